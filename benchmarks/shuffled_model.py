#!/usr/bin/env python3
"""The same model with its channels in another order, so that no group is a block of a 4-bit file.

    python benchmarks/shuffled_model.py models/other/baseline models/other-shuffled/baseline

Models that come from a GGUF file of 4 bits lie on that file's grid: blocks of 32 neighbours share a
scale and, in Q4_1 and Q4_K, a real offset. A grid whose groups are whole blocks, and whose
zero-points are real as those offsets, finds it again, and loses less on such a model than on any
that was never rounded. Channels of the hidden state, of the MLP and of each value head are drawn in
another order here, and groups hold neighbours of many blocks. Weights change places and nothing
else: the function stays and so does every weight, to the last bit.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from made_models import check_new, save_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import cli
from common.model.architecture import family_of
from common.model.source import load_config, resolve_folder
from common.walk.ordering import reorder


@torch.no_grad()
def shuffle(model: nn.Module, seed: int) -> None:
    """Draw another order of a causal LM's channels, in place; the function stays."""
    generator, decoder = torch.Generator().manual_seed(seed), model.model
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    for reader in {decoder.embed_tokens.weight, model.lm_head.weight}:  # one where they are tied
        reader.data = reader.data[:, hidden]
    decoder.norm.weight.data = decoder.norm.weight.data[hidden]
    for layer in decoder.layers:
        family = family_of(layer)
        for name in family.norms:
            norm = layer.get_submodule(name)
            norm.weight.data = norm.weight.data[hidden]
        for name in (name for group in family.reading for name in group.linears):
            linear = layer.get_submodule(name)
            linear.weight.data = linear.weight.data[:, hidden]
        for group in family.writing:
            for parameter in layer.get_submodule(group.linears[0]).parameters():
                parameter.data = parameter.data[hidden]  # weight [out, in], bias [out]
            heads, _, size = group.heads(group.in_features(layer), model.config)
            orders = [torch.randperm(size, generator=generator) for _ in range(heads)]
            reorder(layer, group, torch.stack(orders))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="hub id, folder or demo")
    parser.add_argument("output", type=Path, help="folder of the checkpoint that is written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    check_new(options.output)
    folder = resolve_folder(options.model)
    load_config(folder)  # refuses what is no model of a family, or quantized already
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    shuffle(model, options.seed)
    save_model(model, AutoTokenizer.from_pretrained(folder), options.output)


if __name__ == "__main__":
    cli.run(main)

"""Random prompts, and tiny models on packed weights beside dense ones that compute the same."""

from __future__ import annotations

import copy

import torch
from conftest import build_tiny
from decode_speed import packed

from common.kernels.inference import unpack
from common.model.architecture import family_of
from common.numerics.grid import Grid, round_per_token
from common.running.packed import PackedEmbedding, PackedLinear


def random_prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in lengths]


def tiny_model(architecture: str, tied: bool):
    """Of `build_tiny`, in float32."""
    return build_tiny(architecture, tied).float().eval().requires_grad_(False)


def pack_linears(model, form: str):
    """Pack the linears of a model's layers. Returns a dense model of the same weights."""
    grid = Grid(4, 32) if form == "W4A16" else Grid(8, None, True)
    bits = 8 if form == "W8A8" else None
    dense = copy.deepcopy(model)
    for layer, plain in zip(model.model.layers, dense.model.layers, strict=True):
        for name in family_of(layer).linears:
            linear, other = layer.get_submodule(name), plain.get_submodule(name)
            weight = packed(linear.weight, grid)
            layer.set_submodule(name, PackedLinear(weight, linear.bias, bits))
            other.weight.copy_(unpack(weight, torch.float32))
            if bits:
                other.register_forward_pre_hook(lambda _, inputs: round_per_token(inputs[0], 8))
    return dense


def pack_vocabulary(model) -> PackedLinear:
    """Pack a tied embedding and head with 8 bits. Returns the head."""
    rows = PackedLinear(packed(model.lm_head.weight, Grid(8, None, True)), None)
    model.model.embed_tokens = PackedEmbedding(rows, model.lm_head.weight.dtype)
    model.lm_head = rows
    return rows

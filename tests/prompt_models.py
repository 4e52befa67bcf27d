"""Random prompts, tiny models on packed weights beside dense ones that compute the same, and how
far a decoder that reads prompts as on a GPU is from them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_tiny
from decode_speed import packed
from kernel_checks import relative
from transformers import DynamicCache

from common.kernels.inference import unpack
from common.model.architecture import family_of
from common.numerics.grid import Grid, round_per_token
from common.running.decoding import Decoder
from common.running.packed import PackedEmbedding, PackedLinear
from common.running.prompts import PromptReader

HAS_ROOM = PromptReader._has_room


def random_prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in lengths]


def tiny_model(architecture: str, tied: bool):
    """Of `build_tiny`, in float32."""
    return build_tiny(architecture, tied).float().eval().requires_grad_(False)


# Of several rows the first and the third take inputs of 16 bits as integers in two bytes.
GRIDS = {
    "W4A16": Grid(4, 64),
    "W4A16 g32": Grid(4, 32),
    "W8A16": Grid(8, None, True),
    "W8A8": Grid(8, None, True),
}


def pack_linears(model, form: str):
    """Pack the linears of a model's layers, as one of GRIDS. Returns a dense model of the same
    weights.
    """
    grid, bits = GRIDS[form], 8 if form == "W8A8" else None
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


def note_calls(monkeypatch, module, name: str, calls: list) -> None:
    """Note the calls of a function of a module."""
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(given) or function(*given))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Prompts are read without transformers, though no graph is captured."""
    monkeypatch.setattr(Decoder, "_reads_itself", lambda self: True)
    monkeypatch.setattr(PromptReader, "_has_room", lambda *_: False)
    with torch.inference_mode():
        yield


def errors(
    decoder: Decoder, plain, asked: list[list[int]], prefix: DynamicCache | None = None
) -> list[float]:
    """Of each prompt the largest of logits, keys and values, after reading all, against those of it
    alone. All begin with the tokens in `prefix`, if any, which are not read again.
    """
    before = prefix.get_seq_length() if prefix is not None else 0
    found, largest = decoder.start([prompt[before:] for prompt in asked], prefix), []
    assert decoder.positions[: len(asked)].tolist() == list(map(len, asked))
    for row, prompt in enumerate(asked):
        cache = DynamicCache()
        expected = plain(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits
        pairs = [(found[row], expected[0, -1])]
        for kept, layer in zip(decoder.cache[:, :, row], cache.layers, strict=True):
            pairs.append((kept[0, :, : len(prompt)], layer.keys[0]))
            pairs.append((kept[1, :, : len(prompt)], layer.values[0]))
        largest.append(max(relative(*pair) for pair in pairs))
    return largest


def check(decoder: Decoder, plain, asked, bound: float, prefix=None) -> None:
    largest = errors(decoder, plain, asked, prefix)
    assert max(largest) < bound, largest

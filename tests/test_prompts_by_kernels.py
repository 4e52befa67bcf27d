"""Prompts and steps of tiny models by the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import build_tiny
from kernel_checks import skip_without_the_interpreter
from prompt_models import (
    as_on_a_gpu,  # noqa: F401 (a fixture)
    check,
    note_calls,
    pack_linears,
    random_prompts,
    tiny_model,
)

skip_without_the_interpreter()

from common.kernels import dispatch, inference, inference_triton, products_triton
from common.running.decoding import Decoder


@pytest.mark.parametrize("form", ["dense", "W4A16"])
def test_prompts(monkeypatch, form):
    model = tiny_model("qwen3", False)
    plain = copy.deepcopy(model) if form == "dense" else pack_linears(model, form)
    decoder = Decoder(model, 3, 64)
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    check(decoder, plain, random_prompts(5, 9), 1e-5)


@pytest.mark.parametrize(("form", "whole"), [("W4A16", True), ("W8A16", False)])
def test_on_bytes(monkeypatch, form, whole):
    """Prompts and steps of a model in float16. What the products take as bytes comes as such from
    the norm or gate before, and from the attention of steps where a key's heads have whole blocks.
    """
    model = build_tiny("llama", False, head_dim=32).half().eval()
    plain = pack_linears(model, form).float()
    decoder = Decoder(model, 3, 64)
    for module in (dispatch, inference):
        monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    apart, products = [], []
    note_calls(monkeypatch, inference_triton, "round_rows", apart)
    note_calls(monkeypatch, products_triton, "bytes_matmul", products)
    asked = random_prompts(5, 9)
    check(decoder, plain, asked, 0.01)
    # Attention of prompts is not ours: of each layer it alone is rounded after it.
    layers = len(model.model.layers)
    assert (len(products), len(apart)) == (4 * layers, layers)
    tokens = decoder.tokens[:2].tolist()
    decoder.step(2)
    assert (len(products), len(apart)) == (8 * layers, layers if whole else 2 * layers)
    for row, (prompt, token) in enumerate(zip(asked, tokens, strict=True)):
        likeliest = plain(torch.tensor([[*prompt, token]])).logits[0, -1]
        found = likeliest[decoder.tokens[row]]
        assert likeliest.max() - found < 0.01 * likeliest.abs().max()

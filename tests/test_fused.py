"""Fused layers, with the kernels' twins in the place of the kernels, against transformers' own
layers.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FUSED

from common.model import fused
from common.running.runtime import load_model


@pytest.mark.parametrize(("architecture", "tied"), FUSED)
def test_fused_layers(tiny_models, monkeypatch, architecture, tied):
    monkeypatch.setattr(fused, "_has_kernels", lambda hidden: True)
    plain, _ = load_model(tiny_models[architecture, tied], torch.device("cpu"), torch.float32)
    model = copy.deepcopy(plain)
    fused.fuse_layers(model)
    seen = []
    monkeypatch.setattr(
        fused,
        "rotate_heads",
        lambda *tensors, original=fused.rotate_heads: (seen.append(1), original(*tensors)),
    )
    monkeypatch.setattr(
        fused.gradients,
        "rotated_heads",
        lambda *tensors, original=fused.gradients.rotated_heads: (
            seen.append(1) or original(*tensors)
        ),
    )
    tokens = torch.randint(2, 320, (3, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for cached in (False, True):
            expected = plain(tokens, use_cache=cached).logits
            torch.testing.assert_close(
                model(tokens, use_cache=cached).logits, expected, rtol=1e-4, atol=1e-4
            )
        assert len(seen) == 2 * len(
            model.model.layers
        )  # with a cache attention stays transformers' own
    # Gradients go through the same parts.
    parts = "self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "input_layernorm"
    gradients = []
    for one in (plain, model):
        layers = one.model.layers
        weights = [layer.get_submodule(name).weight for name in parts for layer in layers]
        for weight in weights:
            weight.requires_grad_(True)
        logits = one(tokens, use_cache=False).logits
        gradients.append(torch.autograd.grad(logits.square().mean(), weights))
    for found, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 4 * len(model.model.layers)


def test_sliding_windows_are_left_to_transformers(tiny_models, monkeypatch):
    monkeypatch.setattr(fused, "_has_kernels", lambda hidden: True)
    folder = next(folder for (name, _), folder in tiny_models.items() if name == "mistral")
    plain, _ = load_model(folder, torch.device("cpu"), torch.float32)
    plain.config.sliding_window = 8
    model = copy.deepcopy(plain)
    fused.fuse_layers(model)
    tokens = torch.randint(2, 320, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = plain(tokens, use_cache=False).logits
        torch.testing.assert_close(
            model(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4
        )
        plain.config.sliding_window = None
        assert (plain(tokens, use_cache=False).logits - expected).abs().max() > 1e-3

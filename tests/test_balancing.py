"""Channels balanced by weights alone: the function stays, models with the same function become one
model, and of two forms the one that rounds better is taken.
"""

import pytest
import torch
from conftest import ARCHITECTURES
from test_rotation_and_scaling import all_logits

from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max
from common.walk import balancing
from common.walk.inputs import Needs, new_sums
from common.walk.method import Layer
from common.walk.scaling import fold_scale, shared_by_heads

CPU, GRID = torch.device("cpu"), Grid(4, 32)


@pytest.fixture
def always(monkeypatch):
    """Every group is balanced."""
    monkeypatch.setattr(balancing, "best_scale", lambda layer, group, candidates: candidates[0])


def balanced(index: int, module: torch.nn.Module) -> None:
    balancing.balance(Layer(index, module, GRID, torch.bfloat16))


def rescaled(index: int, module: torch.nn.Module) -> None:
    """Random scales between norms and linears, and between linears; the function stays."""
    layer, generator = Layer(index, module, GRID, torch.float32), torch.Generator().manual_seed(4)
    for group in layer.family.groups:
        scale = torch.exp(torch.randn(group.in_features(module), generator=generator))
        shared = shared_by_heads(layer, group, scale)
        fold_scale(layer, group, shared)


def source_of(tiny_models, architecture: str, tied: bool) -> SourceModel:
    return SourceModel(str(tiny_models[architecture, tied]), CPU, torch.float32)


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_the_function_stays(tiny_models, always, architecture, tied):
    tokens = torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(2))
    logits, weights = [], []
    for change in (None, balanced):
        source = source_of(tiny_models, architecture, tied)
        logits.append(all_logits(source, tokens, change))
        weights.append(source.model.model.layers[0].mlp.down_proj.weight)
        for name, parameter in source.model.model.layers[0].named_parameters():
            if "layernorm" in name:  # nothing is lost when gains are stored
                stored = parameter.bfloat16().float()
                assert torch.allclose(parameter, stored, rtol=1e-6, atol=1e-6)
    assert (logits[1] - logits[0]).abs().max() < 1e-4 * logits[0].abs().max()
    assert not torch.allclose(*weights)


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_models_with_the_same_function_become_one(tiny_models, always, architecture, tied):
    """Relative to a row's length, which no rounding minds, weights are the same."""
    found = []
    for changes in ((balanced,), (rescaled, balanced)):
        source = source_of(tiny_models, architecture, tied)
        module = source.load_layer(0)
        for change in changes:
            change(0, module)
        family = source.family
        found.append([module.get_submodule(name).weight for name in family.linears])
    for one, other in zip(*found, strict=True):
        first, second = (weight / weight.norm(dim=1, keepdim=True) for weight in (one, other))
        # Gains are rounded to bfloat16, each model's to its own.
        assert (first - second).norm() < 0.01 * first.norm()


def with_statistics(module, factors):
    """A layer whose linears' inputs are random, channels of each group times `factors` of it."""
    layer, generator = Layer(0, module, GRID, torch.float32), torch.Generator().manual_seed(6)
    layer.statistics = {}
    for group, sums in new_sums(module, CPU, Needs.GRAM).items():
        inputs = torch.randn(400, sums.in_features, generator=generator)
        sums.add(inputs * factors(group, sums.in_features))
        layer.statistics[group] = sums.finish()
    return layer


def error_of(layer, group) -> float:
    """Relative output error of a group's linears, rounded to nearest, in float64."""
    gram, found, whole = layer.statistics[group].gram.double(), 0.0, 0.0
    for name in group.linears:
        weight = layer.weight(name)
        scale, zero_point = min_max(grouped(weight, GRID), GRID)
        rounded = QuantizedLinear.nearest(weight, scale, zero_point, GRID).dequantize()
        difference, exact = (rounded - weight).double(), weight.double()
        found += (difference @ gram * difference).sum().item()
        whole += (exact @ gram * exact).sum().item()
    return found / whole


def test_uneven_channels_are_balanced(tiny_models):
    """Where weights are large and inputs as small, as a file may have it, rounding does far less
    harm afterwards.
    """
    source = source_of(tiny_models, "llama", True)
    module = source.load_layer(0)
    layer = with_statistics(module, lambda *_: 1.0)
    generator = torch.Generator().manual_seed(4)
    for group in layer.family.groups:
        scale = torch.exp(1.5 * torch.randn(group.in_features(module), generator=generator))
        fold_scale(layer, group, shared_by_heads(layer, group, scale))
    before = {group: error_of(layer, group) for group in layer.family.groups}
    balancing.balance(layer)
    for group, error in before.items():
        assert error_of(layer, group) < 0.5 * error


def test_what_balancing_would_harm_stays(tiny_models):
    """Columns that are long because their inputs are large keep their finer rounding."""
    source = source_of(tiny_models, "llama", True)
    module = source.load_layer(0)
    large = torch.ones(16)
    large[::4] = 12.0

    def factors(group, channels):
        return large.repeat(channels // 16) if group.reads_residual else 1.0

    layer = with_statistics(module, factors)
    for name in (name for group in layer.family.reading for name in group.linears):
        weight = module.get_submodule(name).weight
        weight.data *= large.repeat(weight.shape[1] // 16).sqrt()
    kept = {name: layer.weight(name).clone() for name in layer.family.reading[0].linears}
    before = {group: error_of(layer, group) for group in layer.family.reading}
    balancing.balance(layer)
    for group, error in before.items():
        assert error_of(layer, group) <= error
    assert all(torch.equal(layer.weight(name)[:3], old[:3]) for name, old in kept.items())

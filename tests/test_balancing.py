"""Channels balanced by weights alone: the function stays, and models with the same function become
one model, which rounds as the most even one.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES
from test_rotation_and_scaling import all_logits

import quantize_quarot
from common.model.architecture import family_of
from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max
from common.walk import balancing
from common.walk.balancing import pair_scale
from common.walk.gptq import ranges_of_rotated_weights, searched_ranges
from common.walk.inputs import Needs, new_sums
from common.walk.method import Layer, Method
from common.walk.scaling import fold_into_weights, fold_scale, shared_by_heads

CPU, GRID = torch.device("cpu"), Grid(4, 32)


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
def test_the_function_stays(tiny_models, architecture, tied):
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


def quarot(source: SourceModel, *options: str) -> Method:
    """The method, once it has rewritten what is around the layers."""
    method = quantize_quarot.method(quantize_quarot.argument_parser().parse_args(options))
    method.rewrite_model(source)
    return method


def rotated(index: int, module: torch.nn.Module) -> None:
    """As QuaRot rewrites a layer of a family that its rotation does not fold into."""
    model = SimpleNamespace(model=SimpleNamespace(layers=[module]))
    method = quarot(SimpleNamespace(model=model, family=family_of(module)))
    # One group, so channels keep their places: in the order of lengths almost equal ones may swap.
    method.rewrite_layer(Layer(index, module, Grid(4, None), torch.bfloat16))


@pytest.mark.parametrize(
    ("architecture", "tied", "balanced"),
    [*((*one, balanced) for one in ARCHITECTURES), ("gemma3_text", True, rotated)],
)
def test_models_with_the_same_function_become_one(tiny_models, architecture, tied, balanced):
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


@pytest.mark.parametrize(
    ("architecture", "options", "ranges"),
    [
        ("llama", (), ranges_of_rotated_weights),
        ("gemma3_text", (), searched_ranges),
        ("gemma3_text", ("--kv-bits", "4"), searched_ranges),
        ("gemma3_text", ("--act-bits", "4"), ranges_of_rotated_weights),
    ],
)
def test_weights_that_are_not_rotated_get_searched_ranges(
    tiny_models, monkeypatch, architecture, options, ranges
):
    used = []
    monkeypatch.setattr(quantize_quarot, "gptq_layer", lambda *given: used.append(given[-1]))
    quarot(source_of(tiny_models, architecture, True), *options).quantize_layer(None)
    assert used == [ranges]


def with_statistics(module):
    """A layer whose linears' inputs are random."""
    layer, generator = Layer(0, module, GRID, torch.float32), torch.Generator().manual_seed(6)
    layer.statistics = {}
    for group, sums in new_sums(module, CPU, Needs.GRAM).items():
        sums.add(torch.randn(400, sums.in_features, generator=generator))
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


@pytest.mark.parametrize("spread", [1.5, 2.3, "a few"])
def test_uneven_channels_are_balanced(tiny_models, spread):
    """Where weights are large and inputs as small, as a file may have it, rounding does far less
    harm afterwards.
    """
    source = source_of(tiny_models, "llama", True)
    module = source.load_layer(0)
    layer = with_statistics(module)
    generator = torch.Generator().manual_seed(4)
    for group in layer.family.groups:
        channels = group.in_features(module)
        if spread == "a few":
            scale = torch.ones(channels)
            scale[::20] = 1000.0
        else:
            scale = torch.exp(spread * torch.randn(channels, generator=generator))
        fold_scale(layer, group, shared_by_heads(layer, group, scale))
    before = {group: error_of(layer, group) for group in layer.family.groups}
    balancing.balance(layer)
    for group, error in before.items():
        assert error_of(layer, group) < 0.5 * error


@torch.no_grad()
def test_outliers_alone_are_balanced(tiny_models):
    """What stands out comes near to the rest, which stays bit for bit."""
    source = source_of(tiny_models, "llama", True)
    module = source.load_layer(0)
    for group in source.family.groups:
        scale = torch.ones(group.in_features(module))
        scale[::20] = 100.0
        layer = Layer(0, module, GRID, torch.bfloat16)
        fold_into_weights(module, group, shared_by_heads(layer, group, scale))
    before = {name: module.get_submodule(name).weight.clone() for name in source.family.linears}
    balancing.balance_outliers(Layer(0, module, GRID, torch.bfloat16))
    for group in source.family.groups:
        old, new = (
            torch.cat([weights(name) for name in group.linears]).norm(dim=0)
            for weights in (before.__getitem__, lambda name: module.get_submodule(name).weight)
        )
        assert old.max() > 20 * old.median() and new.max() < 4 * new.median()
    # Of what nothing stands in, columns and rows, everything is as it was.
    columns = torch.arange(module.mlp.gate_proj.in_features) % 20 != 0
    gate = module.mlp.gate_proj.weight
    assert torch.equal(gate[:, columns], before["mlp.gate_proj"][:, columns])
    assert torch.equal(module.mlp.down_proj.weight[:, 1], before["mlp.down_proj"][:, 1])


def test_a_gain_of_zero_frees_its_column(tiny_models):
    """What is read from it may be as small as it is wished to be, and does not widen its group."""
    source = source_of(tiny_models, "llama", True)
    module = source.load_layer(0)
    module.input_layernorm.weight.data[[3, 40]] = 0.0
    for name in ("q_proj", "k_proj", "v_proj"):
        module.get_submodule(f"self_attn.{name}").weight.data[:, [3, 40]] *= 30
    balanced(0, module)
    columns = module.self_attn.q_proj.weight.norm(dim=0)
    assert columns[[3, 40]].max() < 2 * columns.median()
    assert not module.input_layernorm.weight[[3, 40]].any()


def test_where_most_stand_out_all_are_balanced(tiny_models):
    """As the file then says nothing; where they hardly differ none is touched."""
    for spread in (1.0, 0.05):
        weights = []
        for balance in (balancing.balance, balancing.balance_outliers):
            source = source_of(tiny_models, "llama", True)
            module = source.load_layer(0)
            layer = Layer(0, module, GRID, torch.float32)
            balancing.balance(layer)  # equal lengths to begin with
            generator = torch.Generator().manual_seed(4)
            for group in source.family.groups:
                noise = torch.randn(group.in_features(module), generator=generator)
                fold_scale(layer, group, shared_by_heads(layer, group, torch.exp(spread * noise)))
            before = module.mlp.gate_proj.weight.clone()
            balance(layer)
            weights.append(module.mlp.gate_proj.weight)
        if spread == 1.0:
            one, other = (weight / weight.norm() for weight in weights)
            assert (one - other).norm() < 1e-5
        else:
            assert torch.equal(weights[1], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_gains_are_not_rounded_on_the_way(tiny_models, monkeypatch, dtype):
    """Where a gain is stored as gain minus one, 16 bits do not hold the sum; nothing stands out
    here, so all stays.
    """
    source = SourceModel(str(tiny_models["gemma3_text", True]), CPU, dtype)
    module = source.load_layer(0)
    norm = module.input_layernorm
    norm.weight.data = torch.linspace(-0.01, 0.01, len(norm.weight)).to(dtype)
    before = norm.weight.clone()
    monkeypatch.setattr(balancing, "UNEVEN", 1e6)
    balancing.balance_outliers(Layer(0, module, GRID, dtype))
    assert torch.equal(norm.weight, before)
    gain = source.family.gain(norm)
    assert gain.dtype == torch.float32 and torch.equal(gain, before.float() + 1)


@torch.no_grad()
def test_what_reads_a_dead_row_widens_no_group(tiny_models):
    source = source_of(tiny_models, "llama", True)
    module = source.load_layer(0)
    module.mlp.up_proj.weight[7] = 0
    module.mlp.down_proj.weight[:, 7] = 50.0
    balanced(0, module)
    down = module.mlp.down_proj.weight
    assert down[:, 7].norm() < down.norm(dim=0).median()
    assert torch.isfinite(down).all() and not module.mlp.up_proj.weight[7].any()


@torch.no_grad()
def test_a_bias_counts_as_what_its_row_puts_out(tiny_models):
    """A row of v_proj that is all but dead, and its bias, are not blown up."""
    source = source_of(tiny_models, "qwen2", True)
    module = source.load_layer(0)
    values = module.self_attn.v_proj
    values.weight[4] *= 1e-5
    values.bias[4] = 5.0
    fold_into_weights(
        module, source.family.writing[0], pair_scale(module, source.family.writing[0])
    )
    assert values.bias[4] < 5.0 and torch.isfinite(values.weight).all()

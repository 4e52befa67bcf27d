"""Channels in another order: the function stays, and groups hold channels that are alike."""

import pytest
import torch
from conftest import ARCHITECTURES
from test_rotation_and_scaling import all_logits

import quantize_quarot
from common.model.architecture import family_of
from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max
from common.walk import ordering
from common.walk.method import Layer
from common.walk.ordering import order_channels

GRID = Grid(4, 8)


def ordered(index: int, module: torch.nn.Module, grid: Grid = GRID) -> None:
    order_channels(Layer(index, module, grid, torch.bfloat16))


def source_of(folder) -> SourceModel:
    return SourceModel(str(folder), torch.device("cpu"), torch.float32)


def lengths(module: torch.nn.Module, group) -> torch.Tensor:
    """Of the columns that a group's linear reads: [key-value heads, size]."""
    weight = module.get_submodule(group.linears[0]).weight
    heads = group.heads(weight.shape[1], module.self_attn.config)
    return weight.unflatten(1, heads).norm(dim=(0, 2))


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
@torch.no_grad()
def test_ordered_channels_and_the_same_function(tiny_models, architecture, tied):
    tokens = torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(2))
    folder = tiny_models[architecture, tied]
    before = all_logits(source_of(folder), tokens)
    after = all_logits(source_of(folder), tokens, ordered)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    module = source_of(folder).load_layer(0)
    disorder = [lengths(module, group).diff() for group in family_of(module).writing]
    ordered(0, module)
    for group, steps in zip(family_of(module).writing, disorder, strict=True):
        assert steps.min() < 0 <= lengths(module, group).diff().min()


@torch.no_grad()
def test_one_group_has_no_order(tiny):
    """Where all channels of a head, or all of a row, share a step nothing is moved."""
    module = source_of(tiny).load_layer(0)
    size = module.self_attn.head_dim
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    for grid in (Grid(8, None), Grid(4, module.mlp.down_proj.in_features)):
        ordered(0, module, grid)
        assert all(torch.equal(weight, before[name]) for name, weight in module.named_parameters())
    ordered(0, module, Grid(4, size))
    assert torch.equal(module.self_attn.o_proj.weight, before["self_attn.o_proj.weight"])
    assert not torch.equal(module.mlp.down_proj.weight, before["mlp.down_proj.weight"])


@torch.no_grad()
def test_all_processes_take_the_first_ones_order(tiny, monkeypatch):
    """Each rounds rows of its own, which have to fit the others' columns."""
    monkeypatch.setattr(ordering.parallel, "from_first", lambda order: order.flip(-1))
    module = source_of(tiny).load_layer(0)
    ordered(0, module)
    for group in family_of(module).writing:
        assert lengths(module, group).diff().max() <= 0


def rounding_error(module: torch.nn.Module) -> float:
    """Mean squared error of down_proj's columns, rounded to nearest, relative to their lengths: of
    what they add where the inputs are as large as the columns are short.
    """
    weight = module.mlp.down_proj.weight
    rounded = QuantizedLinear.nearest(weight, *min_max(grouped(weight, GRID), GRID), GRID)
    errors = (rounded.dequantize().double() - weight.double()).square().sum(0)
    return (errors / weight.double().square().sum(0)).mean().item()


@pytest.mark.parametrize(("spread", "share"), [(0.2, 0.9), (0.5, 0.5), (1.0, 0.1)])
@torch.no_grad()
def test_short_columns_get_finer_steps(tiny, spread, share):
    """The more the columns differ in length the less is lost, once they are in their order."""
    module = source_of(tiny).load_layer(0)
    weight = module.mlp.down_proj.weight
    generator = torch.Generator().manual_seed(3)
    weight.mul_(torch.exp(spread * torch.randn(weight.shape[1], generator=generator)))
    before = rounding_error(module)
    ordered(0, module)
    assert rounding_error(module) < share * before


@pytest.mark.parametrize(
    ("options", "sorted_"), [((), True), (("--act-bits", "4"), False), (("--kv-bits", "4"), False)]
)
@torch.no_grad()
def test_quarot_orders_what_it_does_not_rotate(tiny, monkeypatch, options, sorted_):
    """What down_proj reads is rotated as it comes, where activations or cache are rounded."""
    for name in ("align", "key_form"):
        monkeypatch.setattr(quantize_quarot, name, lambda layer: None)
    source = source_of(tiny)
    method = quantize_quarot.method(quantize_quarot.argument_parser().parse_args(options))
    method.rewrite_model(source)
    module = source.load_layer(0)
    method.rewrite_layer(Layer(0, module, GRID, torch.bfloat16))
    steps = lengths(module, family_of(module).writing[1]).diff()
    assert (steps.min() >= 0) == sorted_


@pytest.mark.parametrize(
    ("tied", "options", "said"),
    [(True, (), False), (True, ("--head-bits", "8"), True), (False, ("--head-bits", "8"), False)],
)
def test_quarot_says_what_a_head_of_its_own_costs(tiny_models, capsys, tied, options, said):
    """Where its rotation does not fold a tied head stays so, but for --head-bits."""
    source = source_of(tiny_models["llama", tied])
    words = ["--act-bits", "4", *options]
    method = quantize_quarot.method(quantize_quarot.argument_parser().parse_args(words))
    method.rewrite_model(source)
    assert ("gives it one of its own" in capsys.readouterr().out) == said
    assert source.tied == (tied and not said)

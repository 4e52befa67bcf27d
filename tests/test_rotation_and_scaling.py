"""Rewrites that have to keep the model's function, in float32 and float64; Hadamard matrices of the
orders models need.
"""

import pytest
import torch
from conftest import ARCHITECTURES, sampled

from common.base.errors import UserError
from common.model.architecture import FAMILIES
from common.model.source import SourceModel
from common.numerics.grid import Grid
from common.numerics.hadamard import hadamard, rotation
from common.walk.inputs import Needs, new_sums
from common.walk.method import Layer
from common.walk.scaling import fold_scale, shared_by_heads
from quantize_quarot import balance_group, rotate_layer, rotate_vocabulary


@pytest.mark.parametrize(
    "order", [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 76, 128, 140, 148, 576, 896, 1536, 2048]
)
def test_hadamard(order):
    matrix = hadamard(order)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    turned = rotation(order, seed=3)
    assert torch.allclose(turned @ turned.T, torch.eye(order, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("order", [5632, 4864])
def test_larger_orders_by_their_rows(order):
    matrix = hadamard(order)
    rows = matrix[torch.randint(0, order, (40,), generator=torch.Generator().manual_seed(0))]
    products = rows @ matrix.T
    assert (products == order).sum() == 40 and (products[products != order] == 0).all()


@pytest.mark.parametrize("order", [3, 6, 92])
def test_orders_out_of_reach_are_an_error(order):
    with pytest.raises(UserError, match=f"order {order}"):
        hadamard(order)


def all_logits(source: SourceModel, tokens, change=None):
    """Logits of the whole model walked layer by layer, after `change` of each layer."""
    hidden = source.embed(tokens)
    arguments = source.layer_arguments(tokens.shape[1])
    for index in range(source.num_layers):
        module = source.load_layer(index)
        if change:
            change(index, module)
        output = module(hidden, **arguments[index])
        hidden = output[0] if isinstance(output, tuple) else output
    return source.logits(hidden)


@pytest.fixture
def tokens():
    return torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(2))


# A rounding error of float32, and one of float64 through float32 rotary tables.
BOUNDS = [(torch.float32, 1e-3), (torch.float64, 1e-5)]
# Every family in one of them.
IN_BOTH_TYPES = sampled(
    [(*one, *bound) for one in ARCHITECTURES for bound in BOUNDS],
    lambda *case: ARCHITECTURES.index(case[:2]) % 2 == BOUNDS.index(case[2:]),
)


def hidden_rotation(architecture, size=64):
    """R1, or None for a family that it does not fold into."""
    return None if FAMILIES[architecture].normalises_output else rotation(size, seed=0)


@pytest.mark.parametrize("architecture, tied, dtype, bound", IN_BOTH_TYPES)
@torch.no_grad()
def test_rotation_leaves_logits_unchanged(tiny_models, tokens, architecture, tied, dtype, bound):
    folder = str(tiny_models[architecture, tied])
    before = all_logits(SourceModel(folder, torch.device("cpu"), dtype), tokens)
    source = SourceModel(folder, torch.device("cpu"), dtype)
    hidden, value = hidden_rotation(architecture), rotation(16, seed=1)
    if hidden is not None:
        rotate_vocabulary(source, hidden)
        assert not source.tied
        assert source.model.model.norm.weight.eq(1).all()
    after = all_logits(source, tokens, lambda _, module: rotate_layer(module, hidden, value))
    assert (before - after).abs().max() < bound * before.abs().max()


@pytest.mark.parametrize("architecture, tied", ARCHITECTURES)
@torch.no_grad()
def test_rescaled_channels_are_rotated_to_the_same_weights(tiny_models, architecture, tied):
    """Models with the same function and other scales of their channels: nothing that rounding
    depends on is left of those.
    """
    generator = torch.Generator().manual_seed(9)
    hidden, value = hidden_rotation(architecture), rotation(16, seed=1)
    source = SourceModel(str(tiny_models[architecture, tied]), torch.device("cpu"), torch.float64)
    found = []
    for spread in (0.0, 1.0):
        module = source.load_layer(0)
        attention, mlp = module.self_attn, module.mlp

        def factors(count, spread=spread):
            return torch.exp(spread * torch.randn(count, generator=generator, dtype=torch.float64))

        # A rotation of the hidden state takes the norms' gains into the weights, with their scales.
        if hidden is not None:
            for group in FAMILIES[architecture].reading:
                scale = factors(64)
                module.get_submodule(group.fed_by).weight.data /= scale
                for linear in group.linears:
                    module.get_submodule(linear).weight.data *= scale
        scale = factors(128)
        attention_reads, mlp_reads = FAMILIES[architecture].reading
        module.get_submodule(mlp_reads.linears[-1]).weight.data[-128:] /= scale[:, None]
        mlp.down_proj.weight *= scale
        scale = factors(32)
        for parameter in module.get_submodule(attention_reads.linears[-1]).parameters():
            parameter[-32:] /= scale.view(-1, *[1] * (parameter.dim() - 1))
        attention.o_proj.weight *= scale.view(2, 1, 16).expand(2, 2, 16).reshape(-1)
        rotate_layer(module, hidden, value)
        found.append({name: parameter.clone() for name, parameter in module.named_parameters()})
    for name, parameter in found[0].items():
        assert (found[1][name] - parameter).abs().max() < 1e-5 * parameter.abs().max(), name


@torch.no_grad()
def test_channels_that_nothing_feeds_or_reads(tiny):
    """They have no scale of their own to be balanced by."""
    module = SourceModel(str(tiny), torch.device("cpu"), torch.float64).load_layer(0)
    module.mlp.up_proj.weight[3] = 0
    module.mlp.down_proj.weight[:, [5, 7]] = 0
    product = module.mlp.down_proj.weight @ module.mlp.up_proj.weight
    balance_group(module, FAMILIES["llama"].writing[1])
    assert torch.allclose(
        module.mlp.down_proj.weight @ module.mlp.up_proj.weight, product, rtol=1e-10
    )
    rows, columns = module.mlp.up_proj.weight.norm(dim=1), module.mlp.down_proj.weight.norm(dim=0)
    kept = torch.ones(128, dtype=torch.bool)
    kept[[3, 5, 7]] = False
    assert torch.allclose(rows[kept], columns[kept], rtol=1e-5)


@pytest.mark.parametrize("architecture, tied, dtype, bound", IN_BOTH_TYPES)
@torch.no_grad()
def test_scaling_leaves_logits_unchanged_and_statistics_true(
    tiny_models, tokens, architecture, tied, dtype, bound
):
    folder = str(tiny_models[architecture, tied])
    before = all_logits(SourceModel(folder, torch.device("cpu"), dtype), tokens)
    generator = torch.Generator().manual_seed(5)

    def change(index, module):
        layer = Layer(index, module, Grid(4, 32), torch.bfloat16)
        every = new_sums(module, torch.device("cpu"), Needs.GRAM | Needs.MAGNITUDES)
        layer.statistics = {}
        for group, sums in every.items():
            inputs = torch.randn(30, sums.in_features, generator=generator)
            sums.add(inputs)
            layer.statistics[group] = sums.finish()
            scale = torch.exp(0.5 * torch.randn(sums.in_features, generator=generator))
            scale = shared_by_heads(layer, group, scale)
            fold_scale(layer, group, scale)
            statistics = layer.statistics[group]
            scaled = inputs / scale
            assert torch.allclose(statistics.gram, scaled.T @ scaled / 30, rtol=1e-3, atol=1e-4)
            assert torch.allclose(statistics.abs_max, scaled.abs().amax(0))
            assert torch.allclose(statistics.mean_square, scaled.square().mean(0), rtol=1e-3)

    after = all_logits(SourceModel(folder, torch.device("cpu"), dtype), tokens, change)
    assert (before - after).abs().max() < bound * before.abs().max()


@pytest.mark.parametrize("architecture, tied", ARCHITECTURES)
def test_every_group_is_fed_by_what_the_layer_has(tiny_models, architecture, tied):
    source = SourceModel(str(tiny_models[architecture, tied]), torch.device("cpu"), torch.float32)
    layer = source.load_layer(0)
    for group in source.family.groups:
        assert layer.get_submodule(group.fed_by) is not None
    linears = {
        name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert linears == set(source.family.linears)

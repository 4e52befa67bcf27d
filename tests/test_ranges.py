"""Ranges chosen for the error of the outputs, and the gain that clipping costs."""

from types import SimpleNamespace

import pytest
import torch
from layer_problems import correlated_inputs, problem

from common.kernels.rounding import search_range
from common.numerics.grid import Grid, QuantizedLinear, dequantize, grouped, min_max, quantize
from common.solvers.ranges import RANGE_DAMPING, choose_ranges, restore_gain
from common.solvers.rounding import damped, output_error, solve
from common.walk.gptq import gptq_layer


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 64, True), Grid(2, 64)], ids=str)
def test_chosen_ranges_beat_searched_ones(grid, generator):
    """By the damped Gram matrix, which they are chosen with."""
    weight, _, gram, *_ = problem(16, 192, grid, generator)
    regular = damped(gram, RANGE_DAMPING)

    def loss(ranges):
        rounded = dequantize(quantize(weight, *ranges, grid), *ranges, grid)
        return output_error(rounded - weight, regular)

    chosen = loss(choose_ranges(weight, gram, grid, torch.bfloat16))
    searched = loss(search_range(weight, grid, regular.diagonal()))
    assert (chosen <= searched * (1 + 1e-4)).all()
    assert chosen.sum() < 0.999 * searched.sum()


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize(
    "grid", [Grid(4, 32), Grid(4, 64, True), Grid(3, 32), Grid(2, 64)], ids=str
)
def test_ranges_are_not_worse_than_full_ones_on_other_tokens(grid, massive, generator):
    """Fitted on half of the tokens, held to the error on the other half, in float64; with a few
    tokens a hundred times as large in both halves too. Those lie in other directions in each half,
    so that a single draw says little: the mean of eight.
    """
    chosen_by_full, searched_by_full = [], []
    for _ in range(8):
        weight = torch.randn(48, 128, generator=generator) * torch.exp(
            0.5 * torch.randn(48, 128, generator=generator)
        )
        inputs = correlated_inputs(2048, 128, generator)
        if massive:
            inputs[torch.tensor([0, 1, 700, 701])] *= 100
        gram, others = inputs[::2].T @ inputs[::2] / 1024, inputs[1::2].double()

        def error(codes, ranges, weight=weight, others=others):
            found = (dequantize(codes, *ranges, grid) - weight).double()
            return (found @ others.T).square().sum().item()

        full = min_max(grouped(weight, grid), grid)
        chosen = choose_ranges(weight, gram, grid, torch.bfloat16)
        searched = search_range(weight, grid, gram.diagonal())
        by_full = error(quantize(weight, *full, grid), full)
        chosen_by_full.append(error(quantize(weight, *chosen, grid), chosen) / by_full)
        solved = [error(solve(weight, gram, *r, grid)[0], r) for r in (searched, full)]
        searched_by_full.append(solved[0] / solved[1])
    assert sum(chosen_by_full) / 8 < 1.0
    # A diagonal does not see that massive tokens share a direction, which error feedback makes use
    # of.
    assert sum(searched_by_full) / 8 < (1.05 if massive else 1.0)


@pytest.mark.parametrize(
    "grid", [Grid(4, 64), Grid(3, 64), Grid(4, 32, True), Grid(8, None), Grid(4, None)], ids=str
)
def test_the_gain_that_clipping_costs_is_restored(grid, generator):
    """Each row's output, regressed on the original one in float64, has slope one; without, less."""
    weight, inputs, gram, *_ = problem(24, 192, grid, generator)
    scale, zero_point = min_max(grouped(weight, grid), grid, 0.7, torch.float32)
    rounded = QuantizedLinear.nearest(weight, scale, zero_point, grid)
    codes = rounded.codes

    def slopes(scale):
        expected = inputs.double() @ weight.double().T
        found = inputs.double() @ dequantize(codes, scale, zero_point, grid).double().T
        return (found * expected).sum(0) / expected.square().sum(0)

    assert slopes(scale).mean() < 0.995
    alone = restore_gain(weight, rounded, None, torch.float32, 3).dequantize().double()
    whole = weight.double().square().sum(1)
    torch.testing.assert_close((alone * weight).sum(1), whole, rtol=1e-4, atol=0)
    restored = restore_gain(weight, rounded, gram, torch.float32, 3).scale
    torch.testing.assert_close(
        slopes(restored), torch.ones(len(weight), dtype=torch.float64), rtol=0, atol=1e-4
    )
    stored = restore_gain(weight, rounded, gram, torch.bfloat16, 3).scale
    assert torch.equal(stored, stored.bfloat16().float())
    assert (slopes(stored) - 1).abs().max() < 2**-7


@pytest.mark.parametrize("bits, from_bits, kept", [(2, 4, True), (3, 4, True), (3, 3, False)])
def test_few_bits_keep_their_scales(bits, from_bits, kept, generator):
    grid = Grid(bits, 64)
    weight, _, gram, scale, zero_point = problem(24, 192, grid, generator)
    rounded = QuantizedLinear.nearest(weight, scale, zero_point, grid)
    restored = restore_gain(weight, rounded, gram, torch.bfloat16, from_bits).scale
    assert torch.equal(restored, scale) is kept


def test_what_has_no_output_keeps_its_scales(generator):
    grid = Grid(4, 64)
    weight, _, gram, *_ = problem(24, 192, grid, generator)
    weight[2] = 0
    scale, zero_point = min_max(grouped(weight, grid), grid, 0.7, torch.float32)
    rounded = QuantizedLinear.nearest(weight, scale, zero_point, grid)
    restored = restore_gain(weight, rounded, gram, torch.float32).scale
    assert (
        torch.equal(restored[2], scale[2])
        and torch.isfinite(restored).all()
        and not torch.equal(restored, scale)
    )
    without = restore_gain(weight, rounded, torch.zeros_like(gram), torch.float32)
    assert torch.equal(without.scale, scale)


@pytest.mark.parametrize("bits, restored", [(2, False), (3, True), (4, True)])
def test_error_feedback_keeps_its_gain_from_three_bits_on(bits, restored, generator):
    """GPTQ of a group of linears: the output's slope on the original's, by the damped Gram matrix
    that the solve has."""
    weight, _, gram, *_ = problem(24, 192, Grid(bits, 64), generator)
    statistics = SimpleNamespace(gram=gram, mean_square=gram.diagonal())
    layer = SimpleNamespace(
        grid=Grid(bits, 64),
        scale_dtype=torch.float32,
        where=lambda name: name,
        quantize_groups=lambda f: f(SimpleNamespace(linears=["q"]), weight, statistics),
    )
    values = gptq_layer(layer, damping=0.1, sweeps=1).dequantize().double()
    product = weight.double() @ damped(gram, 0.1).double()
    slope = (values * product).sum(1) / (weight * product).sum(1)
    assert bool((slope - 1).abs().max() < 1e-3) is restored

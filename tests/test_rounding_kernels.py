"""Triton kernels that quantization uses, in the interpreter, against their twins in plain torch."""

from __future__ import annotations

import pytest
import torch
from conftest import sampled
from kernel_checks import close, skip_without_the_interpreter

skip_without_the_interpreter()

from common.kernels import (
    half_quadratic_triton,
    ranges_triton,
    rounding,
    rounding_triton,
    sums,
    sums_triton,
)
from common.kernels.rounding import search_range
from common.numerics import grid
from common.numerics.grid import Grid
from common.solvers import adaround, ranges
from quantize_hqq import half_quadratic

GRIDS = [Grid(4, 32), Grid(4, 32, True), Grid(8, None), Grid(3, 48)]


def weights_on_grid(generator, form: Grid, rows: int = 21, channels: int = 96):
    weight = torch.randn(rows, channels, generator=generator)
    scale, zero_point = search_range(weight, form)
    return weight, scale, zero_point


@pytest.mark.parametrize(
    ("form", "channels"),
    sampled(
        [(form, channels) for channels in (128, 40) for form in GRIDS],
        lambda form, channels: (channels == 40) == (GRIDS.index(form) % 2),
    ),
    ids=str,
)
def test_round_block(generator, form, channels):
    rows = 11
    target = torch.randn(channels, rows, generator=generator)
    shifted = target + 0.1 * torch.randn(channels, rows, generator=generator)
    # Above the diagonal the factor holds anything.
    factor = 0.2 * torch.randn(channels, channels, generator=generator)
    scale = (torch.rand(channels, rows, generator=generator) + 0.5) / form.code_max
    zero = torch.randint(-2, 3, (channels, rows), generator=generator).float()
    results = []
    for function in (rounding.round_block, rounding_triton.round_block):
        codes, error = torch.empty(channels, rows, dtype=torch.int8), torch.empty(channels, rows)
        function(target, shifted, factor, scale, zero, form, codes, error)
        results.append((codes, error))
    assert torch.equal(results[0][0], results[1][0])
    close(results[1][1], results[0][1], 1e-5)


# Whether inputs count, the norm, the type of scales, the size of weights.
SEARCHES = [
    (True, 2.0, torch.float32, 1.0),
    (False, 4.0, torch.float32, 1.0),
    (False, 8.0, torch.float32, 1.0),
    (False, 8.0, torch.bfloat16, 1e-6),
    (True, 2.0, torch.float16, 2e-3),
    (True, 2.0, torch.float16, 1e-6),
    (True, 2.0, torch.bfloat16, 1e-6),
]


@pytest.mark.parametrize(
    ("weighted", "norm", "stored", "size", "form"),
    sampled(
        [(*search, form) for search in SEARCHES for form in GRIDS],
        # Every search on one grid; the fewest steps on most of them.
        lambda *case: GRIDS.index(case[4]) == SEARCHES.index(case[:4]) % 4,
    ),
    ids=str,
)
def test_search_range(generator, form, weighted, norm, stored, size):
    weight = torch.randn(21, 96, generator=generator) * size
    weight[3] = 0
    # As it comes: a diagonal, which is not contiguous.
    importance = torch.rand(96, 96, generator=generator).diagonal() if weighted else None
    first, last, steps = rounding.SEARCH.get(form.bits, rounding.SEARCH[4])
    candidates = [1.0, *torch.linspace(first, last, steps).tolist()]
    expected = search_range(weight, form, importance, norm, stored)
    found = ranges_triton.search_range(weight, form, importance, norm, stored, candidates)
    assert ((found[0] == 1) == (grid.grouped(weight, form).abs().amax(-1) == 0)).all()

    def losses(scale, zero_point):
        error = (
            grid.rounding_error(grid.grouped(weight, form), scale, zero_point, form)
            .div(size)
            .abs()
            .pow(norm)
        )
        return (error if importance is None else error * grid.grouped(importance[None], form)).sum(
            -1
        )

    # Two candidates that are equally good may be told apart either way.
    assert (found[0] == expected[0]).float().mean() > 0.95
    torch.testing.assert_close(losses(*found), losses(*expected), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("form", GRIDS, ids=str)
def test_learning_step(generator, form):
    weight, scale, zero_point = weights_on_grid(generator, form)
    inputs = torch.randn(200, 96, generator=generator)
    gram = inputs.T @ inputs / 200
    soft = adaround.SoftRounding.start(weight, scale, zero_point, form)
    twin = adaround.Learning(soft, weight, gram)
    other = adaround.Learning(
        adaround.SoftRounding(soft.low, scale, zero_point, form, soft.v.clone()), weight, gram
    )
    for beta in (None, 20.0, 2.5):
        twin.step(0.7, beta, 0.3)
        rounding_triton.learning_step(
            other.soft.v,
            soft.low,
            scale,
            zero_point,
            weight,
            other.difference @ gram,
            other.unit,
            other.moment,
            other.variance,
            other.difference,
            form,
            0.7,
            beta,
            0.3,
        )
        close(other.soft.v, twin.soft.v, 1e-4)
        close(other.difference, twin.difference, 1e-3)


@pytest.mark.parametrize(
    ("norm", "stored", "size", "form"),
    sampled(
        [
            (*case, form)
            for case in (
                (8.0, torch.bfloat16, 1.0),
                (4.0, torch.float16, 2e-3),
                (2.0, torch.float32, 1.0),
                (0.7, torch.bfloat16, 1e-6),
            )
            for form in GRIDS
        ],
        lambda *case: int(case[0]) % 3 == GRIDS.index(case[3]) % 3,
    ),
    ids=str,
)
def test_half_quadratic(generator, form, norm, stored, size):
    weight = torch.randn(21, 96, generator=generator).pow(3)
    weight[3] = 0
    weight[4] = torch.arange(96) % 4 - 1.0  # exact on a grid
    weight[5] += 40  # far from zero: a zero-point at the end of the grid
    weight[6, ::8] = 1e-28  # next to nothing
    weight *= size
    # In any layout.
    groups = grid.grouped(weight, form).transpose(0, 1).contiguous().transpose(0, 1)
    start = search_range(weight, form, norm=norm, scale_dtype=stored)
    turned = [tensor.t().contiguous().t() for tensor in start]

    def losses(scale, zero_point):
        error = grid.rounding_error(groups, scale, zero_point, form).double() / size
        return error.abs().pow(norm).sum(-1)

    before, moved = losses(*start), []
    for steps in (1, 4):
        rest = form, norm, steps, stored
        expected = half_quadratic(groups, *start, *rest)
        found = half_quadratic_triton.half_quadratic(groups, *turned, *rest)
        assert torch.equal(found[0], grid.round_scale(found[0], stored))
        assert torch.equal(found[1], found[1].round().clamp(form.code_min, form.code_max))
        assert (losses(*found) <= before * (1 + 1e-5)).all()
        # Where two codes are equally near, the two go ways of their own from there on.
        assert torch.isclose(found[0], expected[0], rtol=1e-5, atol=0).float().mean() > 0.9
        close(losses(*found).sum(), losses(*expected).sum(), 0.01)
        # No step is left out: what the twin's steps gain is gained.
        gain = (before - losses(*expected)).sum()
        assert (before - losses(*found)).sum() >= 0.8 * gain
        moved.append(gain)
    assert 0 <= moved[0] <= moved[1] and (form.bits == 8 or moved[0] > 0)


@pytest.mark.parametrize(
    ("form", "stored"),
    [
        (Grid(4, 32), torch.bfloat16),
        (Grid(3, 64, True), torch.float16),
        (Grid(4, 16), torch.float32),
    ],
    ids=str,
)
def test_take_best_range(generator, form, stored):
    size, group = form.group_size, 1
    weight, inputs = (torch.randn(count, 4 * size, generator=generator) for count in (21, 300))
    gram = inputs.T @ (inputs * torch.rand(4 * size, generator=generator)) / 300
    gram = gram + gram.T
    weight[3] = 0
    start = search_range(weight, form, scale_dtype=stored)
    candidates, span = torch.tensor([1.04, 0.9, 0.75, 0.6]), slice(group * size, (group + 1) * size)
    before = grid.QuantizedLinear.nearest(weight, *start, form).dequantize() - weight
    before[:7, span] *= 0.01  # better than any nearest rounding: it stays

    def take(function, weight, error, pull, scale, zero_point):
        ranges_of_group = scale[:, group], zero_point[:, group]
        rest = gram[span, span], form, stored, candidates
        function(weight[:, span], error[:, span], pull, *ranges_of_group, *rest)
        return error, scale, zero_point

    results = []
    for function in (ranges.take_best_range, ranges_triton.take_best_range):
        error, scale, zero_point = before.clone(), *(tensor.clone() for tensor in start)
        pull = (error @ gram[:, span]).t().contiguous().t()
        results.append(take(function, weight, error, pull, scale, zero_point))
    for error, scale, zero_point in results:
        left = torch.ones(4 * size, dtype=torch.bool)
        left[span] = False
        assert torch.equal(error[:, left], before[:, left])
        assert torch.equal(error[:7], before[:7])
        found = grid.QuantizedLinear.nearest(weight[7:], scale[7:], zero_point[7:], form)
        torch.testing.assert_close(found.dequantize() - weight[7:], error[7:], atol=1e-6, rtol=0)
        losses = ((error @ gram) * error).sum(1)
        assert (losses <= ((before @ gram) * before).sum(1) * (1 + 1e-5)).all()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(results[0][1], start[0])
    # Where no loss is finite all stays.
    large, scale, zero_point = weight * 1e25, start[0] * 1e25, start[1].clone()
    given = large, before * 1e25, large[:, span] * 1e10, scale, zero_point
    take(ranges_triton.take_best_range, *given)
    assert (zero_point == zero_point.clamp(form.code_min, form.code_max)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "channels", "weighted"), [(300, 130, True), (5, 64, False)])
def test_channel_sums(generator, dtype, tokens, channels, weighted):
    rows = torch.randn(tokens, channels, generator=generator).to(dtype)
    weights = torch.rand(tokens, generator=generator) + 0.1 if weighted else None
    exact = rows.double()
    counts = torch.ones(tokens) if weights is None else weights
    expected = counts.double() @ exact.square(), exact.abs().amax(0), exact.abs().sum(0)
    for function in (sums.channel_sums, sums_triton.channel_sums):
        turned = rows.t().contiguous().t()
        for found, wanted in zip(function(turned, weights, True), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        assert function(rows, weights, False)[0] is None
    rows[2, 3], rows[3, 1] = torch.inf, torch.nan
    for function in (sums.channel_sums, sums_triton.channel_sums):
        for found in function(rows, weights, True):
            assert found[1].isnan() and found[3].isinf() and torch.isfinite(found[[0, 2]]).all()

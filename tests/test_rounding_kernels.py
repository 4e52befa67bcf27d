"""Triton kernels that round weights, in the interpreter, against their twins in plain torch."""

from __future__ import annotations

import pytest
import torch
from conftest import sampled
from kernel_checks import close, skip_without_the_interpreter

skip_without_the_interpreter()

from common.kernels import rounding, rounding_triton
from common.kernels.rounding import search_range
from common.numerics import grid
from common.numerics.grid import Grid
from common.solvers import adaround

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
    found = rounding_triton.search_range(weight, form, importance, norm, stored, candidates)
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

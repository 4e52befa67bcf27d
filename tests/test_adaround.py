"""Learned rounding: its gradient against autograd, its result against nearest rounding."""

import pytest
import torch
from layer_problems import problem

from common.kernels.learning import MOMENT_DECAY, VARIANCE_DECAY
from common.numerics.grid import Grid, dequantize, quantize
from common.solvers import adaround
from common.solvers.adaround import (
    BETA_END,
    BETA_START,
    Learning,
    SoftRounding,
    beta_at,
    learn_rounding,
    regulariser_gradient,
)
from common.solvers.rounding import output_error

GRIDS = [Grid(4, 32), Grid(2, 64), Grid(8, None), Grid(3, 32, True)]


def widened(scale, columns):
    return scale.repeat_interleave(columns // scale.shape[1], 1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_starts_at_the_true_weights(grid, generator):
    weight, _, _, scale, zero_point = problem(8, 64, grid, generator)
    soft = SoftRounding.start(weight, scale, zero_point, grid)
    position = weight / widened(scale, 64) + widened(zero_point, 64)
    inside = (position > grid.code_min) & (position < grid.code_max)
    assert inside.float().mean() > 0.5
    assert torch.allclose(soft.weight(soft.h())[inside], weight[inside], atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("beta", [None, 20.0, 3.0])
def test_gradient_against_autograd(grid, beta, generator):
    """The exact gradient of the written-out loss, in float64, at a random point of the learning."""
    weight, _, gram, scale, zero_point = problem(6, 64, grid, generator)
    weight, gram, scale, zero_point = (t.double() for t in (weight, gram, scale, zero_point))
    soft = SoftRounding.start(weight, scale, zero_point, grid)
    soft.v += torch.randn(weight.shape, generator=generator)
    strength = 0.7
    v = soft.v.clone().requires_grad_(True)
    h = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
    steps, zero = widened(scale, 64), widened(zero_point, 64)
    rounded = (
        (torch.floor(weight / steps) + h + zero).clamp(grid.code_min, grid.code_max) - zero
    ) * steps
    difference = rounded - weight
    loss = (difference @ gram @ difference.T).trace() / (steps.square() * gram.diagonal()).mean()
    if beta is not None:
        loss = loss + strength * (1 - (2 * h - 1).abs().pow(beta)).sum()
    loss.backward()
    found = Learning(soft, weight, gram).gradient(strength, beta)
    # On the edge of the grid, where a code is just clipped, the derivative is one-sided.
    codes = torch.floor(weight / steps) + zero
    inner = (codes >= grid.code_min) & (codes < grid.code_max)
    assert torch.allclose(found[inner], v.grad[inner], rtol=1e-6, atol=1e-9)
    if beta is None:
        assert found[~inner].abs().max() == 0 if (~inner).any() else True


def test_regulariser_gradient_against_autograd(generator):
    h = torch.rand(1000, generator=generator, dtype=torch.float64).requires_grad_(True)
    for beta in (20.0, 7.5, 2.0):
        h.grad = None
        (1 - (2 * h - 1).abs().pow(beta)).sum().backward()
        assert torch.allclose(regulariser_gradient(h.detach(), beta), h.grad, rtol=1e-9)


def test_schedule():
    assert beta_at(0, 100) is None and beta_at(19, 100) is None
    values = [beta_at(step, 100) for step in range(20, 100)]
    assert values[0] == BETA_START and values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(BETA_END, abs=0.1)


def test_tiles_learn_as_the_whole(generator, monkeypatch):
    """Against Adam on the written-out loss, too: v after a few steps."""
    grid = Grid(4, 64)
    weight, _, gram, scale, zero_point = problem(24, 128, grid, generator)
    weight, gram, scale, zero_point = (t.double() for t in (weight, gram, scale, zero_point))
    given = weight, gram, scale, zero_point, grid, 12, 0.7, 0.5
    whole = learn_rounding(*given).v
    monkeypatch.setattr(adaround, "TILE_ELEMENTS", 5 * 128)
    torch.testing.assert_close(learn_rounding(*given).v, whole)

    soft = SoftRounding.start(weight, scale, zero_point, grid)
    v = soft.v.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([v], lr=0.5, betas=(MOMENT_DECAY, VARIANCE_DECAY), eps=1e-8)
    steps = widened(scale, 128)
    for step in range(12):
        h = (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)
        difference = SoftRounding(soft.low, scale, zero_point, grid, v).weight(h) - weight
        loss = ((difference @ gram) * difference).sum() / (steps.square() * gram.diagonal()).mean()
        beta = beta_at(step, 12)
        if beta is not None:
            loss = loss + 0.7 * (1 - (2 * h - 1).abs().pow(beta)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Ours weighs Adam's epsilon otherwise, which moves v where a derivative is next to nothing.
    assert ((v - whole).abs() < 0.02).float().mean() > 0.95


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(2, 64), Grid(3, 64, True)], ids=str)
def test_better_than_nearest_and_settled(grid, generator):
    weight, _, gram, scale, zero_point = problem(24, 128, grid, generator)
    soft = learn_rounding(weight, gram, scale, zero_point, grid, 400, 1.0, 20 / 400)
    nearest = quantize(weight, scale, zero_point, grid)
    losses = [
        output_error(dequantize(codes, scale, zero_point, grid) - weight, gram).sum().item()
        for codes in (soft.codes(), nearest)
    ]
    assert losses[0] < 0.9 * losses[1]
    assert soft.settled() > 0.95
    assert (soft.codes().float() - nearest.float()).abs().max() <= 1  # only up or down

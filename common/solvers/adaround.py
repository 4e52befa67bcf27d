"""Learned rounding (AdaRound): up or down for each weight, by gradient descent on the output error.

A weight is represented as scale · (clip(⌊w / scale⌋ + h + zero_point) - zero_point) with h between
0 (down) and 1 (up), h = clip(1.2 sigmoid(v) - 0.1, 0, 1) (Nagel et al. 2020, arXiv 2004.10568,
equation 23). A regulariser that grows sharper as β falls drives every h to 0 or 1 (equation 24).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.base import parallel
from common.base.gpu import BFLOAT16, supports
from common.kernels.dispatch import triton_kernels, use_triton
from common.kernels.learning import EPSILON, MOMENT_DECAY, OFFSET, STRETCH, VARIANCE_DECAY
from common.numerics.grid import Grid, QuantizedLinear, grouped

BETA_START, BETA_END = 20.0, 2.0
# Share of the iterations before the regulariser sets in.
WARM_UP = 0.2
# Elements that a CPU updates at once: a dozen tensors of them stay in its cache.
TILE_ELEMENTS = 1 << 18


@dataclass
class SoftRounding:
    """The rounding of one linear as it is learned. v, low and the codes are [out, in]; scale and
    zero_point [out, groups].
    """

    low: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid
    v: Tensor

    @classmethod
    def start(cls, weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> SoftRounding:
        """h starts as the fraction w / scale - ⌊w / scale⌋, so that the soft weights are the true
        ones.
        """
        position = (grouped(weight, grid) / scale.unsqueeze(-1)).flatten(1)
        low = position.floor()
        share = ((position - low) - OFFSET) / STRETCH
        return cls(low, scale, zero_point, grid, torch.logit(share))

    def h(self) -> Tensor:
        return stretched(torch.sigmoid(self.v))

    def weight(self, h: Tensor) -> Tensor:
        """The weights [out, in] for some h."""
        codes = grouped(self.low + h, self.grid) + self.zero_point.unsqueeze(-1)
        return represented_(codes, self.scale, self.zero_point, self.grid)

    def codes(self) -> Tensor:
        """The hard codes [out, in] int8: up where v >= 0."""
        up = (self.v >= 0).to(self.low.dtype)
        codes = grouped(self.low + up, self.grid) + self.zero_point.unsqueeze(-1)
        return codes.clamp(self.grid.code_min, self.grid.code_max).to(torch.int8).flatten(1)

    def rounded(self) -> QuantizedLinear:
        """The hard codes with their scales."""
        return QuantizedLinear(self.codes(), self.scale, self.zero_point, self.grid)

    def settled(self) -> float:
        """Share of h within 0.01 of 0 or 1."""
        h = self.h()
        return ((h < 0.01) | (h > 0.99)).float().mean().item()


def stretched(sigmoid: Tensor) -> Tensor:
    """h, of the sigmoid of v."""
    return (sigmoid * STRETCH).add_(OFFSET).clamp_(0.0, 1.0)


def represented_(codes: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The weights [out, in] that codes [out, groups, group], clipped, stand for, in their place."""
    codes.clamp_(grid.code_min, grid.code_max).sub_(zero_point.unsqueeze(-1))
    return codes.mul_(scale.unsqueeze(-1)).flatten(1)


def beta_at(step: int, iterations: int) -> float | None:
    """The regulariser's exponent at a step, falling along a cosine; None during the warm-up."""
    start = WARM_UP * iterations
    if step < start:
        return None
    progress = (step - start) / max(iterations - start, 1)
    return BETA_END + 0.5 * (BETA_START - BETA_END) * (1 + math.cos(progress * math.pi))


def regulariser_gradient(h: Tensor, beta: float) -> Tensor:
    """Derivative by h of sum(1 - |2h - 1|^beta), for beta above 1."""
    centred = 2 * h - 1
    # A fifth of the time of the general power.
    power = centred.abs().log_().mul_(beta - 1).exp_()
    return power.copysign_(centred).mul_(-2 * beta)


class Learning:
    """Adam on v for the loss tr(D G Dᵀ) / u + strength · Σ (1 - |2h - 1|^β), with D [out, in] the
    error of the soft weights.

    u, the mean s² G of a weight, lets `strength` weigh the regulariser alike in every layer.
    """

    def __init__(self, soft: SoftRounding, weight: Tensor, gram: Tensor):
        self.soft, self.target, self.gram = soft, weight.contiguous(), gram
        steps = (
            soft.scale.unsqueeze(-1)
            .expand(-1, -1, weight.shape[1] // soft.scale.shape[1])
            .flatten(1)
        )
        self.unit = parallel.mean(steps.square() * gram.diagonal())
        # Before Adam's state, as it takes intermediate tensors of its own.
        self.difference = soft.weight(soft.h()) - self.target
        if use_triton(soft.v) and supports(BFLOAT16):
            # Several times as fast. Of 20 linears of two models 0.1 to 0.5% of the codes are not
            # float32's, and the loss is within 0.2%, higher or lower (docs/performance.md).
            self.gram, self.difference = gram.bfloat16(), self.difference.bfloat16()
        self.moment, self.variance = torch.zeros_like(soft.v), torch.zeros_like(soft.v)
        if not use_triton(soft.v):
            self._low = grouped(soft.low, soft.grid) + soft.zero_point.unsqueeze(-1)
            # Where both neighbours are clipped to the same code, h has no effect.
            inside = (self._low >= soft.grid.code_min) & (self._low < soft.grid.code_max)
            self._factor = 2 * steps / self.unit * inside.flatten(1)
            self._sigmoid = torch.sigmoid(soft.v)
            on_cpu = soft.v.device.type == "cpu"
            self._tile = max(1, TILE_ELEMENTS // soft.v.shape[1]) if on_cpu else len(soft.v)

    def gradient(self, strength: float, beta: float | None) -> Tensor:
        """The loss's derivative by v [out, in]; beta None leaves the regulariser out. Where a
        kernel does the steps it is not to be had.
        """
        return self._by_v(self._product(), slice(None), strength, beta)

    def _product(self) -> Tensor:
        """D G [out, in] float32."""
        if self.difference.dtype == torch.bfloat16:
            return torch.mm(self.difference, self.gram, out_dtype=torch.float32)
        return self.difference @ self.gram

    def _by_v(self, product: Tensor, rows: slice, strength: float, beta: float | None) -> Tensor:
        """The loss's derivative by v for some rows [rows, in], from their D G, which makes way."""
        sigmoid = self._sigmoid[rows]
        h = stretched(sigmoid)
        gradient = product.mul_(self._factor[rows])
        if beta is not None:
            gradient.add_(regulariser_gradient(h, beta), alpha=strength)
        # h(1 - h) is zero where h is clipped; masks take several times as long.
        unclipped = torch.addcmul(h, h, h, value=-1).sign_()
        slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1)
        return gradient.mul_(slope.mul_(unclipped).mul_(STRETCH))

    def step(self, strength: float, beta: float | None, rate: float) -> None:
        """One step; `rate` holds the learning rate and Adam's corrections for its start from
        zero."""
        soft, product = self.soft, self._product()
        if kernels := triton_kernels(soft.v):
            kernels.rounding.learning_step(
                soft.v,
                soft.low,
                soft.scale,
                soft.zero_point,
                self.target,
                product,
                self.unit,
                self.moment,
                self.variance,
                self.difference,
                soft.grid,
                strength,
                beta,
                rate,
            )
            return
        for start in range(0, len(product), self._tile):
            rows = slice(start, start + self._tile)
            self._update(rows, self._by_v(product[rows], rows, strength, beta), rate)

    def _update(self, rows: slice, gradient: Tensor, rate: float) -> None:
        """Adam's step of some rows, and what their weights are off by after it."""
        soft, v, sigmoid = self.soft, self.soft.v[rows], self._sigmoid[rows]
        moment, variance = self.moment[rows], self.variance[rows]
        moment.lerp_(gradient, 1 - MOMENT_DECAY)
        variance.lerp_(gradient.square_(), 1 - VARIANCE_DECAY)
        v.addcdiv_(moment, variance.sqrt().add_(EPSILON), value=-rate)
        # Until the next step it is that of the same v.
        torch.sigmoid(v, out=sigmoid)
        codes = grouped(stretched(sigmoid), soft.grid).add_(self._low[rows])
        weight = represented_(codes, soft.scale[rows], soft.zero_point[rows], soft.grid)
        torch.sub(weight, self.target[rows], out=self.difference[rows])


def learn_rounding(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    iterations: int,
    strength: float,
    learning_rate: float,
) -> SoftRounding:
    """Learn the rounding of one or more stacked linears through the Gram matrix of their input.

    The loss is tr(D G Dᵀ), exact over all calibration tokens; its gradient by the weights is 2 D G.
    Adam, as in the paper.

    Args:
        weight: [out, in] float32; gram: [in, in]; scale, zero_point: [out, groups].
    """
    soft = SoftRounding.start(weight, scale, zero_point, grid)
    learning = Learning(soft, weight, gram)
    for step in range(iterations):
        rate = learning_rate * math.sqrt(1 - VARIANCE_DECAY ** (step + 1))
        rate /= 1 - MOMENT_DECAY ** (step + 1)
        learning.step(strength, beta_at(step, iterations), rate)
    return soft

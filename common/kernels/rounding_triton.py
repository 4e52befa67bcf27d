"""The Triton kernels behind `rounding.round_block` and the steps of `adaround.learn_rounding`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common.kernels import learning
from common.kernels.launch_triton import nearest
from common.numerics.grid import Grid


def round_block(
    target: Tensor,
    shifted: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    codes: Tensor,
    error: Tensor,
) -> None:
    """`rounding.round_block`; a program keeps the errors of some rows in registers and goes through
    the channels.
    """
    channels, rows = target.shape
    block_rows = 8
    # One warp: what is summed over channels then never leaves it.
    _round_block[(triton.cdiv(rows, block_rows),)](
        target,
        shifted,
        factor,
        scale,
        zero_point,
        codes,
        error,
        rows,
        channels,
        factor.stride(0),
        CODE_MIN=grid.code_min,
        CODE_MAX=grid.code_max,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=triton.next_power_of_2(channels),
        num_warps=1,
    )


@triton.jit
def _round_block(
    target,
    shifted,
    factor,
    scale,
    zero_point,
    codes,
    error,
    rows,
    channels,
    stride,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mine = row < rows
    channel = tl.arange(0, BLOCK_CHANNELS)
    in_block = channel < channels
    errors = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    # What a channel needs is read while the one before it is rounded.
    pull = tl.load(factor + channel, mask=in_block, other=0.0)
    step = tl.load(scale + row, mask=mine, other=1.0)
    zero = tl.load(zero_point + row, mask=mine, other=0.0)
    start = tl.load(shifted + row, mask=mine, other=0.0)
    goal = tl.load(target + row, mask=mine, other=0.0)
    for j in range(0, channels):
        place = j * rows + row
        later = tl.minimum(j + 1, channels - 1)
        next_place = later * rows + row
        next_pull = tl.load(factor + later * stride + channel, mask=in_block, other=0.0)
        next_step = tl.load(scale + next_place, mask=mine, other=1.0)
        next_zero = tl.load(zero_point + next_place, mask=mine, other=0.0)
        next_start = tl.load(shifted + next_place, mask=mine, other=0.0)
        next_goal = tl.load(target + next_place, mask=mine, other=0.0)
        # Errors of channels to come are still zero, so what the factor holds above its diagonal
        # does not matter.
        value = start + tl.sum(errors * pull[None, :], 1)
        code = nearest(value * (1.0 / step)) + zero
        code = tl.minimum(tl.maximum(code, CODE_MIN), CODE_MAX)
        left = goal - (code - zero) * step
        errors = tl.where((channel == j)[None, :], left[:, None], errors)
        tl.store(codes + place, code.to(tl.int8), mask=mine)
        tl.store(error + place, left, mask=mine)
        pull, step, zero, start, goal = next_pull, next_step, next_zero, next_start, next_goal


def learning_step(
    v: Tensor,
    low: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    target: Tensor,
    product: Tensor,
    unit: Tensor,
    moment: Tensor,
    variance: Tensor,
    difference: Tensor,
    grid: Grid,
    strength: float,
    beta: float | None,
    rate: float,
) -> None:
    """One step of Adam on v, and what the weights are off by after it; see `adaround.Learning`. All
    [out, in] but unit [].
    """
    count, block = v.numel(), 1024
    _learning_step[(triton.cdiv(count, block),)](
        v,
        low,
        scale,
        zero_point,
        target,
        product,
        unit,
        moment,
        variance,
        difference,
        count,
        v.shape[1] // scale.shape[1],
        strength,
        beta or 0.0,
        rate,
        MOMENT_DECAY=learning.MOMENT_DECAY,
        VARIANCE_DECAY=learning.VARIANCE_DECAY,
        EPSILON=learning.EPSILON,
        STRETCH=learning.STRETCH,
        OFFSET=learning.OFFSET,
        HAS_BETA=beta is not None,
        CODE_MIN=grid.code_min,
        CODE_MAX=grid.code_max,
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _soft(v, STRETCH: tl.constexpr, OFFSET: tl.constexpr):
    sigmoid = tl.sigmoid(v)
    return sigmoid, tl.minimum(tl.maximum(STRETCH * sigmoid + OFFSET, 0.0), 1.0)


@triton.jit
def _learning_step(
    v,
    low,
    scale,
    zero_point,
    target,
    product,
    unit,
    moment,
    variance,
    difference,
    count,
    size,
    strength,
    beta,
    rate,
    MOMENT_DECAY: tl.constexpr,
    VARIANCE_DECAY: tl.constexpr,
    EPSILON: tl.constexpr,
    STRETCH: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_BETA: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    value = tl.load(v + place, mask=mask, other=0.0)
    step = tl.load(scale + place // size, mask=mask, other=1.0)
    zero = tl.load(zero_point + place // size, mask=mask, other=0.0)
    base = tl.load(low + place, mask=mask, other=0.0) + zero
    sigmoid, h = _soft(value, STRETCH, OFFSET)
    gradient = tl.load(product + place, mask=mask, other=0.0) * (2.0 * step / tl.load(unit))
    gradient = tl.where((base >= CODE_MIN) & (base < CODE_MAX), gradient, 0.0)
    if HAS_BETA:
        centred = 2.0 * h - 1.0
        size_of = tl.abs(centred)
        power = tl.where(
            size_of > 0, tl.exp2((beta - 1.0) * tl.log2(tl.maximum(size_of, 1e-30))), 0.0
        )
        gradient -= strength * 2.0 * beta * power * tl.where(centred > 0, 1.0, -1.0)
    gradient = tl.where((h > 0.0) & (h < 1.0), gradient * STRETCH * sigmoid * (1.0 - sigmoid), 0.0)
    first = tl.load(moment + place, mask=mask, other=0.0)
    second = tl.load(variance + place, mask=mask, other=0.0)
    first += (1.0 - MOMENT_DECAY) * (gradient - first)
    second += (1.0 - VARIANCE_DECAY) * (gradient * gradient - second)
    value -= rate * first / (tl.sqrt(second) + EPSILON)
    tl.store(v + place, value, mask=mask)
    tl.store(moment + place, first, mask=mask)
    tl.store(variance + place, second, mask=mask)
    _, h = _soft(value, STRETCH, OFFSET)
    code = tl.minimum(tl.maximum(base + h, CODE_MIN), CODE_MAX)
    tl.store(
        difference + place,
        (code - zero) * step - tl.load(target + place, mask=mask, other=0.0),
        mask=mask,
    )

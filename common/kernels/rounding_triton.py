"""The Triton kernels behind `rounding.search_range`, `rounding.round_block` and the steps of
`adaround.learn_rounding`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels import learning
from common.kernels.launch_triton import nearest
from common.numerics.grid import Grid, smallest_scale

_STORED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


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


def search_range(
    weight: Tensor,
    grid: Grid,
    importance: Tensor | None,
    norm: float,
    scale_dtype: torch.dtype,
    candidates: list[float],
) -> tuple[Tensor, Tensor]:
    """`rounding.search_range` for the norms 2, 4 and 8; a program keeps some groups in registers
    and tries all candidates.
    """
    rows, channels = weight.shape
    # Kernels read memory as it lies, and the importance is often a diagonal.
    weight, importance = (
        weight.contiguous(),
        None if importance is None else importance.contiguous(),
    )
    groups = grid.groups(channels)
    size = channels // groups
    scale = torch.empty(rows, groups, device=weight.device)
    zero_point = torch.empty_like(scale)
    block_size = triton.next_power_of_2(size)
    block_groups = max(1, 2048 // block_size)
    _search_range[(triton.cdiv(rows * groups, block_groups),)](
        weight,
        importance,
        torch.tensor(candidates, device=weight.device),
        scale,
        zero_point,
        rows * groups,
        groups,
        size,
        len(candidates),
        smallest_scale(scale_dtype),
        STORED=_STORED[scale_dtype],
        HAS_IMPORTANCE=importance is not None,
        NORM=int(norm),
        SYMMETRIC=grid.symmetric,
        BITS=grid.bits,
        BLOCK_GROUPS=block_groups,
        BLOCK_SIZE=block_size,
        num_warps=4,
    )
    return scale, zero_point


@triton.jit
def _search_range(
    weight,
    importance,
    candidates,
    scale,
    zero_point,
    total,
    groups,
    size,
    count,
    smallest,
    STORED: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    NORM: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    LEVELS: tl.constexpr = (1 << BITS) - 1
    CODE_MIN: tl.constexpr = -(1 << (BITS - 1))
    CODE_MAX: tl.constexpr = (1 << (BITS - 1)) - 1
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, BLOCK_SIZE)
    mask = (group < total)[:, None] & (member < size)[None, :]
    values = tl.load(weight + group[:, None] * size + member[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    if HAS_IMPORTANCE:
        factor = tl.load(
            importance + (group % groups)[:, None] * size + member[None, :], mask=mask, other=0.0
        )
    lowest = tl.minimum(tl.min(values, 1), 0.0)
    highest = tl.maximum(tl.max(values, 1), 0.0)
    largest = tl.max(tl.abs(values), 1)
    # High powers of small weights would be nothing in float32.
    unit = 1.0 / tl.where(largest > 0, largest, 1.0)
    best_error = tl.full((BLOCK_GROUPS,), float("inf"), tl.float32)
    best_scale = tl.full((BLOCK_GROUPS,), 1.0, tl.float32)
    best_zero = tl.zeros((BLOCK_GROUPS,), tl.float32)
    for index in range(0, count):
        shrink = tl.load(candidates + index)
        if SYMMETRIC:
            step = tl.div_rn(largest * shrink * 2.0, LEVELS + 0.0 * largest)
        else:
            low, high = lowest * shrink, highest * shrink
            step = tl.div_rn(high - low, LEVELS + 0.0 * largest)
        rounded = step
        if STORED != tl.float32:
            # To bfloat16, which float16's scales fit in too; by hand, as not every GPU and
            # interpreter rounds to it.
            word = step.to(tl.int32, bitcast=True)
            rounded = ((word + 0x7FFF + (word >> 16 & 1)) & -0x10000).to(tl.float32, bitcast=True)
        rounded = tl.maximum(rounded.to(STORED).to(tl.float32), smallest)
        step = tl.where(step > 0, rounded, 1.0)
        if SYMMETRIC:
            zero = tl.zeros((BLOCK_GROUPS,), tl.float32)
        else:
            zero = nearest(CODE_MIN - tl.div_rn(low, step))
            zero = tl.minimum(tl.maximum(zero, CODE_MIN), CODE_MAX)
        code = nearest(values * (1.0 / step)[:, None]) + zero[:, None]
        code = tl.minimum(tl.maximum(code, CODE_MIN), CODE_MAX)
        error = (code - zero[:, None]) * step[:, None] - values
        if NORM > 2:
            error *= unit[:, None]
        error *= error
        if NORM >= 4:
            error *= error
        if NORM == 8:
            error *= error
        if HAS_IMPORTANCE:
            error *= factor
        loss = tl.sum(error, 1)
        better = loss < best_error
        best_error = tl.where(better, loss, best_error)
        best_scale = tl.where(better, step, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scale + group, best_scale, mask=group < total)
    tl.store(zero_point + group, best_zero, mask=group < total)


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

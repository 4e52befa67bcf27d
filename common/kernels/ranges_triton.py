"""The Triton kernels that choose the range of each group of weights: `rounding.search_range` by the
group's own errors, `ranges.choose_ranges` by the output error with all other groups' as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.base import gpu
from common.kernels.launch_triton import nearest
from common.numerics.grid import Grid, smallest_scale

STORED_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Weights of a program that keeps whole groups.
PROGRAM = 2048


def blocks_of(size: int) -> tuple[int, int]:
    """How many groups of `size` weights a program keeps, and the power of two for each."""
    block_size = triton.next_power_of_2(size)
    return max(1, PROGRAM // block_size), block_size


@triton.jit
def stored_scale(step, smallest, STORED: tl.constexpr):
    """`grid.round_scale`."""
    rounded = step
    if STORED != tl.float32:
        # To bfloat16, which float16's scales fit in too; by hand, as not every GPU and interpreter
        # rounds to it.
        word = step.to(tl.int32, bitcast=True)
        rounded = ((word + 0x7FFF + (word >> 16 & 1)) & -0x10000).to(tl.float32, bitcast=True)
    rounded = tl.maximum(rounded.to(STORED).to(tl.float32), smallest)
    return tl.where(step > 0, rounded, 1.0)


@triton.jit
def nearest_zero(value, BITS: tl.constexpr):
    """The zero-point nearest to a value."""
    return tl.minimum(tl.maximum(nearest(value), -(1 << (BITS - 1))), (1 << (BITS - 1)) - 1)


@triton.jit
def ends(values):
    """The smallest and the largest of each group of weights and zero, and the largest magnitude."""
    lowest, highest = tl.minimum(tl.min(values, 1), 0.0), tl.maximum(tl.max(values, 1), 0.0)
    return lowest, highest, tl.max(tl.abs(values), 1)


@triton.jit
def shrunk_range(
    lowest,
    highest,
    largest,
    shrink,
    smallest,
    STORED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
):
    """`grid.min_max` of groups of which the `ends` are given."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    if SYMMETRIC:
        step = tl.div_rn(largest * shrink * 2.0, LEVELS + 0.0 * largest)
        step = stored_scale(step, smallest, STORED)
        zero = 0.0 * largest
    else:
        low, high = lowest * shrink, highest * shrink
        step = tl.div_rn(high - low, LEVELS + 0.0 * largest)
        step = stored_scale(step, smallest, STORED)
        zero = nearest_zero(-(1 << (BITS - 1)) - tl.div_rn(low, step), BITS)
    return step, zero


@triton.jit
def nearest_codes(values, step, zero, BITS: tl.constexpr):
    """Codes, as floats, of groups of weights."""
    code = nearest(values * (1.0 / step)[:, None]) + zero[:, None]
    return tl.minimum(tl.maximum(code, -(1 << (BITS - 1))), (1 << (BITS - 1)) - 1)


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
    block_groups, block_size = blocks_of(size)
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
        STORED=STORED_TYPES[scale_dtype],
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
    lowest, highest, largest = ends(values)
    # High powers of small weights would be nothing in float32.
    unit = 1.0 / tl.where(largest > 0, largest, 1.0)
    best_error = tl.full((BLOCK_GROUPS,), float("inf"), tl.float32)
    best_scale = tl.full((BLOCK_GROUPS,), 1.0, tl.float32)
    best_zero = tl.zeros((BLOCK_GROUPS,), tl.float32)
    for index in range(0, count):
        shrink = tl.load(candidates + index)
        step, zero = shrunk_range(
            lowest, highest, largest, shrink, smallest, STORED, SYMMETRIC, BITS
        )
        code = nearest_codes(values, step, zero, BITS)
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


# Rows of a program of `take_best_range`.
BEST_ROWS = 16
# Sizes of groups whose Gram matrix a program may keep.
SIZES = (16, 32, 64, 128)


def fits_best_range(size: int) -> bool:
    """Whether `take_best_range` takes groups of this size on this GPU."""
    kept = torch.float32.itemsize * size * (size + 2 * BEST_ROWS)
    return size in SIZES and kept <= gpu.properties().shared_memory


def take_best_range(
    values: Tensor,
    error: Tensor,
    pull: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    block: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    candidates: Tensor,
) -> None:
    """`ranges.take_best_range` for groups that fit; a program tries all candidates for some rows.

    Errors are multiplied in TF32 where a GPU has it, as `cli` lets all of float32 be.
    """
    rows, size = values.shape
    assert values.stride(1) == error.stride(1) == block.stride(1) == 1
    _take_best_range[(triton.cdiv(rows, BEST_ROWS),)](
        values,
        error,
        pull.contiguous(),
        scale,
        zero_point,
        block,
        candidates,
        rows,
        values.stride(0),
        error.stride(0),
        scale.stride(0),
        zero_point.stride(0),
        block.stride(0),
        len(candidates),
        smallest_scale(scale_dtype),
        STORED=STORED_TYPES[scale_dtype],
        SYMMETRIC=grid.symmetric,
        BITS=grid.bits,
        BLOCK_ROWS=BEST_ROWS,
        SIZE=size,
        num_warps=4,
    )


@triton.jit
def _take_best_range(
    values,
    error,
    pull,
    scale,
    zero_point,
    block,
    candidates,
    rows,
    stride,
    error_stride,
    scale_stride,
    zero_stride,
    block_stride,
    count,
    smallest,
    STORED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    member = tl.arange(0, SIZE)
    here = row < rows
    mask = here[:, None]
    weight = tl.load(values + row[:, None] * stride + member[None, :], mask=mask, other=0.0)
    weight = weight.to(tl.float32)
    place = row[:, None] * error_stride + member[None, :]
    current = tl.load(error + place, mask=mask, other=0.0)
    gram = tl.load(block + member[:, None] * block_stride + member[None, :])
    others = tl.load(pull + row[:, None] * SIZE + member[None, :], mask=mask, other=0.0)
    own = tl.dot(current, gram)
    others = 2.0 * (others - own)
    lowest, highest, largest = ends(weight)
    least = tl.full((BLOCK_ROWS,), float("inf"), tl.float32)
    best = current
    best_step = tl.load(scale + row * scale_stride, mask=here, other=1.0)
    best_zero = tl.load(zero_point + row * zero_stride, mask=here, other=0.0)
    for index in range(0, count):
        shrink = tl.load(candidates + index)
        step, zero = shrunk_range(
            lowest, highest, largest, shrink, smallest, STORED, SYMMETRIC, BITS
        )
        code = nearest_codes(weight, step, zero, BITS)
        found = (code - zero[:, None]) * step[:, None] - weight
        loss = tl.sum((tl.dot(found, gram) + others) * found, 1)
        better = loss < least
        least = tl.where(better, loss, least)
        best_step = tl.where(better, step, best_step)
        best_zero = tl.where(better, zero, best_zero)
        best = tl.where(better[:, None], found, best)
    # What is there may not be nearest rounding's error; it stays a candidate as it is.
    better = tl.sum((own + others) * current, 1) >= least
    tl.store(error + place, best, mask=mask & better[:, None])
    tl.store(scale + row * scale_stride, best_step, mask=here & better)
    tl.store(zero_point + row * zero_stride, best_zero, mask=here & better)

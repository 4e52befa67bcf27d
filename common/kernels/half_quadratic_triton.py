"""The Triton kernel behind `quantize_hqq.half_quadratic`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.ranges_triton import (
    STORED_TYPES,
    blocks_of,
    nearest_codes,
    nearest_zero,
    stored_scale,
)
from common.numerics.grid import Grid, smallest_scale

# Norms whose powers are products of a few factors.
EVEN = (2.0, 4.0, 6.0, 8.0)


def half_quadratic(
    groups: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    lp_norm: float,
    steps: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`quantize_hqq.half_quadratic`; a program keeps some groups in registers through all steps."""
    groups, size = groups.contiguous(), groups.shape[-1]
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    best_scale, best_zero = torch.empty_like(scale), torch.empty_like(zero_point)
    block_groups, block_size = blocks_of(size)
    _half_quadratic[(triton.cdiv(scale.numel(), block_groups),)](
        groups,
        scale,
        zero_point,
        best_scale,
        best_zero,
        scale.numel(),
        size,
        steps,
        lp_norm,
        smallest_scale(scale_dtype),
        STORED=STORED_TYPES[scale_dtype],
        EVEN=int(lp_norm) if lp_norm in EVEN else -1,
        SYMMETRIC=grid.symmetric,
        BITS=grid.bits,
        BLOCK_GROUPS=block_groups,
        BLOCK_SIZE=block_size,
        num_warps=4,
    )
    return best_scale, best_zero


@triton.jit
def _power(size, exponent, EVEN: tl.constexpr):
    """Magnitudes above zero to a power; EVEN is the exponent where that is 0, 2, 4, 6 or 8."""
    square = size * size
    if EVEN == 0:
        power = tl.full(size.shape, 1.0, tl.float32)
    elif EVEN == 2:
        power = square
    elif EVEN == 4:
        power = square * square
    elif EVEN == 6:
        power = square * square * square
    elif EVEN == 8:
        power = square * square
        power = power * power
    else:
        power = tl.exp2(exponent * tl.log2(size))
    return power


@triton.jit
def _half_quadratic(
    weights,
    scale,
    zero_point,
    best_scale,
    best_zero,
    total,
    size,
    steps,
    lp_norm,
    smallest,
    STORED: tl.constexpr,
    EVEN: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, BLOCK_SIZE)
    here = group < total
    mask = here[:, None] & (member < size)[None, :]
    values = tl.load(weights + group[:, None] * size + member[None, :], mask=mask, other=0.0)
    values = values.to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    # High powers of small weights would be nothing in float32.
    unit = 1.0 / tl.where(largest > 0, largest, 1.0)
    step = tl.load(scale + group, mask=here, other=1.0)
    zero = tl.load(zero_point + group, mask=here, other=0.0)
    found_step, found_zero = step, zero
    least = tl.full((BLOCK_GROUPS,), float("inf"), tl.float32)
    for _step in range(0, steps + 1):
        code = nearest_codes(values, step, zero, BITS)
        represented = (code - zero[:, None]) * step[:, None]
        magnitude = tl.abs(represented - values) * unit[:, None]
        # An error of zero has no logarithm, and counts as next to nothing.
        power = _power(tl.maximum(magnitude, 1e-30), lp_norm, EVEN)
        loss = tl.sum(tl.where(mask & (magnitude > 0), power, 0.0), 1)
        better = loss < least
        least = tl.where(better, loss, least)
        found_step = tl.where(better, step, found_step)
        found_zero = tl.where(better, zero, found_zero)
        # Errors near zero would get unbounded weight at p < 2.
        floor = (1e-3 * step * unit)[:, None]
        share = _power(tl.maximum(magnitude, floor), lp_norm - 2.0, EVEN - 2)
        share = tl.where(mask, share, 0.0)
        share = share / tl.sum(share, 1)[:, None]
        if SYMMETRIC:
            fitted = tl.sum(share * code * values, 1) / tl.sum(share * code * code, 1)
        else:
            code_mean, weight_mean = tl.sum(share * code, 1), tl.sum(share * values, 1)
            centred = code - code_mean[:, None]
            fitted = tl.sum(share * centred * values, 1) / tl.sum(share * centred * centred, 1)
            fitted = tl.where(fitted > 0, fitted, step)
        step = stored_scale(fitted, smallest, STORED)
        if not SYMMETRIC:
            zero = nearest_zero(code_mean - weight_mean / step, BITS)
    tl.store(best_scale + group, found_step, mask=here)
    tl.store(best_zero + group, found_zero, mask=here)

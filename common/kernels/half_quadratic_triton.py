"""The Triton kernel behind `quantize_hqq.half_quadratic`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch_triton import nearest
from common.kernels.ranges_triton import STORED_TYPES, stored_scale
from common.numerics.grid import Grid, smallest_scale

# Weights of a program.
PROGRAM = 2048
# Norms whose powers are products.
PRODUCTS = (2.0, 4.0, 8.0)


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
    block_size = triton.next_power_of_2(size)
    block_groups = max(1, PROGRAM // block_size)
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
        NORM=int(lp_norm) if lp_norm in PRODUCTS else 0,
        SYMMETRIC=grid.symmetric,
        CODE_MIN=grid.code_min,
        CODE_MAX=grid.code_max,
        BLOCK_GROUPS=block_groups,
        BLOCK_SIZE=block_size,
        num_warps=4,
    )
    return best_scale, best_zero


@triton.jit
def _powers(size, lp_norm, NORM: tl.constexpr):
    """|e|^(p - 2) and |e|^2 of magnitudes above zero, whose product is |e|^p."""
    square = size * size
    if NORM == 2:
        share = tl.full(size.shape, 1.0, tl.float32)
    elif NORM == 4:
        share = square
    elif NORM == 8:
        share = square * square * square
    else:
        share = tl.exp2((lp_norm - 2.0) * tl.log2(size))
    return share, square


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
    NORM: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CODE_MIN: tl.constexpr,
    CODE_MAX: tl.constexpr,
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
        code = nearest(values * (1.0 / step)[:, None]) + zero[:, None]
        code = tl.minimum(tl.maximum(code, CODE_MIN), CODE_MAX)
        represented = (code - zero[:, None]) * step[:, None]
        magnitude = tl.abs(represented - values) * unit[:, None]
        # An error of zero has no logarithm, and counts as next to nothing.
        share, square = _powers(tl.maximum(magnitude, 1e-30), lp_norm, NORM)
        loss = tl.sum(tl.where(mask & (magnitude > 0), share * square, 0.0), 1)
        better = loss < least
        least = tl.where(better, loss, least)
        found_step = tl.where(better, step, found_step)
        found_zero = tl.where(better, zero, found_zero)
        # Errors near zero would get unbounded weight at p < 2.
        floor = (1e-3 * step * unit)[:, None]
        share, _ = _powers(tl.maximum(magnitude, floor), lp_norm, NORM)
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
            zero = nearest(code_mean - weight_mean / step)
            zero = tl.minimum(tl.maximum(zero, CODE_MIN), CODE_MAX)
    tl.store(best_scale + group, found_step, mask=here)
    tl.store(best_zero + group, found_zero, mask=here)

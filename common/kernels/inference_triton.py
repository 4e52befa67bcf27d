"""The Triton kernels behind `common.kernels.inference`, which says what each computes; the products
are in `products_triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.forms import Rounded, Rounding, TwoBytes
from common.kernels.launch_triton import (
    begin,
    launch,
    release,
    round_to_step,
    step_of_token,
    store_bytes,
)


def _results(
    rows: int, size: int, like: Tensor, rounding: Rounding | None
) -> tuple[Tensor | Rounded | TwoBytes, dict]:
    """What takes numbers [rows, size], rounded if asked for, and what a kernel is told of it."""
    output: Tensor | Rounded | TwoBytes
    if rounding is None:
        output = torch.empty(rows, size, device=like.device, dtype=like.dtype)
        tensors = output, output, output
    elif rounding.block is None:
        codes = torch.empty(rows, size, device=like.device, dtype=torch.int8)
        output = Rounded(codes, torch.empty(rows, 1, device=like.device, dtype=like.dtype))
        tensors = output.codes, output.scale, output.scale
    else:
        output = TwoBytes.empty(rows, size, rounding.block, like)
        tensors = output.codes, output.unit, output.sums
    named = dict(zip(("output", "scale", "sums"), tensors, strict=True))
    bits, block = (0, None) if rounding is None else (rounding.bits, rounding.block)
    return output, {**named, "BITS": bits, "PIECE": block}


def _at_once(size: int, rounding: Rounding | None) -> int:
    """Columns of a program: a token that is rounded as one has to be in one."""
    whole = rounding is not None and rounding.block is None
    return triton.next_power_of_2(size) if whole else 1024


def round_rows(inputs: Tensor, rounding: Rounding) -> Rounded | TwoBytes:
    rows, size = inputs.shape
    result, named = _results(rows, size, inputs, rounding)
    columns = _at_once(size, rounding)
    _round_rows[(rows, triton.cdiv(size, columns))](
        inputs,
        size=size,
        smallest=torch.finfo(inputs.dtype).eps,
        BLOCK=columns,
        num_warps=8 if columns > 2048 else 4,
        **named,
        **launch(),
    )
    return result


@triton.jit
def _round_rows(
    inputs,
    output,
    scale,
    sums,
    size,
    smallest,
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    value = tl.load(inputs + row * size + column, mask=column < size, other=0.0)
    release(OVERLAP)
    _store(value, output, scale, sums, row, start, size, smallest, BITS, PIECE)


@triton.jit
def _store(
    value,
    output,
    scale,
    sums,
    row,
    start,
    size,
    smallest,
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Store numbers [BLOCK] of a row of `size` from the column `start` on, as `_results` says."""
    column = start + tl.arange(0, value.shape[0])
    place, mask = output + row * size + column, column < size
    if BITS == 0:
        tl.store(place, value, mask=mask)
    elif PIECE is not None:
        blocks = tl.reshape(value.to(tl.float32), (value.shape[0] // PIECE, PIECE))
        end = size // PIECE
        store_bytes(blocks, output, scale, sums, row, start // PIECE, end, size, PIECE)
    else:
        dtype: tl.constexpr = value.dtype
        exact = value.to(tl.float32)
        step = step_of_token(tl.max(tl.abs(exact), 0), dtype, smallest, BITS)
        code = round_to_step(exact, step, dtype, BITS)
        tl.store(place, code.to(tl.int8), mask=mask)
        tl.store(scale + row, step.to(dtype))


def add_rms_norm(
    hidden: Tensor,
    update: Tensor | None,
    gain: Tensor,
    epsilon: float,
    rounding: Rounding | None = None,
) -> Tensor | Rounded | TwoBytes:
    rows, size = hidden.shape
    result, named = _results(rows, size, hidden, rounding)
    _add_rms_norm[(rows,)](
        hidden,
        update,
        gain,
        size=size,
        epsilon=epsilon,
        smallest=torch.finfo(hidden.dtype).eps,
        HAS_UPDATE=update is not None,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8 if size > 2048 else 4,
        **named,
        **launch(),
    )
    return result


@triton.jit
def _add_rms_norm(
    hidden,
    update,
    gain,
    output,
    scale,
    sums,
    size,
    epsilon,
    smallest,
    HAS_UPDATE: tl.constexpr,
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    dtype: tl.constexpr = hidden.dtype.element_ty
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place, mask = row * size + column, column < size
    value = tl.load(hidden + place, mask=mask, other=0.0)
    if HAS_UPDATE:
        value = (
            value.to(tl.float32) + tl.load(update + place, mask=mask, other=0.0).to(tl.float32)
        ).to(dtype)
        tl.store(hidden + place, value, mask=mask)
    exact = value.to(tl.float32)
    exact *= tl.rsqrt(tl.sum(exact * exact, 0) / size + epsilon)
    normed = (
        tl.load(gain + column, mask=mask, other=0.0).to(tl.float32) * exact.to(dtype).to(tl.float32)
    ).to(dtype)
    release(OVERLAP)
    _store(normed, output, scale, sums, row, 0, size, smallest, BITS, PIECE)


def silu_mul(
    gate: Tensor, up: Tensor, rounding: Rounding | None = None
) -> Tensor | Rounded | TwoBytes:
    rows, size = gate.shape
    result, named = _results(rows, size, gate, rounding)
    columns = _at_once(size, rounding)
    _silu_mul[(rows, triton.cdiv(size, columns))](
        gate,
        up,
        gate_stride=gate.stride(0),
        up_stride=up.stride(0),
        size=size,
        smallest=torch.finfo(gate.dtype).eps,
        BLOCK=columns,
        num_warps=4 if columns <= 1024 else 16,
        **named,
        **launch(),
    )
    return result


@triton.jit
def _silu_mul(
    gate,
    up,
    output,
    scale,
    sums,
    gate_stride,
    up_stride,
    size,
    smallest,
    BITS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    dtype: tl.constexpr = gate.dtype.element_ty
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    mask = column < size
    value = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    value = (value * tl.sigmoid(value)).to(dtype).to(tl.float32)
    product = (
        value * tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    ).to(dtype)
    release(OVERLAP)
    _store(product, output, scale, sums, row, start, size, smallest, BITS, PIECE)


def largest_index(values: Tensor) -> Tensor:
    rows, size = values.shape
    parts = triton.cdiv(size, 2048)
    best = torch.empty(rows, parts, device=values.device)
    index = torch.empty(rows, parts, device=values.device, dtype=torch.int32)
    result = torch.empty(rows, device=values.device, dtype=torch.long)
    _largest_in_part[(rows, parts)](
        values, best, index, size, parts, BLOCK=2048, num_warps=4, **launch()
    )
    _largest_of_parts[(rows,)](
        best, index, result, parts, BLOCK=triton.next_power_of_2(parts), num_warps=1, **launch()
    )
    return result


@triton.jit
def _largest_in_part(values, best, index, size, parts, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(values + row * size + column, mask=column < size, other=float("-inf")).to(
        tl.float32
    )
    # A maximum leaves NaN out.
    odd = tl.sum((found != found).to(tl.int32), 0) > 0
    largest = tl.where(odd, float("inf"), tl.max(found, 0))
    release(OVERLAP)
    tl.store(best + row * parts + part, largest)
    tl.store(index + row * parts + part, tl.min(tl.where(found == largest, column, size), 0))


@triton.jit
def _largest_of_parts(best, index, result, parts, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    found = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    largest = tl.max(found, 0)
    first = tl.min(tl.where(found == largest, part, BLOCK), 0)
    chosen = tl.load(index + row * parts + tl.minimum(first, parts - 1)).to(tl.int64)
    tl.store(result + row, tl.where(tl.abs(largest) < float("inf"), chosen, -1))

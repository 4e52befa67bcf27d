"""The Triton kernels behind `common.kernels.inference`, which says what each computes; the products
are in `products_triton`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.forms import Rounded
from common.kernels.launch_triton import begin, launch, round_to_step, step_of_token


def _empty_rounded(rows: int, size: int, like: Tensor) -> Rounded:
    return Rounded(
        torch.empty(rows, size, device=like.device, dtype=torch.int8),
        torch.empty(rows, 1, device=like.device, dtype=like.dtype),
    )


def round_rows(inputs: Tensor, bits: int) -> Rounded:
    rows, size = inputs.shape
    result = _empty_rounded(rows, size, inputs)
    _round_rows[(rows,)](
        inputs,
        result.codes,
        result.scale,
        size,
        torch.finfo(inputs.dtype).eps,
        BITS=bits,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8 if size > 2048 else 4,
        **launch(),
    )
    return result


@triton.jit
def _round_rows(
    inputs,
    codes,
    scale,
    size,
    smallest,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    column = tl.arange(0, BLOCK)
    mask = column < size
    place = tl.program_id(0).to(tl.int64) * size + column
    _store_rounded(
        tl.load(inputs + place, mask=mask, other=0.0),
        codes + place,
        scale + tl.program_id(0),
        mask,
        smallest,
        BITS,
    )


@triton.jit
def _store_rounded(value, codes, scale, mask, smallest, BITS: tl.constexpr):
    """Round a token to its largest value."""
    dtype: tl.constexpr = value.dtype
    exact = value.to(tl.float32)
    step = step_of_token(tl.max(tl.abs(exact), 0), dtype, smallest, BITS)
    code = round_to_step(exact, step, dtype, BITS)
    tl.store(codes, code.to(tl.int8), mask=mask)
    tl.store(scale, step.to(dtype))


def scale_sums(sums: Tensor, rows: Tensor, channels: Tensor) -> Tensor:
    count, out = sums.shape
    result = torch.empty(count, out, device=sums.device, dtype=rows.dtype)
    _scale_sums[(count, triton.cdiv(out, 2048))](
        sums, rows, channels, result, out, BLOCK=2048, num_warps=4, **launch()
    )
    return result


@triton.jit
def _scale_sums(sums, rows, channels, result, out, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < out
    value = tl.load(sums + row * out + column, mask=mask, other=0).to(tl.float32)
    value *= tl.load(rows + row).to(tl.float32)
    value *= tl.load(channels + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + row * out + column, value.to(result.dtype.element_ty), mask=mask)


def add_rms_norm(
    hidden: Tensor,
    update: Tensor | None,
    gain: Tensor,
    epsilon: float,
    bits: int | None = None,
) -> Tensor | Rounded:
    rows, size = hidden.shape
    result = torch.empty_like(hidden) if bits is None else _empty_rounded(rows, size, hidden)
    output, scale = (result, result) if bits is None else (result.codes, result.scale)
    _add_rms_norm[(rows,)](
        hidden,
        update,
        gain,
        output,
        scale,
        size,
        epsilon,
        torch.finfo(hidden.dtype).eps,
        HAS_UPDATE=update is not None,
        BITS=bits or 0,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8 if size > 2048 else 4,
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
    size,
    epsilon,
    smallest,
    HAS_UPDATE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    dtype: tl.constexpr = hidden.dtype.element_ty
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * size + column
    mask = column < size
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
    if BITS == 0:
        tl.store(output + place, normed, mask=mask)
    else:
        _store_rounded(normed, output + place, scale + tl.program_id(0), mask, smallest, BITS)


def rotate_heads(
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
    queries: int = 0,
) -> None:
    batch, length, count, size = heads.shape
    query_gain, key_gain, epsilon = norms or (None, None, 0.0)
    block = triton.next_power_of_2(count)
    _rotate_heads[(batch * length,)](
        heads,
        cosine,
        sine,
        query_gain,
        key_gain,
        epsilon,
        count,
        queries,
        length,
        heads.stride(0),
        heads.stride(1),
        0 if len(cosine) == 1 else length,
        HAS_NORMS=norms is not None,
        HALF=size // 2,
        BLOCK=block,
        num_warps=4 if block * size <= 8192 else 8,
        **launch(),
    )


@triton.jit
def _rotate_heads(
    heads,
    cosine,
    sine,
    query_gain,
    key_gain,
    epsilon,
    count,
    queries,
    length,
    batch_stride,
    token_stride,
    table_stride,
    HAS_NORMS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program turns all heads of a token, whose halves are the parts of complex numbers."""
    begin(OVERLAP)
    dtype: tl.constexpr = heads.dtype.element_ty
    batch, position = tl.program_id(0).to(tl.int64) // length, tl.program_id(0) % length
    head, lane = tl.arange(0, BLOCK)[:, None], tl.arange(0, HALF)[None, :]
    mask = head < count
    place = heads + batch * batch_stride + position.to(tl.int64) * token_stride
    first = place + head * 2 * HALF + lane
    one = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORMS:
        squares = tl.sum(one * one, 1) + tl.sum(two * two, 1)
        factor = tl.rsqrt(squares / (2 * HALF) + epsilon)[:, None]
        one = _times_gain(one * factor, query_gain, key_gain, head < queries, lane, dtype)
        two = _times_gain(two * factor, query_gain, key_gain, head < queries, HALF + lane, dtype)
    table = (batch * table_stride + position) * 2 * HALF + lane
    turned = one * tl.load(cosine + table).to(tl.float32) - two * tl.load(sine + table).to(
        tl.float32
    )
    other = two * tl.load(cosine + table + HALF).to(tl.float32) + one * tl.load(
        sine + table + HALF
    ).to(tl.float32)
    tl.store(first, turned.to(dtype), mask=mask)
    tl.store(first + HALF, other.to(dtype), mask=mask)


@triton.jit
def _times_gain(normed, query_gain, key_gain, is_query, lane, dtype: tl.constexpr):
    """The end of an RMSNorm of heads, rounded where torch rounds."""
    gain = tl.where(is_query, tl.load(query_gain + lane), tl.load(key_gain + lane))
    return (gain.to(tl.float32) * normed.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)


def silu_mul(gate: Tensor, up: Tensor, bits: int | None = None) -> Tensor | Rounded:
    rows, size = gate.shape
    # A rounded token has to be in one program.
    block = 1024 if bits is None else triton.next_power_of_2(size)
    result = (
        torch.empty(rows, size, device=gate.device, dtype=gate.dtype)
        if bits is None
        else _empty_rounded(rows, size, gate)
    )
    output, scale = (result, result) if bits is None else (result.codes, result.scale)
    _silu_mul[(rows, triton.cdiv(size, block))](
        gate,
        up,
        output,
        scale,
        gate.stride(0),
        up.stride(0),
        size,
        torch.finfo(gate.dtype).eps,
        BITS=bits or 0,
        BLOCK=block,
        num_warps=4 if bits is None else 16,
        **launch(),
    )
    return result


@triton.jit
def _silu_mul(
    gate,
    up,
    output,
    scale,
    gate_stride,
    up_stride,
    size,
    smallest,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    dtype: tl.constexpr = gate.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    value = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    value = (value * tl.sigmoid(value)).to(dtype).to(tl.float32)
    product = (
        value * tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    ).to(dtype)
    if BITS == 0:
        tl.store(output + row * size + column, product, mask=mask)
    else:
        _store_rounded(product, output + row * size + column, scale + row, mask, smallest, BITS)


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
    largest = tl.max(found, 0)
    tl.store(best + row * parts + part, largest)
    tl.store(index + row * parts + part, tl.min(tl.where(found == largest, column, size), 0))


@triton.jit
def _largest_of_parts(best, index, result, parts, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    found = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    first = tl.min(tl.where(found == tl.max(found, 0), part, BLOCK), 0)
    tl.store(result + row, tl.load(index + row * parts + tl.minimum(first, parts - 1)).to(tl.int64))

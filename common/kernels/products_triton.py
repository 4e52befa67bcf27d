"""Triton kernels of products with packed weights, and of unpacking; `common.kernels.inference` says
what each computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.bytes_product_triton import bytes_matmul
from common.kernels.forms import PackedWeight, Rounded, TwoBytes
from common.kernels.launch_triton import begin, launch, release, stages
from common.kernels.row_product_triton import fits_one_row, row_matmul
from common.kernels.splits_triton import WARPS, add_splits, split_sums

# Of a product: the programs (`split_sums`), and loads on their way. Measured as the rest of its
# form.
FLOATS, INTEGERS = (264, 3), (132, 5)
# Conversions of integers are rare units' work. A float with one of these exponents has an integer
# as its last bits, and is that integer plus a power of two.
_EXPONENT_32, _POWER_32 = tl.constexpr(0x4B000000), tl.constexpr(8388608.0)
_EXPONENT_BF16, _POWER_BF16 = tl.constexpr(0x4300), tl.constexpr(128.0)
_EXPONENT_FP16, _POWER_FP16 = tl.constexpr(0x6400), tl.constexpr(1024.0)


def packed_matmul(inputs: Tensor | TwoBytes, weight: PackedWeight) -> Tensor:
    if isinstance(inputs, TwoBytes):
        return bytes_matmul(inputs, weight)
    rows, channels = inputs.shape
    if rows == 1 and fits_one_row(inputs, weight):
        return row_matmul(inputs, weight, early=False)
    if weight.block < 32:  # no product of so few channels
        return inputs @ unpack(weight, inputs.dtype).T
    output, arguments, form = _product(inputs, weight, inputs.dtype, weight.block, *FLOATS)
    grid, names = (
        arguments.pop("grid"),
        {"BITS": weight.bits, "HAS_ZERO": weight.zero_point is not None},
    )
    _matmul[grid](
        inputs,
        weight.packed,
        weight.scale,
        weight.zero_point,
        output,
        **arguments,
        size=channels // weight.scale.shape[1],
        **names,
        **form,
        **launch(),
    )
    return output


def integer_matmul(inputs: Rounded, weight: PackedWeight) -> Tensor:
    channels = inputs.codes.shape[1]
    block = min(128, channels & -channels)
    if block < 32:
        return packed_matmul(inputs.values(), weight)
    output, arguments, form = _product(inputs.codes, weight, inputs.scale.dtype, block, *INTEGERS)
    grid = arguments.pop("grid")
    _integer_matmul[grid](
        inputs.codes,
        inputs.scale,
        weight.packed,
        weight.scale,
        output,
        **arguments,
        **form,
        **launch(),
    )
    return output


def _product(
    inputs: Tensor,
    weight: PackedWeight,
    dtype: torch.dtype,
    block: int,
    programs: int,
    loads: int,
) -> tuple[Tensor, dict, dict]:
    """What both products are launched with: the output, arguments, and constants."""
    rows, channels = inputs.shape
    out = len(weight.packed)
    split = split_sums(rows, 1, out, channels // block, programs, inputs.device, dtype)
    arguments = {
        "grid": (split.tiles, split.splits),
        "partial": split.partial,
        "counters": split.counters,
        "rows": rows,
        "out": out,
        "channels": channels,
        "steps": split.each,
    }
    block_rows = max(16, triton.next_power_of_2(rows))
    bytes_of_row = split.block_out * weight.bits // 8 + block_rows * inputs.element_size()
    return (
        split.output,
        arguments,
        {
            "BLOCK_ROWS": block_rows,
            "BLOCK_OUT": split.block_out,
            "BLOCK": block,
            "SPLITS": split.splits,
            "num_warps": WARPS,
            "num_stages": stages(loads, block * bytes_of_row),
        },
    )


@triton.jit
def _floats(codes, dtype: tl.constexpr):
    """Unsigned 4-bit codes as floats of a type, plus `_added`, which 16 bits leave room for."""
    if dtype == tl.bfloat16:
        return (codes.to(tl.int16) | _EXPONENT_BF16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        return (codes.to(tl.int16) | _EXPONENT_FP16).to(tl.float16, bitcast=True)
    else:
        return (codes.to(tl.int32) | _EXPONENT_32).to(tl.float32, bitcast=True) - _POWER_32


@triton.jit
def _added(dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return _POWER_BF16
    elif dtype == tl.float16:
        return _POWER_FP16
    else:
        return 0.0


@triton.jit
def _matmul(
    inputs,
    packed,
    scale,
    zero_point,
    output,
    partial,
    counters,
    rows,
    out,
    channels,
    steps,
    size,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weights are the left factor, so that they go from registers into tensor cores."""
    begin(OVERLAP)
    dtype: tl.constexpr = inputs.dtype.element_ty
    BYTES: tl.constexpr = BLOCK * BITS // 8
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row, byte = tl.arange(0, BLOCK_ROWS), tl.arange(0, BYTES)
    in_range, known = (channel < out)[:, None], (row < rows)[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    first = tl.program_id(1) * steps * BLOCK
    for start in range(first, tl.minimum(first + steps * BLOCK, channels), BLOCK):
        codes = tl.load(
            packed
            + channel.to(tl.int64)[:, None] * (channels * BITS // 8)
            + start * BITS // 8
            + byte[None, :],
            mask=in_range,
            other=0,
        )
        place = inputs + row[None, :] * channels + start + byte[:, None]
        value = tl.load(place, mask=known, other=0.0)
        if BITS == 4:
            second = tl.load(place + BYTES, mask=known, other=0.0)
            product = tl.dot(_floats(codes & 15, dtype), value, input_precision="ieee")
            product = tl.dot(_floats(codes >> 4, dtype), second, product, input_precision="ieee")
        else:
            unsigned = (codes.to(tl.uint8, bitcast=True) ^ 128).to(tl.int32)
            exact = (unsigned | _EXPONENT_32).to(tl.float32, bitcast=True) - (_POWER_32 + 128.0)
            product = tl.dot(exact.to(dtype), value, input_precision="ieee")
        place = channel * (channels // size) + start // size
        step = tl.load(scale + place, mask=channel < out, other=0.0).to(tl.float32)
        if HAS_ZERO or BITS == 4:
            # Zero-points, and what was added to the codes, count as often as there is input.
            less = tl.full((BLOCK_OUT,), 0.0, tl.float32)
            if HAS_ZERO:
                less += tl.load(zero_point + place, mask=channel < out, other=0).to(tl.float32)
            whole = value.to(tl.float32)
            if BITS == 4:
                less += _added(dtype) + 8.0
                whole += second.to(tl.float32)
            product -= less[:, None] * tl.sum(whole, 0)[None, :]
        total += product * step[:, None]
    release(OVERLAP)
    add_splits(total, output, partial, counters, rows, out, channel, row, SPLITS)


@triton.jit
def _integer_matmul(
    inputs,
    input_scale,
    packed,
    scale,
    output,
    partial,
    counters,
    rows,
    out,
    channels,
    steps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row, byte = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    in_range, known = (channel < out)[:, None], (row < rows)[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.int32)
    first = tl.program_id(1) * steps * BLOCK
    for start in range(first, tl.minimum(first + steps * BLOCK, channels), BLOCK):
        codes = tl.load(
            packed + channel.to(tl.int64)[:, None] * channels + start + byte[None, :],
            mask=in_range,
            other=0,
        )
        value = tl.load(
            inputs + row[None, :] * channels + start + byte[:, None], mask=known, other=0
        )
        total = tl.dot(codes, value, total, out_dtype=tl.int32)
    step = tl.load(scale + channel, mask=channel < out, other=0.0).to(tl.float32)
    token = tl.load(input_scale + row, mask=row < rows, other=0.0).to(tl.float32)
    release(OVERLAP)
    add_splits(
        total.to(tl.float32) * step[:, None] * token[None, :],
        output,
        partial,
        counters,
        rows,
        out,
        channel,
        row,
        SPLITS,
    )


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out, channels = weight.shape
    result = torch.empty(out, channels, device=weight.packed.device, dtype=dtype)
    block = min(2048, triton.next_power_of_2(channels))
    _unpack[(out, triton.cdiv(channels, block))](
        weight.packed,
        weight.scale,
        weight.zero_point,
        result,
        channels,
        channels // weight.scale.shape[1],
        BITS=weight.bits,
        HAS_ZERO=weight.zero_point is not None,
        PIECE=weight.block,
        BLOCK=block,
        num_warps=4,
        **launch(),
    )
    return result


@triton.jit
def _unpack(
    packed,
    scale,
    zero_point,
    weight,
    channels,
    size,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    if BITS == 4:
        HALF: tl.constexpr = PIECE // 2
        byte = channel // PIECE * HALF + channel % HALF
        codes = tl.load(packed + row * (channels // 2) + byte, mask=mask, other=0).to(tl.int32)
        code = ((codes >> (channel % PIECE // HALF * 4)) & 15) - 8
    else:
        code = tl.load(packed + row * channels + channel, mask=mask, other=0).to(tl.int32)
    place = row * (channels // size) + channel // size
    if HAS_ZERO:
        code -= tl.load(zero_point + place, mask=mask, other=0).to(tl.int32)
    value = code.to(tl.float32) * tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(weight + row * channels + channel, value.to(weight.dtype.element_ty), mask=mask)

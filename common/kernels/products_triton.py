"""Triton kernels of products with packed weights, and of unpacking; `common.kernels.inference` says what each computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.inference import PackedWeight, Rounded
from common.kernels.launch_triton import begin, counters, launch, shared_memory

# Of a product: output channels of a program, for few and for many of them, and warps; then programs it should have at least, so
# that every multiprocessor has work, and loads on their way. Measured on an H200 for the linears of the Llama-3.2-1B shape
# (benchmarks/packed_product_sweep.py).
BLOCK_OUT, BLOCK_OUT_WIDE, WARPS = 64, 128, 4
FLOATS, INTEGERS = (264, 3), (132, 5)
# Of a product with one row: warps, output channels of a program, words of a channel at once; by bits, and for many channels.
VECTOR, VECTOR_WIDE = {4: (4, 8, 512), 8: (4, 8, 256)}, (1, 16, 64)
# Conversions of integers are rare units' work. A float with one of these exponents has an integer as its last bits, and is
# that integer plus a power of two.
_EXPONENT_32, _POWER_32 = tl.constexpr(0x4B000000), tl.constexpr(8388608.0)
_EXPONENT_BF16, _POWER_BF16 = tl.constexpr(0x4300), tl.constexpr(128.0)
_EXPONENT_FP16, _POWER_FP16 = tl.constexpr(0x6400), tl.constexpr(1024.0)


def packed_matmul(inputs: Tensor, weight: PackedWeight) -> Tensor:
    rows, channels = inputs.shape
    if rows == 1 and weight.block >= 32:
        return _one_row(inputs, weight, early=False)
    if weight.block < 32:                                                       # no product of so few channels
        return inputs @ unpack(weight, inputs.dtype).T
    output, arguments, form = _product(inputs, weight, inputs.dtype, weight.block, *FLOATS)
    grid, names = arguments.pop("grid"), {"BITS": weight.bits, "HAS_ZERO": weight.zero_point is not None}
    _matmul[grid](inputs, weight.packed, weight.scale, weight.zero_point, output, **arguments,
                  size=channels // weight.scale.shape[1], **names, **form, **launch())
    return output


def row_matmul(inputs: Tensor, weight: PackedWeight, norm: tuple[Tensor, float] | None, gated: bool, added_to: Tensor | None,
               ) -> Tensor:
    return _one_row(inputs, weight, True, norm, gated, added_to)


def _one_row(inputs: Tensor, weight: PackedWeight, early: bool, norm: tuple[Tensor, float] | None = None, gated: bool = False,
             added_to: Tensor | None = None) -> Tensor:
    out, channels = weight.shape
    warps, block_out, block_words = VECTOR_WIDE if out > 4096 else VECTOR[weight.bits]
    gain, epsilon = norm or (None, 0.0)
    if gated:
        out //= 2
    output = added_to if added_to is not None else torch.empty(1, out, device=inputs.device, dtype=inputs.dtype)
    words, piece, blocks = channels * weight.bits // 32, weight.block * weight.bits // 32, channels // weight.block
    _matvec[(triton.cdiv(out, block_out // 2 if gated else block_out),)](
        inputs, weight.packed.view(torch.int32), weight.scale, weight.zero_point, gain, output, out, words,
        blocks // weight.scale.shape[1], epsilon, 0x4B000000, BITS=weight.bits, HAS_ZERO=weight.zero_point is not None,
        HAS_NORM=norm is not None, GATED=gated, ADDED=added_to is not None, EARLY=early, PIECE=piece, BLOCK_OUT=block_out,
        BLOCK_PIECES=max(1, min(block_words // piece, triton.next_power_of_2(blocks))),
        LINES=triton.next_power_of_2(triton.cdiv(words, 32)), num_warps=warps, **launch())
    return output


def integer_matmul(inputs: Rounded, weight: PackedWeight) -> Tensor:
    channels = inputs.codes.shape[1]
    block = min(128, channels & -channels)
    if block < 32:
        return packed_matmul(inputs.values(), weight)
    output, arguments, form = _product(inputs.codes, weight, inputs.scale.dtype, block, *INTEGERS)
    grid = arguments.pop("grid")
    _integer_matmul[grid](inputs.codes, inputs.scale, weight.packed, weight.scale, output, **arguments, **form, **launch())
    return output


def _product(inputs: Tensor, weight: PackedWeight, dtype: torch.dtype, block: int, programs: int, stages: int,
             ) -> tuple[Tensor, dict, dict]:
    """What both products are launched with: the output, arguments, and constants."""
    rows, channels = inputs.shape
    out, steps = len(weight.packed), channels // block
    block_out = BLOCK_OUT_WIDE if out > 4096 else BLOCK_OUT
    tiles = triton.cdiv(out, block_out)
    splits = max(1, min(steps, programs // tiles))
    each = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, each)
    output = torch.empty(rows, out, device=inputs.device, dtype=dtype)
    partial = torch.empty(splits, rows, out, device=inputs.device) if splits > 1 else output
    counts = counters(tiles, inputs.device) if splits > 1 else output
    arguments = {"grid": (tiles, splits), "partial": partial, "counters": counts, "rows": rows, "out": out,
                 "channels": channels, "steps": each}
    block_rows = max(16, triton.next_power_of_2(rows))
    bytes_of_stage = block * (block_out * weight.bits // 8 + block_rows * inputs.element_size())
    return output, arguments, {"BLOCK_ROWS": block_rows, "BLOCK_OUT": block_out, "BLOCK": block, "SPLITS": splits,
                               "num_warps": WARPS, "num_stages": max(1, min(stages, shared_memory() // bytes_of_stage))}


@triton.jit
def _next_four(inputs, place, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """Four inputs each, read together: four tensors [PIECES, PIECE]."""
    four = tl.load(inputs + place[:, :, None] + tl.arange(0, 4)[None, None, :]).to(tl.float32)
    even, odd = tl.split(tl.reshape(four, (PIECES, PIECE, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _fetch(places):
    """Bring what lies at 64-bit addresses into the card's cache, without waiting for it."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places.to(tl.int64)], dtype=tl.int32,
                              is_pure=False, pack=1)


@triton.jit
def _matvec(inputs, packed, scale, zero_point, gain, output, out, words, group_pieces, epsilon, exponent, BITS: tl.constexpr,
            HAS_ZERO: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
            PIECE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_PIECES: tl.constexpr, LINES: tl.constexpr,
            OVERLAP: tl.constexpr):
    """One row times weights. A piece is the words of a block of channels. `exponent` is an argument and no constant, as
    masking with one constant and adding another takes two instructions. EARLY: weights are read before the kernel before ends.
    """
    if not EARLY:
        begin(OVERLAP)
    member = tl.arange(0, BLOCK_OUT)
    if GATED:                                                                   # a gate, what it is for, the next gate ...
        channel = tl.program_id(0) * (BLOCK_OUT // 2) + member // 2
        known = channel < out
        row = tl.minimum(channel, out - 1) + member % 2 * out
    else:
        channel = tl.program_id(0) * BLOCK_OUT + member
        known = channel < out
        row = tl.minimum(channel, out - 1)
    pieces = words // PIECE
    lane, piece = tl.arange(0, PIECE), tl.arange(0, BLOCK_PIECES)
    total = tl.zeros((BLOCK_OUT, BLOCK_PIECES, PIECE), tl.float32)
    squares = tl.zeros((BLOCK_PIECES, PIECE), tl.float32)
    place = packed + row[:, None, None] * words + (piece[:, None] * PIECE + lane[None, :])[None, :, :]
    mask = known[:, None] & (piece < pieces)[None, :]
    codes = tl.load(place, mask=mask[:, :, None], other=0)
    if EARLY:
        if OVERLAP:
            if LINES * 32 > BLOCK_PIECES * PIECE:
                line = tl.minimum(tl.arange(0, LINES) * 32, words - 1)
                _fetch(packed + row[:, None] * words + line[None, :])
        begin(OVERLAP)
    for start in range(0, pieces, BLOCK_PIECES):
        inside = start + piece < pieces
        mask = known[:, None] & inside[None, :]
        more = known[:, None] & (start + BLOCK_PIECES + piece < pieces)[None, :]
        later = tl.load(place + (start + BLOCK_PIECES) * PIECE, mask=more[:, :, None], other=0)
        group = row[:, None] * (pieces // group_pieces) + ((start + piece) // group_pieces)[None, :]
        step = tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
        zero = tl.full((BLOCK_OUT, BLOCK_PIECES), 8.0 if BITS == 4 else 128.0, tl.float32)
        if HAS_ZERO:
            zero += tl.load(zero_point + group, mask=mask, other=0).to(tl.float32)
        if BITS == 8:
            codes = codes ^ -2139062144                                         # signed codes as unsigned ones
        product = tl.zeros((BLOCK_OUT, BLOCK_PIECES, PIECE), tl.float32)
        sum_of_inputs = tl.zeros((BLOCK_PIECES, PIECE), tl.float32)
        first = tl.minimum(start + piece, pieces - 1)[:, None] * (PIECE * 32 // BITS) + lane[None, :] * 4
        for part in tl.static_range(8 // BITS):
            value = _next_four(inputs, first + part * 4 * PIECE, BLOCK_PIECES, PIECE)
            if HAS_NORM:
                factor = _next_four(gain, first + part * 4 * PIECE, BLOCK_PIECES, PIECE)
            for byte in tl.static_range(4):
                one = value[byte]
                if HAS_NORM:
                    squares += tl.where(inside[:, None], one * one, 0.0)
                    one *= factor[byte]
                sum_of_inputs += one
                # A code stays where it is in its half of the word; the input makes up for that.
                half = codes if byte < 2 else codes >> 16
                shift = byte % 2 * 8 + part * 4
                exact = ((half & (((1 << BITS) - 1) << shift)) | exponent).to(tl.float32, bitcast=True) - _POWER_32
                product += exact * (one * (1.0 / (1 << shift)))[None, :, :]
        total += (product - zero[:, :, None] * sum_of_inputs[None, :, :]) * step[:, :, None]
        codes = later
    whole = tl.sum(tl.sum(total, 2), 1)
    if HAS_NORM:
        whole *= tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / (words * 32 // BITS) + epsilon)
    dtype: tl.constexpr = output.dtype.element_ty
    if GATED:
        gate, up = tl.split(tl.reshape(whole, (BLOCK_OUT // 2, 2)))
        target = tl.program_id(0) * (BLOCK_OUT // 2) + tl.arange(0, BLOCK_OUT // 2)
        tl.store(output + target, (gate * tl.sigmoid(gate) * up).to(dtype), mask=target < out)
    else:
        if ADDED:
            whole += tl.load(output + channel, mask=known, other=0.0).to(tl.float32)
        tl.store(output + channel, whole.to(dtype), mask=known)


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
def _matmul(inputs, packed, scale, zero_point, output, partial, counters, rows, out, channels, steps, size, BITS: tl.constexpr,
            HAS_ZERO: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr,
            SPLITS: tl.constexpr, OVERLAP: tl.constexpr):
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
        codes = tl.load(packed + channel.to(tl.int64)[:, None] * (channels * BITS // 8) + start * BITS // 8 + byte[None, :],
                        mask=in_range, other=0)
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
    _finish(total, output, partial, counters, rows, out, channel, row, SPLITS)


@triton.jit
def _integer_matmul(inputs, input_scale, packed, scale, output, partial, counters, rows, out, channels, steps,
                    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
                    OVERLAP: tl.constexpr):
    begin(OVERLAP)
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row, byte = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    in_range, known = (channel < out)[:, None], (row < rows)[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.int32)
    first = tl.program_id(1) * steps * BLOCK
    for start in range(first, tl.minimum(first + steps * BLOCK, channels), BLOCK):
        codes = tl.load(packed + channel.to(tl.int64)[:, None] * channels + start + byte[None, :], mask=in_range, other=0)
        value = tl.load(inputs + row[None, :] * channels + start + byte[:, None], mask=known, other=0)
        total = tl.dot(codes, value, total, out_dtype=tl.int32)
    step = tl.load(scale + channel, mask=channel < out, other=0.0).to(tl.float32)
    token = tl.load(input_scale + row, mask=row < rows, other=0.0).to(tl.float32)
    _finish(total.to(tl.float32) * step[:, None] * token[None, :], output, partial, counters, rows, out, channel, row, SPLITS)


@triton.jit
def _finish(total, output, partial, counters, rows, out, channel, row, SPLITS: tl.constexpr):
    """Store a tile [out, rows]; where channels are split between programs, the last one of the tile adds all up."""
    mask = (row < rows)[None, :] & (channel < out)[:, None]
    place = row[None, :] * out + channel[:, None]
    if SPLITS == 1:
        tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + tl.program_id(1) * rows * out + place, total, mask=mask)
        tl.debug_barrier()
        counter = counters + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros_like(total)
            for split in range(SPLITS):
                total += tl.load(partial + split * rows * out + place, mask=mask, other=0.0)
            tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)
            tl.store(counter, 0)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out, channels = weight.shape
    result = torch.empty(out, channels, device=weight.packed.device, dtype=dtype)
    block = min(2048, triton.next_power_of_2(channels))
    _unpack[(out, triton.cdiv(channels, block))](
        weight.packed, weight.scale, weight.zero_point, result, channels, channels // weight.scale.shape[1], BITS=weight.bits,
        HAS_ZERO=weight.zero_point is not None, PIECE=weight.block, BLOCK=block, num_warps=4, **launch())
    return result


@triton.jit
def _unpack(packed, scale, zero_point, weight, channels, size, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, PIECE: tl.constexpr,
            BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
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

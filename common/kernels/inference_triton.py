"""The Triton kernels behind `common.kernels.inference`, which says what each computes."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.inference import SIGN_BITS, PackedWeight, Rotary

# Attention over longer contexts is split between programs; the last of them to finish joins their results.
SPLIT_LENGTH, BLOCK_LENGTH = 512, 64
# Programs that a product should have at least, so that every multiprocessor has work.
PROGRAMS = 256
# Conversions of integers are rare units' work. A float with this exponent has an integer below 2^23 as its last bits, and is
# that integer plus 2^23.
_EXPONENT, _OFFSET = tl.constexpr(0x4B000000), tl.constexpr(8388608.0)


def packed_matmul(inputs: Tensor, weight: PackedWeight) -> Tensor:
    rows, channels = inputs.shape
    out, words = weight.packed.shape
    group_words = words // weight.scale.shape[1]
    form = {"BITS": weight.bits, "HAS_ZERO": weight.zero_point is not None, "SIGN_BITS": SIGN_BITS if weight.signed else 0}
    if rows == 1:
        output = torch.empty(1, out, device=inputs.device, dtype=inputs.dtype)
        # Pieces of a group: so many words that a power of two of them is a group.
        piece = min(16, group_words & -group_words)
        # Measured on an H200 for the linears of the Llama-3.2-1B shape (benchmarks/packed_product_sweep.py).
        block_out, block_words, warps = (16, 64, 1) if out > 4096 else (8, 128 if words <= 256 else 256, 4)
        _matvec[(triton.cdiv(out, block_out),)](
            inputs, weight.packed, weight.scale, weight.zero_point, output, out, words, group_words // piece, **form,
            PIECE=piece, BLOCK_OUT=block_out, BLOCK_PIECES=min(block_words // piece, triton.next_power_of_2(words // piece)),
            num_warps=warps)
        return output
    size = channels // weight.scale.shape[1]
    block = min(128, size & -size)
    if block < 16:                                                              # no product of so few channels
        return inputs @ unpack(weight, inputs.dtype).T
    block_out = 64 if out <= 4096 else 128
    tiles, steps = triton.cdiv(out, block_out), channels // block
    splits = max(1, min(steps, PROGRAMS // tiles))
    partial = torch.empty(splits, rows, out, device=inputs.device, dtype=torch.float32)
    _matmul[(tiles, splits)](
        inputs, weight.packed.view(torch.uint8), weight.scale, weight.zero_point, partial, rows, out, channels, size,
        triton.cdiv(steps, splits), **form, BLOCK_ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_OUT=block_out, BLOCK=block,
        num_warps=4, num_stages=4)
    output = torch.empty(rows, out, device=inputs.device, dtype=inputs.dtype)
    _sum_parts[(triton.cdiv(rows * out, 1024),)](partial, output, rows * out, SPLITS=splits, BLOCK=1024, num_warps=4)
    return output


@triton.jit
def _matvec(inputs, packed, scale, zero_point, output, out, words, group_pieces, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
            SIGN_BITS: tl.constexpr, PIECE: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_PIECES: tl.constexpr):
    PER_WORD: tl.constexpr = 32 // BITS
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = channel < out
    pieces = words // PIECE
    total = tl.zeros((BLOCK_OUT, BLOCK_PIECES), tl.float32)
    for start in range(0, pieces, BLOCK_PIECES):
        piece = start + tl.arange(0, BLOCK_PIECES)
        known = piece < pieces
        word = piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
        mask = in_range[:, None] & known[None, :]
        codes = tl.load(packed + channel[:, None, None] * words + word[None, :, :], mask=mask[:, :, None], other=0) ^ SIGN_BITS
        place = channel[:, None] * (pieces // group_pieces) + (piece // group_pieces)[None, :]
        step = tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
        product = tl.zeros((BLOCK_OUT, BLOCK_PIECES, PIECE), tl.float32)
        sum_of_inputs = tl.zeros((BLOCK_PIECES, PIECE), tl.float32)
        for i in tl.static_range(PER_WORD):
            value = tl.load(inputs + word * PER_WORD + i, mask=known[:, None], other=0.0).to(tl.float32)
            sum_of_inputs += value
            # A code stays where it is in its half of the word; the input makes up for that.
            half = codes if i < PER_WORD // 2 else codes >> 16
            bits = (half & (((1 << BITS) - 1) << (BITS * (i % (PER_WORD // 2))))) | _EXPONENT
            value *= 1.0 / (1 << (BITS * (i % (PER_WORD // 2))))
            product += (bits.to(tl.float32, bitcast=True) - _OFFSET) * value[None, :, :]
        whole = tl.sum(product, 2)
        if HAS_ZERO:
            zero = tl.load(zero_point + place, mask=mask, other=0).to(tl.float32)
            whole -= zero * tl.sum(sum_of_inputs, 1)[None, :]
        else:
            whole -= (1 << (BITS - 1)) * tl.sum(sum_of_inputs, 1)[None, :]
        total += step * whole
    tl.store(output + channel, tl.sum(total, 1).to(output.dtype.element_ty), mask=in_range)


@triton.jit
def _matmul(inputs, packed, scale, zero_point, partial, rows, out, channels, size, steps, BITS: tl.constexpr,
            HAS_ZERO: tl.constexpr, SIGN_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
            BLOCK: tl.constexpr):
    dtype: tl.constexpr = inputs.dtype.element_ty
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = BLOCK // PER_BYTE
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, BLOCK_ROWS)
    column, byte = tl.arange(0, BLOCK), tl.arange(0, BYTES)
    in_range = channel < out
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    first = tl.program_id(1) * steps * BLOCK
    for start in range(first, tl.minimum(first + steps * BLOCK, channels), BLOCK):
        value = tl.load(inputs + row[:, None] * channels + start + column[None, :], mask=(row < rows)[:, None], other=0.0)
        codes = tl.load(packed + channel[:, None] * (channels // PER_BYTE) + start // PER_BYTE + byte[None, :],
                        mask=in_range[:, None], other=0)
        if BITS == 4:                                                           # the low half is the first of two channels
            code = tl.join(codes & 15, codes >> 4).reshape(BLOCK_OUT, BLOCK)
        else:
            code = codes
        if SIGN_BITS != 0:
            code = code ^ 128
        place = channel * (channels // size) + start // size
        step = tl.load(scale + place, mask=in_range, other=0.0).to(tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_point + place, mask=in_range, other=0).to(tl.float32)
        else:
            zero = tl.full((BLOCK_OUT,), 1 << (BITS - 1), tl.float32)
        # Differences of codes are small integers: exact in 16 bits.
        code = (code.to(tl.int32) | _EXPONENT).to(tl.float32, bitcast=True)
        exact = (code - (zero + _OFFSET)[:, None]).to(dtype)
        total += tl.dot(value, tl.trans(exact), input_precision="ieee") * step[None, :]
    place = (tl.program_id(1) * rows + row[:, None]) * out + channel[None, :]
    tl.store(partial + place, total, mask=(row < rows)[:, None] & in_range[None, :])


@triton.jit
def _sum_parts(partial, output, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * count + place, mask=mask, other=0.0)
    tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out, words = weight.packed.shape
    result = torch.empty(weight.shape, device=weight.packed.device, dtype=dtype)
    block = min(512, triton.next_power_of_2(words))
    _unpack[(out, triton.cdiv(words, block))](
        weight.packed, weight.scale, weight.zero_point, result, words, words // weight.scale.shape[1], BITS=weight.bits,
        HAS_ZERO=weight.zero_point is not None, SIGN_BITS=SIGN_BITS if weight.signed else 0, BLOCK_WORDS=block, num_warps=4)
    return result


@triton.jit
def _unpack(packed, scale, zero_point, weight, words, group_words, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
            SIGN_BITS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    PER_WORD: tl.constexpr = 32 // BITS
    channel = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_WORDS
    element = tl.arange(0, BLOCK_WORDS * PER_WORD)
    word = first + element // PER_WORD
    mask = word < words
    codes = tl.load(packed + channel * words + word, mask=mask, other=0) ^ SIGN_BITS
    code = (codes >> (element % PER_WORD * BITS)) & ((1 << BITS) - 1)
    place = channel * (words // group_words) + word // group_words
    if HAS_ZERO:
        zero = tl.load(zero_point + place, mask=mask, other=0).to(tl.float32)
    else:
        zero = (1 << (BITS - 1)) + 0.0
    exact = (code | _EXPONENT).to(tl.float32, bitcast=True) - (zero + _OFFSET)
    value = exact * tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(weight + (channel * words + first) * PER_WORD + element, value.to(weight.dtype.element_ty), mask=mask)


def round_rows(inputs: Tensor, bits: int) -> Tensor:
    rows, size = inputs.shape
    output = torch.empty_like(inputs)
    _round_rows[(rows,)](inputs, output, size, torch.finfo(inputs.dtype).eps, BITS=bits, BLOCK=triton.next_power_of_2(size),
                         num_warps=8 if size > 2048 else 4)
    return output


@triton.jit
def _round_rows(inputs, output, size, smallest, BITS: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = inputs.dtype.element_ty
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * size + column
    mask = column < size
    value = tl.load(inputs + place, mask=mask, other=0.0).to(tl.float32)
    # Each step is rounded to the inputs' type, as torch does it.
    scale = ((tl.max(tl.abs(value), 0) * 2).to(dtype).to(tl.float32) / ((1 << BITS) - 1)).to(dtype).to(tl.float32)
    scale = tl.where(scale > 0, scale, smallest)
    code = (value / scale).to(dtype).to(tl.float32)
    # Half to even, by the addition that leaves no room for a fraction.
    code = (code + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(code, -(1 << (BITS - 1))), (1 << (BITS - 1)) - 1)
    tl.store(output + place, (code * scale).to(dtype), mask=mask)


def add_rms_norm(hidden: Tensor, update: Tensor | None, gain: Tensor, epsilon: float) -> Tensor:
    rows, size = hidden.shape
    output = torch.empty_like(hidden)
    _add_rms_norm[(rows,)](hidden, update, gain, output, size, epsilon, HAS_UPDATE=update is not None,
                           BLOCK=triton.next_power_of_2(size), num_warps=8 if size > 2048 else 4)
    return output


@triton.jit
def _add_rms_norm(hidden, update, gain, output, size, epsilon, HAS_UPDATE: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = hidden.dtype.element_ty
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * size + column
    mask = column < size
    value = tl.load(hidden + place, mask=mask, other=0.0)
    if HAS_UPDATE:
        value = (value.to(tl.float32) + tl.load(update + place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(hidden + place, value, mask=mask)
    exact = value.to(tl.float32)
    exact *= tl.rsqrt(tl.sum(exact * exact, 0) / size + epsilon)
    factor = tl.load(gain + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + place, (factor * exact.to(dtype).to(tl.float32)).to(dtype), mask=mask)


@cache
def _counters(count: int, device: torch.device) -> Tensor:
    """Zeros that programs count with and leave at zero."""
    return torch.zeros(count, device=device, dtype=torch.int32)


def attend(projected: Tensor, rotary: Rotary, positions: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    rows, key_heads, length, size = keys.shape
    heads = projected.shape[1] // size - 2 * key_heads
    splits = triton.cdiv(length, SPLIT_LENGTH)
    block_heads = max(16, triton.next_power_of_2(heads // key_heads))
    output = torch.empty(rows, heads * size, device=projected.device, dtype=projected.dtype)
    # A partial result and, after it, its largest score and its sum of weights.
    partial = torch.empty(rows, heads, splits, size + 2, device=projected.device) if splits > 1 else output
    counters = _counters(rows * key_heads, projected.device) if splits > 1 else positions
    query_gain, key_gain, epsilon = rotary.norms or (None, None, 0.0)
    _attend[(rows, key_heads, splits)](
        projected, rotary.cosine, rotary.sine, query_gain, key_gain, epsilon, positions, keys, values, output, partial, counters,
        length, keys.stride(0), scaling, KEY_HEADS=key_heads, HEADS_PER_KEY=heads // key_heads, BLOCK_HEADS=block_heads,
        SIZE=size, HAS_NORMS=rotary.norms is not None, SPLITS=splits, SPLIT=SPLIT_LENGTH, BLOCK=BLOCK_LENGTH, num_warps=4)
    return output


@triton.jit
def _attend(projected, cosine, sine, query_gain, key_gain, epsilon, positions, keys, values, output, partial, counters, length,
            row_stride, scaling, KEY_HEADS: tl.constexpr, HEADS_PER_KEY: tl.constexpr, BLOCK_HEADS: tl.constexpr,
            SIZE: tl.constexpr, HAS_NORMS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    HEADS: tl.constexpr = KEY_HEADS * HEADS_PER_KEY
    dtype: tl.constexpr = projected.dtype.element_ty
    row, key_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    member, lane = tl.arange(0, BLOCK_HEADS), tl.arange(0, SIZE)
    other = (lane + SIZE // 2) % SIZE                                           # what the rotation mixes a channel with
    sign = tl.where(lane < SIZE // 2, -1.0, 1.0)
    mine = (member < HEADS_PER_KEY)[:, None]
    position = tl.load(positions + row).to(tl.int32)
    begin = split * SPLIT
    if begin > position:
        return
    turn = tl.load(cosine + position * SIZE + lane).to(tl.float32)
    tilt = tl.load(sine + position * SIZE + lane).to(tl.float32) * sign
    source = projected + row * (HEADS + 2 * KEY_HEADS) * SIZE
    head = key_head * HEADS_PER_KEY + member
    query = tl.load(source + head[:, None] * SIZE + lane[None, :], mask=mine, other=0.0)
    query_mix = tl.load(source + head[:, None] * SIZE + other[None, :], mask=mine, other=0.0)
    key = tl.load(source + (HEADS + key_head) * SIZE + lane)
    key_mix = tl.load(source + (HEADS + key_head) * SIZE + other)
    if HAS_NORMS:
        exact = query.to(tl.float32)
        factor = tl.rsqrt(tl.sum(exact * exact, 1) / SIZE + epsilon)[:, None]
        query = (exact * factor).to(dtype).to(tl.float32) * tl.load(query_gain + lane).to(tl.float32)[None, :]
        query_mix = (query_mix.to(tl.float32) * factor).to(dtype).to(tl.float32) * \
            tl.load(query_gain + other).to(tl.float32)[None, :]
        exact = key.to(tl.float32)
        factor = tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + epsilon)
        key = (exact * factor).to(dtype).to(tl.float32) * tl.load(key_gain + lane).to(tl.float32)
        key_mix = (key_mix.to(tl.float32) * factor).to(dtype).to(tl.float32) * tl.load(key_gain + other).to(tl.float32)
    q = (query.to(tl.float32) * turn[None, :] + query_mix.to(tl.float32) * tilt[None, :]).to(dtype)
    base = row * row_stride + key_head * length * SIZE
    end = tl.minimum(position, begin + SPLIT)
    largest = tl.full((BLOCK_HEADS,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_HEADS,), tl.float32)
    total = tl.zeros((BLOCK_HEADS, SIZE), tl.float32)
    if position // SPLIT == split:                                              # the new token itself
        k = (key.to(tl.float32) * turn + key_mix.to(tl.float32) * tilt).to(dtype)
        v = tl.load(source + (HEADS + KEY_HEADS + key_head) * SIZE + lane)
        tl.store(keys + base + position * SIZE + lane, k)
        tl.store(values + base + position * SIZE + lane, v)
        largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
        weight += 1.0
        total += v.to(tl.float32)[None, :]
    for start in range(begin, end, BLOCK):
        time = start + tl.arange(0, BLOCK)
        place = base + time[:, None] * SIZE + lane[None, :]
        known = (time < end)[:, None]
        k = tl.load(keys + place, mask=known, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        score = tl.where((time < end)[None, :], score, -1e30)
        higher = tl.maximum(largest, tl.max(score, 1))
        share = tl.exp(score - higher[:, None])
        decay = tl.exp(largest - higher)
        v = tl.load(values + place, mask=known, other=0.0)
        total = tl.dot(share.to(dtype), v, total * decay[:, None], input_precision="ieee")
        weight = weight * decay + tl.sum(share, 1)
        largest = higher
    target = output + (row * HEADS + head)[:, None] * SIZE + lane[None, :]
    busy = position // SPLIT + 1                                                # splits that have something to add
    if busy == 1:
        tl.store(target, (total / weight[:, None]).to(dtype), mask=mine)
    else:
        part = partial + (row * HEADS + head) * SPLITS * (SIZE + 2)
        place = part + split * (SIZE + 2)
        tl.store(place[:, None] + lane[None, :], total, mask=mine)
        tl.store(place + SIZE, largest, mask=member < HEADS_PER_KEY)
        tl.store(place + SIZE + 1, weight, mask=member < HEADS_PER_KEY)
        tl.debug_barrier()
        counter = counters + row * KEY_HEADS + key_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == busy - 1:
            largest = tl.full((BLOCK_HEADS,), -1e30, tl.float32)
            weight = tl.zeros((BLOCK_HEADS,), tl.float32)
            total = tl.zeros((BLOCK_HEADS, SIZE), tl.float32)
            for index in range(0, busy):
                place = part + index * (SIZE + 2)
                one = tl.load(place + SIZE, mask=member < HEADS_PER_KEY, other=-1e30)
                higher = tl.maximum(largest, one)
                decay, share = tl.exp(largest - higher), tl.exp(one - higher)
                found = tl.load(place[:, None] + lane[None, :], mask=mine, other=0.0)
                total = total * decay[:, None] + found * share[:, None]
                weight = weight * decay + tl.load(place + SIZE + 1, mask=member < HEADS_PER_KEY, other=1.0) * share
                largest = higher
            tl.store(target, (total / weight[:, None]).to(dtype), mask=mine)
            tl.store(counter, 0)


def silu_mul(gate_and_up: Tensor) -> Tensor:
    rows, size = gate_and_up.shape[0], gate_and_up.shape[1] // 2
    output = torch.empty(rows, size, device=gate_and_up.device, dtype=gate_and_up.dtype)
    _silu_mul[(rows, triton.cdiv(size, 1024))](gate_and_up, output, size, BLOCK=1024, num_warps=4)
    return output


@triton.jit
def _silu_mul(gate_and_up, output, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_and_up + row * 2 * size + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + row * 2 * size + size + column, mask=mask, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * size + column, (gate * up).to(output.dtype.element_ty), mask=mask)


def largest_index(values: Tensor) -> Tensor:
    rows, size = values.shape
    parts = triton.cdiv(size, 2048)
    best = torch.empty(rows, parts, device=values.device)
    index = torch.empty(rows, parts, device=values.device, dtype=torch.int32)
    result = torch.empty(rows, device=values.device, dtype=torch.long)
    _largest_in_part[(rows, parts)](values, best, index, size, parts, BLOCK=2048, num_warps=4)
    _largest_of_parts[(rows,)](best, index, result, parts, BLOCK=triton.next_power_of_2(parts), num_warps=1)
    return result


@triton.jit
def _largest_in_part(values, best, index, size, parts, BLOCK: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(values + row * size + column, mask=column < size, other=float("-inf")).to(tl.float32)
    largest = tl.max(found, 0)
    tl.store(best + row * parts + part, largest)
    tl.store(index + row * parts + part, tl.min(tl.where(found == largest, column, size), 0))


@triton.jit
def _largest_of_parts(best, index, result, parts, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    found = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    first = tl.min(tl.where(found == tl.max(found, 0), part, BLOCK), 0)
    tl.store(result + row, tl.load(index + row * parts + tl.minimum(first, parts - 1)).to(tl.int64))

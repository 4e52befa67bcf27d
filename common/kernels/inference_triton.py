"""The Triton kernels behind `common.kernels.inference`, which says what each computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.inference import SIGN_BITS, PackedWeight

# Attention over longer contexts is split between programs, whose partial results a second kernel joins.
SPLIT_LENGTH, BLOCK_LENGTH = 512, 64


def packed_matmul(inputs: Tensor, weight: PackedWeight) -> Tensor:
    rows, channels = inputs.shape
    out, words = weight.packed.shape
    output = torch.empty(rows, out, device=inputs.device, dtype=inputs.dtype)
    arguments = (inputs, weight.packed, weight.scale, weight.zero_point, output)
    sizes = (out, words, words // weight.scale.shape[1])
    form = {"BITS": weight.bits, "HAS_ZERO": weight.zero_point is not None, "SIGN_BITS": SIGN_BITS if weight.signed else 0}
    if rows == 1:
        block_out = 4
        _matvec[(triton.cdiv(out, block_out),)](*arguments, *sizes, **form, BLOCK_OUT=block_out,
                                                BLOCK_WORDS=min(256, triton.next_power_of_2(words)), num_warps=4)
    else:
        block_out = 16 if out <= 4096 else 32
        _matmul[(triton.cdiv(out, block_out),)](*arguments, rows, *sizes, **form, BLOCK_OUT=block_out, BLOCK_WORDS=32,
                                                BLOCK_ROWS=max(16, triton.next_power_of_2(rows)), num_warps=4, num_stages=3)
    return output


@triton.jit
def _matvec(inputs, packed, scale, zero_point, output, out, words, group_words, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
            SIGN_BITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    PER_WORD: tl.constexpr = 32 // BITS
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_range = channel < out
    total = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
    for start in range(0, words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        mask = in_range[:, None] & (word < words)[None, :]
        codes = tl.load(packed + channel.to(tl.int64)[:, None] * words + word[None, :], mask=mask, other=0) ^ SIGN_BITS
        place = channel[:, None] * (words // group_words) + (word // group_words)[None, :]
        step = tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
        product = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
        sum_of_inputs = tl.zeros((BLOCK_WORDS,), tl.float32)
        for i in tl.static_range(PER_WORD):
            value = tl.load(inputs + word * PER_WORD + i, mask=word < words, other=0.0).to(tl.float32)
            code = (codes >> (BITS * i)) & ((1 << BITS) - 1)
            product += code.to(tl.float32) * value[None, :]
            sum_of_inputs += value
        if HAS_ZERO:
            zero = tl.load(zero_point + place, mask=mask, other=0).to(tl.float32)
            total += step * (product - zero * sum_of_inputs[None, :])
        else:
            total += step * (product - (1 << (BITS - 1)) * sum_of_inputs[None, :])
    tl.store(output + channel, tl.sum(total, 1).to(output.dtype.element_ty), mask=in_range)


@triton.jit
def _matmul(inputs, packed, scale, zero_point, output, rows, out, words, group_words, BITS: tl.constexpr,
            HAS_ZERO: tl.constexpr, SIGN_BITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
            BLOCK_WORDS: tl.constexpr):
    PER_WORD: tl.constexpr = 32 // BITS
    dtype: tl.constexpr = inputs.dtype.element_ty
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, BLOCK_ROWS)
    in_range = channel < out
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, words, BLOCK_WORDS):
        word = start + tl.arange(0, BLOCK_WORDS)
        mask = (word < words)[:, None] & in_range[None, :]
        codes = tl.load(packed + channel.to(tl.int64)[None, :] * words + word[:, None], mask=mask, other=0) ^ SIGN_BITS
        place = channel[None, :] * (words // group_words) + (word // group_words)[:, None]
        step = tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_point + place, mask=mask, other=0).to(tl.float32)
        else:
            zero = tl.full((BLOCK_WORDS, BLOCK_OUT), 1 << (BITS - 1), tl.float32)
        for i in tl.static_range(PER_WORD):
            value = tl.load(inputs + row[:, None] * (words * PER_WORD) + (word * PER_WORD + i)[None, :],
                            mask=(row < rows)[:, None] & (word < words)[None, :], other=0.0)
            code = ((codes >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.float32)
            total = tl.dot(value, ((code - zero) * step).to(dtype), total, input_precision="ieee")
    tl.store(output + row[:, None] * out + channel[None, :], total.to(dtype), mask=(row < rows)[:, None] & in_range[None, :])


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
        zero = tl.load(zero_point + place, mask=mask, other=0).to(tl.int32)
    else:
        zero = 1 << (BITS - 1)
    value = (code - zero).to(tl.float32) * tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
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


def rotate_and_store(projected: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor, keys: Tensor, values: Tensor,
                     norms: tuple[Tensor, Tensor, float] | None) -> Tensor:
    rows, key_heads, length, size = keys.shape
    heads = projected.shape[1] // size
    query = torch.empty(rows, heads - 2 * key_heads, size, device=projected.device, dtype=projected.dtype)
    query_gain, key_gain, epsilon = norms or (None, None, 0.0)
    _rotate_and_store[(rows, heads)](projected, cosine, sine, positions, keys, values, query, query_gain, key_gain, epsilon,
                                     heads, length, keys.stride(0), KEY_HEADS=key_heads, HAS_NORMS=norms is not None,
                                     SIZE=size, num_warps=1)
    return query


@triton.jit
def _rotate_and_store(projected, cosine, sine, positions, keys, values, query, query_gain, key_gain, epsilon, heads, length,
                      row_stride, KEY_HEADS: tl.constexpr, HAS_NORMS: tl.constexpr, SIZE: tl.constexpr):
    HALF: tl.constexpr = SIZE // 2
    dtype: tl.constexpr = projected.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    queries = heads - 2 * KEY_HEADS
    lane = tl.arange(0, HALF)
    source = projected + (row * heads + head) * SIZE
    first, second = tl.load(source + lane), tl.load(source + HALF + lane)
    position = tl.load(positions + row)
    if head < queries + KEY_HEADS:
        if HAS_NORMS:
            gain = query_gain if head < queries else key_gain
            one, two = first.to(tl.float32), second.to(tl.float32)
            factor = tl.rsqrt((tl.sum(one * one, 0) + tl.sum(two * two, 0)) / SIZE + epsilon)
            first = ((one * factor).to(dtype).to(tl.float32) * tl.load(gain + lane).to(tl.float32)).to(dtype)
            second = ((two * factor).to(dtype).to(tl.float32) * tl.load(gain + HALF + lane).to(tl.float32)).to(dtype)
        table = position * SIZE + lane
        one, two = first.to(tl.float32), second.to(tl.float32)
        first = (one * tl.load(cosine + table).to(tl.float32) - two * tl.load(sine + table).to(tl.float32)).to(dtype)
        second = (two * tl.load(cosine + table + HALF).to(tl.float32) +
                  one * tl.load(sine + table + HALF).to(tl.float32)).to(dtype)
    if head < queries:
        target = query + (row * queries + head) * SIZE
    elif head < queries + KEY_HEADS:
        target = keys + row * row_stride + ((head - queries) * length + position) * SIZE
    else:
        target = values + row * row_stride + ((head - queries - KEY_HEADS) * length + position) * SIZE
    tl.store(target + lane, first)
    tl.store(target + HALF + lane, second)


def attend(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scaling: float) -> Tensor:
    rows, key_heads, length, size = keys.shape
    heads = query.shape[1]
    splits = triton.cdiv(length, SPLIT_LENGTH)
    block_heads = max(16, triton.next_power_of_2(heads // key_heads))
    output = torch.empty(rows, heads * size, device=query.device, dtype=query.dtype)
    partial = torch.empty(rows, heads, splits, size, device=query.device) if splits > 1 else output
    weights = torch.empty(rows, heads, splits, 2, device=query.device) if splits > 1 else output
    _attend[(rows, key_heads, splits)](query, keys, values, positions, partial, weights, length, keys.stride(0), scaling,
                                       heads, HEADS_PER_KEY=heads // key_heads, BLOCK_HEADS=block_heads, SIZE=size,
                                       SPLITS=splits, SPLIT=SPLIT_LENGTH, BLOCK=BLOCK_LENGTH, num_warps=4)
    if splits > 1:
        _join[(rows, heads)](partial, weights, output, heads, SIZE=size, SPLITS=splits,
                             BLOCK_SPLITS=triton.next_power_of_2(splits), num_warps=1)
    return output


@triton.jit
def _attend(query, keys, values, positions, partial, weights, length, row_stride, scaling, heads, HEADS_PER_KEY: tl.constexpr,
            BLOCK_HEADS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    row, key_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = query.dtype.element_ty
    member, lane = tl.arange(0, BLOCK_HEADS), tl.arange(0, SIZE)
    head = key_head * HEADS_PER_KEY + member
    mine = (member < HEADS_PER_KEY)[:, None]
    q = tl.load(query + (row * heads + head)[:, None] * SIZE + lane[None, :], mask=mine, other=0.0)
    base = row * row_stride + key_head * length * SIZE
    begin = split * SPLIT
    end = tl.minimum(tl.load(positions + row).to(tl.int32) + 1, begin + SPLIT)
    largest = tl.full((BLOCK_HEADS,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_HEADS,), tl.float32)
    total = tl.zeros((BLOCK_HEADS, SIZE), tl.float32)
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
    if SPLITS == 1:
        tl.store(partial + (row * heads + head)[:, None] * SIZE + lane[None, :], (total / weight[:, None]).to(dtype),
                 mask=mine)
    else:
        place = (row * heads + head) * SPLITS + split
        tl.store(partial + place[:, None] * SIZE + lane[None, :], total, mask=mine)
        tl.store(weights + place * 2, largest, mask=member < HEADS_PER_KEY)
        tl.store(weights + place * 2 + 1, weight, mask=member < HEADS_PER_KEY)


@triton.jit
def _join(partial, weights, output, heads, SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    split, lane = tl.arange(0, BLOCK_SPLITS), tl.arange(0, SIZE)
    mask = split < SPLITS
    largest = tl.load(weights + (place * SPLITS + split) * 2, mask=mask, other=-1e30)
    weight = tl.load(weights + (place * SPLITS + split) * 2 + 1, mask=mask, other=0.0)
    factor = tl.exp(largest - tl.max(largest, 0))
    parts = tl.load(partial + (place * SPLITS + split)[:, None] * SIZE + lane[None, :], mask=mask[:, None], other=0.0)
    total = tl.sum(parts * factor[:, None], 0) / tl.sum(weight * factor, 0)
    tl.store(output + place * SIZE + lane, total.to(output.dtype.element_ty))


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

"""The Triton kernels of attention of one token to a cache, and of the rotary embedding;
`common.kernels.inference` says what each computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.forms import Rotary, Rounding, TwoBytes
from common.kernels.launch_triton import begin, counters, launch, release, store_bytes

# Attention over longer contexts is split between programs; the last of them to finish joins their
# results.
SPLIT_LENGTH, BLOCK_LENGTH = 512, 64


def attend(
    projected: Tensor,
    rotary: Rotary,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    rounding: Rounding | None = None,
) -> Tensor | TwoBytes:
    """As it is where blocks of channels have parts of what several programs find."""
    rows, key_heads, length, size = keys.shape
    heads = projected.shape[1] // size - 2 * key_heads
    splits = triton.cdiv(length, SPLIT_LENGTH)
    block_heads = max(16, triton.next_power_of_2(heads // key_heads))
    block = rounding.block if rounding is not None else None
    if block is not None and heads // key_heads * size % block == 0:
        result = TwoBytes.empty(rows, heads * size, block, projected)
        output, unit, sums = result.codes, result.unit, result.sums
    else:
        result = output = projected.new_empty(rows, heads * size)
        block = unit = sums = None
    # A partial result and, after it, its largest score and its sum of weights.
    partial = (
        torch.empty(rows, heads, splits, size + 2, device=projected.device)
        if splits > 1
        else output
    )
    counts = counters(rows * key_heads, projected.device) if splits > 1 else positions
    query_gain, key_gain, epsilon = rotary.norms or (None, None, 0.0)
    _attend[(rows, key_heads, splits)](
        projected,
        rotary.cosine,
        rotary.sine,
        query_gain,
        key_gain,
        epsilon,
        positions,
        keys,
        values,
        output,
        unit,
        sums,
        partial,
        counts,
        length,
        keys.stride(0),
        scaling,
        KEY_HEADS=key_heads,
        HEADS_PER_KEY=heads // key_heads,
        BLOCK_HEADS=block_heads,
        SIZE=size,
        HAS_NORMS=rotary.norms is not None,
        SPLITS=splits,
        SPLIT=SPLIT_LENGTH,
        BLOCK=BLOCK_LENGTH,
        PIECE=block,
        ONE_ROW=rows == 1,
        num_warps=4,
        **launch(),
    )
    return result


@triton.jit
def _attend(
    projected,
    cosine,
    sine,
    query_gain,
    key_gain,
    epsilon,
    positions,
    keys,
    values,
    output,
    unit,
    sums,
    partial,
    counters,
    length,
    row_stride,
    scaling,
    KEY_HEADS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HEADS: tl.constexpr = KEY_HEADS * HEADS_PER_KEY
    dtype: tl.constexpr = projected.dtype.element_ty
    row, key_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    member, lane = tl.arange(0, BLOCK_HEADS), tl.arange(0, SIZE)
    other = (lane + SIZE // 2) % SIZE  # what the rotation mixes a channel with
    sign = tl.where(lane < SIZE // 2, -1.0, 1.0)
    mine = (member < HEADS_PER_KEY)[:, None]
    position = tl.load(positions + row).to(tl.int32)
    turn = tl.load(cosine + position * SIZE + lane).to(tl.float32)
    tilt = tl.load(sine + position * SIZE + lane).to(tl.float32) * sign
    begin(OVERLAP)  # the kernel before has no part in those
    if ONE_ROW:
        release(OVERLAP)
    origin = split * SPLIT
    if origin > position:
        return
    source = projected + row * (HEADS + 2 * KEY_HEADS) * SIZE
    head = key_head * HEADS_PER_KEY + member
    query = tl.load(source + head[:, None] * SIZE + lane[None, :], mask=mine, other=0.0)
    query_mix = tl.load(source + head[:, None] * SIZE + other[None, :], mask=mine, other=0.0)
    key = tl.load(source + (HEADS + key_head) * SIZE + lane)
    key_mix = tl.load(source + (HEADS + key_head) * SIZE + other)
    if HAS_NORMS:
        exact = query.to(tl.float32)
        factor = tl.rsqrt(tl.sum(exact * exact, 1) / SIZE + epsilon)[:, None]
        query = (exact * factor).to(dtype).to(tl.float32) * tl.load(query_gain + lane).to(
            tl.float32
        )[None, :]
        query_mix = (query_mix.to(tl.float32) * factor).to(dtype).to(tl.float32) * tl.load(
            query_gain + other
        ).to(tl.float32)[None, :]
        exact = key.to(tl.float32)
        factor = tl.rsqrt(tl.sum(exact * exact, 0) / SIZE + epsilon)
        key = (exact * factor).to(dtype).to(tl.float32) * tl.load(key_gain + lane).to(tl.float32)
        key_mix = (key_mix.to(tl.float32) * factor).to(dtype).to(tl.float32) * tl.load(
            key_gain + other
        ).to(tl.float32)
    q = (query.to(tl.float32) * turn[None, :] + query_mix.to(tl.float32) * tilt[None, :]).to(dtype)
    base = row * row_stride + key_head * length * SIZE
    end = tl.minimum(position, origin + SPLIT)
    largest = tl.full((BLOCK_HEADS,), -1e30, tl.float32)
    weight = tl.zeros((BLOCK_HEADS,), tl.float32)
    total = tl.zeros((BLOCK_HEADS, SIZE), tl.float32)
    if position // SPLIT == split:  # the new token itself
        k = (key.to(tl.float32) * turn + key_mix.to(tl.float32) * tilt).to(dtype)
        v = tl.load(source + (HEADS + KEY_HEADS + key_head) * SIZE + lane)
        tl.store(keys + base + position * SIZE + lane, k)
        tl.store(values + base + position * SIZE + lane, v)
        largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
        weight += 1.0
        total += v.to(tl.float32)[None, :]
    for start in range(origin, end, BLOCK):
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
    release(OVERLAP)
    busy = position // SPLIT + 1  # splits that have something to add
    if busy == 1:
        found = (total / weight[:, None]).to(dtype)
        _store(found, output, unit, sums, row, key_head, KEY_HEADS, HEADS_PER_KEY, PIECE)
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
                weight = (
                    weight * decay
                    + tl.load(place + SIZE + 1, mask=member < HEADS_PER_KEY, other=1.0) * share
                )
                largest = higher
            found = (total / weight[:, None]).to(dtype)
            _store(found, output, unit, sums, row, key_head, KEY_HEADS, HEADS_PER_KEY, PIECE)
            tl.store(counter, 0)


@triton.jit
def _store(
    found,
    output,
    unit,
    sums,
    row,
    key_head,
    KEY_HEADS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Store what the heads [more than HEADS_PER_KEY, size] of a key have found."""
    SIZE: tl.constexpr = found.shape[1]
    WIDTH: tl.constexpr = HEADS_PER_KEY * SIZE
    if PIECE is None:
        member, lane = tl.arange(0, found.shape[0]), tl.arange(0, SIZE)
        head = row * KEY_HEADS * HEADS_PER_KEY + key_head * HEADS_PER_KEY + member
        place = output + head[:, None] * SIZE + lane[None, :]
        tl.store(place, found, mask=(member < HEADS_PER_KEY)[:, None])
    else:
        blocks = tl.reshape(found.to(tl.float32), (found.shape[0] * SIZE // PIECE, PIECE))
        first = key_head * (WIDTH // PIECE)
        end, size = first + WIDTH // PIECE, KEY_HEADS * WIDTH
        store_bytes(blocks, output, unit, sums, row, first, end, size, PIECE)


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

"""The Triton kernel of attention of one token to a cache; `common.kernels.inference` says what it
computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.forms import Rotary
from common.kernels.launch_triton import begin, counters, launch

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
) -> Tensor:
    rows, key_heads, length, size = keys.shape
    heads = projected.shape[1] // size - 2 * key_heads
    splits = triton.cdiv(length, SPLIT_LENGTH)
    block_heads = max(16, triton.next_power_of_2(heads // key_heads))
    output = torch.empty(rows, heads * size, device=projected.device, dtype=projected.dtype)
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
        num_warps=4,
        **launch(),
    )
    return output


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
    target = output + (row * HEADS + head)[:, None] * SIZE + lane[None, :]
    busy = position // SPLIT + 1  # splits that have something to add
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
                weight = (
                    weight * decay
                    + tl.load(place + SIZE + 1, mask=member < HEADS_PER_KEY, other=1.0) * share
                )
                largest = higher
            tl.store(target, (total / weight[:, None]).to(dtype), mask=mine)
            tl.store(counter, 0)

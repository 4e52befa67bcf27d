"""The Triton kernel behind `sums.channel_sums`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows that a program reads at once and in all, and its channels.
BLOCK_ROWS, PROGRAM_ROWS, BLOCK_CHANNELS = 16, 256, 128


def channel_sums(
    rows: Tensor, weights: Tensor | None, squares: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`sums.channel_sums`; every input is read once. Programs leave their sums to be added up, so
    that they are the same each time.
    """
    count, channels = rows.shape
    parts = max(1, triton.cdiv(count, PROGRAM_ROWS))
    found = torch.empty(3, parts, channels, device=rows.device)
    _channel_sums[(triton.cdiv(channels, BLOCK_CHANNELS), parts)](
        rows.contiguous(),
        None if weights is None else weights.float().contiguous(),
        *found,
        count,
        channels,
        HAS_WEIGHTS=squares and weights is not None,
        HAS_SQUARES=squares,
        PROGRAM_ROWS=PROGRAM_ROWS,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_CHANNELS=BLOCK_CHANNELS,
        num_warps=4,
    )
    magnitudes = found[2].sum(0)
    # A program's largest value leaves NaN out.
    largest = torch.where(magnitudes.isnan(), magnitudes, found[1].amax(0))
    return found[0].sum(0) if squares else None, largest, magnitudes


@triton.jit
def _channel_sums(
    rows,
    weights,
    squares,
    largest,
    magnitudes,
    count,
    channels,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    square = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    most = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    first = tl.program_id(1) * PROGRAM_ROWS
    for start in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        row = first + start + tl.arange(0, BLOCK_ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        place = rows + row.to(tl.int64)[:, None] * channels + channel[None, :]
        values = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if HAS_SQUARES:
            weighted = values
            if HAS_WEIGHTS:
                weighted *= tl.load(weights + row, mask=row < count, other=0.0)[:, None]
            square += weighted * values
        size = tl.abs(values)
        most, total = tl.maximum(most, size), total + size
    place = tl.program_id(1) * channels + channel
    if HAS_SQUARES:
        tl.store(squares + place, tl.sum(square, 0), mask=inside)
    tl.store(largest + place, tl.max(most, 0), mask=inside)
    tl.store(magnitudes + place, tl.sum(total, 0), mask=inside)

"""How a product [rows, out] is shared out between programs: each has a tile of it, and where tiles
are too few to give every multiprocessor work, several have one and split its sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch_triton import counters

# Output channels of a program, for few and for many of them, and its warps. Measured on an H200 for
# the linears of the Llama-3.2-1B shape (benchmarks/packed_product_sweep.py).
BLOCK_OUT, BLOCK_OUT_WIDE, WARPS = 64, 128, 4
# Rows of a program where there are many.
BLOCK_ROWS = 128


def tile_of_few_rows(out: int) -> int:
    """Output channels of a program."""
    return BLOCK_OUT_WIDE if out > 4096 else BLOCK_OUT


class Split(NamedTuple):
    """tiles: of the output channels.
    splits: programs for a tile, with up to `each` steps of channels.
    partial: [splits, rows, out] float32, which they leave to be added up, and counters of those
        that have; anything where there is one.
    """

    tiles: int
    splits: int
    each: int
    output: Tensor
    partial: Tensor
    counters: Tensor


def split_sums(
    rows: int,
    row_tiles: int,
    out: int,
    block_out: int,
    steps: int,
    programs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Split:
    """Args: programs: up to how many there are where tiles, of `row_tiles` parts of the rows, too,
    are fewer.
    """
    tiles = triton.cdiv(out, block_out)
    each = triton.cdiv(steps, max(1, min(steps, programs // max(1, tiles * row_tiles))))
    splits = triton.cdiv(steps, each)
    output = partial = counts = torch.empty(rows, out, device=device, dtype=dtype)
    if splits > 1:
        partial = torch.empty(splits, rows, out, device=device)
        counts = counters(tiles * row_tiles, device)
    return Split(tiles, splits, each, output, partial, counts)


@triton.jit
def read_tile(rows, out, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Output channels and rows of a program, which its first and third axis count. Programs read
    the last channel, and the last row, in place of those beyond.
    """
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tl.minimum(channel, out - 1), tl.minimum(row, rows - 1)


@triton.jit
def add_splits(total, output, partial, counters, rows, out, SPLITS: tl.constexpr):
    """Store a tile [channels, rows] of a product [rows, out]; where what is summed is split between
    programs, along their second axis, the last one of the tile adds all up.
    """
    channel = tl.program_id(0) * total.shape[0] + tl.arange(0, total.shape[0])
    first = tl.program_id(2) * total.shape[1]
    row = tl.arange(0, total.shape[1])
    mask = (first + row < rows)[None, :] & (channel < out)[:, None]
    place = row[None, :] * out + channel[:, None]
    output += first.to(tl.int64) * out
    partial += first.to(tl.int64) * out
    if SPLITS == 1:
        tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + tl.program_id(1) * rows * out + place, total, mask=mask)
        tl.debug_barrier()
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros_like(total)
            for split in range(SPLITS):
                total += tl.load(partial + split * rows * out + place, mask=mask, other=0.0)
            tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)
            tl.store(counter, 0)

"""The Triton kernel of a product of several rows with packed weights on the units for products of
bytes: `forms.TwoBytes` says what its inputs are.

Integers save what turning codes into floats takes, most of a product's instructions where rows are
few, and their sums are exact within a block of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.forms import PackedWeight, TwoBytes
from common.kernels.launch_triton import begin, launch, release, stages
from common.kernels.splits_triton import WARPS, add_splits, read_tile, split_sums, tile_of_few_rows

# Rows of a program at most; then of a product the programs (`split_sums`), and loads on their way.
# Measured as the rest of its form.
BLOCK_ROWS = 32
PROGRAMS, STAGES = 264, 3


def bytes_matmul(inputs: TwoBytes, weight: PackedWeight) -> Tensor:
    rows, channels = len(inputs.codes), inputs.codes.shape[2]
    out, blocks = len(weight.packed), inputs.unit.shape[1]
    assert blocks * weight.block == channels == weight.shape[1]  # rounded for weights like these
    block_rows = min(BLOCK_ROWS, max(8, triton.next_power_of_2(rows)))
    row_tiles, device = triton.cdiv(rows, block_rows), inputs.codes.device
    block_out, dtype = tile_of_few_rows(out), inputs.dtype
    split = split_sums(rows, row_tiles, out, block_out, blocks, PROGRAMS, device, dtype)
    bytes_of_stage = weight.block * (block_out * weight.bits // 8 + 2 * block_rows)
    _bytes_matmul[(split.tiles, split.splits, row_tiles)](
        inputs.codes,
        inputs.unit,
        inputs.sums,
        weight.packed,
        weight.scale,
        weight.zero_point,
        split.output,
        split.partial,
        split.counters,
        rows,
        out,
        channels,
        weight.packed.shape[1],
        blocks,
        blocks // weight.scale.shape[1],
        split.each,
        BITS=weight.bits,
        HAS_ZERO=weight.zero_point is not None,
        BLOCK=weight.block,
        BLOCK_OUT=block_out,
        BLOCK_ROWS=block_rows,
        SPLITS=split.splits,
        ASSEMBLY=inputs.codes.is_cuda and torch.version.hip is None,
        num_warps=WARPS,
        num_stages=stages(STAGES, bytes_of_stage),
        **launch(),
    )
    return split.output


@triton.jit
def _halves(codes, ASSEMBLY: tl.constexpr):
    """The low and the high halves of bytes, as bytes; four at once."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            """{
                .reg .b32 shifted;
                and.b32 $0, $2, 0x0F0F0F0F;
                shr.u32 shifted, $2, 4;
                and.b32 $1, shifted, 0x0F0F0F0F;
            }""",
            "=r,=r,r",
            [codes],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = (codes & 15).to(tl.int8), (codes >> 4).to(tl.int8)
    return low, high


@triton.jit
def _bytes_matmul(
    inputs,
    unit,
    sums,
    packed,
    scale,
    zero_point,
    output,
    partial,
    counters,
    rows,
    out,
    channels,
    row_bytes,
    blocks,
    group_blocks,
    each,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weights are the left factor, so that they go from registers into tensor cores. The low and
    the high bytes of a row are two neighbours in the right one, so that a thread has both of their
    sums.
    """
    begin(OVERLAP)
    BYTES: tl.constexpr = BLOCK * BITS // 8
    channel, row = read_tile(rows, out, BLOCK_OUT, BLOCK_ROWS)
    half = tl.program_id(2) * 2 * BLOCK_ROWS + tl.arange(0, 2 * BLOCK_ROWS)
    byte = tl.arange(0, BYTES)
    weights = packed + channel.to(tl.int64)[:, None] * row_bytes + byte[None, :]
    values = inputs + tl.minimum(half, 2 * rows - 1)[None, :] * channels + byte[:, None]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, blocks)):
        place = channel * (blocks // group_blocks) + block // group_blocks
        step = tl.load(scale + place).to(tl.float32)
        # 4-bit codes are stored as that much more than they are; zero-points are taken off with it.
        zero = tl.full((BLOCK_OUT,), 8.0 if BITS == 4 else 0.0, tl.float32)
        if HAS_ZERO:
            zero += tl.load(zero_point + place).to(tl.float32)
        size = tl.load(unit + row * blocks + block)
        codes = tl.load(weights + block * BYTES)
        if BITS == 4:
            low, high = _halves(codes, ASSEMBLY)
            product = tl.dot(low, tl.load(values + block * BLOCK), out_dtype=tl.int32)
            second = tl.load(values + block * BLOCK + BYTES)
            product = tl.dot(high, second, product, out_dtype=tl.int32)
        else:
            product = tl.dot(codes, tl.load(values + block * BLOCK), out_dtype=tl.int32)
        low_bytes, high_bytes = tl.split(tl.reshape(product, (BLOCK_OUT, BLOCK_ROWS, 2)))
        found = (high_bytes * 256 + low_bytes).to(tl.float32) * size[None, :]
        if HAS_ZERO or BITS == 4:
            found -= zero[:, None] * tl.load(sums + row * blocks + block)[None, :]
        total += found * step[:, None]
    release(OVERLAP)
    add_splits(total, output, partial, counters, rows, out, SPLITS)

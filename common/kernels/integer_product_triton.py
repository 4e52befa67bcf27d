"""The Triton kernel of a product of rounded inputs with weights of 8 bits: of integers, with sums
that are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from common.kernels.forms import PackedWeight, Rounded
from common.kernels.launch_triton import begin, launch, release, stages
from common.kernels.splits_triton import (
    BLOCK_OUT,
    BLOCK_OUT_WIDE,
    BLOCK_ROWS,
    WARPS,
    add_splits,
    read_tile,
    split_sums,
    tile_of_few_rows,
)

# Of a product: the programs (`split_sums`), and loads on their way; of many rows, for which two
# programs of a multiprocessor are best, as many as fit into so many bytes. Measured as the rest of
# its form.
PROGRAMS, STAGES, STAGES_BYTES = 132, 5, 96 << 10


def integer_matmul(inputs: Rounded, weight: PackedWeight) -> Tensor:
    """Rounded inputs [rows, in] times the transposed weight: [rows, out]; 32 divides `in`."""
    rows, channels = inputs.codes.shape
    out, block = len(weight.packed), min(128, channels & -channels)
    if rows <= BLOCK_ROWS // 2:
        block_rows, block_out = max(16, triton.next_power_of_2(rows)), tile_of_few_rows(out)
    else:
        block_rows = BLOCK_ROWS
        wide = triton.cdiv(out, BLOCK_OUT_WIDE) * triton.cdiv(rows, BLOCK_ROWS) >= PROGRAMS
        block_out = BLOCK_OUT_WIDE if wide else BLOCK_OUT
    bytes_of_stage = block * (block_out + block_rows)
    loads = STAGES if block_rows < BLOCK_ROWS else STAGES_BYTES // bytes_of_stage
    row_tiles, blocks = triton.cdiv(rows, block_rows), channels // block
    device, dtype = inputs.codes.device, inputs.scale.dtype
    split = split_sums(rows, row_tiles, out, block_out, blocks, PROGRAMS, device, dtype)
    _integer_matmul[(split.tiles, split.splits, row_tiles)](
        inputs.codes,
        inputs.scale,
        weight.packed,
        weight.scale,
        split.output,
        split.partial,
        split.counters,
        rows,
        out,
        channels,
        blocks,
        split.each,
        BLOCK=block,
        BLOCK_OUT=block_out,
        BLOCK_ROWS=block_rows,
        SPLITS=split.splits,
        num_warps=WARPS,
        num_stages=stages(loads, bytes_of_stage),
        **launch(),
    )
    return split.output


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
    blocks,
    each,
    BLOCK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    channel, row = read_tile(rows, out, BLOCK_OUT, BLOCK_ROWS)
    byte = tl.arange(0, BLOCK)
    weights = packed + channel.to(tl.int64)[:, None] * channels + byte[None, :]
    values = inputs + row.to(tl.int64)[None, :] * channels + byte[:, None]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.int32)
    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, blocks)):
        codes, value = tl.load(weights + block * BLOCK), tl.load(values + block * BLOCK)
        total = tl.dot(codes, value, total, out_dtype=tl.int32)
    step = tl.load(scale + channel).to(tl.float32)
    token = tl.load(input_scale + row).to(tl.float32)
    release(OVERLAP)
    product = total.to(tl.float32) * step[:, None] * token[None, :]
    add_splits(product, output, partial, counters, rows, out, SPLITS)

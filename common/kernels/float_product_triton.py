"""The Triton kernel of a product with packed weights whose codes become floats as they are read.

Weights are rounded to the inputs' type, as those that are unpacked before a product are. A sum goes
on over all channels, and no scale is left for the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.base import gpu
from common.kernels.forms import PackedWeight
from common.kernels.launch_triton import begin, launch, release, stages
from common.kernels.splits_triton import (
    BLOCK_OUT,
    BLOCK_ROWS,
    WARPS,
    add_splits,
    read_tile,
    split_sums,
    tile_of_few_rows,
)

# Of a product: the programs (`split_sums`), and loads on their way. Measured as the rest of its
# form.
PROGRAMS, STAGES = 264, 3


def float_matmul(inputs: Tensor, weight: PackedWeight) -> Tensor:
    """inputs [rows, in] times the transposed weight: [rows, out]."""
    rows, channels = inputs.shape
    out, block, element = len(weight.packed), weight.block, inputs.element_size()
    block_rows, block_out = BLOCK_ROWS, BLOCK_OUT
    if rows <= BLOCK_ROWS // 2:
        block_rows = max(16, triton.next_power_of_2(rows))
        block_out = tile_of_few_rows(out) if element == 2 else BLOCK_OUT
    row_tiles, blocks = triton.cdiv(rows, block_rows), channels // block
    split = split_sums(
        rows, row_tiles, out, block_out, blocks, PROGRAMS, inputs.device, inputs.dtype
    )
    # Without tensor cores for the type weights go through shared memory, a half of 4 bits at once.
    kept = 0 if element == 2 else block_out * block * element * weight.bits // 8
    # Scales of the same 16-bit type: weights are computed in it, two at a time.
    cuda = inputs.is_cuda and torch.version.hip is None
    pairs = cuda and weight.bits == 4 and element == 2 and weight.scale.dtype == inputs.dtype
    _float_matmul[(split.tiles, split.splits, row_tiles)](
        inputs,
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
        BLOCK=block,
        BLOCK_OUT=block_out,
        BLOCK_ROWS=block_rows,
        SPLITS=split.splits,
        PAIRS=pairs,
        HOPPER=cuda and gpu.properties().capability[0] == 9,
        num_warps=WARPS,
        num_stages=stages(
            STAGES, block * (block_out * weight.bits // 8 + block_rows * element), kept
        ),
        **launch(),
    )
    return split.output


@triton.jit
def _float_matmul(
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
    PAIRS: tl.constexpr,
    HOPPER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Weights are the left factor, so that they go from registers into tensor cores."""
    begin(OVERLAP)
    dtype: tl.constexpr = inputs.dtype.element_ty
    BYTES: tl.constexpr = BLOCK * BITS // 8
    channel, row = read_tile(rows, out, BLOCK_OUT, BLOCK_ROWS)
    byte = tl.arange(0, BYTES)
    weights = packed + channel.to(tl.int64)[:, None] * row_bytes + byte[None, :]
    values = inputs + row.to(tl.int64)[None, :] * channels + byte[:, None]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    first = tl.program_id(1) * each
    for block in range(first, tl.minimum(first + each, blocks)):
        place = channel * (blocks // group_blocks) + block // group_blocks
        step = tl.load(scale + place)[:, None]
        # 4-bit codes are stored as that much more than they are; zero-points are taken off with it.
        zero = tl.full((BLOCK_OUT, 1), 8.0 if BITS == 4 else 0.0, tl.float32)
        if HAS_ZERO:
            zero += tl.load(zero_point + place).to(tl.float32)[:, None]
        codes = tl.load(weights + block * BYTES)
        value = tl.load(values + block * BLOCK)
        if BITS == 4:
            second = tl.load(values + block * BLOCK + BYTES)
            if PAIRS:
                low, high = _pairs(codes, zero, step)
            else:
                low = _float(codes & 15, zero, step, dtype)
                high = _float(codes >> 4, zero, step, dtype)
            total = tl.dot(low, value, total, input_precision="ieee")
            total = tl.dot(high, second, total, input_precision="ieee")
        else:
            weight = _float(codes, zero, step, dtype)
            total = tl.dot(weight, value, total, input_precision="ieee")
        if HOPPER:
            total = _awaited(total)
    release(OVERLAP)
    add_splits(total, output, partial, counters, rows, out, SPLITS)


@triton.jit
def _awaited(total):
    """The same sums, once their products are done: a Hopper's units read weights from registers
    while a program goes on, and what Triton 3.6 compiles wrote to them too early (its issue 9433).
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _float(codes, zero, step, dtype: tl.constexpr):
    """The weights of codes."""
    return ((codes.to(tl.float32) - zero) * step.to(tl.float32)).to(dtype)


@triton.jit
def _pairs(codes, zero, step):
    """The weights of the low and of the high halves of bytes, four at once, in the scale's 16-bit
    type: a float with one of these exponents has a code as its last bits and is a power of two more
    than it. Less that power and the zero-point it is exact, and rounded once, times the scale.
    """
    BF16: tl.constexpr = step.dtype == tl.bfloat16
    POWER: tl.constexpr = 128.0 if BF16 else 1024.0
    return tl.inline_asm_elementwise(
        _ASSEMBLY_BF16 if BF16 else _ASSEMBLY_FP16,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [codes, (-POWER - zero).to(step.dtype), step],
        dtype=(step.dtype, step.dtype),
        is_pure=True,
        pack=4,
    )


def _assembly(dtype: str, exponent: str, one: str) -> tl.constexpr:
    """Codes in $4, what is added in $5 and $6, the scales in $7 and $8."""
    lines = [
        ".reg .b32 low, high, exponent, one, none;",
        f"mov.b32 exponent, 0x{exponent}{exponent};",
        f"mov.b32 one, 0x{one}{one};",
        "mov.b32 none, 0x80008000;",  # twice -0
        "and.b32 low, $4, 0x0F0F0F0F;",
        "shr.u32 high, $4, 4;",
        "and.b32 high, high, 0x0F0F0F0F;",
    ]
    for result in range(4):
        half, bytes_taken = ("low", "high")[result // 2], ("0x4140", "0x4342")[result % 2]
        less, step = 5 + result % 2, 7 + result % 2
        lines += [
            f"prmt.b32 ${result}, {half}, exponent, {bytes_taken};",
            f"fma.rn.{dtype} ${result}, ${result}, one, ${less};",
            f"fma.rn.{dtype} ${result}, ${result}, ${step}, none;",
        ]
    return tl.constexpr("{" + "\n".join(lines) + "}")


_ASSEMBLY_BF16 = _assembly("bf16x2", "4343", "3F80")
_ASSEMBLY_FP16 = _assembly("f16x2", "6464", "3C00")

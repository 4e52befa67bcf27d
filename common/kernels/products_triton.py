"""Products with packed weights, by the Triton kernel that fits each, and the kernel that unpacks
weights; `common.kernels.inference` says what each computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.bytes_product_triton import bytes_matmul
from common.kernels.float_product_triton import float_matmul
from common.kernels.forms import PackedWeight, TwoBytes
from common.kernels.integer_product_triton import integer_matmul
from common.kernels.launch_triton import begin, launch
from common.kernels.row_product_triton import fits_one_row, row_matmul

# Channels that a program unpacks, at most.
UNPACKED = 2048


__all__ = ["fits_one_row", "integer_matmul", "packed_matmul", "row_matmul", "unpack"]


def packed_matmul(inputs: Tensor | TwoBytes, weight: PackedWeight) -> Tensor:
    if isinstance(inputs, TwoBytes):
        return bytes_matmul(inputs, weight)
    if len(inputs) == 1 and fits_one_row(inputs, weight):
        return row_matmul(inputs, weight, early=False)
    return float_matmul(inputs, weight)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    out, channels = weight.shape
    result = torch.empty(out, channels, device=weight.packed.device, dtype=dtype)
    blocks = channels // weight.block
    together = min(triton.next_power_of_2(blocks), max(1, UNPACKED // weight.block))
    _unpack[(out, triton.cdiv(blocks, together))](
        weight.packed,
        weight.scale,
        weight.zero_point,
        result,
        blocks,
        blocks // weight.scale.shape[1],
        BITS=weight.bits,
        HAS_ZERO=weight.zero_point is not None,
        BLOCK=weight.block,
        BLOCKS=together,
        num_warps=4,
        **launch(),
    )
    return result


@triton.jit
def _unpack(
    packed,
    scale,
    zero_point,
    weight,
    blocks,
    group_blocks,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some blocks of a row of weights, of which each byte and each scale is read once."""
    begin(OVERLAP)
    BYTES: tl.constexpr = BLOCK * BITS // 8
    dtype: tl.constexpr = weight.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside, byte = block < blocks, tl.arange(0, BYTES)
    place = row * (blocks // group_blocks) + block // group_blocks
    step = tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)[:, None]
    zero = tl.full((BLOCKS, 1), 8.0 if BITS == 4 else 0.0, tl.float32)
    if HAS_ZERO:
        zero += tl.load(zero_point + place, mask=inside, other=0).to(tl.float32)[:, None]
    source = packed + (row * blocks + block)[:, None] * BYTES + byte[None, :]
    codes = tl.load(source, mask=inside[:, None], other=0)
    target = weight + (row * blocks + block)[:, None] * BLOCK + byte[None, :]
    if BITS == 4:
        high = ((codes >> 4).to(tl.float32) - zero) * step
        tl.store(target + BYTES, high.to(dtype), mask=inside[:, None])
        codes = codes & 15
    tl.store(target, ((codes.to(tl.float32) - zero) * step).to(dtype), mask=inside[:, None])

"""Products with packed weights on a CPU, through the low-bit products that torch brings for it.

What they take was measured (docs/performance.md): activations in bfloat16, the only type they are
fast in, for up to `FUSED_ROWS` rows. For more, weights are unpacked in tiles that stay in the
CPU's cache and multiplied in the activations' own type, which is then faster and exact. A group of
8-bit weights is no form of torch's; it is two groups of 4 bits, the high and the low half of each
code, with the inputs twice.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from common.kernels.forms import OFFSET, PackedWeight, Rounded

# Rows of activations up to which torch's product is faster than unpacking, and elements that are
# unpacked at once.
FUSED_ROWS, TILE = 32, 1 << 18
# Groups that the product for 4 bits takes.
GROUP_SIZES = (256, 128, 64, 32)
# What output and input channels have to be multiples of in the product for int8, which reads past
# the end of other weights.
BYTES = (16, 32)


@cache
def block_rows() -> int | None:
    """Output channels that lie side by side in torch's form of 4-bit codes on this CPU: byte j of
    a channel's bytes holds output channel j in its low half and j + block / 2 in the high one.
    None where the form is another one, or there is none.
    """
    codes = torch.randint(0, 16, (128, 32), generator=torch.Generator().manual_seed(0))
    try:
        packed = _convert(codes)
    except (AttributeError, RuntimeError):  # a torch without it, or not on this kind of CPU
        return None
    for block in (32, 64):
        if torch.equal(_halves(packed, block).transpose(1, 2).reshape(codes.shape), codes.byte()):
            return block
    return None


@cache
def multiplies_integers() -> bool:
    """Whether this CPU has units for products of int8 with sums of int32 (VNNI). Without them
    oneDNN's overflow, and torch's are slow.
    """
    return torch.cpu._is_vnni_supported()


def is_worth_it(dtype: torch.dtype) -> bool:
    """Whether packed weights run faster than dense ones of a type. Where a CPU has units for its
    matrices, it reads a prompt in less time than unpacking takes.
    """
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_row_of_bytes(weight: PackedWeight) -> bool:
    """Whether a row has one scale, no zero-point and a byte for each code."""
    return weight.bits == 8 and weight.scale.shape[1] == 1 and weight.zero_point is None


def fits(weight: PackedWeight) -> bool:
    """Whether `repack` takes it."""
    if is_row_of_bytes(weight):
        return weight.shape[0] % BYTES[0] == weight.shape[1] % BYTES[1] == 0
    block = block_rows()
    return block is not None and weight.shape[0] % block == 0 and _group_size(weight) is not None


def repack(weight: PackedWeight) -> PackedWeight:
    """A weight of `pack` that `fits`, in the form that `product` takes."""
    codes, size = weight.integers(), _group_size(weight)
    if is_row_of_bytes(weight):
        return replace(weight, kernel_scale=torch.ones(1, len(codes), 1, dtype=torch.bfloat16))
    assert size is not None
    repeats = weight.shape[1] // (weight.scale.shape[1] * size)
    scale = weight.scale.float().repeat_interleave(repeats, 1)
    zero = torch.zeros_like(scale)
    if weight.zero_point is not None:
        zero = weight.zero_point.float().repeat_interleave(repeats, 1)
    if weight.bits == 4:
        halves, offset = codes.int() + OFFSET, -zero * scale
    else:  # code = 16 * (high - 8) + low
        unsigned = codes.int() + 128
        halves = torch.cat([unsigned >> 4, unsigned & 15], 1)
        offset = torch.cat([torch.zeros_like(zero), (OFFSET - zero) * scale], 1)
        scale = torch.cat([16 * scale, scale], 1)
    return replace(
        weight,
        packed=_convert(halves).view(len(codes), -1),
        kernel_scale=torch.stack([scale, offset], -1).transpose(0, 1).bfloat16().contiguous(),
    )


def product(rows: Tensor, weight: PackedWeight) -> Tensor:
    """rows [rows, in] times the transposed, repacked weight: [rows, out]."""
    scales = weight.kernel_scale
    if len(rows) > FUSED_ROWS:
        return _by_tiles(rows, weight)
    assert scales is not None
    if is_row_of_bytes(weight):
        sums = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), weight.packed, scales.flatten())
        return (sums.float() * weight.scale.float().view(1, -1)).to(rows.dtype)
    inputs = rows.bfloat16()
    if weight.bits == 8:
        inputs = torch.cat([inputs, inputs], 1)
    size = inputs.shape[1] // len(scales)
    # A part of a joined weight: the product takes scales to lie without gaps, and does not look.
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        inputs, weight.packed, size, scales.contiguous()
    ).to(rows.dtype)


def integer_product(inputs: Rounded, weight: PackedWeight) -> Tensor:
    """Rounded inputs [rows, in] times the transposed weight of 8 bits, one symmetric group per row:
    [rows, out].
    """
    if multiplies_integers():
        sums = torch._int_mm(inputs.codes, weight.packed.T).float()
    else:
        # Eight bits are exact in bfloat16, and sums of products in float32.
        plain = replace(weight, scale=torch.ones_like(weight.scale, dtype=torch.float32))
        sums = product(inputs.codes.float(), plain)
    return (sums * inputs.scale.float() * weight.scale.float().view(1, -1)).to(inputs.scale.dtype)


def unpack_transposed(weight: PackedWeight) -> Tensor:
    """A repacked weight with groups, transposed: [in, out] float32."""
    block = block_rows()
    assert block is not None
    channels, groups = weight.shape[1], weight.scale.shape[1]
    halves = weight.packed.view(len(weight.packed) // block, -1, block // 2)
    if weight.bits == 4:
        values = torch.cat([(halves & 15).float(), (halves >> 4).float()], -1)
    else:
        high, low = halves.split(channels, 1)
        values = torch.cat(
            [((high << 4) | (low & 15)).float(), ((high & 240) | (low >> 4)).float()], -1
        )
    scale, offset = weight.scale.float(), float(OFFSET if weight.bits == 4 else 128)
    zero = offset if weight.zero_point is None else weight.zero_point.float() + offset
    scale, shift = (
        part.view(-1, block, groups).transpose(1, 2).unsqueeze(2).contiguous()
        for part in (scale, -zero * scale)
    )
    grouped = values.view(len(values), groups, channels // groups, block)
    found = torch.empty(groups, channels // groups, len(values), block)
    torch.addcmul(shift, grouped, scale, out=found.permute(2, 0, 1, 3))
    return found.view(channels, -1)


def _by_tiles(rows: Tensor, weight: PackedWeight) -> Tensor:
    """`product` of unpacked weights, in float32: where 16-bit types have units, they run dense."""
    out, channels = weight.shape
    inputs = rows.float()
    if is_row_of_bytes(weight):
        size = max(1, TILE // channels)
        tiles = (weight.packed[start : start + size].float() for start in range(0, out, size))
        found = torch.cat([functional.linear(inputs, tile) for tile in tiles], 1)
        return found.mul_(weight.scale.float().view(1, -1)).to(rows.dtype)
    block = block_rows()
    assert block is not None
    size = block * max(1, TILE // (block * channels))
    blocks = (unpack_transposed(weight[start : start + size]) for start in range(0, out, size))
    return torch.cat([inputs @ part for part in blocks], 1).to(rows.dtype)


def _group_size(weight: PackedWeight) -> int | None:
    """The largest of `GROUP_SIZES` that divides the weight's groups."""
    own = weight.shape[1] // weight.scale.shape[1]
    return next((size for size in GROUP_SIZES if own % size == 0), None)


def _convert(codes: Tensor) -> Tensor:
    """Codes [out, in] of 0 to 15 in torch's form."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def _halves(packed: Tensor, block: int) -> Tensor:
    """Codes [blocks, in, block] of 0 to 15 in torch's form."""
    blocks = packed.view(len(packed) // block, -1, block // 2)
    return torch.cat([blocks & 15, blocks >> 4], -1)

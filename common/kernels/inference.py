"""What a decode step consists of, on packed or dense weights: matrix product, norm, rotary
embedding, attention, gate.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from common.base.gpu import TENSOR_CORES, supports
from common.kernels import processor
from common.kernels.dispatch import triton_kernels, use_triton
from common.kernels.forms import PackedWeight, Rotary, Rounded, Rounding, TwoBytes
from common.numerics.grid import codes_per_token

# Rows of activations up to which weights are unpacked inside the product: by the weights' bits one
# of integers in two bytes; one of floats of 16 bits with weights of 4, twice as many rows where the
# weights are too many to stay in the cache unpacked; and any other of floats. For more they are
# unpacked before it, in tiles of so many weights. Of a tile the rows are a multiple of ALIGNED:
# cuBLAS is slow on outputs at odd addresses.
BYTES_ROWS, FLOAT_ROWS, CACHED, FUSED_ROWS = {4: 64, 8: 128}, 128, 1 << 23, 64
UNPACKED_ELEMENTS, ALIGNED = 1 << 26, 128
# Of each row of a product that unpacks weights inside: sums in float32 that its programs leave to
# be added up, at most (`splits_triton`: programs times output channels of one).
PARTIAL_SUMS = 264 * 128


def _fused(rows: int, weight: PackedWeight, element: int) -> bool:
    """Whether weights are unpacked inside a product with so many rows of floats of `element` bytes
    on a GPU.
    """
    if weight.block < 32:  # there is no product of so few channels
        return False
    if rows == 1:
        return True
    most = FUSED_ROWS
    if weight.bits == 4 and element == 2:
        out, channels = weight.shape
        most = 2 * FLOAT_ROWS if out * channels > CACHED else FLOAT_ROWS
    return rows <= most and supports(TENSOR_CORES)


def _takes_bytes(rows: int, weight: PackedWeight, element: int) -> bool:
    """Whether a product with so many rows, of numbers of `element` bytes, is one of integers in two
    bytes on a GPU.
    """
    # Integers of 16 bits would be a loss to float32; of fewer channels there is no such product.
    fits = weight.block >= 64 and element == 2
    return fits and 1 < rows <= BYTES_ROWS[weight.bits] and supports(TENSOR_CORES)


def wanted_rounding(inputs: Tensor, weight: PackedWeight) -> Rounding | None:
    """How `packed_matmul` rounds inputs like these, of which rows and type count, if it does; so
    that what makes them may do it.
    """
    wanted = use_triton(inputs) and _takes_bytes(len(inputs), weight, inputs.element_size())
    return Rounding(16, weight.block) if wanted else None


def packed_matmul(inputs: Tensor | TwoBytes, weight: PackedWeight) -> Tensor:
    """inputs [..., in], or [rows, in] rounded in the weight's blocks, times the transposed weight:
    [..., out].
    """
    if isinstance(inputs, TwoBytes):
        kernels = triton_kernels(inputs.codes)
        return (
            kernels.products.packed_matmul(inputs, weight)
            if kernels
            else packed_matmul(inputs.values(), weight)
        )
    rows = as_rows(inputs)
    kernels = triton_kernels(inputs)
    if weight.kernel_scale is not None:
        result = processor.product(rows, weight)
    elif (rounding := wanted_rounding(rows, weight)) is not None:
        result = packed_matmul(round_rows(rows, rounding), weight)
    elif kernels and _fused(len(rows), weight, rows.element_size()):
        result = kernels.products.packed_matmul(rows, weight)
    else:
        result = _by_tiles(rows, weight)
    return result.view(*inputs.shape[:-1], result.shape[1])


def as_rows(inputs: Tensor) -> Tensor:
    """inputs [..., in] as [rows, in], one after the other, as kernels read them."""
    return inputs.reshape(math.prod(inputs.shape[:-1]), inputs.shape[-1]).contiguous()


def _by_tiles(rows: Tensor, weight: PackedWeight) -> Tensor:
    """rows [rows, in] times the transposed weight, unpacked: [rows, out]."""
    out, channels = weight.shape
    tile = _tile(channels)
    if out <= tile:
        return functional.linear(rows, unpack(weight, rows.dtype))
    result = rows.new_empty(len(rows), out)
    for start in range(0, out, tile):
        part = slice(start, start + tile)
        torch.mm(rows, unpack(weight[part], rows.dtype).T, out=result[:, part])
    return result


def _tile(channels: int) -> int:
    """Output channels that are unpacked at once of weights with so many input channels."""
    return max(ALIGNED, UNPACKED_ELEMENTS // channels // ALIGNED * ALIGNED)


def product_bytes(rows: int, weight: PackedWeight, element: int, integers: bool = False) -> int:
    """What a product with so many rows of numbers of `element` bytes takes of a GPU's memory, at
    most, beside what goes in and comes out.

    Args:
        integers: the rows are rounded to integers (`integer_matmul`).
    """
    out, channels = weight.shape
    sums = rows * PARTIAL_SUMS * torch.float32.itemsize if rows > 1 else 0
    if integers:
        if _multiplies_integers(channels):
            return sums + rows * channels
        return rows * channels * (1 + element) + product_bytes(rows, weight, element)
    if _takes_bytes(rows, weight, element):
        return sums + rows * channels * 2 + rows * channels // weight.block * 8
    if _fused(rows, weight, element):
        return sums
    return min(out, _tile(channels)) * channels * element


def row_matmul(
    inputs: Tensor,
    weight: PackedWeight,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    added_to: Tensor | None = None,
    bits: int | None = None,
) -> Tensor:
    """`packed_matmul` for one token, with what comes before and after it in a decoder layer: in all
    one kernel, which reads weights while the kernel before still runs. So nothing may have changed
    them just before. The kernel takes inputs as integers of 16 bits with a scale for every 16 to 32
    of them.

    Args:
        inputs: [1, in].
        norm: gain [in] and epsilon of an RMSNorm that the inputs go through first.
        gated: the output channels are gate and up, and silu(gate) * up [1, out / 2] is wanted.
        added_to: [1, out], to which the product is added in place.
        bits: at most 8, if the inputs, normed, are rounded per token to so many.
    """
    kernels = triton_kernels(inputs)
    if kernels and kernels.products.fits_one_row(inputs, weight):
        return kernels.products.row_matmul(inputs, weight, norm, gated, added_to, bits)
    normed = inputs if norm is None else add_rms_norm(inputs, None, *norm)
    if bits is None:
        output = packed_matmul(normed, weight)
    else:
        output = integer_matmul(cast(Rounded, round_rows(normed, Rounding(bits))), weight)
    if gated:
        output = silu_mul(*output.chunk(2, -1))
    return output if added_to is None else added_to.add_(output)


def integer_matmul(inputs: Rounded, weight: PackedWeight) -> Tensor:
    """Rounded inputs times the transposed weight of 8 bits, one symmetric group per row: [rows,
    out]. On a GPU from compute capability 8.0 on products of integers with integer sums.
    """
    if weight.kernel_scale is not None:
        return processor.integer_product(inputs, weight)
    kernels = triton_kernels(inputs.codes)
    if kernels and _multiplies_integers(weight.shape[1]):
        return kernels.products.integer_matmul(inputs, weight)
    return packed_matmul(inputs.values(), weight)


def _multiplies_integers(channels: int) -> bool:
    """Whether a GPU has a product of integers for so many input channels."""
    return channels % 32 == 0 and supports(TENSOR_CORES)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weights [out, in] that the codes stand for."""
    if kernels := triton_kernels(weight.packed):
        return kernels.products.unpack(weight, dtype)
    codes = weight.integers().unflatten(1, (weight.scale.shape[1], -1)).float()
    if weight.zero_point is not None:
        codes -= weight.zero_point.float().unsqueeze(-1)
    return (codes * weight.scale.float().unsqueeze(-1)).flatten(1).to(dtype)


def round_rows(inputs: Tensor, rounding: Rounding) -> Rounded | TwoBytes:
    """Inputs [rows, in] as integers."""
    if kernels := triton_kernels(inputs):
        return kernels.inference.round_rows(inputs.contiguous(), rounding)
    if rounding.block is None:
        codes, scale = codes_per_token(inputs, rounding.bits)
        return Rounded(codes.to(torch.int8), scale)
    values = inputs.float().unflatten(1, (-1, rounding.block))
    unit = values.abs().amax(2).clamp(min=1e-30) / 32512  # the largest whose low byte is signed
    codes = (values / unit.unsqueeze(2)).round().int()
    low = (codes + 128) % 256 - 128
    halves = torch.stack([low, (codes - low) // 256], 1).flatten(2)
    return TwoBytes(halves.to(torch.int8), unit, codes.sum(2) * unit, inputs.dtype)


def rounded(values: Tensor, rounding: Rounding | None) -> Tensor | Rounded | TwoBytes:
    """Values [rows, in], as integers if that is asked for."""
    return values if rounding is None else round_rows(values, rounding)


def add_rms_norm(
    hidden: Tensor,
    update: Tensor | None,
    gain: Tensor,
    epsilon: float,
    rounding: Rounding | None = None,
) -> Tensor | Rounded | TwoBytes:
    """RMSNorm of hidden [rows, size] after `update`, if any, has been added to it in place; rounded
    if asked for.
    """
    if kernels := triton_kernels(hidden):
        return kernels.inference.add_rms_norm(hidden, update, gain, epsilon, rounding)
    if update is not None:
        hidden += update
    values = hidden.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return rounded(gain * values.to(hidden.dtype), rounding)


def attend(
    projected: Tensor,
    rotary: Rotary,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    rounding: Rounding | None = None,
) -> Tensor | Rounded | TwoBytes:
    """Attention of one new token per row, whose key and value are put into the cache: [rows, heads
    * size], rounded if asked for.

    Args:
        projected: [rows, (heads + 2 * key-value heads) * size], queries, keys, values side by side.
        positions: [rows], how many tokens each row has in the cache.
        keys, values: the cache, [rows, key-value heads, length, size].
    """
    if kernels := triton_kernels(projected):
        attended = kernels.attention.attend(
            projected, rotary, positions, keys, values, scaling, rounding
        )
        return rounded(attended, rounding) if isinstance(attended, Tensor) else attended
    key_heads, length, size = keys.shape[1:]
    heads = projected.view(len(projected), -1, size)
    query, key, value = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], dim=1)
    if rotary.norms is not None:
        query, key = (
            add_rms_norm(part.clone(), None, gain, rotary.norms[2])
            for part, gain in ((query, rotary.norms[0]), (key, rotary.norms[1]))
        )
    turn, tilt = (table[positions].unsqueeze(1) for table in (rotary.cosine, rotary.sine))
    query, key = (
        part * turn + torch.cat([-part[..., size // 2 :], part[..., : size // 2]], -1) * tilt
        for part in (query, key)
    )
    rows = torch.arange(len(projected), device=projected.device)
    keys[rows, :, positions], values[rows, :, positions] = key, value
    seen = torch.arange(length, device=query.device) <= positions[:, None]
    attended = functional.scaled_dot_product_attention(
        query.unsqueeze(2), keys, values, seen[:, None, None], scale=scaling, enable_gqa=True
    )
    return rounded(attended.flatten(1), rounding)


def rotate_heads(
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
    queries: int = 0,
) -> None:
    """Turn heads [batch, length, heads, size] in place by the rotary embedding. They may be a part
    of a wider tensor, as long as those of a token lie side by side.

    Args:
        cosine, sine: [1 or batch, length, size].
        norms: where heads go through an RMSNorm first, its gains [size] for the first `queries`
            heads and for the rest, which are keys, and its epsilon.
    """
    if kernels := triton_kernels(heads):
        return kernels.attention.rotate_heads(heads, cosine, sine, norms, queries)
    normed, size = heads, heads.shape[-1]
    if norms is not None:
        parts = heads.split([queries, heads.shape[2] - queries], dim=2)
        normed = torch.cat(
            [
                add_rms_norm(part, None, gain, norms[2])
                for part, gain in zip(parts, norms[:2], strict=True)
            ],
            dim=2,
        )
    turned = torch.cat([-normed[..., size // 2 :], normed[..., : size // 2]], -1)
    heads.copy_(normed * cosine.unsqueeze(2) + turned * sine.unsqueeze(2))


def silu_mul(
    gate: Tensor, up: Tensor, rounding: Rounding | None = None
) -> Tensor | Rounded | TwoBytes:
    """silu(gate) * up of two tensors [rows, size], which may be halves of a wider one; rounded if
    asked for.
    """
    if kernels := triton_kernels(gate):
        return kernels.inference.silu_mul(gate, up, rounding)
    return rounded(functional.silu(gate) * up, rounding)


def largest_index(values: Tensor) -> Tensor:
    """The index of the largest of each row of values [rows, size], the first of equal ones, -1
    where that is infinite or any is NaN: [rows].
    """
    if kernels := triton_kernels(values):
        return kernels.inference.largest_index(values)
    largest, index = values.max(-1)
    return (index + 1) * largest.isfinite() - 1

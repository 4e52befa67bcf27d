"""The Triton kernel of one row's product with packed weights, whose time is that of reading them;
`common.kernels.inference` says what it computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.forms import PackedWeight
from common.kernels.launch_triton import (
    MAGIC,
    begin,
    launch,
    release,
    round_to_step,
    step_of_token,
)

# Programs that a product with one row should have at least.
PROGRAMS = 128


def fits_one_row(inputs: Tensor, weight: PackedWeight) -> bool:
    """Whether the kernel for one row can do it, whose programs have a thread for every four words
    of a channel.
    """
    return weight.block >= 32 and inputs.element_size() == 2 and _lanes(weight) <= 1024


def _lanes(weight: PackedWeight) -> int:
    """Threads of a program of one row's product; at least as many as there are four words in a
    channel.
    """
    return (
        triton.next_power_of_2(weight.shape[1] // weight.block) * weight.block * weight.bits // 128
    )


def _members(weight: PackedWeight) -> int:
    """Output channels of a program of one row's product: many, but fewer where it has many threads
    or there are few programs. Measured on an H200 (benchmarks/packed_product_sweep.py).
    """
    lanes = _lanes(weight)
    most = 32 if lanes <= 128 else 8 if lanes <= 512 else 4
    return min(most, 1 << max(2, (len(weight.packed) // PROGRAMS).bit_length() - 1))


def row_matmul(
    inputs: Tensor,
    weight: PackedWeight,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    added_to: Tensor | None = None,
    bits: int | None = None,
    early: bool = True,
) -> Tensor:
    """Args: early: read weights before the kernel before ends."""
    out, channels = weight.shape
    block_out = _members(weight)
    gain, epsilon = norm or (None, 0.0)
    if gated:
        out //= 2
    output = (
        added_to
        if added_to is not None
        else torch.empty(1, out, device=inputs.device, dtype=inputs.dtype)
    )
    pieces, warps = channels // weight.block, max(1, _lanes(weight) // 32)
    _matvec[(triton.cdiv(out, block_out // 2 if gated else block_out),)](
        inputs,
        weight.packed.view(torch.int32),
        weight.scale,
        weight.zero_point,
        gain,
        output,
        out,
        pieces,
        pieces // weight.scale.shape[1],
        epsilon,
        torch.finfo(inputs.dtype).eps,
        BITS=weight.bits,
        INPUT_BITS=bits or 0,
        HAS_ZERO=weight.zero_point is not None,
        HAS_NORM=norm is not None,
        GATED=gated,
        ADDED=added_to is not None,
        EARLY=early,
        PIECE=weight.block * weight.bits // 32,
        BLOCK_OUT=block_out,
        PIECES=triton.next_power_of_2(pieces),
        ASSEMBLY=inputs.is_cuda and torch.version.hip is None,
        num_warps=warps,
        **launch(),
    )
    return output


@triton.jit
def _four(values):
    """The four tensors [...] of one [..., 2, 2]."""
    even, odd = tl.split(values)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _dot_bytes(total, codes, bytes, SIGNED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """total plus the products of the four bytes of two words; those of codes are signed or not, the
    others are signed.
    """
    if ASSEMBLY:
        if SIGNED:
            total = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [codes, bytes, total],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            total = tl.inline_asm_elementwise(
                "dp4a.u32.s32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [codes, bytes, total],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    else:
        for byte in tl.static_range(4):
            code = codes << (24 - 8 * byte) >> 24
            if not SIGNED:
                code &= 255
            total += code * (bytes << (24 - 8 * byte) >> 24)
    return total


@triton.jit
def _bytes(values):
    """Numbers [lanes, 4], rounded to integers of 16 bits, as two tensors [lanes]: four low and four
    high signed bytes.
    """
    # Half a low byte more makes low bytes signed.
    halves = (values + (MAGIC + 128)).to(tl.int32, bitcast=True)
    first, second, third, fourth = _four(tl.reshape(halves, (values.shape[0], 2, 2)))
    first, second = first & 0xFFFF | third << 16, second & 0xFFFF | fourth << 16
    low = first & 0x00FF00FF | second << 8 & -0x00FF0100
    return low ^ -0x7F7F7F80, first >> 8 & 0x00FF00FF | second & -0x00FF0100


@triton.jit
def _matvec(
    inputs,
    packed,
    scale,
    zero_point,
    gain,
    output,
    out,
    pieces,
    group_pieces,
    epsilon,
    smallest,
    BITS: tl.constexpr,
    INPUT_BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PIECES: tl.constexpr,
    OVERLAP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One row times weights, in products of bytes with sums of integers. A piece is the words of a
    block of channels; a lane reads four words of each output channel. Its inputs become integers of
    16 bits, a high and a low byte, with a scale of their own: that moves them by less than rounding
    the largest to bfloat16 did. With INPUT_BITS they are rounded as a token to at most 8 bits, a
    high byte. EARLY: weights are read before the kernel before ends.
    """
    if not EARLY:
        begin(OVERLAP)
    CHUNKS: tl.constexpr = PIECE // 4
    LANES: tl.constexpr = PIECES * CHUNKS
    member = tl.arange(0, BLOCK_OUT)
    if GATED:  # a gate, what it is for, the next gate ...
        channel = tl.program_id(0) * (BLOCK_OUT // 2) + member // 2
        row = tl.minimum(channel, out - 1) + member % 2 * out
    else:
        channel = tl.program_id(0) * BLOCK_OUT + member
        row = tl.minimum(channel, out - 1)
    words, word = pieces * PIECE, tl.arange(0, LANES * 4)
    codes = tl.load(
        packed + row[:, None] * words + word[None, :], mask=(word < words)[None, :], other=0
    )
    codes = _four(tl.reshape(codes, (BLOCK_OUT, LANES, 2, 2)))
    group = (
        row[:, None] * (pieces // group_pieces)
        + (tl.minimum(tl.arange(0, PIECES), pieces - 1) // group_pieces)[None, :]
    )
    step = tl.load(scale + group).to(tl.float32)
    zero = tl.full((BLOCK_OUT, PIECES), 8.0 if BITS == 4 else 0.0, tl.float32)
    if HAS_ZERO:
        zero += tl.load(zero_point + group).to(tl.float32)
    if EARLY:
        begin(OVERLAP)
    release(OVERLAP)
    inside = tl.arange(0, LANES) < pieces * CHUNKS
    lane = tl.where(inside, tl.arange(0, LANES), 0)
    start = lane // CHUNKS * (PIECE * 32 // BITS) + lane % CHUNKS * 16
    channels = words * 32 // BITS
    if HAS_NORM and INPUT_BITS:  # the norm as it is rounded comes first
        column = tl.arange(0, LANES * 128 // BITS)
        value = tl.load(inputs + column, mask=column < channels, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / channels + epsilon)
    dtype: tl.constexpr = inputs.dtype.element_ty
    squares, largest = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    values = ()
    for eight in tl.static_range(16 // BITS):
        place = (start + eight // 2 * 4 * PIECE + eight % 2 * 8)[:, None] + tl.arange(0, 8)[None, :]
        value = tl.load(inputs + place).to(tl.float32)
        if HAS_NORM:
            factor = tl.load(gain + place).to(tl.float32)
            if INPUT_BITS:
                value = (
                    ((value * inverse).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
                )
            else:
                squares += tl.sum(value * value, 1)
                value *= factor
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
        values = values + tl.split(tl.permute(tl.reshape(value, (LANES, 2, 4)), (0, 2, 1)))
    if INPUT_BITS:
        unit = step_of_token(tl.max(largest, 0), dtype, smallest, INPUT_BITS)
    else:
        unit = tl.maximum(largest, 1e-30) * (1.0 / 32512)
    ones = tl.full((LANES,), 0x01010101, tl.int32)
    low_of_inputs, high_of_inputs = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.int32)
    low_sum, high_sum = (
        tl.zeros((BLOCK_OUT, LANES), tl.int32),
        tl.zeros((BLOCK_OUT, LANES), tl.int32),
    )
    for index in tl.static_range(32 // BITS):
        if INPUT_BITS:
            low, high = _bytes(round_to_step(values[index], unit, dtype, INPUT_BITS) * 256.0)
        else:
            low, high = _bytes(values[index] * (1.0 / unit)[:, None])
            low_of_inputs = _dot_bytes(low_of_inputs, ones, low, True, ASSEMBLY)
        high_of_inputs = _dot_bytes(high_of_inputs, ones, high, True, ASSEMBLY)
        code = codes[index % 4]
        if BITS == 4:
            # The high half of a byte stays where it is, as sixteen times the code.
            code &= 0x0F0F0F0F if index < 4 else -0x0F0F0F10
            if index == 4:
                low_sum, high_sum = low_sum << 4, high_sum << 4
        if not INPUT_BITS:
            low_sum = _dot_bytes(low_sum, code, low[None, :], BITS == 8, ASSEMBLY)
        high_sum = _dot_bytes(high_sum, code, high[None, :], BITS == 8, ASSEMBLY)
    unit = tl.where(inside, unit, 0.0)
    HIGH: tl.constexpr = 1.0 if INPUT_BITS else 256.0
    sum_of_inputs = (low_of_inputs.to(tl.float32) + high_of_inputs.to(tl.float32) * HIGH) * unit
    if BITS == 4:
        unit *= 1 / 16
    product = (low_sum.to(tl.float32) + high_sum.to(tl.float32) * HIGH) * unit[None, :]
    product = tl.sum(tl.reshape(product, (BLOCK_OUT, PIECES, CHUNKS)), 2)
    if BITS == 4 or HAS_ZERO:
        product -= zero * tl.sum(tl.reshape(sum_of_inputs, (PIECES, CHUNKS)), 1)[None, :]
    whole = tl.sum(product * step, 1)
    if HAS_NORM and not INPUT_BITS:
        whole *= tl.rsqrt(tl.sum(tl.where(inside, squares, 0.0), 0) / channels + epsilon)
    if GATED:
        gate, up = tl.split(tl.reshape(whole, (BLOCK_OUT // 2, 2)))
        target = tl.program_id(0) * (BLOCK_OUT // 2) + tl.arange(0, BLOCK_OUT // 2)
        tl.store(output + target, (gate * tl.sigmoid(gate) * up).to(dtype), mask=target < out)
    else:
        if ADDED:
            whole += tl.load(output + channel, mask=channel < out, other=0.0).to(tl.float32)
        tl.store(output + channel, whole.to(dtype), mask=channel < out)

"""What the kernels of a decode step take besides plain tensors: packed weights, rounded
activations, a rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Of 4-bit codes, which are stored unsigned.
OFFSET = 8


@dataclass(frozen=True)
class PackedWeight:
    """Weights [out, in] as integer codes: (code - zero-point) * scale. Made by `pack`.

    packed: 8 bits [out, in] int8. 4 bits [out, in / 2] uint8, in blocks of `block` channels: byte j
        of a block holds channel j in its low half and channel j + block / 2 in the high one, so
        that a block is unpacked into two pieces as they are.
    scale: [out, groups] floating; zero_point: [out, groups] int8, None for zero.
    kernel_scale: only for torch's products on a CPU (`processor.repack`), in whose form `packed`
        then is: scales and what is added [groups of half bytes, out, 2] bfloat16; for int8 with a
        scale per row ones [1, out, 1].
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    kernel_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), self.packed.shape[1] * (8 // self.bits)

    @property
    def block(self) -> int:
        """Channels that a product takes at once: a power of two of them, all in one group."""
        size = self.shape[1] // self.scale.shape[1]
        return min(128, size & -size)

    def __getitem__(self, rows: slice | Tensor) -> PackedWeight:
        """The same for some of the rows."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return replace(
            self,
            packed=self.packed[rows],
            scale=self.scale[rows],
            zero_point=zero_point,
            kernel_scale=None if self.kernel_scale is None else self.kernel_scale[:, rows],
        )

    def integers(self) -> Tensor:
        """The codes [out, in] int8 of a weight that `pack` made."""
        if self.bits == 8:
            return self.packed
        halves = self.packed.unflatten(1, (-1, 1, self.block // 2))
        return (torch.cat([halves & 15, halves >> 4], dim=2).to(torch.int8) - OFFSET).flatten(1)


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> PackedWeight:
    """Codes [out, in] int8 of 4 or 8 bits with their scale and zero-point [out, groups]. Of 4 bits
    groups have an even number of channels.
    """
    zero_point = None if zero_point is None else zero_point.to(torch.int8).contiguous()
    whole = PackedWeight(codes.contiguous(), scale.contiguous(), zero_point, 8)
    if bits == 8:
        return whole
    low, high = (codes + OFFSET).to(torch.uint8).unflatten(1, (-1, 2, whole.block // 2)).unbind(2)
    return replace(whole, packed=(low | high << 4).flatten(1), bits=4)


@dataclass(frozen=True)
class Rounding:
    """How a product takes its inputs, where it takes integers: as `Rounded` to at most 8 bits, or,
    where a block is given, as `TwoBytes` with a scale for so many channels.
    """

    bits: int
    block: int | None = None


@dataclass(frozen=True)
class Rounded:
    """Activations rounded per token (`grid.round_per_token`): codes [rows, in] int8 and scale
    [rows, 1].
    """

    codes: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale


@dataclass(frozen=True)
class TwoBytes:
    """Activations [rows, in] as integers of 16 bits, which the units for products of bytes take as
    two: low + 256 * high.

    codes: [rows, 2, in] int8, of each row the low bytes and then the high ones.
    unit: [rows, blocks] float32, what an integer counts in each block of channels.
    sums: [rows, blocks] float32, of the numbers that the integers of a block stand for.
    dtype: of the activations.
    """

    codes: Tensor
    unit: Tensor
    sums: Tensor
    dtype: torch.dtype

    @classmethod
    def empty(cls, rows: int, size: int, block: int, like: Tensor) -> TwoBytes:
        """For a kernel to fill: on the device and of the type of `like`."""
        codes = torch.empty(rows, 2, size, device=like.device, dtype=torch.int8)
        unit, sums = torch.empty(2, rows, size // block, device=like.device)
        return cls(codes, unit, sums, like.dtype)

    def values(self) -> Tensor:
        low, high = self.codes.float().unbind(1)
        blocks = (low + 256 * high).unflatten(1, (self.unit.shape[1], -1))
        return (blocks * self.unit.unsqueeze(2)).flatten(1).to(self.dtype)


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model: cosine and sine [length, size], and the norms of queries and
    keys where it has them.

    norms: gains [size] of queries and keys, and their epsilon.
    """

    cosine: Tensor
    sine: Tensor
    norms: tuple[Tensor, Tensor, float] | None = None

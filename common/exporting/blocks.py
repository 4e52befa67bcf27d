"""Codes on an integer grid as GGUF's blocks of 32 weights.

A block holds 32 weights of a row: of Q4_0 code * d, code from -8 to 7; of Q4_1 code * d + m, code
from 0 to 15; of Q8_0 code * d, code from -128 to 127. d and m are float16. A group of 64 or 128 is
repeated for each block. Nothing is rounded again but scales that float16 does not hold, and the
minimum m = -zero_point * scale, a product that may have a binary digit more than float16.
"""

from __future__ import annotations

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from common.numerics.grid import Grid

BLOCK = 32


# By bits and whether codes are centred on zero.
_TYPES = {
    (4, False): GGMLQuantizationType.Q4_1,
    (4, True): GGMLQuantizationType.Q4_0,
    (8, True): GGMLQuantizationType.Q8_0,
}


def has_blocks(grid: Grid) -> bool:
    """Whether there are blocks that hold a grid's codes as they are."""
    whole = grid.group_size is None or grid.group_size % BLOCK == 0
    return whole and (grid.bits, grid.symmetric) in _TYPES


def block_type(grid: Grid) -> GGMLQuantizationType:
    """The type of a grid's blocks, where it has some."""
    return _TYPES[grid.bits, grid.symmetric]


def row_bytes(kind: GGMLQuantizationType, in_features: int) -> int:
    """Bytes of a row of `in_features` values, a multiple of the type's block."""
    values, size = GGML_QUANT_SIZES[kind]
    return in_features // values * size


def minimum(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """What the lowest code of each group stands for, [out, groups] float32; scale, zero_point [out,
    groups].
    """
    return (grid.code_min - zero_point.float()) * scale.float()


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The blocks of a linear, row by row, as bytes [out, `row_bytes`] uint8.

    Args:
        codes: [out, in] int8, in a multiple of 32.
        scale: [out, groups], any floating type.
        zero_point: [out, groups], any type; None where the grid is symmetric.
        grid: one that `has_blocks`.
    """
    blocks = codes.unflatten(1, (-1, BLOCK))
    repeats = blocks.shape[1] // scale.shape[1]
    parts = [scale]
    if zero_point is not None:
        parts.append(minimum(scale, zero_point, grid))
    # [out, blocks, 2 or 4] bytes: d, and m where there is one.
    head = torch.stack([_float16(part) for part in parts], -1).view(torch.uint8)
    head = head.repeat_interleave(repeats, dim=1)
    if grid.bits == 8:
        body = blocks.contiguous().view(torch.uint8)
    else:
        levels = (blocks - grid.code_min).to(torch.uint8)
        body = levels[..., : BLOCK // 2] | levels[..., BLOCK // 2 :] << 4
    return torch.cat([head, body], -1).flatten(1)


def _float16(values: Tensor) -> Tensor:
    return values.float().to(torch.float16)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q_proj or k_proj, or what belongs to them, [heads * size, ...], in the order in which
    channel 2i of a head is turned with channel 2i + 1, not i with i + size / 2.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

"""What a decode step consists of, on packed or dense weights: matrix product, norm, rotary embedding, attention, gate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from common.grid import round_per_token
from common.kernels import use_triton

# Rows of activations up to which weights are unpacked inside the product; for more they are unpacked once, in a tile.
FUSED_ROWS = 64
UNPACKED_ELEMENTS = 1 << 26
# Turns four signed bytes into offset ones and back: 0x80808080 as an int32.
SIGN_BITS = -0x7F7F7F80


@dataclass(frozen=True)
class PackedWeight:
    """Weights [out, in] as integer codes: (code - zero-point) * scale.

    packed: [out, in * bits / 32] int32, the lowest bits the first channel's. Codes and zero-points are offset by
        2^(bits - 1), so unsigned; with `signed`, 8-bit codes are as they are, in two's complement.
    scale: [out, groups] floating; zero_point: [out, groups] uint8, None for zero before the offset.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    signed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), self.packed.shape[1] * (32 // self.bits)

    def __getitem__(self, rows: slice | Tensor) -> PackedWeight:
        """The same for some of the rows."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return replace(self, packed=self.packed[rows], scale=self.scale[rows], zero_point=zero_point)


def packed_matmul(inputs: Tensor, weight: PackedWeight) -> Tensor:
    """inputs [..., in] times the transposed weight: [..., out]."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if use_triton(inputs) and len(rows) <= FUSED_ROWS:
        from common.kernels import inference_triton

        result = inference_triton.packed_matmul(rows, weight)
    else:
        out, channels = weight.shape
        tile = max(1, UNPACKED_ELEMENTS // channels)
        parts = [functional.linear(rows, unpack(weight[i:i + tile], inputs.dtype)) for i in range(0, out, tile)]
        result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return result.view(*inputs.shape[:-1], -1)


def unpack(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weights [out, in] that the codes stand for."""
    if use_triton(weight.packed):
        from common.kernels import inference_triton

        return inference_triton.unpack(weight, dtype)
    bits, packed = weight.bits, weight.packed ^ (SIGN_BITS if weight.signed else 0)
    shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)
    codes = ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1).unflatten(1, (weight.scale.shape[1], -1))
    zero = 1 << (bits - 1) if weight.zero_point is None else weight.zero_point.to(torch.int32).unsqueeze(-1)
    return ((codes - zero).float() * weight.scale.float().unsqueeze(-1)).flatten(1).to(dtype)


def round_rows(inputs: Tensor, bits: int) -> Tensor:
    """`grid.round_per_token` of inputs [rows, in]."""
    if use_triton(inputs):
        from common.kernels import inference_triton

        return inference_triton.round_rows(inputs, bits)
    return round_per_token(inputs, bits)


def add_rms_norm(hidden: Tensor, update: Tensor | None, gain: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of hidden [rows, size] after `update`, if any, has been added to it in place."""
    if use_triton(hidden):
        from common.kernels import inference_triton

        return inference_triton.add_rms_norm(hidden, update, gain, epsilon)
    if update is not None:
        hidden += update
    values = hidden.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return gain * values.to(hidden.dtype)


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model: cosine and sine [length, size], and the norms of queries and keys where it has them.

    norms: gains [size] of queries and keys, and their epsilon.
    """

    cosine: Tensor
    sine: Tensor
    norms: tuple[Tensor, Tensor, float] | None = None


def attend(projected: Tensor, rotary: Rotary, positions: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of one new token per row, whose key and value are put into the cache: [rows, heads * size].

    Args:
        projected: [rows, (heads + 2 * key-value heads) * size], queries, keys, values side by side.
        positions: [rows], how many tokens each row has in the cache.
        keys, values: the cache, [rows, key-value heads, length, size].
    """
    if use_triton(projected):
        from common.kernels import inference_triton

        return inference_triton.attend(projected, rotary, positions, keys, values, scaling)
    key_heads, length, size = keys.shape[1:]
    heads = projected.view(len(projected), -1, size)
    query, key, value = heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], dim=1)
    if rotary.norms is not None:
        query, key = (add_rms_norm(part.clone(), None, gain, rotary.norms[2])
                      for part, gain in ((query, rotary.norms[0]), (key, rotary.norms[1])))
    turn, tilt = (table[positions].unsqueeze(1) for table in (rotary.cosine, rotary.sine))
    query, key = (part * turn + torch.cat([-part[..., size // 2:], part[..., :size // 2]], -1) * tilt for part in (query, key))
    rows = torch.arange(len(projected), device=projected.device)
    keys[rows, :, positions], values[rows, :, positions] = key, value
    seen = torch.arange(length, device=query.device) <= positions[:, None]
    return functional.scaled_dot_product_attention(query.unsqueeze(2), keys, values, seen[:, None, None], scale=scaling,
                                                   enable_gqa=True).flatten(1)


def silu_mul(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of [rows, 2 * size], gate and up side by side: [rows, size]."""
    if use_triton(gate_and_up):
        from common.kernels import inference_triton

        return inference_triton.silu_mul(gate_and_up)
    gate, up = gate_and_up.chunk(2, -1)
    return functional.silu(gate) * up


def largest_index(values: Tensor) -> Tensor:
    """The index of the largest of each row of values [rows, size], the first of equal ones: [rows]."""
    if use_triton(values):
        from common.kernels import inference_triton

        return inference_triton.largest_index(values)
    return values.argmax(-1)

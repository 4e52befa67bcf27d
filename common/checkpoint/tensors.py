"""The tensors that stand for a linear in a checkpoint, in the form that compressed-tensors packs
them.
"""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from torch import Tensor

from common.checkpoint.format import INTEGER, PACKED, PARTS, scheme_of
from common.numerics.grid import Grid, QuantizedLinear, type_that_holds

REQUIRED_PARTS = {
    PACKED: ("weight_packed", "weight_scale", "weight_shape"),
    INTEGER: ("weight", "weight_scale"),
}


# Rows of an embedding or head that are compressed at once, and rows of packed codes that are
# unpacked at once: the library takes more than ten bytes for each code meanwhile.
_ROWS_AT_ONCE, _UNPACKED_AT_ONCE = 16384, 4096


def compress(
    quantized: QuantizedLinear, scale_dtype: torch.dtype, form: str = PACKED
) -> dict[str, Tensor]:
    """The tensors that stand for one linear in the file, made by the library's own compressor; form
    PACKED or INTEGER.

    Scales are stored in `scale_dtype`, or in bfloat16 where that does not hold them as they are
    (`grid.scale_type`).
    """
    scale = quantized.scale.to(type_that_holds(quantized.scale, scale_dtype))
    state = {"weight": quantized.dequantize(), "weight_scale": scale}
    if not quantized.grid.symmetric:
        state["weight_zero_point"] = quantized.zero_point.to(torch.int8)
    return BaseCompressor.load_from_registry(form).compress(state, scheme_of(quantized.grid))


def compress_rows(
    quantized: QuantizedLinear, scale_dtype: torch.dtype, form: str
) -> dict[str, Tensor]:
    """`compress` for a vocabulary's many rows, some at a time: the library works on copies of them
    in float32.
    """
    tensors = (quantized.codes, quantized.scale, quantized.zero_point)
    parts = [
        compress(QuantizedLinear(codes, scale, zero_point, quantized.grid), scale_dtype, form)
        for codes, scale, zero_point in zip(
            *(tensor.split(_ROWS_AT_ONCE) for tensor in tensors), strict=True
        )
    ]
    whole = {
        name: torch.cat([part[name] for part in parts])
        for name in parts[0]
        if name != "weight_shape"
    }
    if "weight_shape" in parts[0]:
        whole["weight_shape"] = parts[0]["weight_shape"].new_tensor(quantized.codes.shape)
    return whole


def decompress(state: dict[str, Tensor], grid: Grid) -> Tensor:
    """The float32 weights [out, in] of one linear's stored tensors, by the library's own
    decompressor.
    """
    state = {**state, "weight_scale": state["weight_scale"].float()}
    form = PACKED if "weight_packed" in state else INTEGER
    return BaseCompressor.load_from_registry(form).decompress(state, scheme_of(grid))["weight"]


def stored_parts(
    read: Callable[[str], Tensor], names: Container[str], linear: str
) -> dict[str, Tensor]:
    """The tensors of one linear (by full name) among `names`, keyed as `compress` made them."""
    return {part: read(f"{linear}.{part}") for part in PARTS if f"{linear}.{part}" in names}


def stored_linear(state: dict[str, Tensor], grid: Grid) -> QuantizedLinear:
    """A linear as it was before it was compressed, of its stored tensors."""
    codes, zero_point = stored_codes(state, grid)
    scale = state["weight_scale"].float()
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point.float()
    return QuantizedLinear(codes, scale, zero_point, grid)


def stored_codes(state: dict[str, Tensor], grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Codes [out, in] and zero-points [out, groups] (None if symmetric) of one linear's stored
    tensors, both int8.
    """
    if "weight" in state:
        return state["weight"], None
    columns = state["weight_shape"].tolist()[1]
    parts = state["weight_packed"].split(_UNPACKED_AT_ONCE)
    codes = torch.cat(
        [unpack_from_int32(part, grid.bits, torch.Size((len(part), columns))) for part in parts]
    )
    if grid.symmetric:
        return codes, None
    return codes, unpack_from_int32(
        state["weight_zero_point"], grid.bits, state["weight_scale"].shape, packed_dim=0
    )

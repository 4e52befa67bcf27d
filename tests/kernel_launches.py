"""The launches of Triton kernels that the code itself chooses, for the linears of Llama models
of 1, 3 and 8 billion weights; `compile_kernels` compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from common.kernels import (
    gradients_triton,
    half_quadratic_triton,
    inference,
    ranges_triton,
    rounding_triton,
    sums_triton,
)
from common.kernels.forms import PackedWeight, Rotary, Rounded, Rounding
from common.numerics.grid import Grid

# Hidden size, size of the MLP, heads, key-value heads and head size of Llama models.
SHAPES = {
    "1B": (2048, 8192, 32, 8, 64),
    "3B": (3072, 8192, 24, 8, 128),
    "8B": (4096, 14336, 32, 8, 128),
}
VOCABULARY = 128256
# Bits, group size and zero-points of weights; the last form's inputs are rounded too.
FORMS = (
    *((4, 128, True), (4, 128, False), (4, 64, True), (4, 32, True)),
    *((8, 128, True), (8, 64, False), (8, None, False)),
)
GRIDS = (Grid(4, 128), Grid(4, 128, True), Grid(8, None), Grid(2, 64))


def tensor(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values."""
    return torch.empty(size, dtype=dtype, device="meta")


def packed(
    out: int, channels: int, bits: int, group: int | None, asymmetric: bool, dtype: torch.dtype
) -> PackedWeight:
    groups = channels // (group or channels)
    codes = tensor(out, channels * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    return PackedWeight(
        codes,
        tensor(out, groups, dtype=dtype),
        tensor(out, groups, dtype=torch.int8) if asymmetric else None,
        bits,
    )


def products(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable]:
    """Every product of a decode step, and what unpacks weights."""
    hidden, inner, heads, key_heads, size = shape
    linears = {
        "qkv": ((heads + 2 * key_heads) * size, hidden),
        "o": (hidden, heads * size),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (VOCABULARY, hidden),
    }
    for name, (out, channels) in linears.items():
        for form in FORMS[-1:] if name == "head" else FORMS:
            weight, row = packed(out, channels, *form, dtype), tensor(1, channels, dtype=dtype)
            rounds = form == FORMS[-1] and name != "head"
            yield partial(inference.unpack, weight, dtype)
            for rows in (1, 2, 32, 64, 128, 256):
                yield partial(inference.packed_matmul, tensor(rows, channels, dtype=dtype), weight)
                if rounds:
                    rounded = Rounded(
                        tensor(rows, channels, dtype=torch.int8), tensor(rows, 1, dtype=dtype)
                    )
                    yield partial(inference.integer_matmul, rounded, weight)
            for bits in (None, 8) if rounds else (None,):
                if name in ("o", "down"):
                    added = tensor(1, out, dtype=dtype)
                    yield partial(inference.row_matmul, row, weight, added_to=added, bits=bits)
                else:
                    norm = tensor(channels, dtype=dtype), 1e-5
                    yield partial(
                        inference.row_matmul, row, weight, norm, gated=name == "gate_up", bits=bits
                    )


def products_in_float32(shape: tuple[int, ...], _: torch.dtype) -> Iterator[Callable]:
    """Which has no tensor cores, and so another program."""
    for form in FORMS:
        weight = packed(2 * shape[1], shape[0], *form, torch.float32)
        for rows in (2, 32):
            yield partial(inference.packed_matmul, tensor(rows, shape[0]), weight)


def other_steps(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable]:
    """The rest of a decode step."""
    hidden, inner, heads, key_heads, size = shape
    tokens, gain = tensor(8, hidden, dtype=dtype), tensor(hidden, dtype=dtype)
    for width in (hidden, inner):
        yield partial(inference.round_rows, tensor(8, width, dtype=dtype), Rounding(8))
    for rounding in (None, Rounding(8)):
        for update in (None, tokens):
            yield partial(inference.add_rms_norm, tokens, update, gain, 1e-5, rounding)
        halves = tensor(8, 2 * inner, dtype=dtype).chunk(2, -1)
        yield partial(inference.silu_mul, *halves, rounding)
    for rounding in (Rounding(16, 64), Rounding(16, 128)):
        yield partial(inference.add_rms_norm, tokens, tokens, gain, 1e-5, rounding)
        yield partial(inference.silu_mul, *halves, rounding)
    projected, positions = (
        tensor(8, (heads + 2 * key_heads) * size, dtype=dtype),
        tensor(8, dtype=torch.long),
    )
    for length in (512, 2048):
        cache, table = (
            tensor(8, key_heads, length, size, dtype=dtype),
            tensor(length, size, dtype=dtype),
        )
        for norms in (None, (tensor(size, dtype=dtype), tensor(size, dtype=dtype), 1e-6)):
            rotary = Rotary(table, table, norms)
            for rounding in (None, Rounding(16, 128)):
                given = projected, rotary, positions, cache, cache, 0.1, rounding
                yield partial(inference.attend, *given)
    table, gain = tensor(1, 512, size, dtype=dtype), tensor(size, dtype=dtype)
    for count in (heads, key_heads, heads + key_heads):
        for norms in (None, (gain, gain, 1e-6)):
            turned = tensor(1, 512, count, size, dtype=dtype)
            yield partial(inference.rotate_heads, turned, table, table, norms, heads)
    yield partial(inference.largest_index, tensor(8, VOCABULARY, dtype=dtype))


def rounding_steps(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable]:
    """What quantization does on a GPU."""
    hidden, inner = shape[:2]
    weight, block = tensor(hidden, inner), tensor(128, hidden)
    for grid in GRIDS:
        yield partial(
            rounding_triton.round_block,
            block,
            block,
            tensor(128, 128),
            block,
            block,
            grid,
            tensor(128, hidden, dtype=torch.int8),
            block,
        )
        for importance, norm in ((tensor(inner), 2.0), (None, 8.0)):
            yield partial(
                ranges_triton.search_range, weight, grid, importance, norm, dtype, [1.0, 0.9]
            )
        scale = tensor(hidden, grid.groups(inner))
        groups = weight.unflatten(1, (scale.shape[1], -1))
        if grid.group_size and ranges_triton.fits_best_range(grid.group_size):
            span, one = weight[:, : grid.group_size], scale[:, 0]
            block = tensor(inner, inner)[: grid.group_size, : grid.group_size]
            yield partial(
                ranges_triton.take_best_range,
                *[span] * 3,
                one,
                one,
                block,
                grid,
                dtype,
                tensor(16),
            )
        given = groups, scale, scale, grid
        yield partial(half_quadratic_triton.half_quadratic, *given, 8.0, 4, dtype)
        for beta in (None, 2.0):
            yield partial(
                rounding_triton.learning_step,
                *[weight] * 2,
                scale,
                scale,
                *[weight] * 2,
                tensor(),
                *[weight] * 3,
                grid,
                0.1,
                beta,
                0.1,
            )


def statistics_steps(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable]:
    """What reads the inputs of linears beside products."""
    inputs = tensor(8192, shape[1], dtype=dtype)
    yield partial(sums_triton.channel_sums, inputs, tensor(8192), True)
    yield partial(sums_triton.channel_sums, inputs, None, False)


def tuning_steps(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Callable]:
    """What tuning a whole model's scales does on a GPU, beside what the steps above do."""
    hidden, inner = shape[:2]
    tokens, gain = tensor(512, hidden, dtype=dtype), tensor(hidden, dtype=dtype)
    for with_gain in (True, False):
        yield partial(gradients_triton.rms_norm_slopes, tokens, tokens, gain, 1e-5, with_gain)
    gate, weight = tensor(512, inner, dtype=dtype), tensor(inner, hidden, dtype=dtype)
    yield partial(gradients_triton.silu_mul_slopes, gate, gate, gate)
    for groups in (hidden // 64, 1):
        yield partial(gradients_triton.sum_of_groups, weight, weight, groups)
    logits = tensor(8, VOCABULARY, dtype=dtype)
    for with_slope in (True, False):
        yield partial(gradients_triton.divergence_and_slope, logits, logits, with_slope)


STEPS = (
    products,
    products_in_float32,
    other_steps,
    rounding_steps,
    statistics_steps,
    tuning_steps,
)

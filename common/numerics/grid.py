"""Integer grids: scale, zero-point, quantize, dequantize.

A grid of b bits has the signed codes q in [-2^(b-1), 2^(b-1) - 1]. A weight is represented as (q -
zero_point) * scale with one scale and one integer zero_point for each group of `group_size`
consecutive input channels of one output row (one group per row when group_size is None). These are
the conventions of the compressed-tensors format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.base.errors import UserError

SUPPORTED_BITS = (2, 3, 4, 8)
AUTO_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True)
class Grid:
    """The form of an integer grid, without its scales. `group_size` None means one group per output
    channel.
    """

    bits: int
    group_size: int | None
    symmetric: bool = False

    @property
    def code_min(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else in_features // self.group_size

    @property
    def stored_bits(self) -> float:
        """Bits that a weight takes: codes lie in words of 32 bits, a group has a scale of 16 and a
        zero-point as large as a code. Those of one group per row are not counted.
        """
        own = 16 + (0 if self.symmetric else self.bits)
        shared = 0 if self.group_size is None else own / self.group_size
        return 32 / (32 // self.bits) + shared


@dataclass
class QuantizedLinear:
    """The codes of one linear and what is needed to read them. codes [out, in] int8; scale,
    zero_point [out, groups].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid

    @classmethod
    def nearest(
        cls, weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid
    ) -> QuantizedLinear:
        """Weights [out, in] rounded to the nearest codes; scale, zero_point [out, groups]."""
        return cls(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)

    @classmethod
    def zeros_like(cls, weight: Tensor, grid: Grid) -> QuantizedLinear:
        """All zeros, in the form that the codes of weights [out, in] have."""
        scale = torch.zeros_like(grouped(weight, grid)[..., 0], dtype=torch.float32)
        codes = torch.zeros_like(weight, dtype=torch.int8)
        return cls(codes, scale, torch.zeros_like(scale), grid)

    @staticmethod
    def bytes_of(rows: int, columns: int, grid: Grid) -> int:
        """Of the codes of weights [rows, columns], with scales and zero-points in float32."""
        groups = columns // (grid.group_size or columns)
        return rows * (columns + 8 * groups)

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedLinear:
        """The same with what a function makes of each tensor."""
        return QuantizedLinear(
            function(self.codes), function(self.scale), function(self.zero_point), self.grid
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] that these codes stand for, exactly as a plain load in `dtype`
        computes them.
        """
        return dequantize(self.codes, self.scale, self.zero_point, self.grid).to(dtype)


def resolve_group_size(choice: str | int, in_features: dict[str, int]) -> int | None:
    """Turn a --group-size option into a size that divides every linear.

    Args:
        choice: a number, "auto" (the largest of 128, 64, 32 that divides all) or "channel" (one
            group per row).
        in_features: input channels of each linear that will be quantized, by name.
    Raises:
        UserError: the size does not divide; names the linears and the sizes that would.
    """
    fitting = [
        size for size in AUTO_GROUP_SIZES if all(n % size == 0 for n in in_features.values())
    ]
    if choice == "channel":
        return None
    if choice == "auto":
        if not fitting:
            raise UserError(
                f"none of the group sizes {', '.join(map(str, AUTO_GROUP_SIZES))} divides all "
                f"linears ({_sizes(in_features)}); use --group-size channel"
            )
        return fitting[0]
    size = int(choice)
    offenders = {name: n for name, n in in_features.items() if size <= 0 or n % size}
    if offenders:
        ways = [*map(str, fitting), "auto"] if fitting else []
        raise UserError(
            f"group size {size} does not divide {_sizes(offenders)}; "
            f"use --group-size {' or '.join([*ways, 'channel'])}"
        )
    return size


def _sizes(in_features: dict[str, int]) -> str:
    by_size: dict[int, list[str]] = {}
    for name, n in in_features.items():
        names = by_size.setdefault(n, [])
        if name.split(".")[-1] not in names:
            names.append(name.split(".")[-1])
    return "; ".join(f"{n} ({', '.join(names)})" for n, names in by_size.items())


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """View [out, in] as [out, groups, group]."""
    return weight.unflatten(1, (grid.groups(weight.shape[1]), -1))


def min_max(
    weight: Tensor,
    grid: Grid,
    shrink: float | Tensor = 1.0,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point that span each group's range, shrunk by `shrink`.

    Args:
        weight: [..., group], any floating type.
        shrink: factor on the range, a number or a tensor that broadcasts against [...].
        scale_dtype: the type scales are stored in; they are rounded to it here, so that codes match
            what is stored.
    Returns:
        scale [...] and zero_point [...] (an integer in the code range), both float32.
    """
    scale, low = _full_range(weight, grid, shrink)
    scale = round_scale(scale, scale_dtype)
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (grid.code_min - low / scale).round().clamp(grid.code_min, grid.code_max)


def _full_range(weight: Tensor, grid: Grid, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """The scale that spans each group's range, not rounded yet, and the range's lower end; both
    [...] float32.
    """
    levels = (1 << grid.bits) - 1
    if grid.symmetric:
        high = weight.abs().amax(-1).float() * shrink
        return high * 2.0 / levels, -high
    lowest, highest = weight.amin(-1).float().clamp(max=0.0), weight.amax(-1).float().clamp(min=0.0)
    low, high = lowest * shrink, highest * shrink
    return (high - low) / levels, low


def smallest_scale(scale_dtype: torch.dtype) -> float:
    """The smallest scale of a stored type: subnormal where float32 holds it as a normal number, so
    that 1 / scale is finite.
    """
    limits = torch.finfo(scale_dtype)
    return max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)


def round_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round to the stored type and keep it positive; only an all-zero group, of scale 0, gets scale
    1. Returns float32.

    float16 gets the values that bfloat16 has too: so a checkpoint of which some scales need
    bfloat16 can be loaded in that.
    """
    rounded = scale.to(torch.bfloat16) if scale_dtype == torch.float16 else scale
    rounded = rounded.to(scale_dtype).float().clamp(min=smallest_scale(scale_dtype))
    return torch.where(scale > 0, rounded, torch.ones_like(rounded))


# The share by which rounding to float16 may move the scales of a linear in all. With 1/64 its error
# would grow by a tenth: the range search needs scales that lie near each other.
FLOAT16_TOLERANCE = 1e-3


def float16_holds(scale: Tensor, tolerance: float = FLOAT16_TOLERANCE) -> bool:
    """Whether float16, whose subnormal numbers have few digits, holds a linear's scales, of any
    shape.
    """
    scale = scale.float()
    moved = (scale.to(torch.float16).float().clamp(min=smallest_scale(torch.float16)) - scale).abs()
    return bool((moved * (scale > 0)).sum() <= tolerance * scale.sum())


def scale_type(weights: Iterable[Tensor], grid: Grid, storage_dtype: torch.dtype) -> torch.dtype:
    """The type for the scales of linears [out, in] of a model stored in `storage_dtype`: that, or
    bfloat16 for float16 that does not hold them.
    """
    if storage_dtype != torch.float16:
        return storage_dtype
    held = all(
        float16_holds(_full_range(grouped(weight, grid), grid)[0].to(torch.bfloat16))
        for weight in weights
    )
    return torch.float16 if held else torch.bfloat16


def type_that_holds(scale: Tensor, storage_dtype: torch.dtype) -> torch.dtype:
    """The type that a linear's scales, which have been rounded, are stored in: that of the model,
    or bfloat16 where it does not hold them as they are.
    """
    held = torch.equal(scale.to(storage_dtype).float(), scale.float())
    return storage_dtype if held else torch.bfloat16


def reciprocal_size(groups: Tensor) -> Tensor:
    """One over the largest magnitude of each group [..., group]: [..., 1]; 1 for a group of
    zeros."""
    largest = groups.abs().amax(-1, keepdim=True)
    return 1.0 / torch.where(largest > 0, largest, 1.0)


def power_(error: Tensor, norm: float) -> Tensor:
    """|error|^norm in place; the usual norms without the far slower general power."""
    if norm in (4.0, 6.0, 8.0):
        # torch multiplies for 2 and 3 alone.
        return power_(error.square_(), norm / 2)
    return error.pow_(norm) if norm in (2.0, 3.0) else error.abs_().pow_(norm)


def rounding_error(rows: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Represented minus true weight [..., group] when each row is rounded to its grid (scale,
    zero_point: [...]).
    """
    scale, zero = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    codes = (rows / scale).round_().add_(zero).clamp_(grid.code_min, grid.code_max)
    return codes.sub_(zero).mul_(scale).sub_(rows)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Nearest codes [out, in] int8 of `weight` [out, in] on the given grid; scale, zero_point [out,
    groups].
    """
    values = grouped(weight.float(), grid) / scale.float().unsqueeze(-1)
    codes = (values.round_() + zero_point.float().unsqueeze(-1)).clamp_(
        grid.code_min, grid.code_max
    )
    return codes.to(torch.int8).flatten(1)


def round_per_token(inputs: Tensor, bits: int) -> Tensor:
    """Round activations [..., in] to a symmetric grid of `bits` bits with one scale per token, as
    they come.

    The arithmetic, in the inputs' own type, is that of compressed-tensors, so that a plain load
    rounds alike.
    """
    codes, scale = codes_per_token(inputs, bits)
    return codes.mul_(scale)


def codes_per_token(inputs: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes [..., in] of `round_per_token`, in the inputs' type, and their scales [..., 1]."""
    # Not twice the largest value, which may be more than float16 holds.
    scale = inputs.abs().amax(-1, keepdim=True) / (((1 << bits) - 1) / 2)
    scale = torch.where(scale > 0, scale, torch.finfo(inputs.dtype).eps)
    return (inputs / scale).round_().clamp_(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), scale


def round_clipped(inputs: Tensor, bits: int, clips: tuple[float, ...]) -> Tensor:
    """As `round_per_token`, over that share of each token's range, one of `clips`, with the
    smallest squared error.

    No other library does this, so the arithmetic is float32: float16 has no scales for small
    tokens.
    """
    levels, exact = 1 << bits, inputs.float()
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * levels)

    def rounded_within(clip: float) -> tuple[Tensor, Tensor]:
        scale = largest * (2 * clip / (levels - 1))
        rounded = (exact / scale).round_().clamp_(-levels // 2, levels // 2 - 1).mul_(scale)
        return rounded, (rounded - exact).square().sum(-1, keepdim=True)

    best, best_error = rounded_within(clips[0])
    for clip in clips[1:]:
        rounded, error = rounded_within(clip)
        best = torch.where(error < best_error, rounded, best)
        best_error = torch.minimum(error, best_error)
    return best.to(inputs.dtype)


def round_per_vector(values: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Round the vectors [..., size] of a key-value cache, each to an asymmetric grid of its own
    over `clip` of its range.
    """
    low = values.amin(-1, keepdim=True).clamp(max=0.0).float() * clip
    high = values.amax(-1, keepdim=True).clamp(min=0.0).float() * clip
    scale = ((high - low) / ((1 << bits) - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round_()
    codes = (values / scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)
    return codes.sub_(zero).mul_(scale).to(values.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Weights [out, in] float32 of `codes` [out, in]; exact, since a product of int8 and a 16-bit
    scale fits float32.
    """
    values = grouped(codes, grid).float() - zero_point.float().unsqueeze(-1)
    return values.mul_(scale.float().unsqueeze(-1)).flatten(1)

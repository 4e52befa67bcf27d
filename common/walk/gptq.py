"""GPTQ of one decoder layer, as quantize_gptq.py does it and quantize_quarot.py after its
rotation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.kernels.rounding import search_range
from common.model.architecture import LinearGroup
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max
from common.solvers.ranges import restore_gain
from common.solvers.rounding import damped, refine, solve
from common.walk.inputs import InputStatistics
from common.walk.method import Layer

# Refinements after the solve; docs/Quantization_Methods_Deep_Dive.md has the measurement.
SWEEPS = 1


# Scale and zero-point [out, groups], from weights [out, in], the grid, the mean square [in] of the
# inputs and the type that scales are stored in.
Ranges = Callable[[Tensor, Grid, Tensor, torch.dtype], tuple[Tensor, Tensor]]
# From so many bits on, ranges of rotated weights are full; fewer have no room for it. Measured on
# several models (docs/Quantization_Methods_Deep_Dive.md).
FULL_RANGE_BITS = 4
# Bits from which gain is restored, one fewer than elsewhere: what is clipped costs error feedback
# more gain than nearest rounding (same document, three bits).
GAIN_BITS = 3


def searched_ranges(
    weight: Tensor,
    grid: Grid,
    mean_square: Tensor,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`Ranges` searched on the output error without its cross terms."""
    return search_range(weight, grid, mean_square, scale_dtype=scale_dtype)


def ranges_of_rotated_weights(
    weight: Tensor, grid: Grid, mean_square: Tensor, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`Ranges` that, from FULL_RANGE_BITS on, are full: no rotated weight stands out."""
    if grid.symmetric or grid.bits < FULL_RANGE_BITS:
        return searched_ranges(weight, grid, mean_square, scale_dtype)
    return min_max(grouped(weight, grid), grid, scale_dtype=scale_dtype)


def gptq_layer(
    layer: Layer, damping: float, sweeps: int, ranges: Ranges = searched_ranges
) -> dict[str, QuantizedLinear]:
    """Codes of every linear of a layer. Linears that read the same tensor are solved together.

    After `ranges`, codes are found with error feedback, then scales and codes are refined `sweeps`
    times; what gain that costs is restored.
    """
    grid, scale_dtype = layer.grid, layer.scale_dtype

    def quantize_group(
        group: LinearGroup, weight: Tensor, statistics: InputStatistics
    ) -> QuantizedLinear:
        gram = statistics.gram
        scale, zero_point = ranges(weight, grid, statistics.mean_square, scale_dtype)
        codes, used = solve(
            weight, gram, scale, zero_point, grid, damping, name=layer.where(group.linears[0])
        )
        codes, scale = refine(
            weight, codes, scale, zero_point, gram, grid, scale_dtype, sweeps, used
        )
        rounded = QuantizedLinear(codes, scale, zero_point, grid)
        return restore_gain(weight, rounded, damped(gram, used), scale_dtype, GAIN_BITS)

    return layer.quantize_groups(quantize_group)

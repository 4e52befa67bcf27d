"""GPTQ of one decoder layer, as quantize_gptq.py does it and quantize_quarot.py after its rotation."""

from __future__ import annotations

from torch import Tensor

from common.architecture import LinearGroup
from common.grid import QuantizedLinear
from common.inputs import InputStatistics
from common.kernels.rounding import search_range
from common.method import Layer
from common.ranges import restore_gain
from common.rounding import damped, refine, solve

# Refinements after the solve; docs/quantization_methods_deep_dive.md has the measurement.
SWEEPS = 1


def gptq_layer(layer: Layer, damping: float, sweeps: int) -> dict[str, QuantizedLinear]:
    """Codes of every linear of a layer. Linears that read the same tensor are solved together.

    Scales are searched on the Gram's diagonal, codes found with error feedback, then both are
    refined `sweeps` times; what gain that costs is restored.
    """
    grid, scale_dtype = layer.grid, layer.scale_dtype

    def quantize_group(group: LinearGroup, weight: Tensor,
                       statistics: InputStatistics) -> QuantizedLinear:
        gram = statistics.gram
        scale, zero_point = search_range(weight, grid, statistics.mean_square,
                                         scale_dtype=scale_dtype)
        codes, used = solve(weight, gram, scale, zero_point, grid, damping,
                            name=layer.where(group.linears[0]))
        codes, scale = refine(weight, codes, scale, zero_point, gram, grid, scale_dtype, sweeps,
                              used)
        rounded = QuantizedLinear(codes, scale, zero_point, grid)
        return restore_gain(weight, rounded, damped(gram, used), scale_dtype)

    return layer.quantize_groups(quantize_group)

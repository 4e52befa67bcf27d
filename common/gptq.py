"""GPTQ of one decoder layer, as quantize_gptq.py does it and quantize_quarot.py after its rotation."""

from __future__ import annotations

from common.grid import QuantizedLinear
from common.kernels.rounding import search_range
from common.layerwise import Layer
from common.rounding import damped, refine, restore_gain, solve

# Refinements after the solve; docs/quantization_methods_deep_dive.md has the measurement.
SWEEPS = 1


def gptq_layer(layer: Layer, damping: float, sweeps: int) -> dict[str, QuantizedLinear]:
    """Codes of every linear of a layer. Linears that read the same tensor are solved together.

    Scales are searched on the Gram's diagonal, codes found with error feedback, then both are refined `sweeps` times; what
    gain that costs is restored.
    """
    codes = {}
    for group, statistics in layer.groups():
        stacked = layer.stacked_weight(group)
        scale, zero_point = search_range(stacked, layer.grid, statistics.mean_square, scale_dtype=layer.scale_dtype)
        rounded, used = solve(stacked, statistics.gram, scale, zero_point, layer.grid, damping,
                              name=layer.where(group.linears[0]))
        rounded, scale = refine(stacked, rounded, scale, zero_point, statistics.gram, layer.grid, layer.scale_dtype, sweeps,
                                used)
        scale = restore_gain(stacked, rounded, scale, zero_point, damped(statistics.gram, used), layer.grid, layer.scale_dtype)
        codes.update(layer.split(group, rounded, scale, zero_point))
    return codes

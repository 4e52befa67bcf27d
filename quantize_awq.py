#!/usr/bin/env python3
"""AWQ: scale up the input channels that matter before rounding, then clip each group's range.

    python quantize_awq.py --bits 4 --output models/Llama-3.2-1B-Instruct/awq-4bit
    python quantize_awq.py --model demo

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
https://arxiv.org/abs/2306.00978. A scale s = a^r / w^(1 - r) per input channel, a the mean |x| and w the mean relative
weight, is multiplied into the weights and divided out of the norm or linear before them. r, identity included, is the one
with the smallest output error tr((Q - W) G (Q - W)ᵀ), which the Gram matrix G gives over all calibration tokens
without keeping an activation. The clipping of each group's range is then chosen by the same error.
"""

import torch
from torch import Tensor

from common import cli
from common.grid import Grid, QuantizedLinear, dequantize, grouped, min_max, quantize
from common.layerwise import Layer, Method
from common.models import LINEAR_GROUPS
from common.quantization import run
from common.rounding import choose_ranges, output_error
from common.scaling import fold_scale, power_ratio, shared_by_heads

RATIOS = 14


def rounding_loss(weight: Tensor, gram: Tensor, grid: Grid, scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Output error of weight [out, in] when weight * scale is rounded on its full range and divided by scale again."""
    scaled = weight * scale
    grid_scale, zero_point = min_max(grouped(scaled, grid), grid, scale_dtype=scale_dtype)
    rounded = dequantize(quantize(scaled, grid_scale, zero_point, grid), grid_scale, zero_point, grid) / scale
    return output_error(rounded - weight, gram).sum()


def search_scale(layer: Layer, group_index: int) -> Tensor:
    """The scale [in] of one linear group, all ones if no other is better."""
    statistics = layer.statistics[group_index]
    weight = layer.stacked_weight(LINEAR_GROUPS[group_index])
    groups = grouped(weight.abs(), layer.grid)
    relative = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-8)).flatten(1).mean(0)
    candidates = [torch.ones_like(statistics.abs_mean)]
    for step in range(RATIOS):
        ratio = power_ratio(statistics.abs_mean, relative, step / (RATIOS - 1))
        candidates.append(shared_by_heads(layer, group_index, ratio))
    losses = [rounding_loss(weight, statistics.gram, layer.grid, scale, layer.scale_dtype) for scale in candidates]
    return torch.stack(candidates)[torch.stack(losses).argmin()]


def prepare_layer(layer: Layer) -> None:
    """Search and fold the scales of all four groups."""
    for group_index in range(len(LINEAR_GROUPS)):
        fold_scale(layer, group_index, search_scale(layer, group_index))


def quantize_layer(layer: Layer) -> dict[str, QuantizedLinear]:
    """Codes of every linear: ranges clipped by the output error, then nearest codes."""
    codes = {}
    for group, statistics in zip(LINEAR_GROUPS, layer.statistics, strict=True):
        for name in group.linears:
            weight = layer.weight(name)
            scale, zero_point = choose_ranges(weight, statistics.gram, layer.grid, layer.scale_dtype)
            codes[name] = QuantizedLinear(quantize(weight, scale, zero_point, layer.grid), scale, zero_point, layer.grid)
    return codes


def main() -> None:
    options = cli.quantization_parser(__doc__, bits=4).parse_args()
    run(options, Method("awq", quantize_layer, prepare_layer=prepare_layer))


if __name__ == "__main__":
    cli.run(main)

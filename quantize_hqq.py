#!/usr/bin/env python3
"""HQQ: half-quadratic quantization of the weights alone; no calibration data.

    python quantize_hqq.py --bits 4 --output models/Llama-3.2-1B-Instruct/hqq-4bit
    python quantize_hqq.py --model demo --bits 8

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
https://mobiusml.github.io/hqq_blog. Each group's scale and zero-point minimise the l_p error

    sum |w - q|^p

The half-quadratic idea splits that in two easy steps taken in turn: fixed errors turn l_p into
weighted least squares, of weights |w - q|^(p - 2), whose scale and zero-point have a closed form;
fixed scale and zero-point turn it into rounding. The best step is kept, not the last. The
zero-point is an integer, as the checkpoint format stores it; the authors' is a float. Before,
channels that stand out because of how a file shares them out are brought near to the others
(common/walk/balancing.py); the function stays.
"""

import argparse

import common  # noqa: F401  # says in one line where libraries are missing

# isort: split
import torch
from torch import Tensor

from common import cli
from common.kernels.dispatch import triton_kernels
from common.kernels.rounding import search_range
from common.numerics.grid import (
    Grid,
    QuantizedLinear,
    grouped,
    power_,
    reciprocal_size,
    round_scale,
    rounding_error,
)
from common.quantization import quantize
from common.solvers.ranges import restore_gain
from common.walk.balancing import balance_outliers
from common.walk.inputs import Needs
from common.walk.method import Layer, Method

# p from 4 bits on, and below; chosen on several models (docs/Quantization_Methods_Deep_Dive.md). A
# small one gives up the few large weights of a group, a large one serves them alone, which coarse
# steps do not allow.
LP_NORM, COARSE_LP_NORM = 8.0, 4.0
STEPS = 4


def half_quadratic(
    groups: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    lp_norm: float,
    steps: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Improve scale and zero-point [out, groups] of weights [out, groups, group]; the l_p error
    never rises.
    """
    if kernels := triton_kernels(groups):
        return kernels.half_quadratic.half_quadratic(
            groups, scale, zero_point, grid, lp_norm, steps, scale_dtype
        )
    best_scale, best_zero, best_loss = scale, zero_point, torch.full_like(scale, torch.inf)
    # High powers of small weights would be nothing in float32.
    unit = reciprocal_size(groups)
    for step in range(steps + 1):
        error = rounding_error(groups, scale, zero_point, grid)
        magnitude = error.abs().mul_(unit)
        loss = power_(magnitude.clone(), lp_norm).sum(-1)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
        if step < steps:
            # Errors near zero would get unbounded weight at p < 2.
            share = power_(magnitude.clamp_(min=1e-3 * scale.unsqueeze(-1) * unit), lp_norm - 2)
            share = share / share.sum(-1, keepdim=True)
            # What the codes without their zero-point stand for: (w + error) / scale.
            codes = (groups + error) / scale.unsqueeze(-1) + zero_point.unsqueeze(-1)
            if grid.symmetric:
                fitted = (share * codes * groups).sum(-1) / (share * codes.square()).sum(-1)
                scale = round_scale(fitted, scale_dtype)
            else:
                code_mean, weight_mean = (share * codes).sum(-1), (share * groups).sum(-1)
                centred = codes - code_mean.unsqueeze(-1)
                fitted = (share * centred * groups).sum(-1) / (share * centred.square()).sum(-1)
                scale = round_scale(torch.where(fitted > 0, fitted, scale), scale_dtype)
                zero_point = (
                    (code_mean - weight_mean / scale).round().clamp(grid.code_min, grid.code_max)
                )
    return best_scale, best_zero


def quantize_weight(
    weight: Tensor, grid: Grid, lp_norm: float, scale_dtype: torch.dtype
) -> QuantizedLinear:
    """Codes of a weight [out, in]: the range searched first, then half-quadratic steps, at last the
    gain restored.
    """
    ranges = search_range(weight, grid, norm=lp_norm, scale_dtype=scale_dtype)
    ranges = half_quadratic(grouped(weight, grid), *ranges, grid, lp_norm, STEPS, scale_dtype)
    rounded = QuantizedLinear.nearest(weight, *ranges, grid)
    return restore_gain(weight, rounded, None, scale_dtype)


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.quantization_parser(__doc__, bits=4)
    parser.add_argument(
        "--lp-norm",
        type=float,
        metavar="P",
        help=f"p of the l_p error (default: {LP_NORM:g}; with 2 and 3 bits {COARSE_LP_NORM:g})",
    )
    return parser


def method(options: argparse.Namespace) -> Method:
    def quantize_layer(layer: Layer) -> dict[str, QuantizedLinear]:
        # One by one: what they read does not matter here, and stacked they need twice the memory.
        return {
            name: quantize_weight(
                layer.own_weight(name), layer.grid, options.lp_norm, layer.scale_dtype
            )
            for name in layer.family.linears
        }

    return Method("hqq", quantize_layer, needs=Needs.NOTHING, rewrite_layer=balance_outliers)


def main() -> None:
    options = argument_parser().parse_args()
    if options.lp_norm is None:
        options.lp_norm = LP_NORM if options.bits > 3 else COARSE_LP_NORM
    quantize(options, method(options))


if __name__ == "__main__":
    cli.run(main)

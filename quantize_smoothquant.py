#!/usr/bin/env python3
"""SmoothQuant: 8-bit weights and 8-bit activations (W8A8); the activations' outliers are moved into
the weights first.

    python quantize_smoothquant.py --output models/Llama-3.2-1B-Instruct/smoothquant-8bit
    python quantize_smoothquant.py --model demo --alpha 0.8

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", https://arxiv.org/abs/2211.10438. Each input channel is divided by (equation 4)

    s = max|x|^α / max|W|^(1 - α)

and its weights multiplied by it. Weights are then rounded per output channel, activations per token
as they come, both symmetric. With --alpha auto every linear group gets the α, or no smoothing, with
the smallest output error over a sample of its inputs.
"""

import argparse

import torch
from torch import Tensor

from common import cli
from common.base.arguments import share
from common.base.errors import UserError
from common.kernels.rounding import search_range
from common.model.architecture import LinearGroup
from common.numerics.grid import Grid, QuantizedLinear, min_max, round_per_token, rounding_error
from common.quantization import quantize
from common.walk.inputs import InputStatistics, Needs
from common.walk.method import Layer, Method
from common.walk.scaling import fold_all, largest_weight, power_ratio, shared_by_heads

ACTIVATION_BITS = 8
# Chosen on four models (docs/Quantization_Methods_Deep_Dive.md).
ALPHA = 0.65
ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def rounded_error(
    weight: Tensor, inputs: Tensor, scale: Tensor, grid: Grid, scale_dtype: torch.dtype
) -> Tensor:
    """Mean relative squared output error over inputs [tokens, in] when weight [out, in] and inputs
    are smoothed by scale and rounded. Relative, as a few tokens hundreds of times the usual size
    would decide alone otherwise.
    """
    smoothed = weight * scale
    rounded = smoothed + rounding_error(
        smoothed, *min_max(smoothed, grid, scale_dtype=scale_dtype), grid
    )
    outputs = round_per_token(inputs / scale, ACTIVATION_BITS) @ rounded.T
    expected = inputs @ weight.T
    return ((outputs - expected).square().sum(1) / expected.square().sum(1).clamp(min=1e-12)).mean()


def smoothing_scale(layer: Layer, group: LinearGroup, alpha: float | None) -> Tensor:
    """The smoothing scale [in] of a linear group for one α, or the best of ALPHAS and none at all
    for None.
    """
    statistics = layer.statistics[group]
    weights = [layer.weight(name) for name in group.linears]
    largest = largest_weight(weights)

    def scale_for(exponent: float) -> Tensor:
        return shared_by_heads(layer, group, power_ratio(statistics.abs_max, largest, exponent))

    if alpha is not None:
        return scale_for(alpha)
    stacked = torch.cat(weights)
    candidates = [torch.ones_like(largest), *map(scale_for, ALPHAS)]
    errors = [
        rounded_error(stacked, statistics.sample, scale, layer.grid, layer.scale_dtype)
        for scale in candidates
    ]
    return torch.stack(candidates)[torch.stack(errors).argmin()]


def prepare_layer(layer: Layer, alpha: float | None) -> None:
    """Smooth all four groups: the two norms, v_proj into o_proj, up_proj into down_proj."""
    fold_all(layer, lambda group: smoothing_scale(layer, group, alpha))


def quantize_layer(layer: Layer) -> dict[str, QuantizedLinear]:
    """Nearest codes of every linear, ranges searched with each channel's mean square."""

    def quantize_group(
        _: LinearGroup, weight: Tensor, statistics: InputStatistics
    ) -> QuantizedLinear:
        ranges = search_range(
            weight, layer.grid, statistics.mean_square, scale_dtype=layer.scale_dtype
        )
        return QuantizedLinear.nearest(weight, *ranges, layer.grid)

    return layer.quantize_groups(quantize_group)


def _alpha(text: str) -> float | None:
    return None if text == "auto" else share(text)


class _NoGGUF(argparse.Action):
    """Refuses an option that the other methods take; the batch leaves it out for this one."""

    def __call__(self, *_) -> None:
        raise UserError(
            "GGUF cannot tell that activations are rounded to 8 bits (W8A8); leave --gguf out, or "
            "take another method, which rounds weights alone"
        )


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.quantization_parser(__doc__, bits=8)
    parser.add_argument(
        "--alpha",
        type=_alpha,
        default=ALPHA,
        metavar="X|auto",
        help="migration strength between 0 and 1, or auto: the best for each group (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--group-size",
        choices=("channel",),
        default="channel",
        help="one scale per output channel, as int8 kernels need it",
    )
    parser.add_argument("--gguf", action=_NoGGUF, nargs=0, default=False, help=argparse.SUPPRESS)
    parser.set_defaults(symmetric=True)
    return parser


def method(options: argparse.Namespace) -> Method:
    # The best α is searched on some of the inputs.
    needs = Needs.MAGNITUDES | (Needs.SAMPLES if options.alpha is None else Needs.NOTHING)
    return Method(
        "smoothquant",
        quantize_layer,
        needs,
        original_inputs=True,
        prepare_layer=lambda layer: prepare_layer(layer, options.alpha),
        activation_bits=ACTIVATION_BITS,
    )


def main() -> None:
    options = argument_parser().parse_args()
    if not options.symmetric:
        raise UserError(
            "kernels of 8-bit weights and activations have no zero-points; leave --asymmetric out"
        )
    quantize(options, method(options), bits=(8,))


if __name__ == "__main__":
    cli.run(main)

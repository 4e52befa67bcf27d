#!/usr/bin/env python3
"""AWQ: scale up the input channels that matter before rounding, then clip each group's range.

    python quantize_awq.py --bits 4 --output models/Llama-3.2-1B-Instruct/awq-4bit
    python quantize_awq.py --model demo

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
https://arxiv.org/abs/2306.00978. A scale per input channel, a being the mean |x| and w the mean
relative weight,

    s = a^r / w^(1 - r)

is multiplied into the weights and divided out of the norm or linear before them. r, identity
included, is the one with the smallest output error

    tr((Q - W) G (Q - W)ᵀ)

which the Gram matrix G gives over all calibration tokens without keeping an activation. What the
file itself shares out between a norm or linear and what reads it is balanced first
(common/walk/balancing.py), so that w means the same whatever that was. The
clipping of each group's range is then chosen by the same error. G is damped for both, so that what
is chosen serves other text too.
"""

import argparse

import common  # noqa: F401  # says in one line where libraries are missing

# isort: split
from torch import Tensor

from common import cli
from common.model.architecture import LinearGroup
from common.numerics.grid import QuantizedLinear
from common.quantization import quantize
from common.solvers.ranges import choose_ranges, restore_gain
from common.walk.balancing import balance
from common.walk.inputs import InputStatistics, Needs
from common.walk.method import Layer, Method
from common.walk.scaling import equalize


def quantize_layer(layer: Layer) -> dict[str, QuantizedLinear]:
    """Codes of every linear: ranges clipped by the output error, nearest codes, and the gain that
    clipping costs restored.
    """

    def quantize_group(
        _: LinearGroup, weight: Tensor, statistics: InputStatistics
    ) -> QuantizedLinear:
        ranges = choose_ranges(weight, statistics.gram, layer.grid, layer.scale_dtype)
        rounded = QuantizedLinear.nearest(weight, *ranges, layer.grid)
        return restore_gain(weight, rounded, statistics.gram, layer.scale_dtype)

    return layer.quantize_groups(quantize_group)


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.quantization_parser(__doc__, bits=4)
    cli.add_catch_up(parser)
    cli.add_tune_scales(parser)
    return parser


def method(options: argparse.Namespace) -> Method:
    return Method(
        "awq",
        quantize_layer,
        Needs.GRAM | Needs.MAGNITUDES,
        rewrite_layer=balance,
        prepare_layer=equalize,
        catch_up=options.catch_up,
        tune_steps=options.tune_scales,
    )


def main() -> None:
    options = argument_parser().parse_args()
    cli.resolve_tuning(options)
    quantize(options, method(options))


if __name__ == "__main__":
    cli.run(main)

#!/usr/bin/env python3
"""GPTQ: round the weights one input channel at a time, let later channels make up for the error of
earlier ones.

    python quantize_gptq.py --bits 4 --output models/Llama-3.2-1B-Instruct/gptq-4bit
    python quantize_gptq.py --model demo --bits 8

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", https://arxiv.org/abs/2210.17323. One calibration pass collects the Gram matrix G of
each linear's input; the output error of rounded weights Q over all calibration tokens is then,
exactly,

    tr((Q - W) G (Q - W)ᵀ)

Linears that read the same tensor are solved together. The order of channels is that of descending
Gᵢᵢ, with groups as stored. Before, the channels that a file may scale unevenly are balanced
(common/walk/balancing.py); the function stays. The solver is in common/solvers/rounding.py, the
walk of one layer in common/walk/gptq.py, as QuaRot uses them too.
"""

import argparse

from common import cli
from common.quantization import quantize
from common.solvers.rounding import DAMPING
from common.walk.balancing import balance
from common.walk.gptq import SWEEPS, gptq_layer
from common.walk.method import Method


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.quantization_parser(__doc__, bits=4)
    parser.add_argument(
        "--damping",
        type=float,
        default=DAMPING,
        help="added to G's diagonal, as a share of its mean (default: %(default)s)",
    )
    parser.add_argument(
        "--sweeps",
        type=int,
        default=SWEEPS,
        help="refinements of the rounded weights: scales refitted, then codes one by one (default: "
        "%(default)s)",
    )
    cli.add_catch_up(parser)
    cli.add_tune_scales(parser)
    return parser


def method(options: argparse.Namespace) -> Method:
    return Method(
        "gptq",
        lambda layer: gptq_layer(layer, options.damping, options.sweeps),
        rewrite_layer=balance,
        catch_up=options.catch_up,
        tune_steps=options.tune_scales,
    )


def main() -> None:
    options = argument_parser().parse_args()
    cli.resolve_tuning(options)
    quantize(options, method(options))


if __name__ == "__main__":
    cli.run(main)

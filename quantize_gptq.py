#!/usr/bin/env python3
"""GPTQ: round the weights one input channel at a time, let later channels make up for the error of earlier ones.

    python quantize_gptq.py --bits 4 --output models/Llama-3.2-1B-Instruct/gptq-4bit
    python quantize_gptq.py --model demo --bits 8

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
https://arxiv.org/abs/2210.17323. One calibration pass collects the Gram matrix G of each linear's input; the output
error of rounded weights Q is then tr((Q - W) G (Q - W)ᵀ), exactly, over all calibration tokens. Linears that read the
same tensor are solved together. The order of channels is that of descending Gᵢᵢ, with groups as stored.
"""

import torch

from common import cli
from common.grid import QuantizedLinear, search_range
from common.layerwise import Layer, Method
from common.models import LINEAR_GROUPS
from common.quantization import run
from common.rounding import DAMPING, solve


def quantize_layer(layer: Layer, damping: float) -> dict[str, QuantizedLinear]:
    """Codes of every linear of a layer: scales searched on G's diagonal, then rounding with error feedback."""
    codes = {}
    for group, statistics in zip(LINEAR_GROUPS, layer.statistics, strict=True):
        weights = [layer.weight(name) for name in group.linears]
        stacked = torch.cat(weights)
        scale, zero_point = search_range(stacked, layer.grid, statistics.gram.diagonal(),
                                         scale_dtype=layer.scale_dtype)
        rounded, _ = solve(stacked, statistics.gram, scale, zero_point, layer.grid, damping,
                           name=layer.where(group.linears[0]))
        sizes = [len(weight) for weight in weights]
        for name, *parts in zip(group.linears, rounded.split(sizes), scale.split(sizes), zero_point.split(sizes),
                                strict=True):
            codes[name] = QuantizedLinear(*parts, layer.grid)
    return codes


def main() -> None:
    parser = cli.quantization_parser(__doc__, bits=4)
    parser.add_argument("--damping", type=float, default=DAMPING,
                        help="added to G's diagonal, as a share of its mean (default: %(default)s)")
    options = parser.parse_args()
    run(options, Method("gptq", lambda layer: quantize_layer(layer, options.damping)))


if __name__ == "__main__":
    cli.run(main)

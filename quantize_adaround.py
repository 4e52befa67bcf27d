#!/usr/bin/env python3
"""AdaRound: learn for every weight whether to round up or down.

    python quantize_adaround.py --bits 4 --output models/Llama-3.2-1B-Instruct/adaround-4bit
    python quantize_adaround.py --model demo --iterations 200

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", https://arxiv.org/abs/2004.10568. Layer by
layer (--reconstruction layer) the output error tr((Q - W) G (Q - W)ᵀ) of each linear is minimised through the Gram matrix G
of its input: the exact gradient over all calibration tokens, without keeping an activation. With --reconstruction block
the error of a whole decoder layer's output is minimised on the calibration windows (BRECQ, https://arxiv.org/abs/2102.05426).
"""

import torch

from common import cli
from common.adaround import SoftRounding, beta_at, learn_rounding
from common.grid import QuantizedLinear
from common.layerwise import Layer, Method
from common.models import LINEAR_GROUPS, LINEARS
from common.quantization import run
from common.rounding import choose_ranges

ITERATIONS, DEMO_ITERATIONS = 500, 100
# Weight of the regulariser, and how far Adam could carry a v in all (from one end of h to the other is about 5): with less of
# either a third of the roundings stay undecided (docs/quantization_methods_deep_dive.md).
STRENGTH, TRAVEL = 1.0, 20.0
BLOCK_BATCH, BLOCK_ERROR_WEIGHT = 4, 1000.0


def quantize_layer(layer: Layer, iterations: int) -> dict[str, QuantizedLinear]:
    """Codes of every linear, each group's rounding learned through its Gram matrix."""
    codes, settled = {}, []
    for group, statistics in zip(LINEAR_GROUPS, layer.statistics, strict=True):
        stacked = layer.stacked_weight(group)
        scale, zero_point = choose_ranges(stacked, statistics.gram, layer.grid, layer.scale_dtype)
        soft = learn_rounding(stacked, statistics.gram, scale, zero_point, layer.grid, iterations, STRENGTH,
                              TRAVEL / iterations)
        settled.append(soft.settled())
        codes.update(layer.split(group, soft.codes(), scale, zero_point))
    layer.notes["settled"] = min(settled)
    return codes


def quantize_block(layer: Layer, iterations: int) -> dict[str, QuantizedLinear]:
    """Codes of every linear, their roundings learned together on the decoder layer's output."""
    soft = {}
    for group, statistics in zip(LINEAR_GROUPS, layer.statistics, strict=True):
        for name in group.linears:
            weight = layer.weight(name)
            ranges = choose_ranges(weight, statistics.gram, layer.grid, layer.scale_dtype)
            # Begin where the layer-wise rounding ends up half-way: far better than the fractions.
            soft[name] = learn_rounding(weight, statistics.gram, *ranges, layer.grid, iterations // 4, 0.0,
                                        2.0 / iterations)
    with torch.enable_grad():
        _reconstruct(layer, soft, iterations)
    layer.notes["settled"] = min(rounding.settled() for rounding in soft.values())
    return {name: QuantizedLinear(rounding.codes(), rounding.scale, rounding.zero_point, layer.grid)
            for name, rounding in soft.items()}


def _reconstruct(layer: Layer, soft: dict[str, SoftRounding], iterations: int) -> None:
    """Minimise the mean squared error of the layer's output over batches of windows, plus the regulariser."""
    device = next(iter(soft.values())).v.device
    inputs = torch.cat(layer.inputs)
    with torch.no_grad():
        targets = torch.cat([layer.forward(window.to(device)).to(inputs.device) for window in inputs.split(BLOCK_BATCH)])
    for rounding in soft.values():
        rounding.v.requires_grad_(True)
    originals = {name: layer.module.get_submodule(name).weight for name in LINEARS}
    optimiser = torch.optim.Adam([rounding.v for rounding in soft.values()], lr=TRAVEL / iterations)
    power = targets.float().square().mean()
    generator = torch.Generator().manual_seed(layer.index)
    for step in range(iterations):
        chosen = torch.randint(0, len(inputs), (BLOCK_BATCH,), generator=generator)
        beta = beta_at(step, iterations)
        penalty = torch.zeros((), device=device)
        for name, rounding in soft.items():
            h = rounding.h()
            _set_weight(layer, name, rounding.weight(h).to(originals[name].dtype))
            if beta is not None:
                penalty = penalty + (1 - (2 * h - 1).abs().pow(beta)).mean()
        output = layer.forward(inputs[chosen].to(device))
        error = (output.float() - targets[chosen].to(device).float()).square().mean() / power
        optimiser.zero_grad()
        (error * BLOCK_ERROR_WEIGHT + STRENGTH * penalty).backward()
        optimiser.step()
    for name, weight in originals.items():
        _set_weight(layer, name, weight)
    for rounding in soft.values():
        rounding.v = rounding.v.detach()


def _set_weight(layer: Layer, name: str, weight: torch.Tensor) -> None:
    """Put a parameter, or a tensor that carries a gradient, in the place of a linear's weight."""
    linear = layer.module.get_submodule(name)
    del linear.weight
    linear.weight = weight


def main() -> None:
    parser = cli.quantization_parser(__doc__, bits=4)
    parser.add_argument("--iterations", type=cli.positive, metavar="N",
                        help=f"gradient steps per layer (default: {ITERATIONS}; {DEMO_ITERATIONS} with demo text)")
    parser.add_argument("--reconstruction", choices=("layer", "block"), default="layer",
                        help="learn each linear's rounding alone, or a decoder layer's together (default: %(default)s)")
    options = parser.parse_args()
    cli.resolve_sizes(options)
    options.iterations = options.iterations or (DEMO_ITERATIONS if options.calib_data == "demo" else ITERATIONS)
    quantize = quantize_layer if options.reconstruction == "layer" else quantize_block
    run(options, Method("adaround", lambda layer: quantize(layer, options.iterations)))


if __name__ == "__main__":
    cli.run(main)

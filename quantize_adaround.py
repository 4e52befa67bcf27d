#!/usr/bin/env python3
"""AdaRound: learn for every weight whether to round up or down.

    python quantize_adaround.py --bits 4 --output models/Llama-3.2-1B-Instruct/adaround-4bit
    python quantize_adaround.py --model demo --iterations 200

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
https://arxiv.org/abs/2004.10568. Layer by layer (--reconstruction layer) the output error

    tr((Q - W) G (Q - W)ᵀ)

of each linear is minimised through the Gram matrix G of its input: the exact gradient over all
calibration tokens, without keeping an activation. With --reconstruction block the error of a whole
decoder layer's output is minimised on the calibration windows (BRECQ,
https://arxiv.org/abs/2102.05426). Input channels are equalised first (--equalize), as rounding
learned on top of uneven channels keeps their error; the scales are AWQ's
(https://arxiv.org/abs/2306.00978), searched once what a file shares out unevenly is balanced
(common/walk/balancing.py).
"""

import argparse

import common  # noqa: F401  # says in one line where libraries are missing

# isort: split
import torch
from torch import Tensor

from common import cli
from common.base import parallel
from common.base.arguments import positive
from common.base.errors import UserError
from common.model.architecture import LinearGroup
from common.numerics.grid import QuantizedLinear
from common.quantization import quantize
from common.solvers.adaround import SoftRounding, beta_at, learn_rounding
from common.solvers.ranges import choose_ranges, restore_gain
from common.solvers.rounding import damped
from common.walk.balancing import balance
from common.walk.finished import set_weight
from common.walk.inputs import InputStatistics, Needs
from common.walk.method import Layer, Method
from common.walk.scaling import equalize

ITERATIONS, DEMO_ITERATIONS = 150, 60
# Added to the Gram matrix's diagonal, as a share of its mean: a learned rounding fits the
# calibration text all too well.
DAMPING = 1.0
# Weight of the regulariser, and how far Adam could carry a v in all (from one end of h to the other
# is about 5): with less of either up to a third of the roundings stay undecided
# (docs/Quantization_Methods_Deep_Dive.md).
STRENGTH, TRAVEL = 1.0, 50.0
# Windows of a step of the block's reconstruction, weight of its error, in units of what it starts
# from, and travel there.
BLOCK_BATCH, BLOCK_ERROR_WEIGHT, BLOCK_TRAVEL = 4, 0.1, 20.0
# Where |v| starts from there: far enough from 0 to remember the layer-wise rounding, near enough to
# change it.
BLOCK_START = 1.0


def quantize_layer(layer: Layer, iterations: int, block: bool) -> dict[str, QuantizedLinear]:
    """Codes of every linear, each group's learned through its Gram matrix; with `block`, then on
    the layer's output.
    """
    learned: dict[LinearGroup, SoftRounding] = {}
    settled: list[float] = []

    def learn(weight: Tensor, gram: Tensor, damped_gram: Tensor) -> SoftRounding:
        ranges = choose_ranges(weight, gram, layer.grid, layer.scale_dtype)
        return learn_rounding(
            weight, damped_gram, *ranges, layer.grid, iterations, STRENGTH, TRAVEL / iterations
        )

    def quantize_group(
        group: LinearGroup, weight: Tensor, statistics: InputStatistics
    ) -> QuantizedLinear:
        if block:
            settled.append(learned[group].settled())
            return learned[group].rounded()
        damped_gram = damped(statistics.gram, DAMPING)
        rounding = learn(weight, statistics.gram, damped_gram)
        settled.append(rounding.settled())
        return restore_gain(weight, rounding.rounded(), damped_gram, layer.scale_dtype)

    if block:
        for group, statistics in layer.groups():
            weight, gram = layer.stacked_weight(group), statistics.gram
            learned[group] = learn(weight, gram, damped(gram, DAMPING))
        with torch.enable_grad():
            reconstruct(layer, list(learned.values()), iterations)
    codes = layer.quantize_groups(quantize_group)
    layer.notes["settled"] = min(settled)
    return codes


def reconstruct(layer: Layer, learned: list[SoftRounding], iterations: int) -> None:
    """Minimise the error of the layer's output over batches of windows, plus the regulariser,
    starting from `learned`.

    The error is relative to each token's size, as in `collecting`, against the original model's
    output where that is known.
    """
    inputs = torch.cat(layer.inputs)
    device = next(layer.module.parameters()).device
    with torch.no_grad():
        targets = torch.cat(
            layer.targets
            or [layer.forward(chunk.to(device)).to(chunk.device) for chunk in layer.inputs]
        )
        for rounding in learned:
            rounding.v = torch.where(rounding.v >= 0, BLOCK_START, -BLOCK_START).requires_grad_(
                True
            )
    originals = {name: layer.module.get_submodule(name).weight for name in layer.family.linears}
    count = sum(rounding.v.numel() for rounding in learned)

    def error(chosen: torch.Tensor | slice) -> torch.Tensor:
        output, target = (
            layer.forward(inputs[chosen].to(device)).float(),
            targets[chosen].to(device).float(),
        )
        size = target.square().mean(-1).clamp(min=1e-12)
        return ((output - target).square().mean(-1) / size).mean()

    with torch.no_grad():
        for group, rounding in zip(layer.family.groups, learned, strict=True):
            _set_weights(layer, group, rounding.weight((rounding.v >= 0).float()))
        start = error(slice(BLOCK_BATCH)).clamp(min=1e-12)
    optimiser = torch.optim.Adam([rounding.v for rounding in learned], lr=BLOCK_TRAVEL / iterations)
    generator = torch.Generator().manual_seed(layer.index)
    for step in range(iterations):
        beta = beta_at(step, iterations)
        penalty = torch.zeros((), device=device)
        for group, rounding in zip(layer.family.groups, learned, strict=True):
            h = rounding.h()
            _set_weights(layer, group, rounding.weight(h))
            if beta is not None:
                penalty = penalty + (1 - (2 * h - 1).abs().pow(beta)).sum() / count
        loss = error(torch.randint(0, len(inputs), (BLOCK_BATCH,), generator=generator)) / start
        optimiser.zero_grad()
        (BLOCK_ERROR_WEIGHT * loss + STRENGTH * penalty).backward()
        optimiser.step()
    for name, weight in originals.items():
        set_weight(layer.module.get_submodule(name), weight)
    for rounding in learned:
        rounding.v = rounding.v.detach()


def _set_weights(layer: Layer, group: LinearGroup, stacked: torch.Tensor) -> None:
    """Put the rows of a tensor [out, in], which may carry a gradient, in the place of the weights
    of a group's linears.
    """
    linears = [layer.module.get_submodule(name) for name in group.linears]
    weights = stacked.split([linear.out_features for linear in linears])
    for linear, weight in zip(linears, weights, strict=True):
        set_weight(linear, weight.to(linear.weight.dtype))


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.quantization_parser(__doc__, bits=4)
    parser.add_argument(
        "--iterations",
        type=positive,
        metavar="N",
        help=f"gradient steps per layer (default: {ITERATIONS}; {DEMO_ITERATIONS} with demo text)",
    )
    parser.add_argument(
        "--reconstruction",
        choices=("layer", "block"),
        default="layer",
        help="learn each linear's rounding alone, or then all of a decoder layer's together "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--equalize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="scale input channels as AWQ does before learning; balanced they are in any case "
        "(default: %(default)s)",
    )
    cli.add_catch_up(parser)
    cli.add_tune_scales(parser)
    return parser


def method(options: argparse.Namespace) -> Method:
    block = options.reconstruction == "block"
    needs = Needs.GRAM | (Needs.MAGNITUDES if options.equalize else Needs.NOTHING)
    return Method(
        "adaround",
        lambda layer: quantize_layer(layer, options.iterations, block),
        needs,
        rewrite_layer=balance,
        prepare_layer=equalize if options.equalize else None,
        catch_up=options.catch_up,
        tune_steps=options.tune_scales,
    )


def main() -> None:
    options = argument_parser().parse_args()
    cli.resolve_tuning(options)
    options.iterations = options.iterations or (
        DEMO_ITERATIONS if options.calib_data == "demo" else ITERATIONS
    )
    if options.reconstruction == "block" and parallel.size() > 1:
        raise UserError(
            "--reconstruction block learns a layer as a whole, in one process; start it without "
            "torchrun"
        )
    quantize(options, method(options))


if __name__ == "__main__":
    cli.run(main)

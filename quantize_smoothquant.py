#!/usr/bin/env python3
"""SmoothQuant: 8-bit weights and 8-bit activations (W8A8); the activations' outliers are moved into
the weights first.

    python quantize_smoothquant.py --output models/Llama-3.2-1B-Instruct/smoothquant-8bit
    python quantize_smoothquant.py --model demo --alpha 0.8

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", https://arxiv.org/abs/2211.10438. Each input channel is divided by (equation 4)

    s = max|x|^α / max|W|^(1 - α)

and its weights multiplied by it. Weights are then rounded per output channel, activations per token
as they come, both symmetric. By default (--alpha auto) s is not made of maxima by a rule: it is the
one for which both roundings are expected to change the outputs least.
"""

import argparse
from collections.abc import Callable
from functools import partial

import common  # noqa: F401  # says in one line where libraries are missing

# isort: split
import torch
from torch import Tensor

from common import cli
from common.base.arguments import share
from common.base.errors import UserError
from common.kernels.rounding import search_range
from common.model.architecture import LinearGroup
from common.numerics.grid import QuantizedLinear
from common.quantization import quantize
from common.walk.inputs import InputStatistics, Needs
from common.walk.method import Layer, Method
from common.walk.scaling import centred, fold_all, largest_weight, power_ratio, shared_by_heads

ACTIVATION_BITS = 8
# The best single α of four models (docs/Quantization_Methods_Deep_Dive.md); where auto begins.
ALPHA = 0.65
# Of the search for the least error. Of most linears of two models within 5% of what 64 reach.
STEPS = 8
# Rows of the weights, evenly drawn, that stand for all.
ROWS = 1024


def least_error_scale(
    weight: Tensor,
    inputs: Tensor,
    start: Tensor,
    shared: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """The scale s [in] for which the outputs are expected to change least when inputs [tokens, in]
    divided by it are rounded per token, and weight [out, in] times it per row.

    A rounding error follows the step, which is that of the token or row, wherever in it it arises.
    With as many bits for both, the expected square of the outputs' error is, up to a factor,

        mean(max (x/s)²) · Σ (W s)²  +  Σ max (W s)² · mean(Σ (x/s)²)

    with means over tokens, and sums and maxima within a token or row. In log s the logarithm of
    that is convex (sums, products and maxima of powers: geometric programming), so the least error
    is the same wherever the search begins: where each channel adds as much to what falls with its s
    as to what rises with it. Steps go by half the logarithm of their ratio, shorter and shorter.

    Args:
        start: [in].
        shared: of values [in] makes those equal that have to be (`shared_by_heads`).
    """
    inputs, weights = (_scaled_down(values).square() for values in (inputs, weight))
    mean, total = inputs.mean(0), weights.sum(0)
    log_scale = start.to(inputs.dtype).log()
    for step in range(STEPS):
        power = (2 * log_scale).exp()
        size, peak = mean / power, _sums_of_largest(inputs / power) / len(inputs)
        weight_size, weight_peak = total * power, _sums_of_largest(weights * power)
        falling = _floored(shared(peak * weight_size.sum() + size * weight_peak.sum()))
        rising = _floored(shared(weight_size * peak.sum() + weight_peak * size.sum()))
        log_scale += 0.5 * (1 - step / STEPS) * (falling / rising).log()
    return centred(log_scale.exp())


def _scaled_down(values: Tensor) -> Tensor:
    """In float32 or wider, the largest one: no square or sum of them overflows."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values / values.abs().amax().clamp(min=torch.finfo(values.dtype).tiny)


def _floored(shares: Tensor) -> Tensor:
    """Shares [in], none next to nothing: such a channel gets no scale that 16 bits do not hold.
    Where all are nothing, as those of weights or inputs that are zero, they count alike.
    """
    return shares.clamp(min=1e-6 * shares.mean()).clamp(min=torch.finfo(shares.dtype).tiny)


def _sums_of_largest(values: Tensor) -> Tensor:
    """Of each column the sum of those values [rows, in] that are the largest of their row: [in]."""
    # On a CPU numpy's takes a quarter of the time of torch's.
    column = torch.from_numpy(values.numpy().argmax(1)) if values.is_cpu else values.argmax(1)
    largest = values.gather(1, column.unsqueeze(1)).squeeze(1)
    # In float64 the order of the additions, which a GPU leaves open, does not show.
    sums = largest.new_zeros(values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, column, largest.double()).to(values.dtype)


def smoothing_scale(layer: Layer, group: LinearGroup, alpha: float | None) -> Tensor:
    """The smoothing scale [in] of a linear group for one α, or for None that of the least error."""
    statistics = layer.statistics[group]
    weights = [layer.weight(name) for name in group.linears]
    shared = partial(shared_by_heads, layer, group)
    exponent = ALPHA if alpha is None else alpha
    scale = shared(power_ratio(statistics.abs_max, largest_weight(weights), exponent))
    if alpha is not None:
        return scale
    every = -(-sum(map(len, weights)) // ROWS)
    some = torch.cat([weight[::every] for weight in weights])
    return least_error_scale(some, statistics.sample, scale, shared)


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
    try:
        return None if text == "auto" else share(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; give one, or auto") from None


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
        default="auto",
        metavar="X|auto",
        help="migration strength between 0 and 1, or auto: for each channel what is expected to "
        "change the outputs least (default: %(default)s)",
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
    # The least error is searched on some of the inputs.
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

"""What is found out on the calibration windows before a layer is quantized: the statistics of its
inputs, and by how much the residual stream lags behind the original model's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.base import parallel
from common.model.architecture import LinearGroup
from common.solvers.rounding import catch_up
from common.walk.inputs import InputStatistics, Needs, add_in_parts, group_inputs, new_sums
from common.walk.method import Layer, Method
from common.walk.streams import each_chunk


def collect_statistics(
    layer: Layer,
    device: torch.device,
    method: Method,
    originals: list[Tensor] | None,
) -> dict[LinearGroup, InputStatistics]:
    """Statistics of every linear group over all calibration windows. With `Method.original_inputs`
    the layer's inputs become its outputs.

    The residual stream is normalised before it is read again, so an error that o_proj or down_proj
    adds to it counts relative to the token's size. A few tokens, the first of each text above all,
    carry values hundreds of times the usual; unweighted, they alone would decide how these two are
    rounded. By the square of their size they would count for nothing, and all other tokens rest
    their attention on them: they are weighed by one over the size itself. Where the output is
    normalised first, an error counts relative to the output's own size as well.

    Args:
        originals: hidden states of the original model before the layer; they become those after it.
    """
    tokens = sum(chunk.shape[:-1].numel() for chunk in layer.inputs)
    if Needs.SAMPLES in method.needs:
        tokens = sum(parallel.gather(tokens))
    sums = new_sums(layer.module, device, method.needs, tokens)
    family = layer.family
    inputs: dict[LinearGroup, Tensor] = {}
    attention, mlp = family.writing
    after_attention: list[Tensor] = []
    watch = layer.module.get_submodule(family.reading[1].fed_by).register_forward_pre_hook(
        lambda _, arguments: after_attention.append(arguments[0])
    )
    with group_inputs(layer.module, inputs.__setitem__):

        def visit(i: int) -> None:
            chunk, original = layer.inputs[i].to(device), None
            after_attention.clear()
            inputs.clear()
            parted = originals is not None and (
                originals[i] is not layer.inputs[i] or method.online is not None
            )
            if parted:
                with method.as_original():
                    original = layer.forward(originals[i].to(device))
            output = layer.forward(chunk)
            lags = {}
            if parted and method.catches_up(family):
                lags = {attention: after_attention[0] - after_attention[1], mlp: original - output}
            weights = {attention: token_weights(chunk), mlp: token_weights(output)}
            if family.normalises_output:
                weights = {
                    group: found * output_weights(layer, group, inputs[group])
                    for group, found in weights.items()
                }
            for group in family.groups:
                lag = lags.get(group)
                if lag is not None:
                    lag = family.lag_of_output(lag, layer.config)
                add_in_parts(sums[group], inputs[group], weights.get(group), lag)
            if originals is not None:
                originals[i] = (original if parted else output).to(originals[i].device)
            if method.original_inputs:
                layer.inputs[i] = output.to(layer.inputs[i].device)

        each_chunk(visit, layer.inputs, originals)
    watch.remove()
    return {group: found.finish() for group, found in sums.items()}


def token_weights(hidden: Tensor) -> Tensor:
    """One over the size of each token's hidden state [..., hidden], the root of its mean square:
    [...].
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    length = torch.linalg.vector_norm(hidden, dim=-1, dtype=dtype)
    return (length / hidden.shape[-1] ** 0.5).clamp(min=1e-6).reciprocal()


def output_weights(layer: Layer, group: LinearGroup, inputs: Tensor) -> Tensor:
    """One over the mean square of the group's output for each token of its inputs [..., in]: [...].
    What an error of the output is divided by, squared, where a norm follows.
    """
    linear = layer.module.get_submodule(group.linears[0])
    # Past what is hooked to the linear: the inputs are as it was given them.
    output = torch.nn.functional.linear(inputs, linear.weight, linear.bias)
    return output.float().square().mean(-1).clamp(min=1e-12).reciprocal()


def catch_up_layer(layer: Layer, share: float) -> None:
    """Change the weights of the linears that write the residual stream so that they make up for its
    lag.
    """
    for group, statistics in layer.groups():
        if statistics.lag is None:
            continue
        name, lag = group.linears[0], parallel.own_rows(statistics.lag)
        weight = layer.module.get_submodule(name).weight
        changed = catch_up(layer.own_weight(name), statistics.gram, lag, share)
        weight.data = parallel.join_rows(changed.to(weight.dtype), len(weight))
        # As large as the weights, and done with.
        layer.statistics[group] = replace(statistics, lag=None)

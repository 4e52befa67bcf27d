"""What is found out on the calibration windows before a layer is quantized: the statistics of its
inputs, and by how much the residual stream lags behind the original model's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common import parallel
from common.inputs import InputStatistics, add_in_parts, group_inputs, new_sums
from common.method import Layer, Method
from common.models import LINEAR_GROUPS
from common.rounding import catch_up
from common.streams import each_chunk

# The groups, of one linear each, whose output is added to the residual stream.
_O_PROJ, _DOWN_PROJ = ("self_attn.o_proj",), ("mlp.down_proj",)


def collect_statistics(layer: Layer, device: torch.device, method: Method,
                       originals: list[Tensor] | None) -> list[InputStatistics]:
    """Statistics of every linear group over all calibration windows. With `Method.original_inputs`
    the layer's inputs become its outputs.

    The residual stream is normalised before it is read again, so an error that o_proj or down_proj
    adds to it counts relative to the token's size. A few tokens, the first of each text above all,
    carry values hundreds of times the usual; unweighted, they alone would decide how these two are
    rounded. By the square of their size they would count for nothing, and all other tokens rest
    their attention on them: they are weighed by one over the size itself.

    Args:
        originals: hidden states of the original model before the layer; they become those after it.
    """
    sums = new_sums(layer.module, device, method.needs)
    inputs: dict[int, Tensor] = {}
    after_attention: list[Tensor] = []
    watch = layer.module.post_attention_layernorm.register_forward_pre_hook(
        lambda _, arguments: after_attention.append(arguments[0]))
    with group_inputs(layer.module, inputs.__setitem__):
        def visit(i: int) -> None:
            chunk, original = layer.inputs[i].to(device), None
            after_attention.clear()
            inputs.clear()
            parted = originals is not None and (originals[i] is not layer.inputs[i]
                                                or method.online is not None)
            if parted:
                with method.as_original():
                    original = layer.forward(originals[i].to(device))
            output = layer.forward(chunk)
            lags = {}
            if parted:
                lags = {_O_PROJ: after_attention[0] - after_attention[1],
                        _DOWN_PROJ: original - output}
            weights = {_O_PROJ: token_weights(chunk), _DOWN_PROJ: token_weights(output)}
            for index, group in enumerate(LINEAR_GROUPS):
                add_in_parts(sums[index], inputs[index], weights.get(group.linears),
                             lags.get(group.linears))
            if originals is not None:
                originals[i] = (original if parted else output).to(originals[i].device)
            if method.original_inputs:
                layer.inputs[i] = output.to(layer.inputs[i].device)

        each_chunk(visit, layer.inputs, originals)
    watch.remove()
    return [group.finish() for group in sums]


def token_weights(hidden: Tensor) -> Tensor:
    """One over the size of each token's hidden state [..., hidden], the root of its mean square:
    [...].
    """
    return hidden.float().square().mean(-1).clamp(min=1e-12).rsqrt()


def catch_up_layer(layer: Layer, share: float) -> None:
    """Change the weights of the linears that write the residual stream so that they make up for its
    lag.
    """
    for index, (group, statistics) in enumerate(layer.groups()):
        if statistics.lag is None:
            continue
        name, lag = group.linears[0], parallel.own_rows(statistics.lag)
        weight = layer.module.get_submodule(name).weight
        changed = catch_up(layer.own_weight(name), statistics.gram, lag, share)
        weight.data = parallel.join_rows(changed.to(weight.dtype), len(weight))
        # As large as the weights, and done with.
        layer.statistics[index] = replace(statistics, lag=None)

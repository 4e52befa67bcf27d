"""Scale input channels of a linear group and undo it in what feeds them: the function stays, the
weights' form changes.

With a positive s per channel, W' = W diag(s) reads x' = x / s. The division goes into the norm's
gain, or into the rows of the linear whose output is x: up_proj feeds down_proj, and v_proj feeds
o_proj through the attention's averages, where all query heads that share a key-value head must
share s; `architecture` says which it is. `equalize` chooses s as AWQ does (Lin et al. 2023, arXiv
2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.base import parallel
from common.model.architecture import LinearGroup, family_of
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max
from common.solvers.rounding import damped, output_error
from common.walk.method import Layer

# Exponents that `search_scale` tries, beside no scaling at all.
RATIOS = 14
# Of the Gram matrix that it measures errors with, as a share of the mean diagonal: the scales serve
# other text too (docs/Quantization_Methods_Deep_Dive.md).
SCALE_DAMPING = 1.0


def shared_by_heads(layer: Layer, group: LinearGroup, values: Tensor) -> Tensor:
    """Values [in] per input channel made equal wherever a scale has to be: over query heads of a
    key-value head, the mean.
    """
    if not group.by_head:
        return values
    by_head = values.view(group.heads(len(values), layer.config))
    return by_head.mean(1, keepdim=True).expand_as(by_head).reshape(-1)


def fold_scale(layer: Layer, group: LinearGroup, scale: Tensor) -> None:
    """`fold_into_weights`, and adapt the statistics."""
    fold_into_weights(layer.module, group, scale)
    if layer.statistics is not None:
        layer.statistics[group] = layer.statistics[group].divided(scale)


def fold_into_weights(module: nn.Module, group: LinearGroup, scale: Tensor) -> None:
    """Multiply the input columns of a group's linears in a decoder layer by scale [in], and divide
    what feeds them.

    For o_proj, `scale` has to be equal over the query heads of a key-value head
    (`shared_by_heads`).
    """
    for name in group.linears:
        weight = module.get_submodule(name).weight
        weight.data = (_exact(weight) * scale).to(weight.dtype)
    feeder, family = module.get_submodule(group.fed_by), family_of(module)
    rows = scale.view(group.heads(len(scale), module.self_attn.config))[:, 0].reshape(-1)
    if group.reads_residual:
        family.set_gain(feeder, family.gain(feeder) / rows)
    else:
        for parameter in feeder.parameters():  # weight [out, in] and bias [out]
            fed = parameter.data[-len(rows) :]
            fed.copy_(_exact(fed) / rows.view(-1, *[1] * (fed.dim() - 1)))


def _exact(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is in that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def power_ratio(activation: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """activation^exponent / weight^(1 - exponent), `centred`. All [in]."""
    scale = activation.clamp(min=1e-5).pow(exponent) / weight.clamp(min=1e-5).pow(1 - exponent)
    return centred(scale.clamp(min=1e-4))


def centred(scale: Tensor) -> Tensor:
    """A scale [in] whose largest times its smallest value is one."""
    return scale / (scale.max() * scale.min()).sqrt()


def largest_weight(weights: list[Tensor]) -> Tensor:
    """Largest |w| of each input channel over all rows of all linears [out, in] that read it:
    [in]."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def rounding_loss(
    weight: Tensor, gram: Tensor, grid: Grid, scale: Tensor, scale_dtype: torch.dtype
) -> Tensor:
    """Output error of weight [out, in] when weight * scale is rounded on its full range and divided
    by scale again.
    """
    scaled = weight * scale
    grid_scale, zero_point = min_max(grouped(scaled, grid), grid, scale_dtype=scale_dtype)
    rounded = QuantizedLinear.nearest(scaled, grid_scale, zero_point, grid).dequantize() / scale
    return output_error(rounded - weight, gram).sum()


def search_scale(layer: Layer, group: LinearGroup) -> Tensor:
    """The scale [in] of one linear group, all ones if no other is better."""
    statistics = layer.statistics[group]
    weight = layer.stacked_weight(group)
    groups = grouped(weight.abs(), layer.grid)
    relative = parallel.mean((groups / groups.amax(-1, keepdim=True).clamp(min=1e-8)).flatten(1), 0)
    candidates = [torch.ones_like(statistics.abs_mean)]
    for step in range(RATIOS):
        ratio = power_ratio(statistics.abs_mean, relative, step / (RATIOS - 1))
        candidates.append(shared_by_heads(layer, group, ratio))
    gram = damped(statistics.gram, SCALE_DAMPING)
    losses = [
        rounding_loss(weight, gram, layer.grid, scale, layer.scale_dtype) for scale in candidates
    ]
    return torch.stack(candidates)[parallel.add(torch.stack(losses)).argmin()]


def equalize(layer: Layer) -> None:
    """Search and fold the scales of all four groups of a layer."""
    fold_all(layer, lambda group: search_scale(layer, group))


def fold_all(layer: Layer, search: Callable[[LinearGroup], Tensor]) -> None:
    """Fold the scale [in] that `search` finds for each linear group. No fold changes what the
    search of another group reads.
    """
    found = {group: search(group) for group in layer.family.groups}
    for group, scale in found.items():
        # Several processes find the same, but for a tie.
        fold_scale(layer, group, parallel.from_first(scale))

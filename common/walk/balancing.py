"""Balance the input channels of linears by the weights alone, without changing the function.

Of a channel between two modules it is free what the one multiplies by and the other divides by: the
gains of a norm and the columns that read them, rows of up_proj and columns of down_proj, rows of
v_proj and columns of o_proj. How a file happens to share them out decides how well columns that
share a group's step are rounded. Balanced, models with the same function are the same model.
(With the same aim, for ranges of whole channels: cross-layer equalization, Nagel et al. 2019,
https://arxiv.org/abs/1906.04721.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.base import parallel
from common.model.architecture import LinearGroup
from common.walk.method import Layer
from common.walk.scaling import fold_scale

# Each brings columns and rows hundreds of times nearer to equal lengths.
TURNS = 4
# How far, as a factor, a channel may be from balance before it counts as an outlier. In models as
# their files give them some in a thousand are further, of one's q, k and v 26. And how far two in
# three may be before what the file says of its channels means nothing: there within 1.02 to 1.25,
# in one group 1.45 (docs/Quantization_Methods_Deep_Dive.md).
UNEVEN, SPREAD = 2.0, 1.5


def balance(layer: Layer) -> None:
    """Balance the input channels of each linear group of a layer."""
    for group in layer.family.groups:  # in turn: a pair's rows are as long as its columns make them
        _fold(layer, group, balanced_scale(layer, group))


def balance_outliers(layer: Layer) -> None:
    """Balance those channels of a linear group alone that are far from it, as far as UNEVEN
    allows; the rest stays as the file gives it, to the last bit. All are balanced where most are
    far.
    """
    for group in layer.family.groups:
        scale = balanced_scale(layer, group)
        scale = scale / scale.median()  # what all channels share is no unevenness
        if scale.log().abs().quantile(2 / 3) < math.log(SPREAD):
            scale = scale / scale.clamp(1 / UNEVEN, UNEVEN)
        _fold(layer, group, scale)


def _fold(layer: Layer, group: LinearGroup, scale: Tensor) -> None:
    """Scale the input channels of a linear group, as nearly as leaves a norm's gains exact."""
    if group.reads_residual:
        scale = exact_scale(layer, group, scale)
    fold_scale(layer, group, parallel.from_first(scale))


def balanced_scale(layer: Layer, group: LinearGroup) -> Tensor:
    """The scale [in] that balances the input channels of a linear group."""
    if group.reads_residual:
        return column_scale([layer.weight(name) for name in group.linears])
    return pair_scale(layer.module, group)


def column_scale(weights: list[Tensor]) -> Tensor:
    """The scale [in] by which all columns of weights [out, in] are equally long, where all rows
    count alike: their length is in part as free. Found by turns, as each changes the other
    (Sinkhorn & Knopp 1967).
    """
    squares = torch.cat(weights).float().square()
    scale = torch.ones_like(squares[0])
    for _ in range(TURNS):
        lengths = (squares @ scale).clamp(min=torch.finfo(torch.float32).tiny)
        scale = usable((squares.T @ lengths.reciprocal()).reciprocal())
        scale = scale / scale.log().mean().exp()
    return scale.sqrt()


def pair_scale(module: nn.Module, group: LinearGroup) -> Tensor:
    """The scale [in] by which columns of a linear in a decoder layer are as long as the rows that
    feed them, their biases among them; equal over the query heads of a key-value head.
    """
    weight = module.get_submodule(group.linears[0]).weight
    heads = group.heads(weight.shape[1], module.self_attn.config)
    columns = weight.float().unflatten(1, heads).norm(dim=(0, 2)).flatten()
    feeder = module.get_submodule(group.fed_by)
    rows = feeder.weight[-len(columns) :].float().norm(dim=1)
    if feeder.bias is not None:
        rows = torch.hypot(rows, feeder.bias[-len(columns) :].float())
    # What reads a row that puts out nothing may be as small as it is wished to be.
    rows = rows.clamp(min=torch.finfo(torch.float32).tiny)
    scale = usable((rows / columns).sqrt())
    return scale.view(heads[0], 1, heads[2]).expand(heads).reshape(-1)


def usable(scale: Tensor) -> Tensor:
    """A scale that is one where nothing reads a channel, or nothing sane comes of it."""
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)


def exact_scale(layer: Layer, group: LinearGroup, scale: Tensor) -> Tensor:
    """The scale nearest to a given one by which gains stay what their type holds, and are not
    rounded.
    """
    family = layer.family
    gain = family.gain(layer.module.get_submodule(group.fed_by))
    stored = (gain / scale - family.gain_offset).to(layer.scale_dtype).float()
    exact = gain / (stored + family.gain_offset)
    return torch.where(gain == 0, scale, usable(exact))

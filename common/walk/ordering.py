"""Order the channels between two linears so that those which share a step are alike.

In what order up_proj hands its channels to down_proj is free, and so is that of v_proj's for
o_proj inside a head: rows change places with the columns that read them, the function stays. A
group's step is what its largest weights need. In a file's order long and short columns meet in a
group, and all are rounded as coarsely as the longest; in the order of their lengths short ones
share a step that is as fine as they allow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.base import parallel
from common.model.architecture import LinearGroup, family_of
from common.walk.method import Layer


def order_channels(layer: Layer) -> None:
    """Put the input channels of down_proj, and of o_proj those of each head, in the order of their
    columns' lengths, where they fill more than one group. Before statistics are measured.
    """
    for group in layer.family.writing:
        heads = group.heads(group.in_features(layer.module), layer.config)
        if layer.grid.groups(heads[2]) > 1:
            order = order_of_lengths(layer.weight(group.linears[0]), heads)
            # Lengths that are almost equal may compare otherwise on another card.
            reorder(layer.module, group, parallel.from_first(order))


def order_of_lengths(weight: Tensor, heads: tuple[int, int, int]) -> Tensor:
    """Places [key-value heads, size] of a head's columns from the shortest to the longest; weight
    [out, key-value heads * query heads * size], a column of all query heads that share one.
    """
    lengths = weight.square().sum(0).view(heads).sum(1)
    return lengths.argsort(dim=-1, stable=True)


def reorder(module: nn.Module, group: LinearGroup, order: Tensor) -> None:
    """Let the channels that the one linear of a group in a decoder layer reads change places: its
    columns and the rows that they come from. order: [key-value heads, size], as `order_of_lengths`
    has it.
    """
    linear, rows = module.get_submodule(group.linears[0]), _places(order)
    queries = linear.in_features // len(rows)
    # Query heads lie one after the other, those that share a key-value head side by side.
    linear.weight.data = linear.weight.data[:, _places(order.repeat_interleave(queries, 0))]
    for parameter in _feeding(module, group):  # weight [out, in] or bias [out]
        # What gate_proj puts out is multiplied into it, so its rows go along.
        parts = [parameter[-len(rows) :]] if group.by_head else parameter.split(len(rows))
        for part in parts:
            part.copy_(part[rows])


def _places(order: Tensor) -> Tensor:
    """Where channels of all heads come from, [heads * size], of each head's own [heads, size]."""
    first = torch.arange(len(order), device=order.device) * order.shape[1]
    return (first.unsqueeze(1) + order).flatten()


def _feeding(module: nn.Module, group: LinearGroup) -> list[Tensor]:
    """The weights and biases of which rows are the input channels of a group."""
    family = family_of(module)
    (before,) = (each for each in family.groups if group.fed_by in each.linears)
    names = [group.fed_by] if group.by_head else before.linears
    return [each.data for name in names for each in module.get_submodule(name).parameters()]

"""Order the channels between two linears so that those which share a step are alike.

In what order up_proj hands its channels to down_proj is free, and so is that of v_proj's for
o_proj inside a head: rows change places with the columns that read them, the function stays. A
group's step is what its largest weights need. In a file's order long and short columns meet in a
group, and all are rounded as coarsely as the longest; in the order of their lengths short ones
share a step that is as fine as they allow.
"""

from __future__ import annotations

from torch import Tensor

from common.base import parallel
from common.model.channels import reorder
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

"""Sums over the tokens of a batch, channel by channel: what methods know of inputs beside their
products.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from common.kernels.dispatch import triton_kernels


class ChannelSums(NamedTuple):
    """Of each channel of rows [tokens, in], each [in] float32.

    squares: the weighted sum of squares; None where it was not asked for.
    largest: the largest magnitude.
    magnitudes: the sum of magnitudes; all tokens count alike.
    """

    squares: Tensor | None
    largest: Tensor
    magnitudes: Tensor


def channel_sums(rows: Tensor, weights: Tensor | None = None, squares: bool = True) -> ChannelSums:
    """Rows [tokens, in], of which each counts `weights` [tokens] or once in the squares, if those
    are asked for. A channel that holds NaN has NaN for all.
    """
    if kernels := triton_kernels(rows):
        return ChannelSums(*kernels.sums.channel_sums(rows, weights, squares))
    values = rows.float()
    found = None
    if squares:
        weighted = values if weights is None else values * weights.float().unsqueeze(1)
        found = (weighted * values).sum(0)
    magnitudes = values.abs()
    return ChannelSums(found, magnitudes.amax(0), magnitudes.sum(0))

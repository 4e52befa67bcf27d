"""The range that each group of weights is rounded over, chosen for a small output error.

`choose_ranges` does it before the codes are found, `restore_gain` corrects the scales after.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.kernels.dispatch import triton_kernels
from common.kernels.rounding import TILE_ELEMENTS, search_range
from common.numerics.grid import Grid, QuantizedLinear, min_max, round_scale, rounding_error
from common.solvers.rounding import damped

# Candidates of `choose_ranges`: share of each group's full range.
RANGE_CANDIDATES = tuple(torch.linspace(1.04, 0.55, 16).tolist())
# Of `choose_ranges`, as a share of the Gram matrix's mean diagonal. Other text than that which was
# calibrated on uses other directions: a range that pays for those which this text leaves alone does
# better there. Chosen on four models (docs/Quantization_Methods_Deep_Dive.md).
RANGE_DAMPING = 3.0


def choose_ranges(
    weight: Tensor, gram: Tensor, grid: Grid, scale_dtype: torch.dtype, sweeps: int = 1
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each group for nearest rounding, by the output error with all the
    other groups' errors.

    Group after group, the candidate range that minimises tr(D G Dᵀ), the rest of D as it stands, is
    taken. G is damped by RANGE_DAMPING.

    Args:
        weight: [out, in] float32; gram: [in, in].
        sweeps: how often all groups are gone through.
    Returns:
        scale and zero_point, each [out, groups].
    """
    gram = damped(gram, RANGE_DAMPING)
    scale, zero_point = search_range(weight, grid, gram.diagonal(), scale_dtype=scale_dtype)
    difference = QuantizedLinear.nearest(weight, scale, zero_point, grid).dequantize() - weight
    size = weight.shape[1] // scale.shape[1]
    candidates = torch.tensor(RANGE_CANDIDATES, device=weight.device)
    for _ in range(sweeps):
        for group in range(scale.shape[1]):
            span = slice(group * size, (group + 1) * size)
            take_best_range(
                weight[:, span],
                difference[:, span],
                difference @ gram[:, span],
                scale[:, group],
                zero_point[:, group],
                gram[span, span],
                grid,
                scale_dtype,
                candidates,
            )
    return scale, zero_point


def take_best_range(
    values: Tensor,
    error: Tensor,
    pull: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    block: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    candidates: Tensor,
) -> None:
    """Give one group the best of its current range and those candidates, by the output error;
    error, scale and zero-point change in place.

    All candidates are tried at once, so that a GPU sees few large operations; rows go in tiles that
    fit a CPU's cache.

    Args:
        values, error: [out, group], weights and what the represented ones are off by.
        pull: [out, group], the errors of all groups, this one's as it is, times the Gram matrix.
        scale, zero_point: [out].
        block: [group, group], the group's own part of the Gram matrix.
        candidates: shares of the full range.
    """
    kernels = triton_kernels(values)
    if kernels and kernels.ranges.fits_best_range(values.shape[1]):
        kernels.ranges.take_best_range(
            values, error, pull, scale, zero_point, block, grid, scale_dtype, candidates
        )
        return
    shares = candidates.unsqueeze(1)
    others = pull - error @ block
    rows = max(1, TILE_ELEMENTS[values.device.type] // (len(shares) * values.shape[1]))
    tensors = values, error, scale, zero_point, others
    for tile in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        part, part_error, part_scale, part_zero, part_pull = tile
        scales, zeros = min_max(part.unsqueeze(0), grid, shares, scale_dtype)  # [candidates, rows]
        scales = torch.cat([scales, part_scale.unsqueeze(0)])
        zeros = torch.cat([zeros, part_zero.unsqueeze(0)])
        errors = rounding_error(part.unsqueeze(0), scales, zeros, grid)
        # What is there now may not be nearest rounding's error; it stays a candidate as it is.
        errors[-1] = part_error
        best = ((errors @ block + 2 * part_pull) * errors).sum(-1).argmin(0)
        row = torch.arange(len(part), device=part.device)
        part_error.copy_(errors[best, row])
        part_scale.copy_(scales[best, row])
        part_zero.copy_(zeros[best, row])


# Bits from which `restore_gain` acts. With fewer the demo model gets worse by it (3 bits, KL: HQQ
# 1.29 -> 1.33, AWQ 0.517 -> 0.545): errors are so large there that gain is worth trading for noise.
GAIN_BITS = 4


def restore_gain(
    weight: Tensor,
    rounded: QuantizedLinear,
    gram: Tensor | None,
    scale_dtype: torch.dtype,
    from_bits: int = GAIN_BITS,
) -> QuantizedLinear:
    """The same codes with scales with which the output of each row, regressed on the original one,
    has slope one; below `from_bits` bits with the scales as they are.

    Ranges that are searched, and scales that are fitted, for the smallest error leave outputs too
    small: clipped weights are the largest and always move inwards, and least squares trades gain
    for noise. A layer's error hardly shows it, but all layers shrink alike, and with them the few
    massive activations that attention rests on.

    Args:
        weight: [out, in] float32.
        gram: [in, in], None for inputs of which nothing is known: the weights themselves are
            regressed.
    """
    if rounded.grid.bits < from_bits:
        return rounded
    values, product = rounded.dequantize(), weight if gram is None else weight @ gram
    gain = (values * product).sum(1) / (weight * product).sum(1)
    # A row without output, or whose output is lost, has no gain to restore.
    gain = torch.where((gain > 0.5) & (gain < 2.0), gain, 1.0)
    return replace(rounded, scale=round_scale(rounded.scale / gain.unsqueeze(1), scale_dtype))

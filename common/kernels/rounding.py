"""What quantization spends its time on: the search for each group's range, and rounding a block of
channels in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels.dispatch import triton_kernels
from common.numerics.grid import Grid, grouped, min_max, power_

# Candidates of the range search by bits: first and last share of the full range, and how many. They
# begin above 1, as a zero-point rounded to an integer shifts the range by up to half a step, and a
# scale rounded to 16 bits changes it; at 8 bits that is all there is to find (Gaussian weights with
# heavy tails: error 1.12 -> 1.02 of a float zero-point's).
SEARCH = {4: (1.04, 0.4, 60), 8: (1.02, 0.94, 40)}

# Elements of one working tile where many ranges are tried: small enough that its temporaries stay
# in a CPU's cache.
TILE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}


def search_range(
    weight: Tensor,
    grid: Grid,
    importance: Tensor | None = None,
    norm: float = 2.0,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Shrink each group's range step by step and keep the scale and zero-point with the smallest
    weighted error.

    The error of a candidate is sum_i importance_i * |w_i - q_i|^norm over the group. With
    `importance` the diagonal of the Gram matrix this is the layer's output error, cross terms left
    out.

    Args:
        weight: [out, in].
        importance: [in], positive, or None for all ones.
    Returns:
        scale and zero_point, each [out, groups] float32.
    """
    first, last, steps = SEARCH.get(grid.bits, SEARCH[4])
    candidates = [1.0, *torch.linspace(first, last, steps).tolist()]
    kernels = triton_kernels(weight)
    if kernels and norm in (2.0, 4.0, 8.0):
        return kernels.ranges.search_range(weight, grid, importance, norm, scale_dtype, candidates)
    groups = grouped(weight, grid)  # [out, groups, group]
    factor = None if importance is None else grouped(importance.float().unsqueeze(0), grid)
    shares = torch.tensor(candidates, device=weight.device).view(-1, 1, 1)
    scales, zeros = [], []
    for part in groups.split(max(1, TILE_ELEMENTS[weight.device.type] // weight.shape[1])):
        part = part.float()
        # [candidates, rows, groups], as the errors.
        scale, zero = min_max(part, grid, shares, scale_dtype)
        lowest, highest = grid.code_min - zero, grid.code_max - zero
        errors = torch.empty_like(scale)
        for index in range(len(candidates)):
            # In steps of the grid, so that no power of a small weight's error is nothing.
            value = part / scale[index].unsqueeze(-1)
            nearest = value.round()
            # A sixth of the time that torch's clamp takes for bounds that are broadcast.
            torch.maximum(nearest, lowest[index].unsqueeze(-1), out=nearest)
            torch.minimum(nearest, highest[index].unsqueeze(-1), out=nearest)
            error = power_(nearest.sub_(value), norm)
            torch.sum(error if factor is None else error.mul_(factor), -1, out=errors[index])
        best = errors.mul_((scale / scale[0]) ** norm).argmin(0, keepdim=True)
        scales.append(scale.gather(0, best)[0])
        zeros.append(zero.gather(0, best)[0])
    return torch.cat(scales), torch.cat(zeros)


def round_block(
    target: Tensor,
    shifted: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    codes: Tensor,
    error: Tensor,
) -> None:
    """Round a block of channels in turn, each to the code nearest to shifted_j + sum over k < j of
    factor_jk error_k.

    All are [block, out] but factor [block, block], of which the part below the diagonal counts.

    Args:
        codes, error: filled with the codes and with target minus what they stand for.
    """
    if kernels := triton_kernels(target):
        kernels.rounding.round_block(target, shifted, factor, scale, zero_point, grid, codes, error)
        return
    # Channels are taken apart at once: one by one it takes a fifth of the time.
    tensors = target, shifted, factor, 1.0 / scale, scale, zero_point, codes, error
    channels = zip(*(tensor.unbind() for tensor in tensors), strict=True)
    errors = error.T
    for j, (wanted, value, feedback, inverse, step, zero, code, left) in enumerate(channels):
        if j:
            value = torch.addmv(value, errors[:, :j], feedback[:j])
        found = torch.mul(value, inverse).round_().add_(zero).clamp_(grid.code_min, grid.code_max)
        code.copy_(found)
        torch.sub(wanted, found.sub_(zero).mul_(step), out=left)

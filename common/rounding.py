"""Round the weights of linears that share an input so that their output error is small, not their weight error.

With D = Q - W and the Gram matrix G of the input, the mean squared output error over all calibration tokens is
tr(D G Dᵀ). The solver goes through the input channels one by one and lets later channels make up for the error of
earlier ones, as GPTQ does (Frantar et al. 2022, arXiv 2210.17323). It uses the equivalent form of Chee et al. 2023
(arXiv 2307.13304, theorem 6): with G = (A + I) diag(d) (A + I)ᵀ, A strictly upper triangular, channel j is rounded at
w_j + sum over k < j of (w_k - q_k) A_kj. No inverse of G is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError
from common.grid import Grid, dequantize, grouped, min_max, quantize, round_scale, rounding_error
from common.kernels.rounding import TILE_ELEMENTS, round_block, search_range

BLOCK = 128
# As a share of the mean diagonal. More than the paper's 0.01: errors then avoid the directions that the calibration text
# happens not to use (WikiText-2 perplexity 1.176 against 1.190 of the baseline's; docs/quantization_methods_deep_dive.md).
DAMPING = 0.1
_DAMPING_TRIES = 5
# Of `catch_up`: the share of the lag that o_proj and down_proj each recover, and the damping as a share of the mean diagonal.
CATCH_UP, CATCH_UP_DAMPING = 0.5, 1.0


def damped(gram: Tensor, damping: float) -> Tensor:
    """Copy of gram [in, in] with damping * mean diagonal added to the diagonal; dead channels (0) get 1 instead."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    diagonal += damping * mean
    diagonal[dead] = 1.0
    return gram


def feedback_factor(gram: Tensor, damping: float, name: str = "") -> tuple[Tensor, float]:
    """Strictly upper triangular A [in, in] with gram + damping = (A + I) diag (A + I)ᵀ, transposed, and the damping used.

    A failed Cholesky is retried with ten times the damping.

    Raises:
        UserError: the Gram matrix holds NaN or Inf, or stays indefinite; names the layer.
    """
    for _ in range(_DAMPING_TRIES):
        # Lower Cholesky of the matrix flipped on both axes is, flipped back, an upper factor: gram = R Rᵀ.
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping).flip(0, 1))
        if not failed.item():
            factor = lower.flip(0, 1).T.contiguous()
            del lower
            factor /= factor.diagonal().clone().unsqueeze(1)
            if torch.isfinite(factor).all():
                return factor.tril_(-1), damping
        damping *= 10
    raise UserError(f"{name or 'a layer'}: its calibration inputs contain NaN or Inf, or are degenerate; "
                    "use other calibration data, or --dtype float32")


def solve(weight: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, damping: float = DAMPING,
          name: str = "") -> tuple[Tensor, float]:
    """Round `weight` with error feedback, channels in descending order of their Gram diagonal.

    Scales keep the original groups whatever the order ("static groups"), so nothing has to be permuted at run time.

    Args:
        weight: [out, in]; linears that share the input may be stacked along out.
        gram: [in, in] float32.
        scale, zero_point: [out, groups].
        name: for error messages.
    Returns:
        codes [out, in] int8 and the damping that was used.
    """
    columns = weight.shape[1]
    # A dead channel feeds back nothing (its row and column of the Gram are zero), so its own weight does not matter.
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor, damping = feedback_factor(gram[order][:, order], damping, name)
    group_of = (torch.arange(columns, device=weight.device) // (columns // scale.shape[1]))[order]
    # Channels first, so that one channel of all rows lies together.
    scales, zeros = scale.float().T.contiguous(), zero_point.float().T.contiguous()
    target = weight.float().T[order].contiguous()
    codes = torch.empty_like(target, dtype=torch.int8)
    error = torch.empty_like(target)                                            # w - q of the channels done
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        shifted = target[block].addmm(factor[block, :start], error[:start])
        round_block(target[block], shifted, factor[block, block], scales[group_of[block]], zeros[group_of[block]], grid,
                    codes[block], error[block])
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous(), damping


def catch_up(weight: Tensor, gram: Tensor, lag: Tensor, share: float) -> Tensor:
    """Weights [out, in] that, before they are rounded, make up for what the layers before have lost.

    The residual stream falls short of the original model's by some lag. W + share · E[lag xᵀ] (G + damping)⁻¹ adds back the
    share of it that is a linear function of this linear's input x: least squares, heavily damped. The idea of asymmetric
    calibration (Li et al. 2025, arXiv 2504.02692), here with the residual stream as the target.

    Args:
        weight: [out, in] of a linear whose output is added to the residual stream.
        gram: [in, in]; lag: E[lag xᵀ], [out, in].
        share: between 0 and 1.
    """
    # Where inputs hold NaN the factorisation fails; the rounding that follows says so.
    factor, _ = torch.linalg.cholesky_ex(damped(gram, CATCH_UP_DAMPING))
    return weight + share * torch.cholesky_solve(lag.T, factor).T


def restore_gain(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, gram: Tensor | None, grid: Grid,
                 scale_dtype: torch.dtype) -> Tensor:
    """Scales [out, groups] with which the output of each row, regressed on the original one, has slope one; below GAIN_BITS bits
    the scales as they are.

    Ranges that are searched, and scales that are fitted, for the smallest error leave outputs too small: clipped weights are
    the largest and always move inwards, and least squares trades gain for noise. A layer's error hardly shows it, but all
    layers shrink alike, and with them the few massive activations that attention rests on.

    Args:
        weight: [out, in] float32; codes: [out, in]; scale, zero_point: [out, groups]; gram: [in, in], None
            for inputs of which nothing is known: the weights themselves are regressed.
    """
    if grid.bits < GAIN_BITS:
        return scale
    rounded, product = dequantize(codes, scale, zero_point, grid), weight if gram is None else weight @ gram
    gain = (rounded * product).sum(1) / (weight * product).sum(1)
    # A row without output, or whose output is lost, has no gain to restore.
    gain = torch.where((gain > 0.5) & (gain < 2.0), gain, 1.0)
    return round_scale(scale / gain.unsqueeze(1), scale_dtype)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error tr(D G Dᵀ) per output row [out] of a weight difference [out, in]."""
    return (difference @ gram * difference).sum(-1)


# Bits from which `restore_gain` acts. Measured at 4 on eight models; at 3 the demo model gets worse by it (KL 0.349 -> 0.365 as its
# file gives it, 0.431 -> 0.442 at a spread of 0.2): errors are so large there that gain is worth trading for noise.
GAIN_BITS = 4

# Candidates of `choose_ranges`: share of each group's full range.
RANGE_CANDIDATES = tuple(torch.linspace(1.04, 0.55, 16).tolist())


def choose_ranges(weight: Tensor, gram: Tensor, grid: Grid, scale_dtype: torch.dtype, sweeps: int = 1,
                  ) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each group for nearest rounding, by the output error with all the other groups' errors.

    Group after group, the candidate range that minimises tr(D G Dᵀ), the rest of D as it stands, is taken.

    Args:
        weight: [out, in] float32; gram: [in, in].
        sweeps: how often all groups are gone through.
    Returns:
        scale and zero_point, each [out, groups].
    """
    scale, zero_point = search_range(weight, grid, gram.diagonal(), scale_dtype=scale_dtype)
    difference = dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid) - weight
    size = weight.shape[1] // scale.shape[1]
    for _ in range(sweeps):
        for group in range(scale.shape[1]):
            span = slice(group * size, (group + 1) * size)
            values, block = weight[:, span], gram[span, span]
            current = difference[:, span]
            others = difference @ gram[:, span] - current @ block               # pull of the other groups' errors
            best = _best_range(values, current, scale[:, group], zero_point[:, group], block, others, grid, scale_dtype)
            difference[:, span], scale[:, group], zero_point[:, group] = best
    return scale, zero_point


def _best_range(values: Tensor, current: Tensor, scale: Tensor, zero_point: Tensor, block: Tensor, others: Tensor,
                grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The best of the current range and all candidates for one group: error [out, group], scale and zero_point [out].

    All candidates are tried at once, so that a GPU sees few large operations; rows go in tiles that fit a CPU's cache.
    """
    results = []
    shares = torch.tensor(RANGE_CANDIDATES, device=values.device).unsqueeze(1)
    rows = max(1, TILE_ELEMENTS[values.device.type] // (len(RANGE_CANDIDATES) * values.shape[1]))
    for tile in zip(*(tensor.split(rows) for tensor in (values, current, scale, zero_point, others)), strict=True):
        part, part_current, part_scale, part_zero, pull = tile
        scales, zeros = min_max(part.unsqueeze(0), grid, shares, scale_dtype)   # [candidates, rows]
        scales, zeros = torch.cat([scales, part_scale.unsqueeze(0)]), torch.cat([zeros, part_zero.unsqueeze(0)])
        errors = rounding_error(part.unsqueeze(0), scales, zeros, grid)
        # What is there now may not be nearest rounding's error; it stays a candidate as it is.
        errors[-1] = part_current
        best = ((errors @ block + 2 * pull) * errors).sum(-1).argmin(0)
        row = torch.arange(len(part), device=part.device)
        results.append((errors[best, row], scales[best, row], zeros[best, row]))
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


def refine(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, gram: Tensor, grid: Grid,
           scale_dtype: torch.dtype, sweeps: int, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Lower tr(D G Dᵀ) of rounded weights further: scales refitted to the codes, then codes improved one by one, in turn.

    The loss of no row rises. G is damped as in `solve`.

    Returns:
        codes [out, in] int8 and scale [out, groups].
    """
    gram = damped(gram, damping)
    for _ in range(sweeps):
        scale = _refit_scales(weight, codes, scale, zero_point, gram, grid, scale_dtype)
        codes = _descend(weight, codes, scale, zero_point, gram, grid)
    return codes, scale


def _refit_scales(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, gram: Tensor, grid: Grid,
                  scale_dtype: torch.dtype) -> Tensor:
    """The scales [out, groups] that minimise the output error for fixed codes: least squares, a small system per row."""
    steps = grouped(codes, grid).float() - zero_point.unsqueeze(-1)             # [out, groups, group]
    flat = steps.flatten(1)
    size = steps.shape[2]
    normal = torch.stack([grouped((steps[:, g] @ gram[g * size:(g + 1) * size]) * flat, grid).sum(-1)
                          for g in range(steps.shape[1])], dim=1)               # [out, groups, groups]
    target = grouped((weight @ gram) * flat, grid).sum(-1)
    # A group whose codes are all zero, or nearly so, keeps its scale.
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    identity = torch.eye(normal.shape[1], device=weight.device)
    residual = target - (normal @ scale.unsqueeze(-1)).squeeze(-1)
    root, _ = torch.linalg.cholesky_ex(normal + ridge[:, None, None] * identity)
    step = torch.cholesky_solve(residual.unsqueeze(-1), root).squeeze(-1)
    fitted = round_scale(scale + step, scale_dtype)
    fitted = torch.where(torch.isfinite(fitted) & (fitted > 0.5 * scale) & (fitted < 2 * scale), fitted, scale)
    before, after = (output_error((steps * s.unsqueeze(-1)).flatten(1) - weight, gram) for s in (scale, fitted))
    return torch.where((after < before).unsqueeze(1), fitted, scale)


def _descend(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """One sweep of coordinate descent: each channel's codes in turn get their best value given all the others."""
    columns = weight.shape[1]
    group_of = torch.arange(columns, device=weight.device) // (columns // scale.shape[1])
    scales, zeros = scale.T.contiguous(), zero_point.T.contiguous()             # channels first, as in `solve`
    new = codes.T.contiguous()
    error = (new - zeros[group_of]).mul_(scales[group_of]).sub_(weight.T)       # q - w
    # The best value of channel j alone is q_j - gradient_j / G_jj; later channels feel the changes of earlier ones.
    pull = gram / gram.diagonal().unsqueeze(1)
    gained = torch.empty(min(BLOCK, columns), len(weight), device=weight.device)
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        present = error[block] + weight.T[block]
        gain = gained[:len(present)]
        round_block(present, present.addmm(pull[block], error, alpha=-1), pull[block, block], scales[group_of[block]],
                    zeros[group_of[block]], grid, new[block], gain)
        error[block] -= gain
    return new.T.contiguous()

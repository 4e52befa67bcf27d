"""Round the weights of linears that share an input so that their output error is small, not their
weight error.

With D = Q - W and the Gram matrix G of the input, the mean squared output error over all
calibration tokens is tr(D G Dᵀ). The solver goes through the input channels one by one and lets
later channels make up for the error of earlier ones, as GPTQ does (Frantar et al. 2022, arXiv
2210.17323). It uses the equivalent form of Chee et al. 2023 (arXiv 2307.13304, theorem 6): with G =
(A + I) diag(d) (A + I)ᵀ, A strictly upper triangular, channel j is rounded at w_j + sum over k < j
of (w_k - q_k) A_kj. No inverse of G is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.base.errors import UserError
from common.kernels.rounding import round_block
from common.numerics.grid import Grid, grouped, round_scale

BLOCK = 128
# As a share of the mean diagonal. More than the paper's 0.01: errors then avoid the directions that
# the calibration text happens not to use (WikiText-2 perplexity 1.176 against 1.190 of the
# baseline's; docs/Quantization_Methods_Deep_Dive.md).
DAMPING = 0.1
_DAMPING_TRIES = 5
# Of `catch_up`: the share of the lag that o_proj and down_proj each recover, and the damping as a
# share of the mean diagonal.
CATCH_UP, CATCH_UP_DAMPING = 0.5, 1.0


def damped(gram: Tensor, damping: float) -> Tensor:
    """Copy of gram [in, in] with damping * mean diagonal added to the diagonal; dead channels (0)
    get 1 instead.
    """
    gram = gram.clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    diagonal += damping * mean
    diagonal[dead] = 1.0
    return gram


def feedback_factor(gram: Tensor, damping: float, name: str = "") -> tuple[Tensor, float]:
    """Strictly upper triangular A [in, in] with gram + damping = (A + I) diag (A + I)ᵀ, transposed,
    and the damping used.

    A failed Cholesky is retried with ten times the damping.

    Raises:
        UserError: the Gram matrix holds NaN or Inf, or stays indefinite; names the layer.
    """
    for _ in range(_DAMPING_TRIES):
        # Lower Cholesky of the matrix flipped on both axes is, flipped back, an upper factor: gram
        # = R Rᵀ.
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping).flip(0, 1))
        if not failed.item():
            factor = lower.flip(0, 1).T.contiguous()
            del lower
            factor /= factor.diagonal().clone().unsqueeze(1)
            if torch.isfinite(factor).all():
                return factor.tril_(-1), damping
        damping *= 10
    raise UserError(
        f"{name or 'a layer'}: its calibration inputs contain NaN or Inf, or are degenerate; "
        "use other calibration data, or --dtype float32"
    )


def solve(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    damping: float = DAMPING,
    name: str = "",
) -> tuple[Tensor, float]:
    """Round `weight` with error feedback, channels in descending order of their Gram diagonal.

    Scales keep the original groups whatever the order ("static groups"), so nothing has to be
    permuted at run time.

    Args:
        weight: [out, in]; linears that share the input may be stacked along out.
        gram: [in, in] float32.
        scale, zero_point: [out, groups].
        name: for error messages.
    Returns:
        codes [out, in] int8 and the damping that was used.
    """
    columns = weight.shape[1]
    # A dead channel feeds back nothing (its row and column of the Gram are zero), so its own weight
    # does not matter.
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor, damping = feedback_factor(gram[order][:, order], damping, name)
    group_of = (torch.arange(columns, device=weight.device) // (columns // scale.shape[1]))[order]
    # Channels first, so that one channel of all rows lies together.
    scales, zeros = scale.float().T.contiguous(), zero_point.float().T.contiguous()
    target = weight.float().T[order].contiguous()
    codes = torch.empty_like(target, dtype=torch.int8)
    error = torch.empty_like(target)  # w - q of the channels done
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        shifted = target[block].addmm(factor[block, :start], error[:start])
        round_block(
            target[block],
            shifted,
            factor[block, block],
            scales[group_of[block]],
            zeros[group_of[block]],
            grid,
            codes[block],
            error[block],
        )
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.contiguous(), damping


def catch_up(weight: Tensor, gram: Tensor, lag: Tensor, share: float) -> Tensor:
    """Weights [out, in] that, before they are rounded, make up for what the layers before have
    lost.

    The residual stream falls short of the original model's by some lag. W + share · E[lag xᵀ] (G +
    damping)⁻¹ adds back the share of it that is a linear function of this linear's input x: least
    squares, heavily damped. The idea of asymmetric calibration (Li et al. 2025, arXiv 2504.02692),
    here with the residual stream as the target.

    Args:
        weight: [out, in] of a linear whose output is added to the residual stream.
        gram: [in, in]; lag: E[lag xᵀ], [out, in].
        share: between 0 and 1.
    """
    # Where inputs hold NaN the factorisation fails; the rounding that follows says so.
    factor, _ = torch.linalg.cholesky_ex(damped(gram, CATCH_UP_DAMPING))
    return weight + share * torch.cholesky_solve(lag.T, factor).T


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error tr(D G Dᵀ) per output row [out] of a weight difference [out,
    in]."""
    return (difference @ gram * difference).sum(-1)


def refine(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    gram: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
    sweeps: int,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Lower tr(D G Dᵀ) of rounded weights further: scales refitted to the codes, then codes
    improved one by one, in turn.

    The loss of no row rises. G is damped as in `solve`.

    Returns:
        codes [out, in] int8 and scale [out, groups].
    """
    gram = damped(gram, damping)
    for _ in range(sweeps):
        scale = _refit_scales(weight, codes, scale, zero_point, gram, grid, scale_dtype)
        codes = _descend(weight, codes, scale, zero_point, gram, grid)
    return codes, scale


def _refit_scales(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    gram: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype,
) -> Tensor:
    """The scales [out, groups] that minimise the output error for fixed codes: least squares, a
    small system per row.
    """
    steps = grouped(codes, grid).float() - zero_point.unsqueeze(-1)  # [out, groups, group]
    flat = steps.flatten(1)
    size = steps.shape[2]
    normal = torch.stack(
        [
            grouped((steps[:, g] @ gram[g * size : (g + 1) * size]) * flat, grid).sum(-1)
            for g in range(steps.shape[1])
        ],
        dim=1,
    )  # [out, groups, groups]
    target = grouped((weight @ gram) * flat, grid).sum(-1)
    # A group whose codes are all zero, or nearly so, keeps its scale.
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    identity = torch.eye(normal.shape[1], device=weight.device)
    residual = target - (normal @ scale.unsqueeze(-1)).squeeze(-1)
    root, _ = torch.linalg.cholesky_ex(normal + ridge[:, None, None] * identity)
    step = torch.cholesky_solve(residual.unsqueeze(-1), root).squeeze(-1)
    fitted = round_scale(scale + step, scale_dtype)
    fitted = torch.where(
        torch.isfinite(fitted) & (fitted > 0.5 * scale) & (fitted < 2 * scale), fitted, scale
    )
    before, after = (
        output_error((steps * s.unsqueeze(-1)).flatten(1) - weight, gram) for s in (scale, fitted)
    )
    return torch.where((after < before).unsqueeze(1), fitted, scale)


def _descend(
    weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, gram: Tensor, grid: Grid
) -> Tensor:
    """One sweep of coordinate descent: each channel's codes in turn get their best value given all
    the others.
    """
    columns = weight.shape[1]
    group_of = torch.arange(columns, device=weight.device) // (columns // scale.shape[1])
    scales, zeros = scale.T.contiguous(), zero_point.T.contiguous()  # channels first, as in `solve`
    # A single row lies the same way transposed, and the caller's codes would be changed.
    new = codes.T.clone(memory_format=torch.contiguous_format)
    error = (new - zeros[group_of]).mul_(scales[group_of]).sub_(weight.T)  # q - w
    # The best value of channel j alone is q_j - gradient_j / G_jj; later channels feel the changes
    # of earlier ones.
    pull = gram / gram.diagonal().unsqueeze(1)
    gained = torch.empty(min(BLOCK, columns), len(weight), device=weight.device)
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        present = error[block] + weight.T[block]
        gain = gained[: len(present)]
        round_block(
            present,
            present.addmm(pull[block], error, alpha=-1),
            pull[block, block],
            scales[group_of[block]],
            zeros[group_of[block]],
            grid,
            new[block],
            gain,
        )
        error[block] -= gain
    return new.T.contiguous()

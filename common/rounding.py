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
from common.grid import Grid

BLOCK = 128
DAMPING = 0.01
_DAMPING_TRIES = 5


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
    """Strictly upper triangular A [in, in] with gram + damping = (A + I) diag (A + I)ᵀ, and the damping that was used.

    A failed Cholesky is retried with ten times the damping.

    Raises:
        UserError: the Gram matrix holds NaN or Inf, or stays indefinite; names the layer.
    """
    for _ in range(_DAMPING_TRIES):
        # Lower Cholesky of the matrix flipped on both axes is, flipped back, an upper factor: gram = R Rᵀ.
        lower, failed = torch.linalg.cholesky_ex(damped(gram, damping).flip(0, 1))
        if not failed.item():
            upper = lower.flip(0, 1)
            factor = upper / upper.diagonal()
            if torch.isfinite(factor).all():
                return factor.triu_(1), damping
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
    group_of = torch.arange(columns, device=weight.device) // (columns // scale.shape[1])
    # Channels first, so that one channel of all rows lies together.
    scales = scale.float().T[group_of[order]].contiguous()
    zeros = zero_point.float().T[group_of[order]].contiguous()
    target = weight.float().T[order].contiguous()
    codes = torch.empty_like(target)
    error = torch.empty_like(target)                                            # w - q of the channels done
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        shifted = target[start:stop].addmm(factor[:start, start:stop].T, error[:start])
        _solve_block(target[start:stop], shifted, factor[start:stop, start:stop], scales[start:stop], zeros[start:stop],
                     grid, codes[start:stop], error[start:stop])
    back = torch.empty_like(codes)
    back[order] = codes
    return back.T.to(torch.int8).contiguous(), damping


def _solve_block(target: Tensor, shifted: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid,
                 codes: Tensor, error: Tensor) -> None:
    """Round one block of channels in turn; fills codes and error. All [block, out] but factor [block, block]."""
    inverse = 1.0 / scale
    for j in range(len(target)):
        value = torch.addmv(shifted[j], error[:j].T, factor[:j, j]) if j else shifted[j]
        code = torch.mul(value, inverse[j], out=codes[j])
        code.round_().add_(zero_point[j]).clamp_(grid.code_min, grid.code_max)
        torch.sub(target[j], torch.sub(code, zero_point[j]).mul_(scale[j]), out=error[j])


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error tr(D G Dᵀ) per output row [out] of a weight difference [out, in]."""
    return (difference @ gram * difference).sum(-1)

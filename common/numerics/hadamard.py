"""Orthogonal Hadamard matrices of every order that Sylvester's and Paley's constructions reach."""

from __future__ import annotations

import torch
from torch import Tensor

from common.base.errors import UserError


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix [order, order] of +1 and -1 in float64: H Hᵀ = order · I.

    Raises:
        UserError: no construction reaches the order.
    """
    return torch.kron(*factors(order))


def factors(order: int) -> tuple[Tensor, Tensor]:
    """Two Hadamard matrices, of orders a · b = order and near each other, whose Kronecker product
    is `hadamard(order)`.

    An order is written as m · 2^k with the smallest m that is 1 or that Paley reaches; H is the
    Kronecker product of Paley's matrix and Sylvester's, and Sylvester's splits anywhere.

    Raises:
        UserError: no construction reaches the order.
    """
    power = order & -order
    while power:
        core = _paley(order // power)
        if core is not None:
            left = 1
            while left * left * len(core) < power:
                left *= 2
            return torch.kron(core, _sylvester(left)), _sylvester(power // left)
        power //= 2
    raise UserError(
        f"no Hadamard matrix of order {order} is known here; this model cannot be rotated"
    )


def rotate(inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """inputs [..., order] times the orthogonal Hadamard matrix of `factors` (left, right), as two
    small products.
    """
    folded = inputs.unflatten(-1, (len(left), len(right)))
    turned = left.T.to(inputs) @ (folded @ right.to(inputs))
    return turned.flatten(-2) / (len(left) * len(right)) ** 0.5


def rotation(order: int, seed: int) -> Tensor:
    """A random orthogonal matrix [order, order] in float64: Hadamard with the signs of its rows
    drawn by `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (order, 1), generator=generator).double() * 2 - 1
    return signs * hadamard(order) / order**0.5


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, block)
    return matrix


def _paley(order: int) -> Tensor | None:
    """Paley's matrix of an order, or None. I: order - 1 a prime of the form 4n + 3; II: order / 2 -
    1 one of 4n + 1.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        matrix = _bordered(order - 1, sign=-1.0)
        return matrix + torch.eye(order, dtype=torch.float64)
    if _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        matrix = _bordered(order // 2 - 1, sign=1.0)
        identity = torch.eye(order // 2, dtype=torch.float64)
        block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(matrix, block) + torch.kron(identity, other)
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """Jacobsthal's matrix of a prime with a border of ones; the border column has the given
    sign."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor(
        [0.0 if i == 0 else 1.0 if i in squares else -1.0 for i in range(prime)],
        dtype=torch.float64,
    )
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(index.unsqueeze(1) - index) % prime]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = sign
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

"""Kernel or twin: whether an operation goes to a Triton kernel on a GPU or is done in plain torch.

An operation begins with

    if kernels := triton_kernels(tensor):
        return kernels.rounding.round_block(...)

and goes on with its twin, which computes the same and runs everywhere.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from common.base.gpu import BFLOAT16, TRITON, supports
from common.base.machine import look_for_compiler, missing_for_triton
from common.base.progress import say


class TritonKernels(NamedTuple):
    """The modules that hold the kernels."""

    inference: ModuleType
    attention: ModuleType
    products: ModuleType
    ranges: ModuleType
    rounding: ModuleType
    gradients: ModuleType
    sums: ModuleType
    half_quadratic: ModuleType


def triton_kernels(tensor: Tensor) -> TritonKernels | None:
    """The kernels for an operation on `tensor`, of any shape; None where its twin in plain torch
    does it.
    """
    return _import_kernels() if use_triton(tensor) else None


@cache
def _import_kernels() -> TritonKernels:
    # Only where one is called: Triton is not on every machine, and can be broken.
    from common.kernels import (
        attention_triton,
        gradients_triton,
        half_quadratic_triton,
        inference_triton,
        products_triton,
        ranges_triton,
        rounding_triton,
        sums_triton,
    )

    return TritonKernels(
        inference_triton,
        attention_triton,
        products_triton,
        ranges_triton,
        rounding_triton,
        gradients_triton,
        sums_triton,
        half_quadratic_triton,
    )


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` goes to a Triton kernel."""
    return tensor.is_cuda and supports(TRITON) and triton_works()


@cache
def triton_works() -> bool:
    """Whether Triton can compile and run a kernel here; says why not, once."""
    problem = triton_problem()
    if problem:
        say(f"{problem}; plain torch is used, which is slower")
    return problem is None


def triton_problem() -> str | None:
    """Why Triton cannot compile and run a kernel here and what mends it; None when it can."""
    try:
        dtype = torch.bfloat16 if supports(BFLOAT16) else torch.float16
        values = torch.zeros(1, 32, device="cuda", dtype=dtype)
        _import_kernels().inference.silu_mul(values, values)
        torch.cuda.synchronize()
        return None
    except Exception as error:
        # A missing C compiler, header, driver or package: each raises its own type.
        missing = missing_for_triton(*look_for_compiler())
        reason = (
            missing or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        )
        return f"Triton does not work here ({reason})"

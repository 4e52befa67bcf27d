"""Operations that have a Triton kernel for CUDA and a twin in plain torch.

`inference` and `rounding` hold the functions to call, with their twins; a CUDA tensor goes to the kernel of the same name in
`inference_triton`, `products_triton` or `rounding_triton` where Triton works.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from common.machine import look_for_compiler, missing_for_triton
from common.progress import say


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` goes to a Triton kernel."""
    return tensor.is_cuda and triton_works()


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
        from common.kernels.inference_triton import silu_mul

        values = torch.zeros(1, 32, device="cuda", dtype=torch.bfloat16)
        silu_mul(values, values)
        torch.cuda.synchronize()
        return None
    except Exception as error:  # a missing C compiler, header, driver or package: each raises its own type
        missing = missing_for_triton(*look_for_compiler())
        reason = missing or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        return f"Triton does not work here ({reason})"

"""Operations that have a Triton kernel for CUDA and a twin in plain torch.

`inference` and `rounding` hold the functions to call, with their twins; a CUDA tensor goes to the
kernel of the same name in `inference_triton`, `products_triton` or `rounding_triton` where Triton
works and the card has what the kernel needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from common.machine import look_for_compiler, missing_for_triton
from common.progress import say

# What not every card has. Below 8.0 Triton multiplies matrices without tensor cores, and integers
# not at all.
TRITON, TENSOR_CORES, BFLOAT16 = "Triton", "tensor cores in Triton", "bfloat16 units"
FLASH_ATTENTION, DEPENDENT_LAUNCH = "flash attention", "programmatic dependent launch"
# The compute capability from which on it is there.
_SINCE = {TRITON: (7, 5), TENSOR_CORES: (8, 0), BFLOAT16: (8, 0), FLASH_ATTENTION: (8, 0),
          DEPENDENT_LAUNCH: (9, 0)}


@dataclass(frozen=True)
class Card:
    """What kernels and their launches are chosen by.

    capability: the compute capability.
    shared_memory: bytes that a program may take.
    """

    capability: tuple[int, int]
    shared_memory: int


@cache
def card() -> Card:
    """The current CUDA device; where there is none, something for Triton's interpreter."""
    if not torch.cuda.is_available():
        return Card((8, 0), 163 << 10)
    properties = torch.cuda.get_device_properties()
    return Card((properties.major, properties.minor), properties.shared_memory_per_block_optin)


def supports(feature: str, capability: tuple[int, int] | None = None) -> bool:
    """Whether cards of a compute capability (None: the current one's) have one of the features above."""
    return (capability or card().capability) >= _SINCE[feature]


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
        from common.kernels.inference_triton import silu_mul

        dtype = torch.bfloat16 if supports(BFLOAT16) else torch.float16
        values = torch.zeros(1, 32, device="cuda", dtype=dtype)
        silu_mul(values, values)
        torch.cuda.synchronize()
        return None
    except Exception as error:  # a missing C compiler, header, driver or package: each raises its own type
        missing = missing_for_triton(*look_for_compiler())
        reason = missing or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        return f"Triton does not work here ({reason})"

"""What the GPU can do: the features that kernels, types and launches are chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

# What not every GPU has. Below 8.0 Triton multiplies matrices without tensor cores, and integers
# not at all.
TRITON, TENSOR_CORES, BFLOAT16 = "Triton", "tensor cores in Triton", "bfloat16 units"
FLASH_ATTENTION, DEPENDENT_LAUNCH = "flash attention", "programmatic dependent launch"
# The compute capability from which on it is there.
_SINCE = {
    TRITON: (7, 5),
    TENSOR_CORES: (8, 0),
    BFLOAT16: (8, 0),
    FLASH_ATTENTION: (8, 0),
    DEPENDENT_LAUNCH: (9, 0),
}


@dataclass(frozen=True)
class Properties:
    """What kernels and their launches are chosen by.

    capability: the compute capability.
    shared_memory: bytes that a program may take.
    """

    capability: tuple[int, int]
    shared_memory: int


@cache
def properties() -> Properties:
    """The current CUDA device; where there is none, something for Triton's interpreter."""
    if not torch.cuda.is_available():
        return Properties((8, 0), 163 << 10)
    found = torch.cuda.get_device_properties()
    return Properties((found.major, found.minor), found.shared_memory_per_block_optin)


def supports(feature: str, capability: tuple[int, int] | None = None) -> bool:
    """Whether GPUs of a compute capability (None: the current one's) have one of the features
    above.
    """
    return (capability or properties().capability) >= _SINCE[feature]

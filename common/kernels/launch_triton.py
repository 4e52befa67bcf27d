"""How the kernels of a decode step are launched, and what several of them use."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@cache
def launch() -> dict:
    """How kernels are launched: on Hopper and later while the kernel before still runs (programmatic dependent launch)."""
    overlap = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


@cache
def shared_memory() -> int:
    """Bytes that a program's loads on their way may take: on a desktop card less than half of what a Hopper has."""
    if not torch.cuda.is_available():
        return 1 << 17
    return torch.cuda.get_device_properties().shared_memory_per_block_optin - (1 << 14)


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Wait for the kernel before and let the one after be launched; comes first in every kernel."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def counters(count: int, device: torch.device) -> Tensor:
    """Zeros that programs count with and leave at zero."""
    return torch.zeros(count, device=device, dtype=torch.int32)

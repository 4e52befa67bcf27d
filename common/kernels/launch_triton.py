"""How the kernels of a decode step are launched, and what several kernels use."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.base import gpu

# Added and subtracted, it leaves no room for a fraction: rounding to the nearest integer, half to
# even. The sum alone has the integer as its last bits.
MAGIC = tl.constexpr(12582912.0)


def launch() -> dict:
    """How kernels are launched: on Hopper and later while the kernel before still runs
    (programmatic dependent launch).
    """
    overlap = gpu.supports(gpu.DEPENDENT_LAUNCH)
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


def stages(most: int, size: int, kept: int = 0) -> int:
    """How many loads of `size` bytes may be on their way: at most `most`, and what a program's
    shared memory has room for beside `kept` bytes, which is less than half of a Hopper's on a
    desktop GPU.
    """
    return max(1, min(most, (gpu.properties().shared_memory - kept - (1 << 14)) // size))


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Wait for the kernel before. Comes first in every kernel, or after loads of what the kernel
    before does not write.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(OVERLAP: tl.constexpr):
    """Let the kernel after be launched, once all programs have come so far, and not only when they
    have ended. Its programs take room while they wait: so just before the last stores, or early
    where the kernel after reads its weights before it waits.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@cache
def counters(count: int, device: torch.device) -> Tensor:
    """Zeros that programs count with and leave at zero."""
    return torch.zeros(count, device=device, dtype=torch.int32)


@triton.jit
def nearest(value):
    return (value + MAGIC) - MAGIC


@triton.jit
def step_of_token(largest, dtype: tl.constexpr, smallest, BITS: tl.constexpr):
    """The scale of a token whose largest magnitude is given; it and codes are rounded to the
    values' own type, as torch does.
    """
    step = (largest / (((1 << BITS) - 1) / 2)).to(dtype).to(tl.float32)
    return tl.where(step > 0, step, smallest)


@triton.jit
def round_to_step(values, step, dtype: tl.constexpr, BITS: tl.constexpr):
    """The codes, as floats, of float32 values."""
    code = nearest((values / step).to(dtype).to(tl.float32))
    return tl.minimum(tl.maximum(code, -(1 << (BITS - 1))), (1 << (BITS - 1)) - 1)


@triton.jit
def store_bytes(values, codes, unit, sums, row, first, end, size, BLOCK: tl.constexpr):
    """Store float32 numbers [blocks, BLOCK], of a row of `size` from the block `first` on and
    before `end`, as a `TwoBytes`.
    """
    # What is not finite makes its block so: a maximum leaves it out.
    step = tl.maximum(tl.max(tl.abs(values), 1), 1e-30) * (1.0 / 32512) + tl.sum(values * 0.0, 1)
    code = nearest(values * (1.0 / step)[:, None]).to(tl.int32)
    low = code << 24 >> 24  # signed
    block = first + tl.arange(0, values.shape[0])
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    place, inside = codes + row * 2 * size + column, block < end
    tl.store(place, low.to(tl.int8), mask=inside[:, None])
    tl.store(place + size, ((code - low) >> 8).to(tl.int8), mask=inside[:, None])
    place = row * (size // BLOCK) + block
    tl.store(unit + place, step, mask=inside)
    tl.store(sums + place, tl.sum(code, 1).to(tl.float32) * step, mask=inside)

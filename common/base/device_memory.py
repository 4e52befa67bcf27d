"""How much of a GPU's memory this process may take, and what of it is left.

Under WSL the driver moves what a GPU has no room for into host memory, ten times slower, and
raises no error. So a process takes no more than what is free when it first uses the GPU, less what
does not pass through torch's allocator; beyond that torch itself raises the out-of-memory error
that makes chunks smaller. Nothing is kept in pinned host memory, of which WSL has little.
"""

from __future__ import annotations

import math
from weakref import WeakSet

import torch

from common.base.errors import UserError

# Of a process, outside of torch's allocator: what CUDA takes at once, and the kernels that
# libraries and Triton load when they are first used.
CONTEXT, LIBRARIES = 512 << 20, 512 << 20
# With less the smallest models do not run.
LEAST = 256 << 20
_limits: dict[int, int] = {}


def allocation(free: int, gib: float | None = None) -> int:
    """Bytes that torch's allocator may take.

    Args:
        free: bytes that are free on the GPU once the process's context is on it.
        gib: GiB that the whole process may take, its context included; None for all that is free.
    Raises:
        UserError: that is next to nothing.
    """
    room = free - LIBRARIES
    if gib is not None:
        room = min(room, int(gib * 2**30) - CONTEXT - LIBRARIES)
    if room < LEAST:
        asked, taken = "", LIBRARIES
        if gib is not None:
            asked, taken = f" and --device-memory allows {gib:g} GiB", CONTEXT + LIBRARIES
        raise UserError(
            f"the GPU has {free / 2**30:.2f} GiB of memory free{asked}, of which CUDA and its "
            f"libraries take {taken / 2**30:.1f}: too little to work with; close other programs on "
            "the GPU, or use --device cpu"
        )
    return room


def limit(device: torch.device, gib: float | None = None) -> None:
    """Let this process take no more of a GPU than is free now, or than `gib` GiB.

    Raises:
        UserError: that is next to nothing.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    room = allocation(free + torch.cuda.memory_reserved(device), gib)
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), _index(device))
    _limits[_index(device)] = room


class Reserve:
    """Memory that torch keeps for one user, who counts what of it is `idle` (bytes): nobody else is
    given any while this lives.
    """

    def __init__(self, device: torch.device):
        self.device, self.idle = device, 0
        _reserves.add(self)


_reserves: WeakSet[Reserve] = WeakSet()


def unused(device: torch.device) -> int:
    """Bytes that torch keeps of a GPU for later."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available(device: torch.device) -> float:
    """Bytes that this process can still allocate on a device; infinite for a CPU, which has no
    limit here.
    """
    if device.type != "cuda":
        return math.inf
    if _index(device) not in _limits:
        limit(device)
    # As if it were allocated.
    idle = sum(one.idle for one in _reserves if _index(one.device) == _index(device))
    # What torch keeps for later is ours; the rest may have been taken by others since.
    free = torch.cuda.mem_get_info(device)[0] + unused(device) - idle
    return max(0, min(_limits[_index(device)] - torch.cuda.memory_allocated(device) - idle, free))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def halved_to_fit(most: int, bytes_each: float, room: float) -> int:
    """`most` things of `bytes_each`, halved until they fit into `room` bytes; at least one."""
    while most > 1 and most * bytes_each > room:
        most //= 2
    return most

"""Several processes on one model, as torchrun starts them: who does what, and sums over all. Alone, none of it does anything.

Each process has its share of the calibration windows; statistics are added up, so that all have the same. The groups of linears
of a layer are shared out by their cost; what one process found is sent to all. NCCL between cards, gloo between CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from common.errors import UserError


def rank() -> int:
    """Which of the processes this is."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this is the process that writes and talks."""
    return rank() == 0


def card() -> int:
    """The card of this process, of those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def start(device: torch.device) -> None:
    """Join the other processes. Raises UserError where they cannot be reached."""
    if size() == 1 or distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:150]
        raise UserError(f"the other processes cannot be reached ({reason}); start with torchrun") from None


def stop() -> None:
    """Wait for all processes and part from them."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def share(windows: Tensor) -> Tensor:
    """This process's part of windows [samples, length]. Raises UserError when there are fewer than processes."""
    if len(windows) < size():
        raise UserError(f"{len(windows)} calibration windows cannot be shared out to {size()} processes; raise --calib-samples")
    return windows.tensor_split(size())[rank()]


def add(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """The largest over all processes, element by element, in place."""
    if size() > 1:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def join_rows(tensor: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, of which each may have another number, under each other."""
    if size() == 1:
        return tensor
    numbers = gather(len(tensor))
    padded = tensor.new_zeros(max(numbers), *tensor.shape[1:])
    padded[:len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in numbers]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def owners(costs: list[float]) -> list[int]:
    """Which process does each of some tasks: the costliest first, each to the one that has least to do."""
    load, chosen = [0.0] * size(), [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        chosen[task] = load.index(min(load))
        load[chosen[task]] += costs[task]
    return chosen


def send(tensors: list[Tensor] | None, source: int, device: torch.device) -> list[Tensor]:
    """Tensors of process `source`, given there and None elsewhere, on all processes."""
    if size() == 1:
        return tensors
    forms = [None if tensors is None else [(tensor.shape, tensor.dtype) for tensor in tensors]]
    distributed.broadcast_object_list(forms, src=source, device=device)
    received = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms[0]] if tensors is None else \
        [tensor.contiguous() for tensor in tensors]
    for tensor in received:
        distributed.broadcast(tensor, src=source)
    return received


def each(chosen: list[int], task: Callable[[int], list[Tensor]], device: torch.device) -> list[list[Tensor]]:
    """What task(i) gives for every i, computed by process chosen[i] and sent to all."""
    found = [task(i) if owner == rank() else None for i, owner in enumerate(chosen)]
    return [send(tensors, owner, device) for tensors, owner in zip(found, chosen, strict=True)]


def gather(value: object) -> list:
    """A small value of every process, in their order."""
    if size() == 1:
        return [value]
    values: list = [None] * size()
    distributed.all_gather_object(values, value)
    return values

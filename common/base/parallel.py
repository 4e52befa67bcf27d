"""Several processes on one model, as torchrun starts them: who does what, and sums over all. Alone,
none of it does anything.

Each process has its share of the calibration windows; statistics are added up, so that all have the
same. Of every linear each process rounds its share of the rows, and all rows are sent to all. NCCL
between GPUs, gloo between CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from common.base.errors import UserError, first_line


def rank() -> int:
    """Which of the processes this is."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this is the process that writes and talks."""
    return rank() == 0


def gpu_index() -> int:
    """The GPU of this process, of those of its machine."""
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
        raise UserError(
            f"the other processes cannot be reached ({first_line(error)}); start with torchrun"
        ) from None


@contextmanager
def _together() -> Iterator[None]:
    """While open, it is said in one line that another process has ended meanwhile."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # this process's own, seen late
    except RuntimeError as error:  # what gloo raises, and NCCL's error is one
        raise UserError(
            f"another process has ended or is out of reach ({first_line(error)}); what it said "
            "tells why, and --resume takes up the layers that are finished"
        ) from error


def stop() -> None:
    """Wait for all processes and part from them."""
    if distributed.is_initialized():
        with _together():
            distributed.barrier()
        distributed.destroy_process_group()


def own_windows(windows: Tensor) -> Tensor:
    """This process's part of windows [samples, length]. Raises UserError when there are fewer than
    processes.
    """
    if len(windows) < size():
        raise UserError(
            f"{len(windows)} calibration windows cannot be shared out to {size()} processes; raise "
            f"--calib-samples"
        )
    return own_rows(windows)


def own_rows(tensor: Tensor) -> Tensor:
    """This process's part of the rows [n, ...] that all processes have."""
    return tensor.tensor_split(size())[rank()]


def add(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if size() > 1:
        with _together():
            distributed.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """The largest over all processes, element by element, in place."""
    if size() > 1:
        with _together():
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def mean(tensor: Tensor, dim: int | None = None) -> Tensor:
    """The mean over the tensors of all processes, along a dimension or of all elements."""
    if size() == 1:
        return tensor.mean(dim)
    sums = tensor.sum(dim)
    return add(sums) / add(torch.full_like(sums, tensor.numel() // sums.numel()))


def join_rows(tensor: Tensor, count: int | None = None) -> Tensor:
    """The rows [n, ...] of all processes under each other.

    Args:
        count: how many there are in all, where each has its `own_rows`; None if each may have
            another number.
    """
    if size() == 1:
        return tensor
    numbers = (
        gather(len(tensor))
        if count is None
        else [len(part) for part in torch.arange(count).tensor_split(size())]
    )
    padded = tensor.new_zeros(max(numbers), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in numbers]
    with _together():
        distributed.all_gather(parts, padded)
    return torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])


def from_first(tensor: Tensor) -> Tensor:
    """The first process's tensor, in all of them; each has one of that form."""
    if size() > 1:
        tensor = tensor.contiguous()
        with _together():
            distributed.broadcast(tensor, src=0)
    return tensor


def gather(value: object) -> list:
    """A small value of every process, in their order."""
    if size() == 1:
        return [value]
    values: list = [None] * size()
    with _together():
        distributed.all_gather_object(values, value)
    return values

"""Where to compute and in which type, as the options --device, --device-memory and --dtype say."""

from __future__ import annotations

import argparse

import torch

from common.base import device_memory, machine, parallel
from common.base.arguments import DTYPE_NAMES
from common.base.errors import UserError
from common.base.gpu import BFLOAT16, supports
from common.base.progress import say

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which DTYPES, a config.json and the metadata know a type."""
    return str(dtype).removeprefix("torch.")


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What the arguments of `cli.add_device_arguments` say. Raises UserError, as
    `resolve_device`."""
    device = resolve_device(options.device, options.device_memory)
    return device, resolve_dtype(options.dtype, device)


def resolve_device(choice: str, memory: float | None = None) -> torch.device:
    """The torch device of a --device option, and from now on a limit on its memory, in GiB
    (`device_memory`).

    Raises:
        UserError: CUDA was asked for and there is none or it has no memory left, or a GPU is there
            that cannot be used and the CPU was not asked for.
    """
    if choice == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", parallel.gpu_index())
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"there are {torch.cuda.device_count()} GPUs; start as many processes, not "
                f"{device.index + 1}"
            )
        obstacle = machine.too_old_a_gpu(
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
            torch.cuda.get_arch_list(),
        )
        if obstacle is None:
            device_memory.limit(device, memory)
            return device
    else:
        obstacle = machine.obstacle(machine.look())
    if obstacle and (obstacle.stops or choice == "cuda"):
        none = "no CUDA device was found: " if not obstacle.stops else ""
        raise UserError(
            f"{none}{obstacle.problem}; {obstacle.mend}, or use --device cpu, which is far slower"
        )
    if choice == "cuda" and torch.version.cuda is None:
        raise UserError(
            f"no CUDA device was found, and torch {torch.__version__} is a build without CUDA; use "
            f"--device cpu"
        )
    if choice == "cuda":
        raise UserError(
            "no CUDA device was found, nor NVIDIA's driver; use --device cpu, or "
            f"{machine.install_driver(machine.look())}"
        )
    if obstacle:
        say(f"{obstacle.problem}; going on on the CPU ({obstacle.mend})")
    return torch.device("cpu")


def resolve_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The type of a --dtype option: on a CPU float32, which gives the same result on CPUs with and
    without bf16 units; on a GPU without such units float16.
    """
    if choice == "auto" and device.type == "cuda":
        units = supports(BFLOAT16, torch.cuda.get_device_capability(device))
        return torch.bfloat16 if units else torch.float16
    if choice == "auto":
        return torch.float32
    return DTYPES[choice]

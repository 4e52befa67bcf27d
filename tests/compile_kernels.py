"""Compile the Triton kernels for every generation of GPUs, without a GPU.

    python tests/compile_kernels.py          every kernel for the oldest and the newest GPU, every
                                             branch for one, what may take too much shared memory
                                             for every GPU
    python tests/compile_kernels.py --all    all launches for every GPU, assembled too; much longer

The launches are those of `kernel_launches`, and no program may take more shared memory than the GPU
has. Triton's interpreter, in which the other tests run, lets pass what the compiler refuses.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from kernel_launches import SHAPES, STEPS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from common.base import gpu
from common.kernels import dispatch

# Compute capabilities of RTX 20, A100, RTX 30, RTX 40, H100, B200, RTX 50, and the KiB of shared
# memory that a program may take there.
CARDS = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


class _Driver:
    """What Triton asks about a GPU when it compiles."""

    def __init__(self, capability: tuple[int, int]):
        self.arch = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(
    capability: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> dict[tuple, Callable[[], CompiledKernel]]:
    """The launches for a GPU, by kernel, types and constants; called, one is compiled."""
    gpu.properties = lambda: gpu.Properties(capability, CARDS[capability] << 10)
    dispatch.triton_works = lambda: True
    Tensor.is_cuda = property(lambda tensor: True)  # none holds values, and none is on a GPU
    triton.runtime.driver.set_active(_Driver(capability))
    found: dict[tuple, Callable[[], CompiledKernel]] = {}

    def note(kernel: JITFunction, *arguments, grid, warmup, **constants) -> None:
        everything = *arguments, *constants.values()
        types = tuple(
            str(value.dtype).removeprefix("torch.")
            for value in everything
            if isinstance(value, Tensor)
        )
        # How many programs share a product does not change the program.
        named = {
            name: min(value, 2) if name == "SPLITS" else value
            for name, value in constants.items()
            if name.isupper() or name.startswith("num_")
        }
        found.setdefault(
            (kernel.__name__, types, tuple(sorted(named.items()))),
            partial(_compile, kernel, arguments, constants),
        )

    JITFunction.run = note
    for shape in SHAPES.values():
        for dtype in dtypes:
            for calls in STEPS:
                for call in calls(shape, dtype):
                    call()
    JITFunction.run = _run
    return found


_run = JITFunction.run


def _compile(kernel: JITFunction, arguments: tuple, constants: dict) -> CompiledKernel:
    """Compile as for tensors that begin at multiples of 16 bytes: the widest loads, and with them
    the most shared memory.
    """

    def real(value):
        if not isinstance(value, Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    named = {name: real(value) for name, value in constants.items()}
    return _run(kernel, *map(real, arguments), grid=(1,), warmup=True, **named)


def variant(key: tuple) -> tuple:
    """What of a launch decides which of a kernel's branches are compiled."""
    constants = dict(key[2])
    return (
        key[0],
        *(constants.get(name) for name in ("BITS", "INPUT_BITS", "SPLITS")),
        constants.get("BLOCK") in (32, 64) and (key[0], constants.get("BLOCK")),
        constants.get("PIECE") is None,
        *(
            value
            for name, value in key[2]
            if isinstance(value, bool)
            and name not in ("OVERLAP", "HOPPER")  # by card
            and (name != "HAS_ZERO" or key[0] != "_matvec")
        ),
    )


# Those whose shared memory grows with their constants.
GROWING = ("_float_matmul", "_integer_matmul", "_bytes_matmul", "_attend", "_take_best_range")


def chosen(keys: Iterable[tuple], seen: set[tuple], most: int, every: bool) -> list[tuple]:
    """A launch of each kernel, of those in GROWING that with the largest constants for each type;
    and small ones of up to `most` variants that are not in `seen`, which grows.

    Args:
        every: also of kernels that are not in GROWING.
    """
    ordered = sorted(
        keys,
        key=lambda key: math.prod(1 + abs(value) for _, value in key[2] if isinstance(value, int)),
    )
    large = [key for key in ordered if key[0] in GROWING]
    first = {key[0]: key for key in reversed(ordered) if every and key[0] not in GROWING}
    first |= {(key[0], key[1][0]): key for key in large}
    seen |= set(map(variant, first.values()))
    more = {variant(key): key for key in reversed(ordered) if variant(key) not in seen}
    more = dict(list(more.items())[:most])
    seen |= set(more)
    return [*first.values(), *more.values()]


def check(capability: tuple[int, int], key: tuple, compiled: CompiledKernel) -> str | None:
    """What is wrong with a compiled kernel, if anything."""
    limit = CARDS[capability] << 10
    if compiled.metadata.shared > limit:
        return f"{compiled.metadata.shared} bytes of shared memory, the card has {limit}"
    if capability < (9, 0) and "griddepcontrol" in compiled.asm["ptx"]:
        return "waits for the kernel before, which this card cannot"
    if dict(key[2]).get("HOPPER", capability[0] == 9) is not (capability[0] == 9):
        return "awaits products, or does not, as a card of another generation should"
    if leaves_product_running(compiled.asm["ttgir"]):
        return "an iteration ends before a product has read its left factor's registers"
    return None


def leaves_product_running(ttgir: str) -> bool:
    """Whether an iteration of a loop ends while a product may still read its left factor from
    registers, to which the next one writes: Triton lets it be so, and 3.6 gave NaN.
    """
    running = False
    for line in ttgir.splitlines():
        if "warp_group_dot " in line and "isAsync = true" in line:
            running |= ": tensor<" in line  # not in shared memory
        elif "warp_group_dot_wait" in line and "pendings = 0" in line:
            running = False
        elif running and "scf.yield" in line:
            return True
    return False


def main() -> int:
    everything = "--all" in sys.argv[1:]
    if not everything:
        # Assembling and LLVM's optimisation are half of the time and change nothing checked.
        os.environ["DISABLE_LLVM_OPT"] = "1"
        add_stages = CUDABackend.add_stages

        def without_ptxas(self, stages, *arguments) -> None:
            add_stages(self, stages, *arguments)
            stages["cubin"] = lambda source, metadata: b""

        CUDABackend.add_stages = without_ptxas
    failures, count, seen, start = [], 0, set(), time.perf_counter()
    ends, done, programs = (min(CARDS), max(CARDS)), set(), {}
    for capability in CARDS:
        dtypes = (torch.bfloat16, torch.float16)
        if not everything:
            dtypes = dtypes[:1] if gpu.supports(gpu.BFLOAT16, capability) else dtypes[1:]
        found, most = launches(capability, dtypes), 0
        same = capability[0], CARDS[capability], frozenset(found)
        if everything:
            keys = list(found)
        else:
            # The same launches for the same generation give the same programs.
            keys = [] if same in done else chosen(found, seen, 14, capability in ends)
        done.add(same)
        for key in keys:
            try:
                place = capability[0], key  # the same for every card of a generation
                programs[place] = compiled = programs.get(place) or found[key]()
                most = max(most, compiled.metadata.shared)
                problem = check(capability, key, compiled)
            except Exception as error:  # of any type; the others are still worth a try
                problem = f"{type(error).__name__} {str(error)[:300]}"
            if problem:
                failures.append(f"{capability} {key}: {problem}")
        count += len(keys)
        print(
            f"{capability[0]}.{capability[1]}: {len(keys)} of {len(found)} launches, shared memory "
            f"up to {most} of {CARDS[capability] << 10} bytes, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    hopper = [one.asm["ttgir"] for (generation, _), one in programs.items() if generation == 9]
    if not any("isAsync = true" in text and "pendings = 0" in text for text in hopper):
        failures.append("products that run on have another name now: see leaves_product_running")
    left = {variant(key) for key in found} - seen
    if left and not everything:
        failures.append(f"not compiled for any card: {left}")
    print("\n".join(failures))
    print(f"{count} launches, {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

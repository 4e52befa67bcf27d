#!/usr/bin/env python3
"""Microseconds of the packed products for many block shapes, beside the dense product: where their
constants come from.

    python benchmarks/packed_product_sweep.py

The linears of the Llama-3.2-1B shape, 4 bits in groups and 8 bits. Weights rotate among
copies that do not fit the cache; a captured graph of one call for each copy is replayed, and the
median counts. Kernels are compiled by several processes first.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import triton

from common.kernels import (
    bytes_product_triton,
    float_product_triton,
    integer_product_triton,
    row_product_triton,
    splits_triton,
)
from common.kernels.forms import Rounding, pack
from common.kernels.inference import integer_matmul, packed_matmul, rounded, wanted_rounding

SHAPES = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
COPIES = 48
# Output channels of a program, programs, warps, stages.
FORMS = [
    form
    for form in itertools.product((64, 128), (132, 264, 528), (4, 8), (3, 5))
    if form[0] == 128 or form[2] == 4
]
# Output channels of a program, for one token.
VECTOR_FORMS = [(members,) for members in (4, 8, 16, 32)]
# Bits of the weights, their groups (None: whole rows), whether the inputs are rounded to 8 bits,
# tokens. Products of several tokens are on floats in groups of 32, and with 4 bits from 65 on.
KINDS = {
    "W4A16, 1 token": (4, 128, False, 1),
    **{f"W4A16, {tokens} tokens": (4, 128, False, tokens) for tokens in (8, 16, 32, 64, 128, 256)},
    "W4A16 g32, 8 tokens": (4, 32, False, 8),
    "W8A16, 1 token": (8, None, False, 1),
    "W8A16, 32 tokens": (8, None, False, 32),
    "W8A8, 1 token": (8, None, True, 1),
    "W8A8, 32 tokens": (8, None, True, 32),
    "W8A8, 512 tokens": (8, None, True, 512),
}


def products(kind: str, shape: tuple[int, int], copies: int) -> list[Callable[[], object]]:
    """One call for each of several random weights; what rounds the inputs is not in it."""
    bits, group, integers, tokens = KINDS[kind]
    out, channels = shape
    groups = channels // (group or channels)
    inputs = torch.randn(tokens, channels, device="cuda").bfloat16()
    weights = []
    for _ in range(copies):
        codes = torch.randint(-1 << bits - 1, 1 << bits - 1, shape, device="cuda").to(torch.int8)
        scale = (0.02 * torch.rand(out, groups, device="cuda")).bfloat16()
        zero = torch.randint(-8, 8, (out, groups), device="cuda") if bits == 4 else None
        weights.append(pack(codes, scale, zero, bits))
    function = integer_matmul if integers else packed_matmul
    argument = rounded(inputs, Rounding(8) if integers else wanted_rounding(inputs, weights[0]))
    return [partial(function, argument, weight) for weight in weights]


def forms(kind: str) -> list[tuple[int, ...]]:
    *_, integers, tokens = KINDS[kind]
    return VECTOR_FORMS if not integers and tokens == 1 else FORMS


def set_form(form: tuple[int, ...]) -> None:
    if form in VECTOR_FORMS:
        row_product_triton._members = lambda weight: form[0]
        return
    block_out, programs, warps, stages = form
    splits_triton.BLOCK_OUT = splits_triton.BLOCK_OUT_WIDE = block_out
    for module in (bytes_product_triton, float_product_triton, integer_product_triton):
        module.WARPS, module.PROGRAMS, module.STAGES = warps, programs, stages
    float_product_triton.BLOCK_OUT = block_out
    integer_product_triton.BLOCK_OUT = integer_product_triton.BLOCK_OUT_WIDE = block_out
    integer_product_triton.STAGES_BYTES = stages * 128 * (block_out + splits_triton.BLOCK_ROWS)


def microseconds(calls: list[Callable[[], object]]) -> float:
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(6):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[1:])


def compile_share(share: int, of: int) -> None:
    """Compile every `of`-th form. One that needs more than the GPU has is met again when it is
    timed.
    """
    for kind in KINDS:
        calls = [products(kind, shape, 1)[0] for shape in SHAPES.values()]
        for form in forms(kind)[share::of]:
            set_form(form)
            for call in calls:
                try:
                    call()
                except triton.runtime.errors.OutOfResources:
                    continue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--best", type=int, default=5, help="forms that are shown (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=14, help="that compile (default: %(default)s)"
    )
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_share, args=(i, options.processes))
        for i in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name, shape in SHAPES.items():
        dense = [torch.randn(shape, device="cuda").bfloat16() for _ in range(COPIES // 2)]
        for kind, (*_, tokens) in KINDS.items():
            inputs = torch.randn(tokens, shape[1], device="cuda").bfloat16()
            plain = microseconds(
                [partial(torch.nn.functional.linear, inputs, weight) for weight in dense]
            )
            calls, found = products(kind, shape, COPIES), []
            for form in forms(kind):
                set_form(form)
                try:
                    found.append((microseconds(calls), form))
                except triton.runtime.errors.OutOfResources:
                    continue
            shown = ", ".join(f"{time:.1f} {form}" for time, form in sorted(found)[: options.best])
            print(f"{name}, {kind}: dense {plain:.1f}, packed {shown}", flush=True)


if __name__ == "__main__":
    main()

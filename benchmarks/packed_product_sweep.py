#!/usr/bin/env python3
"""Microseconds of the packed products for many block shapes, beside the dense product: where their constants come from.

    python benchmarks/packed_product_sweep.py

The linears of the Llama-3.2-1B shape, 4 bits in groups of 128. Weights rotate among copies that do not fit the cache; a captured
graph of one call for each copy is replayed, and the median counts. Kernels are compiled by several processes first.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402

from common.kernels import inference_triton as kernels  # noqa: E402

SHAPES = {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}
BITS, GROUP, COPIES, ROWS = 4, 128, 48, 32
# Warps, rows of the weight, words of a row; and rows of the weight, channels, warps, stages.
VECTOR = [(warps, rows, words) for warps, rows, words in itertools.product((1, 2, 4, 8), (2, 4, 8, 16), (64, 128, 256, 1024))
          if 8 <= rows * words / (32 * warps) <= 64]
MATRIX = [(rows, channels, warps, stages) for rows, channels, warps, stages in
          itertools.product((16, 32, 64, 128), (64, 128), (4, 8), (2, 4)) if rows > 16 or warps == 4]


def weights(out: int, channels: int, copies: int) -> list[tuple[torch.Tensor, ...]]:
    """Packed codes, scales and zero-points, random."""
    groups = channels // GROUP
    return [(torch.randint(-2**31, 2**31, (out, channels * BITS // 32), device="cuda").to(torch.int32),
             (0.02 * torch.rand(out, groups, device="cuda")).bfloat16(),
             torch.randint(0, 1 << BITS, (out, groups), device="cuda").to(torch.uint8)) for _ in range(copies)]


def vector_call(out: int, channels: int, weight: tuple, inputs: torch.Tensor, form: tuple) -> Callable[[], None]:
    warps, rows, block = form
    words, piece = channels * BITS // 32, 16
    output = torch.empty(1, out, device="cuda", dtype=torch.bfloat16)
    return lambda: kernels._matvec[(triton.cdiv(out, rows),)](
        inputs, *weight, output, out, words, GROUP * BITS // 32 // piece, BITS=BITS, HAS_ZERO=True, SIGN_BITS=0, PIECE=piece,
        BLOCK_OUT=rows, BLOCK_PIECES=min(block, words) // piece, num_warps=warps)


def matrix_call(out: int, channels: int, weight: tuple, inputs: torch.Tensor, form: tuple) -> Callable[[], None]:
    rows, block, warps, stages = form
    tiles, steps = triton.cdiv(out, rows), channels // block
    splits = max(1, min(steps, kernels.PROGRAMS // tiles))
    partial = torch.empty(splits, ROWS, out, device="cuda")
    return lambda: kernels._matmul[(tiles, splits)](
        inputs, weight[0].view(torch.uint8), *weight[1:], partial, ROWS, out, channels, GROUP, triton.cdiv(steps, splits),
        BITS=BITS, HAS_ZERO=True, SIGN_BITS=0, BLOCK_ROWS=ROWS, BLOCK_OUT=rows, BLOCK=block, num_warps=warps, num_stages=stages)


KINDS = {"vector": (vector_call, VECTOR, 1), "matrix": (matrix_call, MATRIX, ROWS)}


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
    """Compile every `of`-th form. One that needs more than the card has is met again when it is timed."""
    for make, forms, rows in KINDS.values():
        for form in forms[share::of]:
            for out, channels in SHAPES.values():
                inputs = torch.randn(rows, channels, device="cuda").bfloat16()
                try:
                    make(out, channels, weights(out, channels, 1)[0], inputs, form)()
                except triton.runtime.errors.OutOfResources:
                    break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--best", type=int, default=5, help="forms that are shown (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="that compile (default: %(default)s)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_share, args=(i, options.processes)) for i in range(options.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name, (out, channels) in SHAPES.items():
        dense = [torch.randn(out, channels, device="cuda").bfloat16() for _ in range(COPIES // 2)]
        for kind, (make, forms, rows) in KINDS.items():
            inputs = torch.randn(rows, channels, device="cuda").bfloat16()
            plain = microseconds([lambda weight=weight, inputs=inputs: torch.nn.functional.linear(inputs, weight)
                                  for weight in dense])
            packed, found = weights(out, channels, COPIES), []
            for form in forms:
                try:
                    found.append((microseconds([make(out, channels, weight, inputs, form) for weight in packed]), form))
                except triton.runtime.errors.OutOfResources:
                    continue
            shown = ", ".join(f"{time:.1f} {form}" for time, form in sorted(found)[:options.best])
            print(f"{name} {kind}: dense {plain:.1f}, packed {shown}", flush=True)
        del dense


if __name__ == "__main__":
    main()

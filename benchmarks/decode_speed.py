#!/usr/bin/env python3
"""Tokens per second of a model of the Llama-3.2-1B shape, 16-bit and packed, at batch 1, 8 and 32.

    python benchmarks/decode_speed.py --output decode.json

Random weights, rounded to nearest. A prompt of 64 random tokens, 128 new ones; medians over several
runs in one process, after two in which graphs of the steps and of the prompt are captured. The
roofline is the time that reading weights and cache once takes at the bandwidth of a large copy,
measured in the same run.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from shape import SHAPE, random_model

from common import metadata
from common.base.device import resolve_device
from common.cli import configure_torch, run
from common.kernels.forms import PackedWeight, pack
from common.model.architecture import family_of
from common.model.fused import fuse_layers
from common.numerics.grid import Grid, grouped, min_max, quantize
from common.running.decoding import STEPS_AT_ONCE, Decoder
from common.running.packed import PackedEmbedding, PackedLinear
from common.running.speed import weight_bytes

PROMPT, NEW, CACHE, WARM_UP, REPEATS = 64, 128, 2048, 2, 5


@dataclass(frozen=True)
class Form:
    grid: Grid | None
    activation_bits: int | None = None
    vocabulary: bool = False


FORMS = {
    "bf16": Form(None),
    "W4A16 g128": Form(Grid(4, 128)),
    "W4A16 g128, int8 ends": Form(Grid(4, 128), vocabulary=True),
    "W4A16 g128 symmetric": Form(Grid(4, 128, True)),
    "W8A16": Form(Grid(8, None, True)),
    "W8A8": Form(Grid(8, None, True), 8),
}


def packed(weight: torch.Tensor, grid: Grid) -> PackedWeight:
    """Weights [out, in] rounded to nearest and packed."""
    scale, zero_point = min_max(grouped(weight, grid), grid)
    codes = quantize(weight, scale, zero_point, grid)
    return pack(codes, scale.to(weight.dtype), None if grid.symmetric else zero_point, grid.bits)


def build(form: Form, device: torch.device):
    model = random_model(device, torch.bfloat16)
    fuse_layers(model)
    if form.grid is None:
        return model
    for layer in model.model.layers:
        for name in family_of(layer).linears:
            weight = layer.get_submodule(name).weight
            layer.set_submodule(
                name, PackedLinear(packed(weight, form.grid), None, form.activation_bits)
            )
    if form.vocabulary:
        rows = PackedLinear(packed(model.lm_head.weight, Grid(8, None, True)), None)
        model.model.embed_tokens, model.lm_head = PackedEmbedding(rows, torch.bfloat16), rows
    return model


@torch.inference_mode()
def measure(model, batch: int, prompt: int = PROMPT) -> dict:
    """Medians of prefill and decode seconds."""
    decoder = Decoder(model, batch, max(CACHE, prompt + NEW))
    prompts = torch.randint(0, SHAPE["vocab_size"], (batch, prompt)).tolist()

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(WARM_UP + REPEATS):
        start = now()
        decoder.start(prompts)
        middle = now()
        for _ in range(NEW // STEPS_AT_ONCE):
            decoder.run(batch)
        times.append((middle - start, now() - middle))
    prefill, decode = (statistics.median(column) for column in zip(*times[WARM_UP:], strict=True))
    token = decoder.cache.numel() * decoder.cache.element_size() / decoder.length
    return {
        "prefill_tokens_per_second": batch * prompt / prefill,
        "decode_tokens_per_second": batch * NEW / decode,
        "latency_seconds": prefill + decode,
        "step_seconds": decode / NEW,
        "cache_bytes_read": token * (prompt + NEW / 2),
        "memory_bytes": torch.cuda.memory_allocated(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def bandwidth() -> float:
    """Bytes per second of a large copy, read and written counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(6):
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * source.nbytes / statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of each prompt")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--output", type=Path, help="JSON of everything")
    options = parser.parse_args()
    configure_torch(0)
    device = resolve_device("cuda")
    rate = bandwidth()
    results = {
        "device": metadata.describe_device(device),
        "versions": metadata.versions(),
        "copy_bytes_per_second": rate,
        "rows": [],
    }
    print(f"{results['device']['name']}, copy {rate / 1e12:.2f} TB/s", flush=True)
    for name in options.forms:
        model = build(FORMS[name], device)
        gc.collect()
        torch.cuda.empty_cache()
        # The embedding is not read whole, unless it is the head too.
        weights = weight_bytes(model)
        for batch in options.batches:
            torch.cuda.reset_peak_memory_stats()
            row = {"form": name, "batch": batch, "prompt": options.prompt, "weight_bytes": weights}
            row |= measure(model, batch, options.prompt)
            row["roofline_share"] = (weights + row["cache_bytes_read"]) / rate / row["step_seconds"]
            results["rows"].append(row)
            print(
                f"RESULT {name}, batch {batch}: prefill {row['prefill_tokens_per_second']:.0f}, "
                f"decode {row['decode_tokens_per_second']:.0f} tokens/s, latency "
                f"{row['latency_seconds']:.3f} s, weights {weights / 2**30:.2f} GiB, in use "
                f"{row['memory_bytes'] / 2**30:.2f} GiB, roofline {row['roofline_share']:.0%}",
                flush=True,
            )
        del model
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    run(main)

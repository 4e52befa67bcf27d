#!/usr/bin/env python3
"""Seconds and memory that quantizing a model of the Llama-3.2-1B shape takes, our methods beside
other libraries.

    python benchmarks/quantization_speed.py --output speed.json
    python benchmarks/quantization_speed.py --only gptq,hqq --peers ""

Random weights and 128 x 2048 random tokens, the same for all. A model of one layer goes before, so
that nothing is compiled or read for the first time. Our figures are a script's own, from the
finished checkpoint's
metadata: `work` is all but reading the model and writing the checkpoint. A peer
(benchmarks/requirements.txt) is timed without reading the model, unless it quantizes while it
reads, and without saving; one that is not installed is left out.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from methods import method_options
from peers import PEERS, Work
from scripts import quantize
from shape import write_random_model

from common import (
    metadata,
    quantization,
)
from common.base.device import resolve_device
from common.base.stopwatch import Stopwatch
from common.checkpoint.writer import METADATA_FILE
from common.cli import quiet_libraries
from common.model.source import load_tokenizer, resolve_folder
from common.text.windows import Windows

SAMPLES, LENGTH = 128, 2048
METHODS = {**method_options(128), "hqq": ["--group-size", "64"]}
# Phases that are no work on the model's weights.
NOT_WORK = ("load", "write", "calibration text", "total")


def _forget_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ours(method: str, folder: Path, windows: Windows, scratch: Path) -> dict:
    """Seconds by phase and peak device memory of one of our scripts."""
    quantization.windows_of = lambda *_, **__: windows
    output = scratch / method
    _forget_peak()
    quantize(
        method, ["--model", str(folder), "--output", str(output), "--overwrite", *METHODS[method]]
    )
    document = json.loads((output / METADATA_FILE).read_text())
    seconds = document["seconds"]
    return {
        "seconds": seconds,
        "work": sum(value for phase, value in seconds.items() if phase not in NOT_WORK),
        "total": seconds["total"],
        **document["memory"],
    }


def peer(name: str, folder: Path, windows: Windows, tokenizer, device: torch.device) -> dict | None:
    """Seconds, without reading the model, and peak device memory of another library; None where it
    is not installed.
    """
    _forget_peak()
    watch, size = Stopwatch(device), 64 if name == "hqq-package-4bit" else 128
    try:
        PEERS[name](Work(folder, tokenizer, windows.tokens, size, device, watch))
    except ImportError as error:
        print(f"{name}: not installed ({error})")
        return None
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"work": watch.seconds["quantize"], "peak_device_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(METHODS), help="our methods (default: %(default)s)"
    )
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="other libraries (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, help="fewer layers, for a trial")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each of ours; the median counts"
    )
    parser.add_argument("--output", type=Path, help="JSON of everything, written after each")
    options = parser.parse_args()
    quiet_libraries()
    device = resolve_device("auto")
    tokenizer = load_tokenizer(resolve_folder("demo"))
    changes = {"num_hidden_layers": options.layers} if options.layers else {}
    generator = torch.Generator().manual_seed(0)
    windows = Windows(
        torch.randint(0, 128256, (options.samples, LENGTH), generator=generator), "random tokens", 0
    )
    results = {
        "device": metadata.describe_device(device),
        "versions": metadata.versions(),
        "samples": options.samples,
        "length": LENGTH,
        "ours": {},
        "peers": {},
    }

    def keep(kind: str, name: str, found: dict) -> None:
        results[kind][name] = found
        if options.output:
            options.output.write_text(json.dumps(results, indent=1))

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_model(Path(scratch) / "model", tokenizer, device, **changes)
        methods = list(filter(None, options.only.split(",")))
        small = write_random_model(
            Path(scratch) / "small", tokenizer, device, **{**changes, "num_hidden_layers": 1}
        )
        for method in methods:
            ours(method, small, windows, Path(scratch))
        for method in methods:
            runs = sorted(
                (ours(method, folder, windows, Path(scratch)) for _ in range(options.repeats)),
                key=lambda run: run["work"],
            )
            found = runs[len(runs) // 2]
            keep("ours", method, found)
            phases = ", ".join(
                f"{phase} {seconds:.2f}" for phase, seconds in found["seconds"].items()
            )
            peak = (
                f"{found['peak_device_bytes'] / 2**30:.2f} GiB"
                if found["peak_device_bytes"]
                else "–"
            )
            print(
                f"RESULT {method}: work {found['work']:.2f} s, peak {peak} ({phases})", flush=True
            )
        for name in filter(None, options.peers.split(",")):
            found = peer(name, folder, windows, tokenizer, device)
            if found:
                keep("peers", name, found)
                print(
                    f"RESULT {name}: work {found['work']:.2f} s, peak "
                    f"{(found['peak_device_bytes'] or 0) / 2**30:.2f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Seconds that the generation and ranking tasks take on a model of the Llama-3.2-1B shape with
random weights.

    python benchmarks/evaluation_speed.py --data-root ../shared/data

ARC-Challenge test whole, 2,000 questions of SQuAD v2, 500 of OpenMath (GSM8K in its columns). A
random model hardly ever stops of itself, so every answer is generated to its full length: the
slowest case. Tokens are the demo model's.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from shape import SHAPE, random_model

from common import metadata
from common.base.device import resolve_device, resolve_dtype
from common.cli import configure_torch, run
from common.model.fused import fuse_layers
from common.model.source import load_tokenizer, resolve_folder
from common.tasks import arc, openmath, squad_v2
from common.tasks.harness import SAMPLE_SEED, run_task
from common.text.data import load_rows

# Task, data, samples.
RUNS = (
    (arc.TASK, arc.TASK.address, 1172),
    (squad_v2.TASK, squad_v2.TASK.address, 2000),
    (openmath.TASK, "openmath_standin/gsm8k_as_openmath2:test", 500),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--openmath-data", default=RUNS[-1][1])
    parser.add_argument(
        "--layers",
        type=int,
        default=SHAPE["num_hidden_layers"],
        help="fewer for a trial (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="samples per task, for a trial")
    options = parser.parse_args()
    configure_torch(0)
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    tokenizer = load_tokenizer(resolve_folder("demo"))
    model = random_model(device, dtype, tokenizer.eos_token_id, num_hidden_layers=options.layers)
    fuse_layers(model)
    print(
        f"{metadata.describe_device(device)['name']}, {dtype}, torch {torch.__version__}",
        flush=True,
    )
    total = 0.0
    for task, data, samples in RUNS:
        address = options.openmath_data if task is openmath.TASK else data
        rows = load_rows(
            address, options.data_root, limit=options.limit or samples, seed=SAMPLE_SEED
        )
        summary, _ = run_task(task, model, tokenizer, rows, demo=False)
        total += summary["seconds"]
        print(
            f"{task.name}: {summary['samples']} samples in {summary['seconds']:.1f} s", flush=True
        )
    print(f"total: {total:.1f} s")


if __name__ == "__main__":
    run(main)

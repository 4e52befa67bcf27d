#!/usr/bin/env python3
r"""Evaluate a model: ARC, SQuAD v2, OpenMath, perplexity, speed and memory.

    python common/evaluation.py --model-path models/Llama-3.2-1B-Instruct/gptq-4bit
    python common/evaluation.py --model-path models/SmolLM2-135M-Instruct/baseline --limit 20
    python common/evaluation.py --model-path owner/Llama-3.2-1B-Instruct-GPTQ \
        --baseline meta-llama/Llama-3.2-1B-Instruct --name gptqmodel-4bit

Tasks run in lm-eval with the task files in common/tasks, on the same samples and prompts for every
configuration. Metrics go to results/<model>/<configuration>.json, a record for each sample to
results/<model>/samples/, both with what they were made from. Others' quantized models are filed
beside ours: whatever transformers loads (GPTQ, AWQ, bitsandbytes, HQQ, torchao, AutoRound,
compressed-tensors, GGUF), as long as the package that it takes is installed. A quantized model that
does not say what it was made from is told with --baseline.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Started as a script: `common` is a folder of the project's, not of this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from common import cli
from common.base.arguments import Parser, positive
from common.cli import add_device_arguments
from common.reporting.card import refresh_card
from common.results.documents import RESULTS_FOLDER
from common.results.naming import subject_of
from common.tasks.evaluate import evaluate_model
from common.tasks.task import all_tasks, task_names


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that the evaluation shares with baseline.py and the batch."""
    add_device_arguments(parser)
    known = task_names()
    limits = ", ".join(f"{task.name} {task.limit}" for task in all_tasks() if task.limit)
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help=f"samples per task (default: {limits}; the demo's own tasks whole)",
    )
    parser.add_argument(
        "--tasks",
        type=_tasks,
        default=known,
        metavar="A,B",
        help=f"what to evaluate (default: {','.join(known)})",
    )
    parser.add_argument(
        "--data",
        choices=("auto", "demo", "hub"),
        default="auto",
        help="the demo's own tasks or the real data sets; auto is demo for the demo model without "
        "--data-root",
    )
    for task in all_tasks():
        task.add_arguments(parser)
    parser.add_argument(
        "--results-dir",
        type=Path,
        default=RESULTS_FOLDER,
        metavar="DIR",
        help="where results go (default: %(default)s)",
    )


def add_reuse_argument(parser: argparse.ArgumentParser) -> None:
    """--reuse, for the batch."""
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="evaluate only what has no results of the same checkpoint, data, device and code yet",
    )


def _tasks(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    known = task_names()
    unknown = [task for task in chosen if task not in known]
    if unknown or not chosen:
        what = f"unknown task {', '.join(unknown)}" if unknown else "no task"
        raise argparse.ArgumentTypeError(f"{what}; known are {', '.join(known)}")
    return chosen


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-path",
        required=True,
        help="checkpoint or model folder, hub id, .gguf file, or owner/name/file.gguf on the hub",
    )
    parser.add_argument(
        "--name",
        help="what a quantized model is called in results and tables (default: the last part of "
        "--model-path)",
    )
    parser.add_argument(
        "--baseline",
        help="the 16-bit model that a quantized one was made from: hub id, folder, or "
        "demo (default: what its metadata says)",
    )
    add_evaluation_arguments(parser)
    add_reuse_argument(parser)
    options = parser.parse_args()
    subject = subject_of(options.model_path, options.baseline, options.results_dir, options.name)
    evaluate_model(subject, options, options.reuse)
    refresh_card(subject, options.results_dir)


if __name__ == "__main__":
    cli.run(main)

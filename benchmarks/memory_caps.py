#!/usr/bin/env python3
"""What every method and the evaluation take of a GPU and of the host, held to so much of the GPU.

    python benchmarks/memory_caps.py --shapes 1B,3B,8B --output caps.jsonl

Models of the shapes of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B with random weights, within 6, 8
and 12 GiB (`--device-memory`). Every run is a process of its own that ends in a line of JSON:

driver_peak_gib: most memory of the GPU in use, less what was before (nvidia-smi, 20 times a
second).
reserved_peak_gib, allocated_peak_gib: the same by torch's allocator, since its peak was last reset.
outside_gib: taken at the end beside torch's allocator, to hold against device_memory's margins.
host_peak_gib: resident memory of the process.

Methods quantize the first --layers layers, as layers come one after the other; for verify and the
evaluation HQQ quantizes all. Calibration tokens are random. Evaluation is on the demo's questions
or, with --data-root, on the real ones.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import lm_eval.evaluator  # noqa: F401  (forked children have it)
import quantization_speed
import torch
from card_memory import Driver
from large_model import first_layers
from scripts import processes, run_script
from shape import write_random_shards
from transformers import LlamaForCausalLM, pipelines  # noqa: F401  (forked children have it)

from common import (
    evaluation,  # noqa: F401  (forked children have it)
    metadata,  # noqa: F401  (forked children have it)
)
from common.cli import quiet_libraries
from common.model.source import load_tokenizer, resolve_folder
from common.text.windows import Windows

COMMON = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192)
SHAPES = {
    "1B": dict(
        COMMON,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "3B": dict(
        COMMON,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "8B": dict(
        COMMON,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
    ),
}
TRIAL = dict(
    vocab_size=49152,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
CAPS = {"1B": 6.0, "3B": 8.0, "8B": 12.0}
METHODS = tuple(quantization_speed.METHODS)
# choices: ARC and perplexity with divergence, and speed; answers: what is generated token by token.
TASKS = {"choices": "arc,perplexity,speed", "answers": "squad_v2,openmath"}
WORK = (
    *METHODS,
    "hqq-whole",
    "verify",
    "choices",
    "answers",
    "baseline-choices",
    "baseline-answers",
)
# Options that are numbers: default and what they count.
NUMBERS = (
    ("--layers", 2, "that the methods quantize"),
    ("--samples", 128, "calibration windows"),
    ("--length", 2048, "tokens of a window"),
    ("--iterations", 20, "of AdaRound"),
    ("--windows", 4, "of perplexity"),
    ("--limit", 400, "questions of ARC"),
    ("--answers", 24, "of SQuAD and of OpenMath"),
)


def write(folder: Path, shape: dict, tokenizer: str) -> None:
    write_random_shards(folder, load_tokenizer(resolve_folder(tokenizer)), shape)


def apart(work: Callable[[], object], log: Path, answer: Path) -> None:
    """Run `work` in this process, a child; its output goes to `log`, what it took to `answer`."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    quiet_libraries()
    found = {"ok": True}
    try:
        work()
    except BaseException as error:  # whatever it is, its line belongs into the results
        last = (log.read_text().strip().splitlines() or [""])[-1]
        found = {
            "ok": False,
            "error": last[:200]
            if last.startswith("error: ")
            else f"{type(error).__name__}: {error}"[:200],
        }
    found["host_peak_gib"] = metadata.peak_memory(torch.device("cpu"))["peak_host_bytes"] / 2**30
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "reserved_peak_gib": torch.cuda.max_memory_reserved() / 2**30,
            "allocated_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "taken_gib": (total - free - torch.cuda.memory_reserved()) / 2**30,
        }
    answer.write_text(json.dumps(found))


def quantize(
    method: str, folder: Path, output: Path, cap: float, samples: int, length: int, more: list[str]
) -> None:
    tokens = torch.randint(0, 49152, (samples, length), generator=torch.Generator().manual_seed(0))
    quantization_speed.quantization.windows_of = lambda *_, **__: Windows(
        tokens, "random tokens", 0
    )
    words = quantization_speed.METHODS[method]
    run_script(
        f"quantize_{method}.py",
        [
            "--model",
            str(folder),
            "--output",
            str(output),
            "--overwrite",
            *words,
            *more,
            "--device-memory",
            str(cap),
        ],
    )


def evaluate(
    folder: Path, tasks: str, cap: float, options: argparse.Namespace, results: Path
) -> None:
    data = ["--data-root", str(options.data_root)] if options.data_root else ["--data", "demo"]
    limit = options.limit if "arc" in tasks else options.answers
    run_script(
        "common/evaluation.py",
        [
            "--model-path",
            str(folder),
            "--tasks",
            tasks,
            "--limit",
            str(limit),
            "--windows",
            str(options.windows),
            "--window-length",
            str(options.length),
            "--results-dir",
            str(results),
            "--device-memory",
            str(cap),
            *data,
        ],
    )


def verify(folder: Path, cap: float) -> None:
    # Checks of a random model may fail (1); they have to be made.
    run_script(
        "verify_model.py", ["--model-path", str(folder), "--device-memory", str(cap)], fine=(0, 1)
    )


def jobs(folder: Path, cap: float, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """All that can be run on a model, by name."""
    scratch, layers = (
        folder.parent,
        json.loads((folder / "config.json").read_text())["num_hidden_layers"],
    )
    part = first_layers(folder, min(options.layers, layers))
    whole, results = scratch / "hqq-whole", scratch / "results"
    few = {"adaround": ["--iterations", str(options.iterations)]}
    found = {
        method: partial(
            quantize,
            method,
            part,
            scratch / method,
            cap,
            options.samples,
            options.length,
            few.get(method, []),
        )
        for method in METHODS
    }
    found["hqq-whole"] = partial(quantize, "hqq", folder, whole, cap, 1, options.length, [])
    found["verify"] = partial(verify, whole, cap)
    for name, tasks in TASKS.items():
        found[name] = partial(evaluate, whole, tasks, cap, options, results)
        found[f"baseline-{name}"] = partial(evaluate, folder, tasks, cap, options, results)
    return found


def measure(name: str, job: Callable[[], object], driver: Driver, scratch: Path) -> dict:
    """Run a job in a process of its own. Returns what it took."""
    log, answer = scratch / f"{name}.log", scratch / "answer.json"
    answer.unlink(missing_ok=True)
    before, start = driver.settle(), time.perf_counter()
    process = processes().Process(target=apart, args=(job, log, answer))
    process.start()
    process.join()
    found = {"seconds": time.perf_counter() - start}
    if before is not None:
        found["driver_peak_gib"] = driver.peak - before
    if not answer.is_file():
        last = (log.read_text().strip().splitlines() or [""])[-1] if log.is_file() else ""
        return {**found, "ok": False, "error": f"exit code {process.exitcode}: {last[:150]}"}
    found |= json.loads(answer.read_text())
    if "taken_gib" in found:
        found["outside_gib"] = found.pop("taken_gib") - (before or 0.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", default="1B,3B,8B", help="NAME or NAME:GIB (default: %(default)s)"
    )
    parser.add_argument(
        "--work",
        default=",".join(name for name in WORK if name != "baseline-answers"),
        help=f"of {', '.join(WORK)}; verify, choices and answers need hqq-whole "
        "(default: %(default)s)",
    )
    for flag, default, what in NUMBERS:
        parser.add_argument(flag, type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, help="real data sets")
    parser.add_argument(
        "--tokenizer", default="demo", metavar="MODEL", help="whose it is (default: %(default)s)"
    )
    parser.add_argument(
        "--scratch", type=Path, help="where models are written (default: a temporary folder)"
    )
    parser.add_argument(
        "--trial", action="store_true", help="tiny models, to see that everything runs"
    )
    parser.add_argument("--output", type=Path, help="file that the lines are appended to")
    options = parser.parse_args()
    wanted = options.work.split(",")
    if unknown := set(wanted) - set(WORK):
        parser.error(f"unknown work {', '.join(sorted(unknown))}; known are {', '.join(WORK)}")
    driver, failed = Driver(), 0
    for given in options.shapes.split(","):
        shape, _, gib = given.partition(":")
        cap = float(gib or CAPS[shape])
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            folder = Path(scratch) / f"random-{shape}"
            content = {**SHAPES[shape], **TRIAL} if options.trial else SHAPES[shape]

            def report(name: str, found: dict, shape: str = shape, cap: float = cap) -> None:
                rounded = {
                    key: round(value, 2) if isinstance(value, float) else value
                    for key, value in found.items()
                }
                line = json.dumps({"shape": shape, "cap_gib": cap, "work": name, **rounded})
                print(line, flush=True)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(line + "\n")

            found = measure(
                "write",
                partial(write, folder, content, options.tokenizer),
                driver,
                Path(scratch),
            )
            report("write the model", found)
            if not found["ok"]:
                sys.exit(2)
            work = jobs(folder, cap, options)
            for name in filter(wanted.__contains__, WORK):
                found = measure(name, work[name], driver, Path(scratch))
                failed += not found["ok"]
                report(name, found)
                if name in METHODS:
                    shutil.rmtree(Path(scratch) / name, ignore_errors=True)
    driver.stop()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

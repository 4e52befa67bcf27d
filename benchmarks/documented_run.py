#!/usr/bin/env python3
"""The comparison behind README.md and docs/, in as little time on a borrowed GPU as gives honest
figures.

    python benchmarks/documented_run.py --data-root ../shared/data

What `run_all_quantization.sh --demo` does, in another order: configurations are quantized one after
the other, as their times count; then all are evaluated at once, as their answers do not depend on
how long they took; then speed is measured one by one. Real data sets; calibration 64 x 2048 tokens
of calib/pile_style_mix; GSM8K stands in for OpenMathInstruct-2. Results go to docs/results/, which
analyze_results.py makes the tables of.
"""

import argparse
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scripts import processes

from common.base.files import write_json
from common.model.demo import DEMO_NAME
from common.model.source import MODELS_FOLDER, resolve_folder
from common.results.documents import CONFIGURATIONS, DOCUMENTED_FOLDER, STATUS_FILE
from common.run_all import imported  # noqa: F401  (forked children have it)

CALIBRATION = [
    "--calib-data",
    "calib/pile_style_mix",
    "--calib-samples",
    "64",
    "--calib-length",
    "2048",
]


# A mirror of OpenMathInstruct-2 has some tens of problems: GSM8K's test set, in its columns, stands
# in for it, whole.
PROBLEMS = "1319"
EVALUATION = [
    "--tasks",
    "arc,arc_easy,squad_v2,openmath,perplexity",
    "--openmath-data",
    "openmath_standin/gsm8k_as_openmath2:test",
]


def script(words: list[str], log: Path) -> None:
    """Run a script of the project with its output in `log`; ends the process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def start(words: list[str], configuration: str) -> multiprocessing.Process:
    process = processes().Process(
        target=script, args=(words, Path("logs") / DEMO_NAME / f"{configuration}.log")
    )
    process.start()
    return process


def finish(process: multiprocessing.Process, configuration: str, status: dict[str, dict]) -> bool:
    """Wait for a step; a failed one is noted with the last line of its log."""
    process.join()
    if process.exitcode:
        lines = (Path("logs") / DEMO_NAME / f"{configuration}.log").read_text().strip().splitlines()
        status[configuration] = {
            "state": "failed",
            "reason": lines[-1][:200] if lines else f"exit code {process.exitcode}",
        }
    return not process.exitcode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True)
    parser.add_argument(
        "--only", default=",".join(CONFIGURATIONS), help="configurations (default: all)"
    )
    parser.add_argument(
        "--limit",
        default=PROBLEMS,
        help="samples per task (default: %(default)s); less for a trial",
    )
    parser.add_argument("--windows", help="perplexity windows, for a trial")
    parser.add_argument("--calib-samples", help="fewer, for a trial")
    options = parser.parse_args()
    chosen = options.only.split(",")
    began = time.monotonic()

    def done(stage: str) -> None:
        print(f"{stage} after {time.monotonic() - began:.0f} s", flush=True)

    print(f"processes: {processes().get_start_method()}", flush=True)
    # In a child too: what has used threads is not to be forked.
    first = processes().Process(target=resolve_folder, args=("demo",))
    first.start()
    first.join()
    for configuration in chosen:
        (Path("logs") / DEMO_NAME / f"{configuration}.log").unlink(missing_ok=True)
    status: dict[str, dict] = {configuration: {"state": "done"} for configuration in chosen}
    data = ["--data-root", options.data_root]
    less = [
        word
        for flag in ("limit", "windows")
        if getattr(options, flag)
        for word in (f"--{flag}", getattr(options, flag))
    ]
    place = ["--results-dir", str(DOCUMENTED_FOLDER)]
    folders = {name: MODELS_FOLDER / DEMO_NAME / name for name in chosen}

    def quantize(name: str) -> list[str]:
        method, bits = CONFIGURATIONS[name]
        calibration = [
            *CALIBRATION,
            *(["--calib-samples", options.calib_samples] if options.calib_samples else []),
        ]
        return [
            f"quantize_{method}.py",
            "--model",
            "demo",
            "--bits",
            str(bits),
            "--output",
            str(folders[name]),
            "--overwrite",
            *data,
            *calibration,
        ]

    def evaluate(name: str) -> list[str]:
        words = (
            ["common/baseline.py", "--model", "demo"]
            if name == "baseline"
            else ["common/evaluation.py", "--model-path", str(folders[name])]
        )
        return [*words, *data, *less, *place, *EVALUATION]

    def speed(name: str) -> list[str]:
        return [
            "common/evaluation.py",
            "--model-path",
            str(folders[name]),
            *data,
            *less,
            *place,
            "--tasks",
            "speed",
        ]

    def one_by_one(words: Callable[[str], list[str]], names: list[str]) -> None:
        for name in names:
            if status[name]["state"] == "done":
                finish(start(words(name), name), name, status)

    one_by_one(quantize, [name for name in chosen if name != "baseline"])
    done("quantized")
    running = {
        name: start(evaluate(name), name) for name in chosen if status[name]["state"] == "done"
    }
    for name, process in running.items():
        finish(process, name, status)
    done("evaluated")
    one_by_one(speed, chosen)
    done("speed measured")
    write_json(DOCUMENTED_FOLDER / DEMO_NAME / STATUS_FILE, status)
    for name, state in status.items():
        if state["state"] != "done":
            print(f"{name}: {state['reason']}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The comparison behind README.md and docs/, in as little time on a borrowed GPU as gives honest
figures.

    python benchmarks/documented_run.py --data-root ../shared/data --models demo models/SECOND

What `run_all_quantization.sh` does, model by model and in another order: configurations are
quantized one after the other, as their times count; then all are evaluated at once, as their
answers do not depend on how long they took; then speed is measured one by one. Real data sets;
calibration 64 x 2048 tokens of calib/pile_style_mix; GSM8K stands in for OpenMathInstruct-2.
Results go to docs/results/, which analyze_results.py makes the tables of.
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
from common.model.source import MODELS_FOLDER, resolve_folder
from common.results.documents import CONFIGURATIONS, DOCUMENTED_FOLDER, STATUS_FILE
from common.results.naming import filed_as, source_of
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


def start(words: list[str], log: Path) -> multiprocessing.Process:
    process = processes().Process(target=script, args=(words, log))
    process.start()
    return process


def finish(process: multiprocessing.Process, log: Path) -> dict[str, str]:
    """Wait for a step. Returns its state; a failed one's with the last line of its log."""
    process.join()
    if not process.exitcode:
        return {"state": "done"}
    lines = log.read_text().strip().splitlines()
    return {
        "state": "failed",
        "reason": lines[-1][:200] if lines else f"exit code {process.exitcode}",
    }


def document(model: str, options: argparse.Namespace) -> None:
    """The comparison of one model."""
    chosen = options.only.split(",")
    began = time.monotonic()

    def done(stage: str) -> None:
        print(f"{model}: {stage} after {time.monotonic() - began:.0f} s", flush=True)

    # In a child: what has used threads is not to be forked.
    first = processes().Process(target=resolve_folder, args=(model,))
    first.start()
    first.join()
    name = filed_as(model, DOCUMENTED_FOLDER)
    logs = {configuration: Path("logs") / name / f"{configuration}.log" for configuration in chosen}
    for log in logs.values():
        log.unlink(missing_ok=True)
    status: dict[str, dict] = {
        configuration: {"state": "done", "source": source_of(model)} for configuration in chosen
    }
    folders = {configuration: MODELS_FOLDER / name / configuration for configuration in chosen}
    data = ["--data-root", options.data_root]
    less = [
        word
        for flag in ("limit", "windows")
        if getattr(options, flag)
        for word in (f"--{flag}", getattr(options, flag))
    ]
    place = ["--results-dir", str(DOCUMENTED_FOLDER)]

    def quantize(configuration: str) -> list[str]:
        method, bits = CONFIGURATIONS[configuration]
        words = [f"quantize_{method}.py", "--model", model, "--bits", str(bits)]
        words += ["--output", str(folders[configuration]), "--overwrite", *data, *CALIBRATION]
        return words + (["--calib-samples", options.calib_samples] if options.calib_samples else [])

    def of(configuration: str) -> list[str]:
        return (
            ["common/baseline.py", "--model", model]
            if configuration == "baseline"
            else [
                "common/evaluation.py",
                "--model-path",
                str(folders[configuration]),
                "--baseline",
                model,
            ]
        )

    def evaluate(configuration: str) -> list[str]:
        return [*of(configuration), *data, *less, *place, *EVALUATION]

    def speed(configuration: str) -> list[str]:
        return [*of(configuration), *data, *less, *place, "--tasks", "speed"]

    def sound() -> list[str]:
        return [name for name in chosen if status[name]["state"] == "done"]

    def one_by_one(words: Callable[[str], list[str]], names: list[str]) -> None:
        for configuration in names:
            log = logs[configuration]
            status[configuration].update(finish(start(words(configuration), log), log))

    one_by_one(quantize, [name for name in chosen if name != "baseline"])
    done("quantized")
    running = {name: start(evaluate(name), logs[name]) for name in sound()}
    for configuration, process in running.items():
        status[configuration].update(finish(process, logs[configuration]))
    done("evaluated")
    one_by_one(speed, sound())
    done("speed measured")
    write_json(DOCUMENTED_FOLDER / name / STATUS_FILE, status)
    _without_this_machine(DOCUMENTED_FOLDER / name)
    for configuration, state in status.items():
        if state["state"] != "done":
            print(f"{model} {configuration}: {state['reason']}")


def _without_this_machine(results: Path) -> None:
    """Results name a model's folder by its full path; from the project's folder on says as much."""
    for file in results.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        if f'"{ROOT}/' in text:
            file.write_text(text.replace(f'"{ROOT}/', '"'), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True)
    parser.add_argument(
        "--models", nargs="+", default=["demo"], help="hub ids, folders, demo (default: demo)"
    )
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
    print(f"processes: {processes().get_start_method()}", flush=True)
    for model in options.models:
        document(model, options)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The comparison behind README.md and docs/, in as little time on a borrowed GPU as gives honest
figures.

    python benchmarks/documented_run.py --data-root ../shared/data --models demo models/SECOND

What `run_all_quantization.sh` does, model by model and in another order: configurations are
quantized one after the other, as their times count; then speed is measured one by one; then all
are evaluated at once, as their answers do not depend on how long they took. Real data sets;
calibration 64 x 2048 tokens of calib/pile_style_mix; GSM8K stands in for OpenMathInstruct-2.
Results go to docs/results/, which analyze_results.py makes the tables of.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.base.environment import missing
from common.base.errors import UserError
from common.base.files import json_or_none, write_json
from common.base.libraries import INTERPRETER
from common.cli import run
from common.model.source import MODELS_FOLDER, resolve_folder
from common.results.documents import (
    CONFIGURATIONS,
    DOCUMENTED_FOLDER,
    STATUS_FILE,
    has_samples,
    load_samples,
    write_samples,
)
from common.results.naming import filed_as, source_of
from common.results.peers import PEERS
from common.run_all.peers import SCRIPT, check_environment
from common.run_all.steps import StepFailed, run_logged

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


def document(model: str, options: argparse.Namespace) -> bool:
    """The comparison of one model. Returns whether all of it was done."""
    chosen = options.only.split(",")
    began = time.monotonic()

    resolve_folder(model)
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

    def quantize(configuration: str) -> list[str]:
        if configuration in PEERS:
            words = [SCRIPT, configuration]
        else:
            method, bits = CONFIGURATIONS[configuration]
            words = [f"quantize_{method}.py", "--bits", str(bits)]
        words += ["--model", model, "--output", str(folders[configuration]), "--overwrite"]
        words += [*data, *CALIBRATION]
        return words + (["--calib-samples", options.calib_samples] if options.calib_samples else [])

    def evaluate(configuration: str, what: list[str]) -> list[str]:
        words = ["common/evaluation.py", "--model-path", str(folders[configuration])]
        words += ["--baseline", model, "--name", configuration]
        if configuration == "baseline":
            words = ["common/baseline.py", "--model", model]
        return [*words, *data, *less, "--results-dir", str(DOCUMENTED_FOLDER), *what]

    def step(configuration: str, words: list[str]) -> None:
        interpreter = INTERPRETER if configuration in PEERS else None
        try:
            run_logged(words, logs[configuration], {}, interpreter)
        except StepFailed as failure:
            status[configuration].update(state="failed", reason=str(failure))

    def sound() -> list[str]:
        return [name for name in chosen if status[name]["state"] == "done"]

    def one_by_one(words: Callable[[str], list[str]], names: list[str]) -> None:
        for configuration in names:
            step(configuration, words(configuration))

    def at_once(words: Callable[[str], list[str]], names: list[str]) -> None:
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(lambda configuration: step(configuration, words(configuration)), names))

    found = [STATUS_FILE, *(f"{configuration}.json" for configuration in chosen)]
    # What an earlier call measured counts only if it is of the same model, by its path here.
    _name_model(DOCUMENTED_FOLDER / name, found, source_of(model), shown=False)
    for stage in options.stages.split(","):
        if stage == "quantize":
            one_by_one(quantize, [name for name in chosen if name != "baseline"])
        elif stage == "speed":
            one_by_one(lambda name: evaluate(name, ["--tasks", "speed"]), sound())
        else:
            at_once(lambda name: evaluate(name, EVALUATION), sound())
        print(f"{model}: {stage} after {time.monotonic() - began:.0f} s", flush=True)
        file = DOCUMENTED_FOLDER / name / STATUS_FILE
        write_json(file, {**(json_or_none(file) or {}), **status})
    _name_model(DOCUMENTED_FOLDER / name, found, source_of(model), shown=True)
    for configuration in sound():
        if has_samples(DOCUMENTED_FOLDER, name, configuration):
            _coarser_divergences(name, configuration)
    for configuration, state in status.items():
        if state["state"] != "done":
            print(f"{model} {configuration}: {state['reason']}")
    return len(sound()) == len(chosen)


def _name_model(results: Path, names: list[str], source: str, shown: bool) -> None:
    """In results, name a model's folder, full path `source`, by its path in the project, which is
    the same on every machine, or by the full one again, as an evaluation does.
    """
    short = source.removeprefix(f"{ROOT}/")
    for file in map(results.joinpath, names):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            if shown:
                text = text.replace(f'"{ROOT}/', '"')
            else:
                text = text.replace(f'"{short}"', f'"{source}"')
            file.write_text(text, encoding="utf-8")


def _coarser_divergences(model: str, configuration: str) -> None:
    """Keep two digits of each token's divergence, most of what a record takes: a mean over 300,000
    tokens is the same to four digits.
    """
    kept: dict[str, list[dict]] = {}
    for record in load_samples(DOCUMENTED_FOLDER, model, configuration):
        own = {key: value for key, value in record.items() if key != "task"}
        if "kl" in own:
            own["kl"] = [float(f"{value:.1e}") for value in own["kl"]]
        kept.setdefault(record["task"], []).append(own)
    write_samples(DOCUMENTED_FOLDER, model, configuration, kept)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", required=True)
    parser.add_argument(
        "--models", nargs="+", default=["demo"], help="hub ids, folders, demo (default: demo)"
    )
    parser.add_argument(
        "--only", default=",".join(CONFIGURATIONS), help="configurations (default: all of ours)"
    )
    parser.add_argument(
        "--with-peers",
        action="store_true",
        help="other libraries, too, in the environment that run_all_quantization.sh --with-peers "
        "sets up",
    )
    parser.add_argument(
        "--stages",
        default="quantize,speed,evaluate",
        help="what is done, in order (default: %(default)s)",
    )
    parser.add_argument(
        "--at-once", type=int, default=10, help="evaluations (default: %(default)s)"
    )
    parser.add_argument(
        "--limit",
        default=PROBLEMS,
        help="samples per task (default: %(default)s); less for a trial",
    )
    parser.add_argument("--windows", help="perplexity windows, for a trial")
    parser.add_argument("--calib-samples", help="fewer, for a trial")
    options = parser.parse_args()
    if options.with_peers:
        options.only += "," + ",".join(PEERS)
    if unknown := set(options.only.split(",")) - {*CONFIGURATIONS, *PEERS}:
        known = ", ".join([*CONFIGURATIONS, *PEERS])
        parser.error(f"--only: there is no {min(unknown)}; there are {known}")
    if set(options.only.split(",")) & set(PEERS):
        check_environment()
    # Found before everything is quantized, not after. Measuring speed is an evaluation, too.
    if options.stages != "quantize" and not importlib.util.find_spec("lm_eval"):
        raise UserError(f"{missing('lm_eval')}; or give --stages quantize")
    done = [document(model, options) for model in options.models]
    return 0 if all(done) else 1


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
r"""Perplexity and divergence of several models, each quantized by every method, from the same
calibration tokens.

    python benchmarks/quality.py --data-root ../shared/data --models demo models/Other/baseline \
        --output quality.json
    python benchmarks/quality.py --data-root ../shared/data --models demo --seeds 0 1 2 --peers

No default may be chosen on one model: give the demo model, others, and variants of both with the
same function and other statistics. WikiText-2 test in windows of 2048; calibration 64 x 2048
tokens, groups of 64, asymmetric. With --peers other libraries (benchmarks/requirements.txt)
quantize the same models from the same tokens; what is not installed is left out. A line for each
run as it ends, then a table: perplexity relative to the baseline's by model, its mean and worst,
and the mean divergence in nats.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from methods import method_options
from peers import PEERS, Work
from scripts import quantize

from common import cli
from common.base.arguments import positive, two_or_more
from common.base.device import DTYPES, resolve_device
from common.base.errors import UserError, first_line
from common.base.stopwatch import Stopwatch
from common.model.source import SourceModel, resolve_folder
from common.results.documents import CONFIGURATIONS
from common.results.peers import PEERS as KNOWN_PEERS
from common.running.runtime import load_model
from common.tasks import perplexity
from common.tasks.original import last_hidden_states
from common.text.windows import calibration_windows, evaluation_windows

GROUP_SIZE = 64
METHODS = method_options(GROUP_SIZE)
# What is run: the configurations of the comparison and a few beside them, by name: the script and
# its options.
RUNS = {
    **{name: (made[0], ["--bits", str(made[1])]) for name, made in CONFIGURATIONS.items() if made},
    "gptq-3bit": ("gptq", ["--bits", "3"]),
    "quarot-3bit": ("quarot", ["--bits", "3"]),
    "quarot-w4a4kv4": ("quarot", ["--bits", "4", "--act-bits", "4", "--kv-bits", "4"]),
}
# Where there is no calibration, or nothing drawn, a seed changes nothing.
UNSEEDED = ("hqq", *(name for name, peer in KNOWN_PEERS.items() if not peer.calibrated))


class Subject:
    """A model to measure on: its windows of text, its perplexity, and its last hidden states, from
    which all divergences are.
    """

    def __init__(self, model: str, options: argparse.Namespace):
        self.name, self.options = model, options
        self.folder = resolve_folder(model)
        self.device, self.dtype = resolve_device("auto"), DTYPES[options.dtype]
        original = self.original()
        self.tokenizer = original.tokenizer
        self.windows = evaluation_windows(
            perplexity.ADDRESS,
            self.tokenizer,
            options.windows,
            options.window_length,
            options.data_root,
        )
        self.states = last_hidden_states(original, self.windows.tokens)
        self.baseline = perplexity.perplexity(self.load(self.folder), self.windows)[0]["perplexity"]

    def original(self) -> SourceModel:
        return SourceModel(str(self.folder), self.device, self.dtype)

    def load(self, folder: Path):
        return load_model(folder, self.device, self.dtype)[0]

    def calibration(self, seed: int) -> torch.Tensor:
        """Token windows [samples, length], the scripts' own."""
        options = self.options
        return calibration_windows(
            options.calib_data,
            self.tokenizer,
            options.calib_samples,
            options.calib_length,
            seed,
            options.data_root,
        ).tokens

    def measure(self, model) -> dict[str, float]:
        found = perplexity.perplexity(model, self.windows, self.original(), self.states)[0]
        return {
            "perplexity": found["perplexity"],
            "ratio": found["perplexity"] / self.baseline,
            "kl": found["divergence"]["kl_mean"],
        }


def by_script(
    script: str, extra: list[str], subject: Subject, seed: int
) -> tuple[dict[str, float], float]:
    """Quantize by one of our scripts. Returns what was measured and the seconds of the whole
    script.
    """
    options = subject.options
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "checkpoint"
        seconds = quantize(
            script,
            [
                "--model",
                subject.name,
                "--output",
                str(output),
                "--seed",
                str(seed),
                *METHODS[script],
                "--data-root",
                str(options.data_root),
                "--calib-data",
                options.calib_data,
                "--calib-samples",
                str(options.calib_samples),
                "--calib-length",
                str(options.calib_length),
                *extra,
            ],
        )
        return subject.measure(subject.load(output)), seconds


def by_peer(function: Callable, subject: Subject, seed: int) -> tuple[dict[str, float], float]:
    """The same by another library, seconds without loading. Raises ImportError where it is not
    installed.
    """
    watch = Stopwatch(subject.device)
    work = Work(
        subject.folder,
        subject.tokenizer,
        subject.calibration(seed),
        GROUP_SIZE,
        subject.device,
        watch,
    )
    model = function(work).model.to(subject.device)  # some leave parts of it on the host
    return subject.measure(model), watch.seconds["quantize"]


def _script(run: str) -> str:
    """The script that a run written out begins with."""
    return (run.split() or [""])[0]


def jobs(options: argparse.Namespace) -> dict[str, tuple[Callable, bool]]:
    """By name of a run: a function of subject and seed, and whether the seed matters."""
    found = {}
    for run in options.runs:
        script, extra = RUNS[run] if run in RUNS else (_script(run), run.split()[1:])
        found[run] = (
            (lambda *what, script=script, extra=extra: by_script(script, extra, *what)),
            script not in UNSEEDED,
        )
    for name, function in PEERS.items() if options.peers else ():
        found[name] = (
            (lambda *what, function=function: by_peer(function, *what)),
            name not in UNSEEDED,
        )
    return found


def table(records: list[dict], models: list[str]) -> str:
    """Runs by models: means over seeds of the perplexity ratio, their mean and worst over models,
    and the mean divergence.
    """

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    lines = [
        "| run | " + " | ".join(models) + " | mean | worst | KL, nats |",
        "|---|" + "---:|" * (len(models) + 3),
    ]
    for run in dict.fromkeys(record["run"] for record in records):
        own = [
            [record for record in records if (record["run"], record["model"]) == (run, model)]
            for model in models
        ]
        ratios = [mean([record["ratio"] for record in some]) for some in own if some]
        shown = iter(ratios)
        cells = [f"{next(shown):.4f}" if some else "–" for some in own]
        divergence = mean([record["kl"] for some in own for record in some])
        lines.append(
            f"| {run} | {' | '.join(cells)} | {mean(ratios):.4f} | {max(ratios):.4f} | "
            f"{divergence:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["demo"], help="hub ids, folders or demo (default: demo)"
    )
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--calib-data", default="calib/pile_style_mix")
    parser.add_argument("--calib-samples", type=positive, default=64)
    parser.add_argument("--calib-length", type=positive, default=2048)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--runs",
        nargs="*",
        default=list(RUNS),
        help="names of RUNS, or a script and its options in quotes",
    )
    parser.add_argument("--peers", action="store_true", help="other libraries too")
    parser.add_argument("--windows", type=positive, help="of the text (default: all)")
    parser.add_argument("--window-length", type=two_or_more, default=2048)
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="to evaluate in (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="JSON of all records, written after each")
    options = parser.parse_args()
    if unknown := [run for run in options.runs if run not in RUNS and _script(run) not in METHODS]:
        parser.error(f"unknown run {unknown[0]}; known are {', '.join([*RUNS, *METHODS])}")
    if options.output and not options.output.parent.is_dir():
        raise UserError(f"--output: there is no folder {options.output.parent}")
    cli.configure_torch(0)
    records: list[dict] = []
    for model in options.models:
        subject = Subject(model, options)
        print(f"BASELINE {model} {subject.baseline:.4f}", flush=True)
        for run, (job, seeded) in jobs(options).items():
            for seed in options.seeds if seeded else options.seeds[:1]:
                try:
                    found, seconds = job(subject, seed)
                except Exception as error:
                    if run not in PEERS:
                        raise
                    # Another library's failure is not the others'.
                    missing = isinstance(error, ModuleNotFoundError)
                    reason = "not installed" if missing else f"failed, {type(error).__name__}"
                    print(f"{run}: {reason}: {first_line(error)}", flush=True)
                    error.__traceback__ = None  # which holds what it had on the GPU
                    gc.collect()
                    break
                records.append(
                    {
                        "model": model,
                        "run": run,
                        "seed": seed,
                        **found,
                        "seconds": round(seconds, 1),
                    }
                )
                print(
                    f"RESULT {model} {run} seed {seed}: {found['perplexity']:.4f}, "
                    f"{found['ratio']:.4f} x, KL {found['kl']:.4f}, {seconds:.1f} s",
                    flush=True,
                )
                if options.output:
                    options.output.write_text(
                        json.dumps(
                            {"calibration": options.calib_data, "records": records}, indent=1
                        )
                    )
                gc.collect()
    print(table(records, options.models))


if __name__ == "__main__":
    cli.run(main)

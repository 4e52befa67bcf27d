"""The batch behind run_all_quantization.sh: every configuration in processes of its own, one after
the other, or several at once with a GPU each.

A configuration that fails is recorded with its reason and does not stop the rest. What is finished
is kept where it was made with the same options, and results where they are of the same checkpoint,
data, device and code.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from common.base.arguments import gibibytes, positive
from common.base.device import DTYPES
from common.base.errors import UserError
from common.base.files import write_json
from common.base.progress import say
from common.checkpoint.writer import METADATA_FILE
from common.cli import resolve_sizes, run
from common.model.source import DEFAULT_MODEL, MODELS_FOLDER
from common.results.documents import CONFIGURATIONS, RESULTS_FOLDER, STATUS_FILE, read_document
from common.results.identity import checkpoint_hash
from common.results.naming import filed_as, source_of
from common.results.reuse import changed_sources, made_from
from common.run_all import check
from common.run_all.passed_on import method_parser, share_out
from common.text.windows import text_sample

_REASON_LENGTH = 200


@dataclass
class Batch:
    """What all configurations of a run share."""

    model: str
    name: str
    results: Path
    overwrite: bool
    device: list[str]
    dtype: str
    evaluation: list[str]
    # By method, the options that its script is told.
    passed_on: dict[str, list[str]]
    status: dict[str, dict] = field(default_factory=dict)
    # GPUs that no configuration is using; None without --gpus, when nothing is said about which to
    # use.
    free: queue.Queue[str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def gpu(self) -> Iterator[dict[str, str]]:
        """While open a GPU belongs to the caller; gives the environment that lets processes see
        that one alone.
        """
        if self.free is None:
            yield {}
            return
        gpu = self.free.get()
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
        finally:
            self.free.put(gpu)

    def note(self, configuration: str, state: str, reason: str = "", **more) -> None:
        """Record the state of a configuration, where analyze_results.py finds it, and whose it is.
        How its checkpoint was made is kept.
        """
        with self.lock:
            before = self.status.get(configuration, {})
            kept = {"made": before["made"]} if "made" in before else {}
            self.status[configuration] = {
                "state": state,
                **({"reason": reason} if reason else {}),
                "source": source_of(self.model),
                **kept,
                **more,
            }
            write_json(self.results / self.name / STATUS_FILE, self.status)

    def quantization_options(self, method: str) -> list[str]:
        """What a method's script is told that decides a checkpoint's weights."""
        without_effect = ("--save-metadata", "--no-save-metadata", "--resume")
        words = [word for word in self.passed_on.get(method, []) if word not in without_effect]
        return [*words, *(["--dtype", self.dtype] if self.dtype != "auto" else [])]


class StepFailed(Exception):
    """A step of a configuration ended with an error; the message is its last line."""


def step(title: str, command: list[str], log: Path, gpu: dict[str, str]) -> str:
    """Run one script, showing its output and keeping it in `log`. Raises StepFailed with its error
    line.
    Returns its first warning of something wrecked, the worst.

    Args:
        gpu: environment that says which GPU to use; lines are shown with the configuration's name
            when it says so.
    """
    prefix = f"[{log.stem}] " if gpu else ""
    say(f"{prefix}--- {title}")
    log.parent.mkdir(parents=True, exist_ok=True)
    last, error, wrecked = "", "", ""
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **gpu},
        )
        for line in process.stdout:
            sys.stdout.write(prefix + line)
            sys.stdout.flush()
            file.write(line)
            last = line.strip() or last
            if line.startswith(("error: ", "FAIL")):
                error = line.strip().removeprefix("error: ")
            if line.startswith("warning: ") and " is wrecked" in line:
                wrecked = wrecked or line.strip().removeprefix("warning: ")
        code = process.wait()
    if code:
        if code < 0:
            error = error or f"killed by signal {-code}" + (
                " (out of memory?)" if code == -9 else ""
            )
        raise StepFailed((error or last or f"exit code {code}")[:_REASON_LENGTH])
    return wrecked


def run_configuration(batch: Batch, configuration: str) -> bool:
    """Quantize, verify and evaluate one configuration. Returns whether all went well."""
    wanted = CONFIGURATIONS[configuration]
    folder = MODELS_FOLDER / batch.name / configuration
    log = Path("logs") / batch.name / f"{configuration}.log"
    say(f"=== {configuration}")
    if batch.overwrite or not folder.is_dir():
        log.unlink(missing_ok=True)
    verified = batch.status.get(configuration, {}).get("verified")
    batch.note(configuration, "running")
    try:
        with batch.gpu() as gpu:
            verified = _run_steps(batch, configuration, folder, log, gpu, verified)
    except (StepFailed, UserError) as failure:
        say(f"=== {configuration} failed: {failure}")
        batch.note(
            configuration, "warning" if folder.is_dir() and wanted else "failed", str(failure)
        )
        return False
    batch.note(configuration, "done", **({"verified": verified} if verified else {}))
    return True


def _run_steps(
    batch: Batch,
    configuration: str,
    folder: Path,
    log: Path,
    gpu: dict[str, str],
    verified: str | None,
) -> str | None:
    """Quantize what is not there yet, verify, evaluate. Returns the hash of the checkpoint that was
    verified.

    Args:
        verified: the hash of the one that an earlier run verified.
    Raises:
        StepFailed: a step ended with an error, what is there was made with other options, or a part
            of it is wrecked.
    """
    wanted = CONFIGURATIONS[configuration]
    evaluate = [*batch.device, *batch.evaluation, "--results-dir", str(batch.results)]
    evaluate += [] if batch.overwrite else ["--reuse"]
    if wanted is None:
        step(
            "evaluate",
            [sys.executable, "common/baseline.py", "--model", batch.model, *evaluate],
            log,
            gpu,
        )
        return None
    method, bits = wanted
    found = None if batch.overwrite or (folder / METADATA_FILE).is_file() else _hash(batch, folder)
    if found:
        _check_made(batch, configuration, method, folder, found)
        say(f"{folder} is finished, with the same options; there is nothing to resume")
    else:
        # What is there is not made again: --resume ends at once, or refuses it for its options.
        extra = ["--overwrite"] if batch.overwrite else ["--resume"] if folder.is_dir() else []
        wrecked = step(
            "quantize",
            [
                sys.executable,
                f"quantize_{method}.py",
                "--model",
                batch.model,
                "--bits",
                str(bits),
                "--output",
                str(folder),
                *batch.device,
                *batch.passed_on.get(method, []),
                *extra,
            ],
            log,
            gpu,
        )
        found = _hash(batch, folder)
        made = {"checkpoint": found, "options": batch.quantization_options(method)}
        if found and not (folder / METADATA_FILE).is_file():
            made.update(made_from=made_from(batch.model, method, batch.results), wrecked=wrecked)
        batch.note(configuration, "running", made=made)
    # Noted where there is no metadata for verification to read it from.
    if reason := batch.status[configuration].get("made", {}).get("wrecked"):
        raise StepFailed(reason)
    if found is None or found != verified or batch.overwrite:
        step(
            "verify",
            [sys.executable, "verify_model.py", "--model-path", str(folder), *batch.device],
            log,
            gpu,
        )
    else:
        say(f"{configuration}: verified before")
    step(
        "evaluate",
        [
            sys.executable,
            "common/evaluation.py",
            "--model-path",
            str(folder),
            "--baseline",
            batch.model,
            *evaluate,
        ],
        log,
        gpu,
    )
    return found


def _hash(batch: Batch, folder: Path) -> str | None:
    """The hash of a checkpoint; None where there is none, or a broken one, as a later step says."""
    try:
        return checkpoint_hash(folder, batch.results) if folder.is_dir() else None
    except UserError:
        return None


def _check_made(batch: Batch, configuration: str, method: str, folder: Path, found: str) -> None:
    """Refuse a checkpoint without metadata unless it is known to be made with the same options.

    Args:
        found: the checkpoint's hash.
    Raises:
        StepFailed: naming the way out.
    """
    made, asked = (
        batch.status.get(configuration, {}).get("made", {}),
        batch.quantization_options(method),
    )
    if made.get("checkpoint") != found:
        reason = "it is not known what it was made with"
    elif made.get("options") != asked:
        both = made.get("options", []), asked
        then, now = (" ".join(words) or "the defaults" for words in both)
        reason = f"it was made with {then}, not {now}"
    elif changes := changed_sources(
        made.get("made_from", {}), made_from(batch.model, method, batch.results)
    ):
        reason = f"it was made with {', '.join(changes)}"
    else:
        return
    raise StepFailed(
        f"{folder} has no metadata and {reason}; --overwrite makes it again; to keep it, "
        "move it away first"
    )


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="run_all_quantization.sh",
        allow_abbrev=False,
        description="Baseline and all quantization methods: quantized, verified, evaluated, README "
        "regenerated. "
        "Arguments that are not listed here are passed to the method scripts that take them, such "
        "as "
        "--group-size 64.",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="the demo model with the demo's data: 15 to 30 minutes on 2 "
        "cores (calibration 16 x 512 tokens)",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="hub id, folder, or demo (default: %(default)s)"
    )
    parser.add_argument(
        "--only", metavar="A,B", help=f"configurations to run, of {', '.join(CONFIGURATIONS)}"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="run finished configurations again"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="samples per evaluation task")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), help="default: auto")
    parser.add_argument(
        "--device-memory",
        type=gibibytes,
        metavar="GIB",
        help="GPU memory that a process may take (default: what is free)",
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), help="type to compute in")
    parser.add_argument("--data-root", help="where data sets are looked up before the hub")
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="run N configurations at once, each on a GPU of its own",
    )
    parser.add_argument(
        "--results-dir", type=Path, default=RESULTS_FOLDER, help="default: %(default)s"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run nothing; show what on this machine would stop or slow a run",
    )
    options, passed_on = parser.parse_known_args()
    if options.demo:
        options.model = "demo"
    unknown = set((options.only or "baseline").split(",")) - set(CONFIGURATIONS)
    if unknown:
        parser.error(
            f"unknown configuration {', '.join(sorted(unknown))}; known are "
            f"{', '.join(CONFIGURATIONS)}"
        )
    return options, passed_on


def _methods(configurations: list[str]) -> set[str]:
    return {CONFIGURATIONS[name][0] for name in configurations if CONFIGURATIONS[name]}


def _samples(
    options: argparse.Namespace, configurations: list[str], shared: dict[str, list[str]]
) -> list[tuple]:
    """The rows that a run reads, as `check.lines` takes them.

    Args:
        shared: by method, the options that its script is told.
    """
    found = (
        []
        if source_of(options.model) == "demo" and not options.data_root
        else check.evaluation_samples(options.limit)
    )
    for method in sorted(_methods(configurations) - {"hqq"}):  # which reads no calibration data
        words = ["--model", options.model, *shared.get(method, [])]
        told = method_parser(method).parse_args(words)
        resolve_sizes(told)
        if told.calib_data != "demo":
            found.append((told.calib_data, *text_sample(told.calib_samples, told.seed)))
    return list(dict.fromkeys(found))


def _gpus(count: int) -> queue.Queue[str]:
    """The first `count` GPUs, as CUDA_VISIBLE_DEVICES names them. Raises UserError when there are
    fewer.
    """
    present = torch.cuda.device_count()
    if count > present:
        raise UserError(
            f"--gpus {count}: this machine has {present}; use --gpus {present}"
            if present
            else "no CUDA device was found; leave --gpus out, or check the driver with nvidia-smi"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(present))
    free: queue.Queue[str] = queue.Queue()
    for name in list(names)[:count]:
        free.put(name)
    return free


def main() -> int:
    options, passed_on = parse()
    asked = (
        options.model,
        options.device or "auto",
        Path(options.data_root) if options.data_root else None,
    )
    # Without a script it is shown as "Not started".
    chosen = [
        name
        for name in (options.only.split(",") if options.only else CONFIGURATIONS)
        if CONFIGURATIONS[name] is None or Path(f"quantize_{CONFIGURATIONS[name][0]}.py").is_file()
    ]
    shared = (
        share_out(passed_on, _methods(chosen) or _methods(list(CONFIGURATIONS)))
        if passed_on
        else {}
    )
    if options.check:
        return check.report(*asked, _samples(options, chosen, shared))
    check.show_problems(*asked)
    device = [
        part
        for name in ("device", "device_memory", "dtype", "data_root")
        if getattr(options, name)
        for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    name = filed_as(options.model, options.results_dir)
    status_file = options.results_dir / name / STATUS_FILE
    batch = Batch(
        options.model,
        name,
        options.results_dir,
        options.overwrite,
        device,
        options.dtype or "auto",
        ["--limit", str(options.limit)] if options.limit else [],
        shared,
        read_document(status_file) if status_file.is_file() else {},
    )
    if options.gpus:
        batch.free = _gpus(options.gpus)
    start = time.monotonic()
    failed = []
    if "baseline" in chosen and not run_configuration(batch, "baseline"):
        failed.append("baseline")
        say("The baseline failed, so there is nothing to compare with; stopping.")
    else:
        rest = [name for name in chosen if name != "baseline"]
        with ThreadPoolExecutor(options.gpus or 1) as pool:
            failed += [
                name
                for name, fine in zip(
                    rest, pool.map(partial(run_configuration, batch), rest), strict=True
                )
                if not fine
            ]
    readme = subprocess.run(
        [sys.executable, "analyze_results.py", "--results-dir", str(options.results_dir)]
    )
    say(
        f"{len(chosen)} configurations in {time.monotonic() - start:.0f} s"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed or readme.returncode else 0


if __name__ == "__main__":
    run(main)

"""The batch from its options on: each configuration, then the tables."""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common import cli
from common.base.errors import UserError
from common.base.progress import say
from common.model.source import resolve_folder
from common.results.documents import CONFIGURATIONS, STATUS_FILE, check_folder, read_document
from common.results.naming import filed_as, source_of
from common.results.peers import PEERS
from common.run_all import check
from common.run_all.passed_on import HANDED_ON, method_script, of_evaluation, share_out
from common.run_all.peers import run_peer, set_up_environment
from common.run_all.steps import Batch, run_configuration
from common.run_all.unchanged import Unchanged
from common.tasks.evaluate import on_demo_data
from common.text.windows import text_sample


def _methods(configurations: list[str]) -> set[str]:
    return {made[0] for name in configurations if (made := CONFIGURATIONS.get(name))}


def _samples(
    options: argparse.Namespace,
    configurations: list[str],
    shared: dict[str, list[str]],
    told: argparse.Namespace,
) -> list[tuple]:
    """The rows that a run reads, as `check.lines` takes them.

    Args:
        shared: by method, the options that its script is told.
        told: what the evaluation is told.
    """
    data_root = Path(options.data_root) if options.data_root else None
    found = (
        []
        if on_demo_data(told.data, source_of(options.model), data_root)
        else check.evaluation_samples(options.limit, data_root, told)
    )
    for name in sorted(_methods(configurations)):
        script = method_script(name)
        words = ["--model", options.model, *shared.get(name, [])]
        own = script.argument_parser().parse_args(words)
        cli.resolve_sizes(own)
        if script.method(own).needs_calibration and own.calib_data != "demo":
            found.append((own.calib_data, *text_sample(own.calib_samples, own.seed)))
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


def run_all(
    options: argparse.Namespace, passed_on: list[str], chosen: list[str], unchanged: Unchanged
) -> int:
    """Run a batch, or its check. Returns the exit code.

    Args:
        passed_on: options that are not the batch's own.
        chosen: configurations to run.
    Raises:
        UserError: a mistake in the options, before anything is installed or run.
    """
    asked = (
        options.model,
        options.device or "auto",
        Path(options.data_root) if options.data_root else None,
    )
    evaluation, passed_on, told = of_evaluation(passed_on)
    shared = (
        share_out(passed_on, _methods(chosen) or _methods(list(CONFIGURATIONS)))
        if passed_on
        else {}
    )
    if options.check:
        return check.report(*asked, _samples(options, chosen, shared, told))
    check.show_problems(*asked)
    if options.with_peers:
        set_up_environment()
    device = [
        part
        for name in HANDED_ON
        if getattr(options, name)
        for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    name = filed_as(options.model, options.results_dir)
    check_folder(options.results_dir, name)
    status_file = options.results_dir / name / STATUS_FILE
    batch = Batch(
        options.model,
        name,
        options.results_dir,
        options.overwrite,
        device,
        options.dtype or "auto",
        [*(["--limit", str(options.limit)] if options.limit else []), *evaluation],
        shared,
        read_document(status_file) if status_file.is_file() else {},
    )
    if options.gpus:
        batch.free = _gpus(options.gpus)
    start = time.monotonic()
    failed = []

    def run(name: str) -> bool:
        if unchanged.done(name):
            say(f"=== {name}: nothing has changed since it was done")
            return True
        unchanged.begins(name)
        fine = run_peer(batch, name, passed_on) if name in PEERS else run_configuration(batch, name)
        if fine:
            unchanged.ends(name, batch.name, _local_folder(options.model))
        return fine

    if "baseline" in chosen and not run("baseline"):
        failed.append("baseline")
        say("The baseline failed, so there is nothing to compare with; stopping.")
    else:
        rest = [name for name in chosen if name != "baseline"]
        with ThreadPoolExecutor(options.gpus or 1) as pool:
            failed += [
                name for name, fine in zip(rest, pool.map(run, rest), strict=True) if not fine
            ]
    command = [sys.executable, "analyze_results.py", "--results-dir", str(options.results_dir)]
    command += ["--texts", *(["--data-root", options.data_root] if options.data_root else [])]
    readme = subprocess.run(command)
    if readme.returncode == 0:
        unchanged.tables_are_written()
    say(
        f"{len(chosen)} configurations in {time.monotonic() - start:.0f} s"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed or readme.returncode else 0


def _local_folder(model: str) -> Path | None:
    """The folder of a --model that no hub is asked for."""
    return resolve_folder(model) if model == "demo" or Path(model).is_dir() else None

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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common import cli
from common.base.arguments import gibibytes, positive
from common.base.device import DTYPES
from common.base.errors import UserError
from common.base.progress import say
from common.model.source import DEFAULT_MODEL
from common.results.documents import CONFIGURATIONS, RESULTS_FOLDER, STATUS_FILE, read_document
from common.results.naming import filed_as, source_of
from common.results.peers import PEERS
from common.run_all import check
from common.run_all.passed_on import HANDED_ON, method_script, of_evaluation, share_out
from common.run_all.peers import run_peer, set_up_environment
from common.run_all.steps import Batch, run_configuration
from common.text.windows import text_sample


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="run_all_quantization.sh",
        allow_abbrev=False,
        description="Baseline and all quantization methods: quantized, verified, evaluated, README "
        "regenerated. Arguments that are not listed here are passed to the evaluation, such as "
        "--windows 20 or --tasks arc,perplexity, or to the method scripts that take them, such as "
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
        "--with-peers",
        action="store_true",
        help="other libraries too, in an environment of their own (.peers, made on first use): "
        + ", ".join(PEERS),
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
    known = [*CONFIGURATIONS, *(PEERS if options.with_peers else ())]
    unknown = set((options.only or "baseline").split(",")) - set(known)
    if unknown:
        others = "; with --with-peers also those of other libraries" if unknown <= {*PEERS} else ""
        parser.error(
            f"unknown configuration {', '.join(sorted(unknown))}; known are "
            f"{', '.join(known)}{others}"
        )
    return options, passed_on


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
    demo = source_of(options.model) == "demo" and not options.data_root
    found = (
        []
        if told.data == "demo" or (demo and told.data == "auto")
        else check.evaluation_samples(
            options.limit, Path(options.data_root) if options.data_root else None, told
        )
    )
    for name in sorted(_methods(configurations)):
        script = method_script(name)
        words = ["--model", options.model, *shared.get(name, [])]
        told = script.argument_parser().parse_args(words)
        cli.resolve_sizes(told)
        if script.method(told).needs_calibration and told.calib_data != "demo":
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
    everything = [*CONFIGURATIONS, *(PEERS if options.with_peers else ())]
    chosen = [
        name
        for name in (options.only.split(",") if options.only else everything)
        if not (made := CONFIGURATIONS.get(name)) or Path(f"quantize_{made[0]}.py").is_file()
    ]
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
    if "baseline" in chosen and not run_configuration(batch, "baseline"):
        failed.append("baseline")
        say("The baseline failed, so there is nothing to compare with; stopping.")
    else:
        rest = [name for name in chosen if name != "baseline"]

        def run(name: str) -> bool:
            if name in PEERS:
                return run_peer(batch, name, passed_on)
            return run_configuration(batch, name)

        with ThreadPoolExecutor(options.gpus or 1) as pool:
            failed += [
                name for name, fine in zip(rest, pool.map(run, rest), strict=True) if not fine
            ]
    command = [sys.executable, "analyze_results.py", "--results-dir", str(options.results_dir)]
    command += ["--texts", *(["--data-root", options.data_root] if options.data_root else [])]
    readme = subprocess.run(command)
    say(
        f"{len(chosen)} configurations in {time.monotonic() - start:.0f} s"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed or readme.returncode else 0


if __name__ == "__main__":
    cli.run(main)

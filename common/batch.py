"""The batch behind run_all_quantization.sh: every configuration in processes of its own, one after
the other, or several at once with a GPU each.

A configuration that fails is recorded with its reason and does not stop the rest. What is finished
is kept where it was made with the same options, and results where they are of the same checkpoint,
data, device and code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from common.base.arguments import DEFAULT_MODEL, DTYPE_NAMES, Parser, gibibytes, positive
from common.results.documents import CONFIGURATIONS, RESULTS_FOLDER
from common.results.peers import PEERS
from common.run_all import processes
from common.run_all.unchanged import Unchanged


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
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
        help="the demo model with the demo's data: 25 to 50 minutes on 2 "
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
    parser.add_argument("--dtype", choices=("auto", *DTYPE_NAMES), help="type to compute in")
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


def main() -> int:
    todo = _todo()
    return todo() if todo else 0


def _todo() -> Callable[[], int] | None:
    """What there is to do; None where all is as an earlier batch left it, which is said. To find
    out imports nothing large.
    """
    options, passed_on = parse()
    unchanged, chosen = Unchanged(options, passed_on), _chosen(options)
    if not options.check and unchanged.everything(chosen):
        print(
            f"Nothing is to be done: {', '.join(chosen)} and the tables are as an earlier batch "
            "with these options left them (--overwrite makes them again)"
        )
        return None
    if not options.check:
        processes.begin()  # it imports what scripts need while the batch imports its own

    def run() -> int:
        from common.run_all.whole import run_all

        return run_all(options, passed_on, chosen, unchanged)

    return run


def _chosen(options: argparse.Namespace) -> list[str]:
    """The configurations to run. One without a script is shown as "Not started"."""
    everything = [*CONFIGURATIONS, *(PEERS if options.with_peers else ())]
    return [
        name
        for name in (options.only.split(",") if options.only else everything)
        if not (made := CONFIGURATIONS.get(name)) or Path(f"quantize_{made[0]}.py").is_file()
    ]


if __name__ == "__main__":
    if todo := _todo():
        # Only now, as it takes seconds: torch and transformers.
        from common import cli

        cli.run(todo)

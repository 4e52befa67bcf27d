"""The quantize scripts, run in this process, and processes of their own for what is to be measured
apart.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import runpy
import sys
import time
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.base.errors import UserError
from common.run_all.processes import try_gpu


def quantize(script: str, options: list[str]) -> float:
    """Run a quantize script in this process. Returns its seconds."""
    start = time.perf_counter()
    run_script(f"quantize_{script}.py", options)
    return time.perf_counter() - start


def run_script(script: str, options: list[str], fine: tuple[int, ...] = (0,)) -> None:
    """Run a script of the project in this process. Raises UserError, after what it says itself,
    where it ends with an exit code that is not `fine`.
    """
    sys.argv = [script, *options]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if (end.code or 0) not in fine:
            raise UserError(f"{' '.join(sys.argv)} ended with {end.code}") from None


@cache
def processes() -> multiprocessing.context.BaseContext:
    """Children are forked with everything imported, which takes ten seconds; where some package has
    touched the GPU while it was imported, a forked child cannot use it, and they are spawned
    instead.
    """
    # Whether there is a GPU is looked up in the child as well: it may touch it.
    trial = multiprocessing.get_context("fork").Process(
        target=lambda: try_gpu(torch.cuda.is_available())
    )
    trial.start()
    trial.join()
    return multiprocessing.get_context("spawn" if trial.exitcode else "fork")

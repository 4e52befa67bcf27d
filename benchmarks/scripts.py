"""The quantize scripts, run in this process."""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def quantize(script: str, options: list[str]) -> float:
    """Run a quantize script in this process. Returns its seconds."""
    sys.argv = [f"quantize_{script}.py", *options]
    start = time.perf_counter()
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)} ended with {end.code}") from None
    return time.perf_counter() - start

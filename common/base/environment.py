"""The libraries that every script needs, looked for before anything imports them. Only Python's own
modules are imported here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from common.base import interrupts

ROOT = Path(__file__).resolve().parents[2]
# Of requirements.txt, by the names that they are imported by: what is imported before a script can
# say anything, and what is later.
_FIRST = ("torch", "transformers", "compressed_tensors")
_LATER = (
    *("accelerate", "datasets", "gguf", "lm_eval", "markdown_it", "matplotlib", "numpy", "pandas"),
    *("plotly", "pyarrow", "safetensors", "scipy", "tqdm", "yaml"),
)


def check_script() -> None:
    """End a script of the project with one line where its Python has not the libraries, and let
    Ctrl-C end it without a traceback while they are imported; `common.cli.run` takes over then,
    which not all benchmarks end with. Whoever imports the project for something else is left alone.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    folder = ROOT if sys.argv[:1] == ["-m"] else script and Path(script).resolve().parent
    if folder not in (ROOT, ROOT / "common", ROOT / "benchmarks"):
        return
    for name in _FIRST:
        if not importlib.util.find_spec(name):
            print(f"error: {missing(name)}", file=sys.stderr)
            sys.exit(2)
    if folder != ROOT / "benchmarks":
        interrupts.end_at_once()


def is_required(library: str | None) -> bool:
    """Whether requirements.txt has what is imported by this name, such as lm_eval."""
    return library in (*_FIRST, *_LATER)


def missing(library: str) -> str:
    """That a library of requirements.txt is not installed, and what the user can do."""
    interpreter = Path(".venv/bin/python")
    own = [(ROOT / name).resolve() for name in (".venv", ".peers")]
    if Path(sys.prefix).resolve() in own:
        way_out = f"{sys.executable} -m pip install -r requirements.txt"
    elif (ROOT / interpreter).is_file():
        way_out = f"use {interpreter}, or source .venv/bin/activate first"
    else:
        way_out = f"bash run_all_quantization.sh --check makes {interpreter}, which has it"
    return f"{library} is not installed for {sys.executable}: {way_out}"

"""The libraries that every script needs, looked for before anything imports them. Only Python's own
modules are imported here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from common.base import interrupts

ROOT = Path(__file__).resolve().parents[2]
# Of requirements.txt, what is imported before a script can say anything.
_LIBRARIES = ("torch", "transformers", "compressed_tensors")


def check_script() -> None:
    """End a script of the project with one line where its Python has not the libraries, and let
    Ctrl-C end it without a traceback while they are imported; `common.cli.run` takes over then.
    Whoever imports the project for something else is left alone.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if sys.argv[0] != "-m" and (script is None or ROOT not in Path(script).resolve().parents):
        return
    for name in _LIBRARIES:
        if not importlib.util.find_spec(name):
            print(f"error: {missing(name)}", file=sys.stderr)
            sys.exit(2)
    interrupts.end_at_once()


def missing(library: str) -> str:
    """That a library is not installed, and what the user can do."""
    interpreter = Path(".venv/bin/python")
    if not (ROOT / interpreter).is_file():
        way_out = f"bash run_all_quantization.sh --check makes {interpreter}, which has it"
    elif Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        way_out = f"{interpreter} -m pip install -r requirements.txt"
    else:
        way_out = f"use {interpreter}, or source .venv/bin/activate first"
    return f"{library} is not installed for {sys.executable}: {way_out}"

"""Other libraries: the versions that were tried, and the environment that holds them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from common.base.machine import command

# What common/setup_environment.sh makes.
INTERPRETER = Path(".peers/bin/python")
_PINS = Path(__file__).resolve().parents[2] / "benchmarks"


def requirement(package: str) -> str:
    """A package as it is to be installed: with the version of benchmarks/requirements*.txt, its
    name alone where it is not there.
    """
    for file in sorted(_PINS.glob("requirements*.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if re.match(rf"{re.escape(package)}\s*[=<>~!]", line, re.IGNORECASE):
                return line.split("#")[0].replace(" ", "")
    return package


def how_to_install(packages: list[str]) -> str:
    """The command that installs packages here, and the environment that has them if one does."""
    wanted = [requirement(package) for package in packages]
    quoted = " ".join(f"'{one}'" if one not in packages else one for one in wanted)
    here = f"{command(Path(sys.executable).name)} -m pip install {quoted}"
    running = Path(sys.prefix).name == INTERPRETER.parts[0]
    elsewhere = not running and not {*wanted} & {*packages}
    more = (
        f", or run this with {INTERPRETER}, which bash run_all_quantization.sh --with-peers sets up"
    )
    return here + (more if elsewhere else "")

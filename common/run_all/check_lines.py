"""What `check` makes of its facts: a line for each thing that was looked at, with what mends it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from common.base import machine
from common.base.machine import Driver, Gpu, Obstacle

PASS, WARN, FAIL, SKIP = "PASS", "WARN", "FAIL", "SKIP"
GB, GIB = 1e9, 2**30
DEMO_BYTES = 0.27 * GB
# README's Size table: the comparison's nine checkpoints together, in 16-bit weights.
_CHECKPOINTS = 4.8
# Device memory beside the 16-bit weights: CUDA's own, and working memory of the evaluation.
_WORKING_GIB = 1.5
_WIDTH = 80


@dataclass(frozen=True)
class Line:
    """One thing that was looked at: what was found, and what mends it.

    Args:
        state: PASS, WARN (slower, or may run out), FAIL (stops the batch) or SKIP (not needed).
    """

    name: str
    state: str
    found: str
    mend: str = ""

    def text(self) -> str:
        """As it is shown: at most 80 columns, a mend on lines of its own."""
        start = f"{self.state}  {self.name:<11} "
        shape: dict[str, Any] = {
            "width": _WIDTH,
            "break_long_words": False,
            "break_on_hyphens": False,
        }
        text = textwrap.fill(
            self.found, initial_indent=start, subsequent_indent=" " * len(start), **shape
        )
        if self.mend:
            text += "\n" + textwrap.fill(
                self.mend, initial_indent=" " * 6 + "-> ", subsequent_indent=" " * 9, **shape
            )
        return text


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model.

    Args:
        where: where its files are.
        weights: their bytes, None if not known.
        missing: how many of these are still to be fetched.
        problem: why it cannot be had.
    """

    where: str
    weights: float | None = None
    missing: float = 0
    problem: str = ""


def python_line(version: tuple, executable: str) -> Line:
    """version: as sys.version_info."""
    release = "" if version[3] == "final" else f" {version[3]}"
    found = f"{'.'.join(map(str, version[:3]))}{release}, {executable}"
    if version < (3, 11, 0, "final"):
        return Line(
            "Python", FAIL, found, "delete .venv and run this again: it names what to install"
        )
    return Line("Python", PASS, found)


def packages_line(requirements: str, installed: Callable[[str], str | None]) -> Line:
    """requirements: the file's text; installed: a package's version, None if it is not there."""
    wanted = [
        Requirement(line)
        for line in requirements.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    wrong = [
        f"{one.name} {installed(one.name) or 'is missing'} (wanted {one.specifier})"
        for one in wanted
        if not one.specifier.contains(installed(one.name) or "0", prereleases=True)
    ]
    if wrong:
        return Line(
            "Packages",
            WARN,
            ", ".join(wrong),
            f"{machine.command('python')} -m pip install -r requirements.txt",
        )
    shown = ("torch", "transformers", "compressed-tensors")
    return Line("Packages", PASS, ", ".join(f"{name} {installed(name)}" for name in shown))


def disk_line(free: float, model: ModelFacts) -> Line:
    """free: bytes on the disk that the batch writes to."""
    found = f"{free / GB:.0f} GB free"
    if model.weights is None:
        return Line(
            "Disk",
            PASS if free > 20 * GB else WARN,
            found,
            "" if free > 20 * GB else "free some space",
        )
    needed = model.missing + _CHECKPOINTS * model.weights
    found += f"; the batch takes about {needed / GB:.1f} GB" + (
        f", {model.missing / GB:.1f} of them to fetch the model" if model.missing else ""
    )
    if free < needed:
        return Line(
            "Disk",
            FAIL if free < model.missing else WARN,
            found,
            "free some space, or choose fewer with --only",
        )
    return Line("Disk", PASS, found)


def memory_line(total: float, available: float, model: ModelFacts, device: str, wsl: bool) -> Line:
    """total, available: bytes of the machine's memory, in WSL of the virtual machine's."""
    # Measured: 3 GiB for the demo and 6 for the 1B shape on a CPU, which evaluates in float32.
    # With a GPU layers are read one by one (docs/scaling.md).
    needed = 4.0 if device == "cuda" else max(3.0, 1 + 2 * (model.weights or 0) / GIB)
    found = (
        f"{available / GIB:.1f} of {total / GIB:.1f} GiB free{', WSL has no more' if wsl else ''}"
    )
    found += "" if model.weights is None else f"; about {needed:.0f} are needed"
    if available / GIB >= needed:
        return Line("Memory", PASS, found)
    size = max(8, round(needed + 2))
    if wsl and total / GIB < size:
        return Line(
            "Memory",
            WARN,
            found,
            f"set memory={size}GB under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown",
        )
    return Line("Memory", WARN, found, "close other programs, or take a smaller --model")


def device_lines(
    wanted: str,
    usable: bool,
    obstacle: Obstacle | None,
    driver: Driver,
    card: Gpu | None,
    model: ModelFacts,
    architectures: list[str],
) -> list[Line]:
    """Driver, GPU and its memory.

    Args:
        wanted: the --device option.
        usable: whether torch sees a GPU.
        obstacle: why it does not, where one is there.
        driver, card: what nvidia-smi says; card is None where it says nothing.
        architectures: as torch.cuda.get_arch_list.
    """
    if wanted == "cpu":
        return [Line("Card", SKIP, "not used: --device cpu")]
    if obstacle is not None:
        blocks = obstacle.stops or wanted == "cuda"
        return [
            Line(
                "Card",
                FAIL if blocks else WARN,
                obstacle.problem,
                f"{obstacle.mend}, or use --device cpu, which is far slower"
                if blocks
                else obstacle.mend,
            )
        ]
    if not usable:
        return [
            Line("Card", FAIL, "no CUDA device was found", "use --device cpu")
            if wanted == "cuda"
            else Line("Card", SKIP, "none; everything runs on the CPU")
        ]
    built = f"torch is built for CUDA {torch.version.cuda}"
    lines = [
        Line(
            "Driver",
            PASS,
            f"{driver.version}, runs CUDA {driver.cuda}; {built}"
            if driver.version
            else f"works; {built}",
        )
    ]
    if card is None:
        return [*lines, Line("Card", PASS, "works; nvidia-smi does not describe it")]
    major, _, minor = card.capability.partition(".")
    unsuitable = (
        machine.too_old_a_gpu(card.name, (int(major), int(minor)), architectures)
        if minor.isdigit()
        else None
    )
    lines.append(
        Line("Card", FAIL, unsuitable.problem, f"{unsuitable.mend}, or --device cpu")
        if unsuitable
        else Line("Card", PASS, f"{card.name}, compute capability {card.capability}")
    )
    free, total = card.free / 1024, card.total / 1024
    found = f"{free:.1f} of {total:.1f} GiB free: desktop and programs take {total - free:.1f}"
    if model.weights is None:
        return [*lines, Line("Card memory", PASS, found)]
    needed = model.weights / GIB + _WORKING_GIB
    found += f"; the 16-bit model takes about {needed:.1f}"
    lines.append(
        Line("Card memory", PASS, found)
        if free >= needed
        else Line(
            "Card memory",
            WARN,
            found,
            "close what else uses the card (browser, games), or take a smaller --model",
        )
    )
    return lines


def compiler_line(missing: str | None) -> Line:
    """missing: what Triton needs and does not find, with the command that installs it."""
    if missing:
        what, mend = missing.split(": ", 1)
        return Line(
            "Compiler",
            WARN,
            f"{what}; without it Triton's kernels are not used, which is slower",
            mend,
        )
    return Line("Compiler", PASS, "a C compiler and Python.h, for Triton")


def triton_line(problem: str | None) -> Line:
    """problem: why Triton does not compile."""
    if problem:
        return Line(
            "Triton",
            WARN,
            f"{problem}; plain torch is used, which is slower",
            "delete ~/.triton and try again; if that does not help, report the reason",
        )
    return Line("Triton", PASS, "compiles and runs a kernel")


def model_line(model: ModelFacts) -> Line:
    if model.problem:
        return Line("Model", FAIL, model.problem)
    return Line(
        "Model",
        PASS,
        model.where + ("" if model.weights is None else f", {model.weights / GB:.2f} GB"),
    )


def data_line(
    demo: bool, data_root: Path | None, places: dict[str, str], problems: list[str]
) -> Line:
    """places: where rows are, by the data set's address; problems: of those that are nowhere."""
    if data_root is not None and not data_root.is_dir():
        return Line(
            "Data",
            FAIL,
            f"--data-root {data_root} is not a folder",
            "give the folder that holds <owner>/<name>",
        )
    if problems:
        found, mends = zip(*(problem.partition("; ")[::2] for problem in problems), strict=True)
        return Line("Data", FAIL, "; ".join(found), mends[0])
    if not places:
        return Line("Data", PASS, "the demo's own" if demo else "as it is needed")
    names = {
        place: ", ".join(address.split(":")[0] for address in places if places[address] == place)
        for place in dict.fromkeys(places.values())
    }
    return Line("Data", PASS, "; ".join(f"{place} {found}" for place, found in names.items()))

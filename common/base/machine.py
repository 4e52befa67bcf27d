"""Whether CUDA can be used on this machine, and what it takes where a GPU is there and cannot be.

`look` gathers what is known, the other functions judge it. nvidia-smi takes up to a second: `look`
is called only where torch sees no GPU, and asks it only where something of the driver is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import torch

# The oldest driver that runs a CUDA version's programs: on Linux, and on Windows for WSL.
DRIVERS = {12: (525, 528), 13: (580, 580)}
_WSL_SMI = "usr/lib/wsl/lib/nvidia-smi"
_NVIDIA, _DISPLAY = "0x10de", "0x03"


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Args:
        version: such as "535.183.01".
        cuda: the newest CUDA that it runs, such as "12.2".
        fault: why nvidia-smi failed, if it did.
    """

    version: str | None = None
    cuda: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Machine:
    """What decides whether CUDA can be used, where torch sees no GPU.

    Args:
        torch_cuda: the CUDA that torch was built for; None for a build without it.
        visible: CUDA_VISIBLE_DEVICES, None where it is not set.
        wsl: whether this is Linux under Windows.
        card: whether a GPU of NVIDIA's is there, and something of its driver.
        bare: whether a GPU is in the machine and nothing of its driver is.
        graphics: whether WSL passes a graphics card on, of whatever maker.
        driver: what is known of the driver.
        fault: what torch says when it is made to start CUDA.
    """

    torch_cuda: str | None
    visible: str | None = None
    wsl: bool = False
    card: bool = False
    bare: bool = False
    graphics: bool = False
    driver: Driver = Driver()
    fault: str | None = None

    @property
    def hidden(self) -> bool:
        """Whether the environment hides all GPUs."""
        return self.visible is not None and self.visible.split(",")[0].strip() in (
            "",
            "-1",
            "NoDevFiles",
        )


@dataclass(frozen=True)
class Obstacle:
    """Why the GPU cannot be used and what mends that.

    Args:
        stops: False where the CPU is what the user must have meant.
    """

    problem: str
    mend: str
    stops: bool = True


def is_wsl(root: Path = Path("/")) -> bool:
    """Whether this is WSL."""
    return "microsoft" in _read(root / "proc/version").lower()


def find_smi(root: Path = Path("/")) -> str | None:
    """The nvidia-smi command; WSL's is not always on the PATH."""
    return shutil.which("nvidia-smi") or shutil.which(str(root / _WSL_SMI))


def look(root: Path = Path("/")) -> Machine:
    """What is known of this machine, where torch sees no GPU.

    Args:
        root: the folder that holds dev, proc and sys.
    """
    nodes = any((root / "dev").glob("nvidia[0-9]*"))
    smi, wsl = find_smi(root), is_wsl(root)
    known = Machine(
        torch.version.cuda,
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        wsl,
        graphics=(root / "dev/dxg").exists(),
    )
    if known.hidden or (not nodes and smi is None):
        card = nodes or smi is not None
        return replace(known, card=card, bare=not card and _on_the_bus(root))
    # nvidia-smi alone proves nothing: it is also installed where there is no GPU.
    driver = ask_driver(smi, root)
    card = nodes or driver.fault is None or (known.graphics if wsl else _on_the_bus(root))
    return replace(known, card=card, driver=driver, fault=_torch_fault())


def ask_driver(smi: str | None, root: Path = Path("/")) -> Driver:
    """The driver as nvidia-smi describes it, or where there is no such command the kernel."""
    if smi is None:
        found = re.search(
            r"Module\s.*?(\d+\.\d+(\.\d+)?)\s", _read(root / "proc/driver/nvidia/version")
        )
        return Driver(found.group(1) if found else None)
    code, output = _call([smi])
    if code:
        return Driver(
            fault=next(
                (line.strip() for line in output.splitlines() if line.strip()), f"exit code {code}"
            )[:120]
        )
    version, cuda = (
        re.search(rf"{name} Version:\s*([\d.]+)", output) for name in ("Driver", r"CUDA(?: \w+)?")
    )
    return Driver(*(found.group(1) if found else None for found in (version, cuda)))


def obstacle(machine: Machine) -> Obstacle | None:
    """Why torch sees no GPU on this machine; None where there is none to see."""
    if machine.card and machine.hidden:
        return Obstacle("CUDA_VISIBLE_DEVICES hides the card", "unset it", stops=False)
    if not machine.card:
        if machine.bare:
            # A container on a machine with GPUs that were not passed to it looks the same.
            return Obstacle(
                "an NVIDIA card is in this machine, but not its driver",
                install_driver(machine),
                stops=False,
            )
        if machine.graphics:
            return Obstacle(
                "WSL passes a graphics card on, but no NVIDIA driver",
                f"if it is NVIDIA's, {install_driver(machine)}",
                stops=False,
            )
        return None
    if machine.torch_cuda is None:
        # --isolated: such a build comes from another index, which pip's configuration names.
        pip = f"{command('python')} -m pip install --isolated --force-reinstall"
        return Obstacle(
            f"a card is there, but torch {torch.__version__} is a build without CUDA",
            f"install the one with it: {pip} torch=={torch.__version__.split('+')[0]}",
        )
    driver, where = (
        machine.driver,
        "run wsl --shutdown on Windows" if machine.wsl else "restart the machine",
    )
    if driver.fault:
        return Obstacle(
            f"nvidia-smi fails ({driver.fault})",
            f"{where}; if that does not help, {install_driver(machine)}",
        )
    if too_old(driver, machine):
        runs = f" runs CUDA {driver.cuda}," if driver.cuda else " is too old:"
        return Obstacle(
            f"the card cannot be used: NVIDIA driver {driver.version}{runs} this torch needs CUDA "
            f"{machine.torch_cuda}",
            install_driver(machine),
        )
    if machine.visible and "No CUDA GPUs" in (machine.fault or ""):
        return Obstacle(
            f"CUDA_VISIBLE_DEVICES={machine.visible} names no card of this machine", "unset it"
        )
    version = f" (NVIDIA driver {driver.version})" if driver.version else ""
    return Obstacle(
        f"a card is there{version}, but CUDA does not start ({machine.fault})",
        f"{where}; if that does not help, {install_driver(machine)}",
    )


def too_old(driver: Driver, machine: Machine) -> bool:
    """Whether the driver cannot run what torch was built for. Minor versions do not matter."""
    needed = _major(machine.torch_cuda or "0")
    if driver.cuda is not None:
        return _major(driver.cuda) < needed
    return (
        driver.version is not None
        and needed in DRIVERS
        and _major(driver.version) < DRIVERS[needed][machine.wsl]
    )


def install_driver(machine: Machine) -> str:
    """What to install so that this torch can use the GPU."""
    needed = DRIVERS.get(_major(machine.torch_cuda or "0"))
    version = (
        f"NVIDIA driver {needed[machine.wsl]} or newer" if needed else "the newest NVIDIA driver"
    )
    return f"install {version}" + (" on Windows, not inside WSL" if machine.wsl else "")


def has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a torch build can run on a GPU.

    Args:
        capability: the GPU's compute capability.
        architectures: what the build holds code for, as torch.cuda.get_arch_list gives it: sm_86
            is for 8.6 to 8.9, compute_80 for all from 8.0 on.
    """
    for kind, number in re.findall(r"\b(\w+?)_(\d+)[a-z]?\b", " ".join(architectures)):
        major, minor = divmod(int(number), 10)
        if (
            (capability >= (major, minor))
            if kind == "compute"
            else (capability[0] == major and capability[1] >= minor)
        ):
            return True
    return not architectures


def too_old_a_gpu(
    name: str, capability: tuple[int, int], architectures: list[str]
) -> Obstacle | None:
    """What is wrong with a GPU that this torch has no code for; arguments as `has_code_for`."""
    if has_code_for(capability, architectures):
        return None
    numbers = sorted(int(re.sub(r"\D", "", text)) for text in architectures)
    known = ", ".join(f"{number // 10}.{number % 10}" for number in numbers)
    return Obstacle(
        f"{name} has compute capability {capability[0]}.{capability[1]}, and this torch "
        f"has code for {known} only",
        "use a card of those",
    )


def missing_for_triton(
    compiler: str | None, header: bool, version: tuple[int, int] = sys.version_info[:2]
) -> str | None:
    """What Triton lacks to build a kernel's launcher, and what installs it; None if nothing.

    Args:
        compiler: the C compiler that Triton would call, None if there is none.
        header: whether Python.h is there.
    """
    python = f"python{version[0]}.{version[1]}-dev"
    lacking = {"a C compiler": "gcc"} if compiler is None else {}
    if not header:
        lacking["Python.h"] = python
    return (
        f"{' and '.join(lacking)} missing: sudo apt install {' '.join(lacking.values())}"
        if lacking
        else None
    )


def look_for_compiler() -> tuple[str | None, bool]:
    """The C compiler that Triton would call, and whether Python.h is where it would look for it."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return compiler, (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").is_file()


def command(name: str) -> str:
    """How a program of this Python's environment is called from here, such as .venv/bin/hf."""
    path = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not path.exists() or (found and Path(found) == path):
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi describes it: compute capability as "8.6", memory in MiB."""

    name: str
    capability: str
    total: int
    free: int


def ask_gpu(smi: str, which: str) -> Gpu | None:
    """The GPU with this number or UUID; None where nvidia-smi does not say."""
    code, output = _call(
        [
            smi,
            "-i",
            which,
            "--format=csv,noheader,nounits",
            "--query-gpu=name,compute_cap,memory.total,memory.free",
        ]
    )
    parts = [part.strip() for part in output.strip().split(",")]
    if code or len(parts) != 4 or not (parts[2].isdigit() and parts[3].isdigit()):
        return None
    return Gpu(parts[0], parts[1], int(parts[2]), int(parts[3]))


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _call(words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command; 1 and the reason where it does not answer."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"{type(error).__name__}"
    return result.returncode, result.stdout + result.stderr


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _on_the_bus(root: Path) -> bool:
    """Whether a graphics card of NVIDIA's is in the machine, with or without a driver."""
    return any(
        _read(device / "vendor").strip() == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )


def _torch_fault() -> str | None:
    if torch.version.cuda is None:
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split("\n")[0][:150]
    return None

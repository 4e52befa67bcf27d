"""Machines that this one is not, played by facts, fake commands and folders.

Old drivers, hidden GPUs, builds without CUDA, WSL.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.base import device, machine
from common.base.errors import UserError
from common.base.machine import Driver, Machine

HEADER = """Tue Nov 24 10:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.120                Driver Version: {driver}         CUDA Version: {cuda}     |
|-----------------------------------------+------------------------+----------------------+
"""
WORKING = Machine("13.0", card=True, driver=Driver("580.65.06", "13.0"), fault=None)


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A folder that stands for / and an empty PATH, which `played(...)` fills.

    torch is a CUDA 13 build that sees no GPU.
    """
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("CUDA unknown error\nmore"))
    )

    def fill(*paths: str, smi: str | None = None, code: int = 0, **contents: str) -> Path:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        for path, text in contents.items():
            file = tmp_path / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if smi is not None:
            file = tmp_path / "path" / "nvidia-smi"
            file.write_text(
                f"#!/bin/sh\necho called >> {tmp_path}/calls\n"
                f"/bin/cat <<'END'\n{smi}\nEND\nexit {code}\n"
            )
            file.chmod(0o755)
        return tmp_path

    look = machine.look
    monkeypatch.setattr(machine, "look", lambda: look(tmp_path))
    return fill


def refused(choice: str) -> str:
    with pytest.raises(UserError) as error:
        device.resolve_device(choice)
    return str(error.value)


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_an_old_driver_is_not_taken_for_no_card(played, choice):
    played("dev/nvidia0", smi=HEADER.format(driver="535.183.01", cuda="12.2"))
    message = refused(choice)
    for words in (
        "NVIDIA driver 535.183.01 runs CUDA 12.2",
        "needs CUDA 13.0",
        "install NVIDIA driver 580 or newer",
        "--device cpu",
    ):
        assert words in message
    assert "Windows" not in message
    assert device.resolve_device("cpu") == torch.device("cpu")


def test_an_old_driver_under_wsl_is_mended_on_windows(played):
    played(
        "dev/dxg",
        smi=HEADER.format(driver="552.22", cuda="12.4"),
        proc__version="Linux 5.15-Microsoft-standard-WSL2",
    )
    message = refused("auto")
    assert (
        "552.22 runs CUDA 12.4" in message
        and "driver 580 or newer on Windows, not inside WSL" in message
    )


def test_the_kernel_is_asked_where_there_is_no_nvidia_smi(played):
    played(
        "dev/nvidia3",
        proc__driver__nvidia__version="NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "
        "535.104.05  Release Build\nGCC version: 12.3.0\n",
    )
    assert "NVIDIA driver 535.104.05 is too old: this torch needs CUDA 13.0" in refused("auto")


def test_a_driver_that_fails_says_what_it_said(played):
    played("dev/nvidia0", smi="Failed to initialize NVML: Driver/library version mismatch", code=18)
    said = "nvidia-smi fails (Failed to initialize NVML: Driver/library version mismatch)"
    assert f"{said}; restart the machine" in refused("auto")


def test_cuda_that_does_not_start_says_why(played):
    played("dev/nvidia0", smi=HEADER.format(driver="580.65.06", cuda="13.0"))
    assert "CUDA does not start (CUDA unknown error)" in refused("auto")


def test_cards_hidden_on_purpose_mean_the_cpu(played, monkeypatch, capsys):
    """And nvidia-smi, which takes a second, is not asked."""
    root = played("dev/nvidia0", smi=HEADER.format(driver="580.65.06", cuda="13.0"))
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert device.resolve_device("auto") == torch.device("cpu")
        assert (
            "CUDA_VISIBLE_DEVICES hides the card; going on on the CPU (unset it)"
            in capsys.readouterr().out
        )
        assert "no CUDA device was found: CUDA_VISIBLE_DEVICES hides the card; unset it" in refused(
            "cuda"
        )
    assert not (root / "calls").exists()


def test_a_card_that_is_named_and_not_there(played, monkeypatch):
    played("dev/nvidia0", smi=HEADER.format(driver="580.65.06", cuda="13.0"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(
        torch.cuda,
        "init",
        lambda: (_ for _ in ()).throw(RuntimeError("No CUDA GPUs are available")),
    )
    assert "CUDA_VISIBLE_DEVICES=7 names no card of this machine; unset it" in refused("auto")


def test_torch_without_cuda_beside_a_card(played, monkeypatch):
    played("dev/nvidia0", smi=HEADER.format(driver="580.65.06", cuda="13.0"))
    monkeypatch.setattr(torch.version, "cuda", None)
    message = refused("auto")
    release = torch.__version__.split("+")[0]
    assert (
        "is a build without CUDA" in message
        and f"-m pip install --isolated --force-reinstall torch=={release}" in message
    )


def test_machines_without_a_card_are_left_alone(played, capsys):
    """An empty one; the driver without a GPU; WSL on another maker's graphics, with /dev/dxg."""
    played()
    assert device.resolve_device("auto") == torch.device("cpu")
    played(
        smi="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9
    )
    assert device.resolve_device("auto") == torch.device("cpu")
    assert capsys.readouterr().out == ""
    (Path(played()) / "path/nvidia-smi").unlink()
    played("dev/dxg", proc__version="Linux 5.15-microsoft-standard-WSL2")
    assert device.resolve_device("auto") == torch.device("cpu")
    assert (
        "no NVIDIA driver; going on on the CPU (if it is NVIDIA's, install NVIDIA driver 580"
        in capsys.readouterr().out
    )
    assert "on Windows, not inside WSL" in refused("cuda")


def test_a_card_without_any_driver_is_said(played, capsys):
    played(
        sys__bus__pci__devices__1__vendor="0x10de\n",
        sys__bus__pci__devices__1__class="0x030000\n",
    )
    assert device.resolve_device("auto") == torch.device("cpu")
    line = " ".join(capsys.readouterr().out.split())
    assert "an NVIDIA card is in this machine, but not its driver" in line
    assert "install NVIDIA driver 580 or newer" in line
    assert "an NVIDIA card is in this machine" in refused("cuda")


def test_a_driver_without_a_version_is_not_called_none(played):
    played("dev/nvidia0")
    assert "a card is there, but CUDA does not start" in refused("auto")


def test_cuda_without_a_card_or_a_build_for_it(played, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; use --device cpu" in refused("cuda")


def test_a_card_on_the_bus_whose_driver_is_not_loaded(played):
    played(
        smi="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        code=9,
        sys__bus__pci__devices__1__vendor="0x10de\n",
        sys__bus__pci__devices__1__class="0x030000\n",
    )
    assert "nvidia-smi fails (NVIDIA-SMI has failed" in refused("auto")


def test_a_card_that_torch_has_no_code_for(monkeypatch):
    architectures = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120"]
    able = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1), (13, 0)}
    for capability in able | {(5, 2), (6, 1), (7, 0), (10, 0)}:
        assert machine.has_code_for(capability, architectures) == (capability in able), capability
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    for choice in ("auto", "cuda"):
        assert (
            "GTX 1080 has compute capability 6.1, and this torch has code for 7.5, 8.0"
            in refused(choice)
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(device.device_memory, "limit", lambda *_: None)
    assert device.resolve_device("auto") == torch.device("cuda", 0)


def test_minor_versions_of_cuda_do_not_matter():
    assert not machine.too_old(Driver("580.65.06", "13.0"), replace(WORKING, torch_cuda="13.2"))
    assert machine.too_old(Driver("575.57.08", "12.9"), WORKING)
    assert machine.too_old(Driver("575.57.08"), WORKING) and not machine.too_old(
        Driver("580.65.06"), WORKING
    )
    assert "newest NVIDIA driver" in machine.install_driver(replace(WORKING, torch_cuda="15.0"))


def test_what_triton_lacks_is_named_with_its_packages():
    assert machine.missing_for_triton("/usr/bin/gcc", True) is None
    assert (
        machine.missing_for_triton("/usr/bin/gcc", False, (3, 12))
        == "Python.h missing: sudo apt install python3.12-dev"
    )
    assert machine.missing_for_triton(None, False, (3, 11)).endswith(
        "sudo apt install gcc python3.11-dev"
    )
    assert machine.missing_for_triton(None, True) == "a C compiler missing: sudo apt install gcc"


def test_triton_that_cannot_build_names_both_packages(monkeypatch, capsys):
    from common.kernels import dispatch

    def no_header(*_, **__):
        raise RuntimeError("fatal error: Python.h: No such file or directory")

    monkeypatch.setattr(dispatch.torch, "zeros", no_header)
    monkeypatch.setattr(dispatch, "look_for_compiler", lambda: (None, False))
    dispatch.triton_works.cache_clear()
    try:
        assert not dispatch.triton_works()
    finally:
        dispatch.triton_works.cache_clear()
    printed = capsys.readouterr().out
    assert (
        "sudo apt install gcc python3." in printed
        and "-dev" in printed
        and "plain torch is used" in printed
    )


def test_the_hub_login_is_named_as_it_can_be_called(tmp_path, monkeypatch):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/hf").touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert machine.command("hf") == ".venv/bin/hf"
    monkeypatch.setenv("PATH", f"{tmp_path}/.venv/bin:/usr/bin:/bin")  # activated
    assert machine.command("hf") == "hf"


def test_the_compiler_is_looked_for_where_triton_does(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    assert machine.look_for_compiler() == (None, False)
    for name in ("gcc", "Python.h"):
        (tmp_path / name).touch(mode=0o755)
    assert machine.look_for_compiler() == (str(tmp_path / "gcc"), True)
    monkeypatch.setenv("CC", "/opt/cc")
    assert machine.look_for_compiler() == ("/opt/cc", True)

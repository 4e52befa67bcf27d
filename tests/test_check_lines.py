"""The lines of run_all_quantization.sh --check, each where all is well and where not."""

from dataclasses import replace

from common.base import machine
from common.base.machine import Driver, Gpu, Obstacle
from common.run_all import check_lines
from common.run_all.check_lines import FAIL, GB, GIB, PASS, SKIP, WARN, Line, ModelFacts

LLAMA = ModelFacts("meta-llama/Llama-3.2-1B-Instruct", 2.47 * GB, 2.47 * GB)
CARD = Gpu("NVIDIA GeForce RTX 3060", "8.6", 12288, 11000)
DRIVER = Driver("580.65.06", "13.0")
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "compute_120"]


def device(wanted="auto", usable=True, obstacle=None, driver=DRIVER, card=CARD, model=LLAMA):
    return {
        line.name: line
        for line in check_lines.device_lines(
            wanted, usable, obstacle, driver, card, model, ARCHITECTURES
        )
    }


def test_python():
    assert check_lines.python_line((3, 12, 3, "final", 0), "python").state == PASS
    line = check_lines.python_line((3, 11, 0, "candidate", 1), "python")
    assert line.state == FAIL and "3.11.0 candidate" in line.found and ".venv" in line.mend


def test_packages():
    versions = {
        "torch": "2.13.0+cu130",
        "transformers": "5.17.0",
        "compressed-tensors": "0.19.0",
        "scipy": "1.17",
    }
    wanted = (
        "# a comment\ntorch==2.13.0\ntransformers==5.17.0\n"
        "compressed-tensors==0.19.0\nscipy>=1.16\n"
    )
    assert (
        check_lines.packages_line(wanted, versions.get).found
        == "torch 2.13.0+cu130, transformers 5.17.0, compressed-tensors 0.19.0"
    )
    line = check_lines.packages_line(
        wanted + "tqdm>=4\n", {**versions, "transformers": "4.57.1"}.get
    )
    assert (
        line.state == WARN
        and "transformers 4.57.1 (wanted ==5.17.0)" in line.found
        and "tqdm is missing" in line.found
    )
    assert line.mend.endswith("-m pip install -r requirements.txt")


def test_disk():
    """The comparison's nine folders and the download: 1B takes 11.9 + 2.5 GB."""
    assert check_lines.disk_line(15 * GB, LLAMA).state == PASS
    line = check_lines.disk_line(10 * GB, LLAMA)
    assert (
        line.state == WARN
        and "takes about 14.3 GB, 2.5 of them" in line.found
        and "--only" in line.mend
    )
    assert check_lines.disk_line(2 * GB, LLAMA).state == FAIL
    assert check_lines.disk_line(12 * GB, replace(LLAMA, missing=0)).state == PASS
    assert check_lines.disk_line(10 * GB, ModelFacts("", None)).state == WARN


def test_memory():
    assert check_lines.memory_line(16 * GIB, 12 * GIB, LLAMA, "cpu", wsl=False).state == PASS
    line = check_lines.memory_line(8 * GIB, 5 * GIB, LLAMA, "cpu", wsl=True)
    assert line.state == WARN and "WSL has no more" in line.found
    assert (
        "memory=8GB under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown"
        in check_lines.memory_line(4 * GIB, 3.5 * GIB, LLAMA, "cpu", wsl=True).mend
    )
    assert check_lines.memory_line(8 * GIB, 5 * GIB, LLAMA, "cuda", wsl=True).state == PASS
    assert (
        "close other programs"
        in check_lines.memory_line(64 * GIB, 2 * GIB, LLAMA, "cuda", wsl=False).mend
    )


def test_a_card_that_works():
    lines = device()
    assert [line.state for line in lines.values()] == [PASS] * 3
    assert lines["Card"].found == "NVIDIA GeForce RTX 3060, compute capability 8.6"
    assert "580.65.06, runs CUDA 13.0" in lines["Driver"].found
    assert "10.7 of 12.0 GiB free: desktop and programs take 1.3" in lines["Card memory"].found
    assert device(card=None, driver=Driver())["Card"].state == PASS


def test_a_card_that_does_not():
    taken = device(card=Gpu("RTX 3050", "8.6", 4096, 2048))["Card memory"]
    assert taken.state == WARN and "close what else uses the card" in taken.mend
    old = device(card=Gpu("GTX 1080", "6.1", 8192, 8000))["Card"]
    assert (
        old.state == FAIL and "compute capability 6.1" in old.found and "--device cpu" in old.mend
    )
    driver = Obstacle("the driver is too old", "install driver 580")
    assert device(usable=False, obstacle=driver)["Card"] == Line(
        "Card",
        FAIL,
        "the driver is too old",
        "install driver 580, or use --device cpu, which is far slower",
    )
    hidden = replace(driver, stops=False)
    assert device(usable=False, obstacle=hidden)["Card"].state == WARN
    assert device("cuda", usable=False, obstacle=hidden)["Card"].state == FAIL
    assert device("cuda", usable=False)["Card"].state == FAIL
    assert device("auto", usable=False)["Card"].state == device("cpu")["Card"].state == SKIP


def test_compiler_and_triton():
    assert check_lines.compiler_line(None).state == check_lines.triton_line(None).state == PASS
    line = check_lines.compiler_line(machine.missing_for_triton("gcc", False, (3, 11)))
    assert (
        line.state == WARN
        and "Python.h missing" in line.found
        and line.mend == "sudo apt install python3.11-dev"
    )
    assert check_lines.triton_line("Triton does not work here (CompilationError: x)").state == WARN


def test_data(tmp_path):
    def line(*arguments):
        return check_lines.data_line(*arguments)

    assert line(True, None, {}, []) == Line("Data", PASS, "the demo's own")
    assert line(False, tmp_path / "none", {}, []).state == FAIL
    places = {"owner/a": "on the hub", "owner/b": "in the cache", "owner/c": "on the hub"}
    assert (
        line(False, None, places, []).found == "on the hub owner/a, owner/c; in the cache owner/b"
    )
    problems = ["data set owner/d cannot be fetched: x; give a file", "data file e does not exist"]
    assert line(False, tmp_path, places, problems) == Line(
        "Data",
        FAIL,
        "data set owner/d cannot be fetched: x; data file e does not exist",
        "give a file",
    )

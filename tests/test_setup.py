"""What a bare machine is told."""

import shutil
import subprocess

import pytest
from conftest import ROOT

# Stands for a Python: whether it is new enough, whether it can make environments, how it makes one.
PYTHON = """#!/bin/sh
case "$*" in
    *sys.exit*) exit {old} ;;
    *ensurepip*) exit {no_venv} ;;
    *print*) echo {version} ;;
    *"-m venv"*) echo "made with {version}"; exit 1 ;;
esac
"""
PPA = "sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.11 python3.11-venv"


@pytest.fixture
def bare(tmp_path):
    """Run the batch where there are these Pythons: version, whether new enough, with venv."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "common").mkdir()
    for tool in ("bash", "dirname", "sha256sum", "cut", "cat", "grep"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for name in ("run_all_quantization.sh", "requirements.txt", "common/setup_environment.sh"):
        shutil.copy(ROOT / name, tmp_path / name)

    def run(
        release: str = 'ID=ubuntu\nVERSION_ID="24.04"\nUBUNTU_CODENAME=noble\n',
        **pythons: tuple[str, bool, bool],
    ):
        for name, (version, new, venv) in pythons.items():
            python = tmp_path / "bin" / name.replace("_", ".")
            python.write_text(
                PYTHON.format(old=int(not new), no_venv=int(not venv), version=version)
            )
            python.chmod(0o755)
        (tmp_path / "os-release").write_text(release)
        result = subprocess.run(
            ["bash", tmp_path / "run_all_quantization.sh", "--demo"],
            capture_output=True,
            text=True,
            env={"PATH": str(tmp_path / "bin"), "OS_RELEASE": str(tmp_path / "os-release")},
        )
        assert result.returncode == 2 and not (tmp_path / ".venv").exists()
        return result

    return run


def test_missing_venv_is_answered_with_the_command_that_mends_it(bare):
    result = bare(python3=("3.12", True, False))
    assert result.stderr.strip() == (
        "error: Python's venv module is missing; install it with: sudo apt install python3.12-venv"
    )


def test_a_python_with_venv_comes_before_one_without(bare):
    """And an old python3 does not hide a newer one beside it."""
    assert (
        "made with 3.12"
        in bare(python3=("3.13", True, False), python3_12=("3.12", True, True)).stdout
    )
    assert (
        "made with 3.11"
        in bare(
            python3=("3.10", False, True),
            python3_11=("3.11", True, True),
            python3_12=("3.12", True, False),
        ).stdout
    )


@pytest.mark.parametrize(
    "release, words",
    [
        ('NAME=Ubuntu\nID=ubuntu\nVERSION_ID="22.04"\nUBUNTU_CODENAME=jammy\n', PPA),
        ('NAME="Linux Mint"\nID=linuxmint\nVERSION_ID="21.3"\nUBUNTU_CODENAME=jammy\n', PPA),
        ('ID=ubuntu\nVERSION_ID="20.04"\nUBUNTU_CODENAME=focal\n', "upgrade it"),
        ('ID=debian\nVERSION_ID="11"\n', "upgrade it"),
        ('ID=debian\nVERSION_ID="12"\n', "install it with: sudo apt install python3 python3-venv"),
    ],
)
def test_too_old_a_python_is_answered_with_packages_that_help(bare, release, words):
    lines = bare(release, python3=("3.10", False, True)).stderr.splitlines()
    assert (
        len(lines) == 1
        and lines[0].startswith("error: Python 3.11 or newer is needed; ")
        and words in lines[0]
    )


@pytest.mark.parametrize(
    "version, accepted",
    [
        ((3, 10, 12, "final", 0), False),
        ((3, 11, 0, "candidate", 1), False),
        ((3, 11, 0, "final", 0), True),
        ((3, 12, 3, "final", 0), True),
        ((3, 14, 0, "candidate", 2), True),
    ],
)
def test_release_candidates_of_3_11_are_refused(version, accepted):
    """Ubuntu 22.04's python3.11 is 3.11.0rc1, which lacks sys.get_int_max_str_digits.

    torch._dynamo cannot be imported there, nor what imports it.
    """
    script = (ROOT / "common/setup_environment.sh").read_text()
    condition = script.split("import sys; sys.exit(")[1].split(")' 2>")[0]
    assert eval(condition.replace("sys.version_info", repr(version))) is not accepted

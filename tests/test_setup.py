"""What a bare machine is told."""

import shutil
import subprocess

from conftest import ROOT

# Stands for a Debian python3 whose venv module is a package of its own.
PYTHON_WITHOUT_VENV = """#!/bin/sh
case "$*" in
    *ensurepip*) exit 1 ;;
    *sys.exit*) exit 0 ;;
    *) echo 3.12 ;;
esac
"""


def test_missing_venv_is_answered_with_the_command_that_mends_it(tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON_WITHOUT_VENV)
    python.chmod(0o755)
    (tmp_path / "common").mkdir()
    for name in ("run_all_quantization.sh", "requirements.txt", "common/setup_environment.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    result = subprocess.run(["bash", tmp_path / "run_all_quantization.sh", "--demo"], capture_output=True, text=True,
                            env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert result.returncode == 2
    assert result.stderr.strip() == "error: Python's venv module is missing; install it with: sudo apt install python3.12-venv"
    assert not (tmp_path / ".venv").exists()

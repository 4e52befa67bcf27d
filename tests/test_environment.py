"""A script that is started with a Python that has not what it needs, or interrupted before it can
say anything: one line.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from common import cli
from common.base import environment
from common.results.documents import CONFIGURATIONS

SCRIPTS = sorted({f"quantize_{made[0]}.py" for made in CONFIGURATIONS.values() if made}) + [
    *("verify_model.py", "compare_to_baseline.py", "analyze_results.py"),
    *("common/evaluation.py", "common/baseline.py", "common/gguf_export.py"),
]


@pytest.mark.parametrize("words", [*([script] for script in SCRIPTS), ["-m", "common.batch"]])
def test_without_its_libraries_a_script_says_where_they_are(words):
    """A Python that does not look at what is installed stands for one that has nothing."""
    command = [sys.executable, "-S", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: torch is not installed for") and ".venv" in line


def test_whoever_imports_the_project_is_left_alone():
    code = "import common, signal; print(signal.getsignal(signal.SIGINT).__name__)"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "default_int_handler")


def test_ctrl_c_while_torch_is_imported(tmp_path):
    """One word, not a traceback out of the middle of it."""
    (tmp_path / "torch.py").write_text(
        f"import time\nopen({str(tmp_path / 'began')!r}, 'w').close()\ntime.sleep(60)\n"
    )
    script = subprocess.Popen(
        [sys.executable, ROOT / "quantize_hqq.py", "--model", "demo"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not (tmp_path / "began").exists() and script.poll() is None:
        time.sleep(0.05)
    script.send_signal(signal.SIGINT)
    said = script.communicate(timeout=30)[0]
    assert script.returncode == 130 and said == b"interrupted\n"


@pytest.mark.parametrize(
    ("made", "own", "words"),
    [
        (False, False, "bash run_all_quantization.sh --check makes .venv/bin/python"),
        (True, False, "source .venv/bin/activate"),
        (True, True, ".venv/bin/python -m pip install -r requirements.txt"),
    ],
)
def test_the_way_out_is_one_that_is_there(tmp_path, monkeypatch, made, own, words):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    if made:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv" if own else "/usr"))
    assert words in environment.missing("torch")


@pytest.mark.parametrize("name", ["lm_eval", "common.nothing"])
def test_a_library_that_is_missing_later_is_named(capsys, name):
    """But for the project's own modules, whose absence is a mistake of ours."""

    def main():
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    if name == "lm_eval":
        with pytest.raises(SystemExit, match="2"):
            cli.run(main)
        assert "error: lm_eval is not installed for" in capsys.readouterr().err
    else:
        with pytest.raises(ModuleNotFoundError):
            cli.run(main)

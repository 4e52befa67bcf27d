"""A script that is started with a Python that has not what it needs, or interrupted before it can
say anything: one line.
"""

import os
import re
import shutil
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
    "benchmarks/documented_run.py",
]


@pytest.mark.parametrize("words", [*([script] for script in SCRIPTS), ["-m", "common.batch"]])
def test_without_its_libraries_a_script_says_where_they_are(words):
    """A Python that does not look at what is installed stands for one that has nothing."""
    command = [sys.executable, "-S", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: torch is not installed for") and ".venv" in line


@pytest.mark.parametrize("place", ["elsewhere", ".venv/bin"])
def test_whoever_imports_the_project_is_left_alone(tmp_path, place):
    """A program of the environment beside it, such as pytest, above all: its Ctrl-C cleans up."""
    project = tmp_path / "project"
    for file in ("__init__.py", "base/__init__.py", "base/environment.py", "base/interrupts.py"):
        (project / "common" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "common" / file, project / "common" / file)
    script = project / place / "program.py" if place != "elsewhere" else tmp_path / "program.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("import common, signal; print(signal.getsignal(signal.SIGINT).__name__)")
    result = subprocess.run(
        [sys.executable, "-S", script],
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout.strip()) == (0, "default_int_handler")


@pytest.mark.parametrize("library", ["torch", "transformers", "compressed_tensors"])
def test_each_library_is_looked_for(monkeypatch, capsys, library):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "quantize_gptq.py"), False)
    monkeypatch.setattr(environment.interrupts, "end_at_once", lambda: None)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name != library)
    with pytest.raises(SystemExit, match="2"):
        environment.check_script()
    assert f"error: {library} is not installed" in capsys.readouterr().err


def test_all_that_is_required_is_known():
    """By the names that packages are imported by."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = [re.split(r"[=<>]", line)[0] for line in lines if line and line[0] != "#"]
    imported = {"pyyaml": "yaml", "markdown-it-py": "markdown_it"}
    names = [imported.get(package, package.replace("-", "_")) for package in packages]
    assert len(names) > 10 and all(map(environment.is_required, names))


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
        (True, True, f"{sys.executable} -m pip install -r requirements.txt"),
    ],
)
def test_the_way_out_is_one_that_is_there(tmp_path, monkeypatch, made, own, words):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    if made:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / "bin" / "python").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv" if own else "/usr"))
    assert words in environment.missing("torch")


@pytest.mark.parametrize("name", ["lm_eval", "common.nothing", "transformers.nothing", None])
def test_a_library_that_is_missing_later_is_named(capsys, name):
    """Not a module of the project, or of a library that is there, whose absence is a mistake."""

    def main():
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    if name == "lm_eval":
        with pytest.raises(SystemExit, match="2"):
            cli.run(main)
        assert "error: lm_eval is not installed for" in capsys.readouterr().err
    else:
        with pytest.raises(ModuleNotFoundError):
            cli.run(main)

"""Scripts that the batch runs, in processes forked from one that has everything imported."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
import torch
from conftest import ROOT

from common import batch
from common.run_all import processes, steps

ENDINGS = {
    "print('fine')": (0, "fine"),
    "import sys; sys.exit(3)": (3, ""),
    "import sys; print('error: no', file=sys.stderr); sys.exit(2)": (2, "error: no"),
    "raise RuntimeError('odd')": (1, "RuntimeError: odd"),
    "import os, signal; print('so far'); os.kill(os.getpid(), signal.SIGKILL)": (
        -signal.SIGKILL,
        "so far",
    ),
    "import os; print('below', flush=True); os.abort()": (-signal.SIGABRT, "below"),
    "import subprocess; subprocess.run(['echo', 'of a child'])": (0, "of a child"),
}


@pytest.fixture(params=["forked", "started"])
def run(request, tmp_path, monkeypatch):
    """Runs a script in a process; gives exit code and output."""
    if request.param == "started":
        monkeypatch.setattr(processes, "_forking", lambda: None)
    monkeypatch.chdir(tmp_path)

    def run(content, *arguments, **environment):
        (tmp_path / "script.py").write_text(content)
        with processes.running(["script.py", *arguments], environment) as (output, process):
            return process.wait(), output.read()

    return run


@pytest.mark.parametrize("content", ENDINGS)
def test_how_a_script_ends(run, content):
    code, said = ENDINGS[content]
    found, output = run(content)
    assert found == code and (output.strip().endswith(said) if said else not output)


@pytest.mark.parametrize(
    "content, reason",
    [
        (r"raise Exception('CUDA broke\nMore to see.')", "Exception: CUDA broke"),
        (r"raise RuntimeError('CUDA error: odd\nCompile.')", "RuntimeError: CUDA error: odd"),
        (
            "import queue\ntry: {}['k']\nexcept KeyError: raise queue.Empty('the real one')",
            "_queue.Empty: the real one",
        ),
        ("import sys; print('ValueError: seen'); sys.exit('error: mine')", "mine"),
        ("import sys; print('ValueError: seen'); sys.exit('no space')", "no space"),
        ("print('so far'); raise SystemExit(3)", "so far"),
    ],
)
def test_why_a_step_failed(tmp_path, monkeypatch, content, reason):
    """Its error, and not how a library explains that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "_forking", lambda: None)
    (tmp_path / "script.py").write_text(content)
    with pytest.raises(steps.StepFailed) as failure:
        steps.run_logged(["script.py"], tmp_path / "logs" / "a.log", {})
    assert str(failure.value) == reason


def test_what_a_script_is_given(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SAID_BEFORE", "1")
    code, output = run(
        "import os, sys; print(*sys.argv, __name__, os.getcwd(), os.environ['SAID_BEFORE'], "
        "os.environ['CUDA_VISIBLE_DEVICES'])",
        "--option",
        "a b",
        CUDA_VISIBLE_DEVICES="5",
    )
    assert (code, output) == (0, f"script.py --option a b __main__ {tmp_path} 1 5\n")


def test_what_is_printed_comes_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("import time; print('first'); time.sleep(60)")
    with processes.running(["script.py"], {}) as (output, process):
        assert output.readline() == "first\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_nothing_is_imported_again(tmp_path, monkeypatch):
    """Nor has what is forked used a GPU, or threads of torch's, which a fork would be without; and
    what is there is not looked through for garbage.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(
        "import sys; before = set(sys.modules); import gc, threading; import lm_eval.evaluator; "
        "import common.evaluation, common.quantization, common.verification; "
        "from transformers import LlamaForCausalLM; import torch; "
        "print(len(set(sys.modules) - before), torch.cuda.is_initialized(), "
        "threading.active_count(), torch.ones(300, 300).matmul(torch.ones(300, 300)).sum().item(), "
        "gc.get_freeze_count() > 100_000)"
    )
    with processes.running(["script.py"], {}) as (output, process):
        assert output.read() == f"0 False 1 {300.0**3} True\n" and process.wait() == 0


@pytest.mark.parametrize(
    ("imported", "why"),
    [("json", "a fork cannot use the GPU"), ("ends_the_process", "ended the")],
)
def test_where_nothing_can_be_forked(tmp_path, monkeypatch, capfd, imported, why):
    """Where a package used the GPU when it was imported, which is here as if there were none, or
    fails to be imported: a line says why, and scripts run all the same.
    """
    if torch.cuda.is_available():
        pytest.skip("a fork can use the GPU")
    (tmp_path / "ends_the_process.py").write_text("raise RuntimeError('a broken package')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "_IMPORTED", imported)
    monkeypatch.setattr(processes, "_forking", processes._forking.__wrapped__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    server = forkserver.ForkServer()
    for name in ("ensure_running", "connect_to_new_process", "set_forkserver_preload"):
        monkeypatch.setattr(forkserver, name, getattr(server, name))
    (tmp_path / "script.py").write_text("print('fine')")
    with processes.running(["script.py"], {}) as (output, process):
        assert output.read() == "fine\n" and process.wait() == 0
    said = capfd.readouterr().out
    assert "each script imports all libraries anew" in said and why in said
    server._stop()


@pytest.mark.parametrize(("extra", "times"), [([], 1), (["--check"], 0)])
def test_it_is_begun_before_the_batch_imports_its_own(tmp_path, monkeypatch, extra, times):
    begun = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "begin", lambda: begun.append(1))
    monkeypatch.setattr("sys.argv", ["batch", "--model", "owner/tiny", *extra])
    assert batch._todo() is not None and len(begun) == times


def interrupted(words, seconds, folder):
    """What a process of the project says that gets Ctrl-C with all that it started, as in a
    terminal: after some seconds, or for 0 by itself.
    """
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Whatever the tests were started with.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        if seconds:
            time.sleep(seconds)
            os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said and said.rstrip().endswith("interrupted")
    return said


# Interrupted as the process that others are forked from starts.
BEGUN = """
import os, signal, time
from common.base import interrupts
from common.run_all import processes
interrupts.end_at_once()
processes.begin()
os.killpg(0, signal.SIGINT)
time.sleep(30)
"""
# In the middle of its work.
AT_WORK = """
import os, signal, time
from common import cli
from common.base import interrupts

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    finally:
        print("cleaned up", flush=True)

interrupts.end_at_once()
cli.run(main)
"""


def test_interrupted_while_all_is_imported(tmp_path):
    batch = ["-m", "common.batch", "--demo", "--only", "baseline"]
    for words, seconds in ((["-c", BEGUN], 0), ([*batch, "--results-dir", str(tmp_path)], 3)):
        interrupted(words, seconds, tmp_path)
        assert not list(tmp_path.iterdir())


def test_interrupted_at_work(tmp_path):
    assert interrupted(["-c", AT_WORK], 0, tmp_path).startswith("cleaned up")


def test_a_script_answers_an_interrupt(run):
    code, output = run("import os, signal; os.kill(os.getpid(), signal.SIGINT); print('deaf')")
    assert code and output.rstrip().endswith("KeyboardInterrupt")

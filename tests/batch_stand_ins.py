"""The batch on scripts that stand in for the real ones, and on the real ones with a tiny model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from common.run_all.unchanged import FILE

# Scripts that stand in for the real ones: they note how they were called, and gptq fails.
NOTE = (
    "import sys, pathlib; a = sys.argv; "
    "pathlib.Path('calls').open('a').write(' '.join(a) + '\\n'); "
)
STAND_INS = {
    "quantize_gptq.py": "import sys; print('error: no luck today', file=sys.stderr); sys.exit(2)",
    "quantize_hqq.py": NOTE
    + "pathlib.Path(a[a.index('--output') + 1]).mkdir(parents=True, exist_ok=True)",
    "verify_model.py": "",
    "common/baseline.py": NOTE,
    "common/evaluation.py": NOTE,
    "analyze_results.py": "",
}


@pytest.fixture
def batch(tmp_path, monkeypatch):
    for name, content in STAND_INS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "common.run_all.check.show_problems", lambda *_: None
    )  # it would ask the hub for the model

    def run(*arguments):
        from common.batch import main

        monkeypatch.setattr(sys, "argv", ["batch", "--model", "owner/tiny", *arguments])
        return main()

    run.folder = tmp_path
    return run


@pytest.fixture
def real_batch(tiny, tmp_path, monkeypatch):
    """The batch on a tiny model with the real scripts, each run in this process."""
    from made_up_results import README

    from common import batch

    # All of the batch, before it is given another `step`: it imports the rest when it runs.
    from common.run_all import steps, whole  # noqa: F401

    # Two tasks of the demo, without answers to generate, keep this short.
    small = [
        "--data",
        "demo",
        "--tasks",
        "arc,perplexity",
        "--windows",
        "2",
        "--window-length",
        "48",
    ]

    def step(title, words, log, gpu):
        more = small if title == "evaluate" else []
        result = run_script(ROOT / words[0], *words[1:], *more, cwd=tmp_path)
        run.titles.append(f"{title} {Path(words[0]).stem}")
        run.output += result.stdout
        if result.returncode:
            raise steps.StepFailed(
                result.stderr.strip().splitlines()[-1].removeprefix("error: ")[:200]
            )

    def run(*arguments, again: bool = True):
        """again: what an earlier batch left is looked into, whether it has changed or not."""
        run.titles, run.output = [], ""
        if again:
            (tmp_path / "results" / FILE).unlink(missing_ok=True)
        monkeypatch.setattr(
            sys, "argv", ["batch", "--model", str(tiny), "--only", "baseline,hqq-4bit", *arguments]
        )
        code = batch.main()
        return code, json.loads((tmp_path / "results" / tiny.name / "status.json").read_text())

    shutil.copy(ROOT / "quantize_hqq.py", tmp_path)
    (tmp_path / "README.md").write_text(README)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "step", step)
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
    run.folder, run.name = tmp_path, tiny.name
    return run

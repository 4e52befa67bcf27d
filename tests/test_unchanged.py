"""A second batch with nothing to do: it looks at files alone, and at all of them."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.run_all import unchanged
from common.run_all.unchanged import FILE, Unchanged

OWN = {"model": "given", "only": None, "limit": 8, "data_root": None, "overwrite": False}
LEFT = {
    "given/config.json": "the 16-bit model",
    "given/model.safetensors": "weights",
    "results/name/baseline.json": "{}",
    "results/name/hqq-4bit.json": "{}",
    "results/name/samples/hqq-4bit.jsonl.gz": "samples",
    "results/name/status.json": '{"hqq-4bit": {"state": "done"}}',
    "models/name/hqq-4bit/config.json": "{}",
    "models/name/hqq-4bit/model.safetensors": "codes",
    "common/tasks/arc.py": "code",
    "quantize_hqq.py": "code",
    "text.txt": "calibration",
}


@pytest.fixture
def left(tmp_path, monkeypatch):
    """What a batch left behind. Gives how one asks for it, with other options than its."""
    for name, content in {**LEFT, "README.md": "tables"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)

    def asked(*passed_on, **own):
        options = argparse.Namespace(**{**OWN, "results_dir": Path("results"), **own})
        return Unchanged(options, list(passed_on or ("--calib-data", "text.txt")))

    first = asked()
    first.begins("hqq-4bit")
    first.ends("hqq-4bit", "name", Path("given"))
    first.tables_are_written()
    return asked


def test_nothing_is_to_be_done_while_nothing_changes(left):
    assert left().done("hqq-4bit") and left().everything(["hqq-4bit"])
    # Which others are asked for, and on how many GPUs, is no matter to one.
    assert left(only="hqq-4bit", gpus=2).done("hqq-4bit")
    assert not left().done("gptq-4bit") and not left().everything(["hqq-4bit", "gptq-4bit"])
    assert not left().everything([])


@pytest.mark.parametrize(
    "passed_on, own",
    [
        (["--calib-data", "text.txt", "--seed", "1"], {}),
        (["--windows", "2"], {}),
        ([], {"limit": 9}),
        ([], {"device": "cpu"}),
        ([], {"overwrite": True}),
        ([], {"model": "another"}),
    ],
)
def test_other_options_are_looked_into(left, passed_on, own):
    assert not left(*passed_on, **own).done("hqq-4bit")


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("change", ["content", "same size, other time", "gone"])
def test_whatever_changes_is_looked_into(left, name, change):
    file = Path(name)
    if change == "gone":
        file.unlink()
    elif change == "content":
        file.write_text(LEFT[name].replace("done", "failed") + " ")
    else:
        os.utime(file, ns=(1, 1))
    # Of the status file what is said of this one counts, by its content.
    same = name.endswith("status.json") and change.startswith("same")
    assert left().done("hqq-4bit") == same
    assert not left().everything(["hqq-4bit"])


def test_new_files_settings_and_versions_are_looked_into(left, monkeypatch):
    Path("common/tasks/new.py").write_text("")
    assert not left().done("hqq-4bit")
    Path("common/tasks/new.py").unlink()
    assert left().done("hqq-4bit")
    monkeypatch.setitem(unchanged._ENVIRONMENT, "OMP_NUM_THREADS", "77")
    assert not left().done("hqq-4bit")


def test_tables_are_made_again_when_their_readme_changes(left):
    Path("README.md").write_text("without tables")
    assert left().done("hqq-4bit") and not left().everything(["hqq-4bit"])


def test_what_changes_while_it_is_worked_on_is_not_remembered(left):
    Path("results", FILE).unlink()
    one = left()
    one.begins("hqq-4bit")
    Path("quantize_hqq.py").write_text("edited")
    one.ends("hqq-4bit", "name", Path("given"))
    assert not left().done("hqq-4bit")
    # Nor is what a hub has to be asked for, or a damaged note believed.
    one = left()
    one.begins("hqq-4bit")
    one.ends("hqq-4bit", "name", None)
    assert not Path("results", FILE).exists()
    Path("results", FILE).write_text('{"given hqq-4bit": 5}')
    assert not left().done("hqq-4bit")


def test_a_second_batch_starts_nothing(real_batch, capfd):
    words = ["--limit", "3", "--group-size", "64"]
    assert real_batch(*words)[0] == 0
    first = real_batch.titles
    code, status = real_batch(*words, again=False)
    assert code == 0 and real_batch.titles == [] and status["hqq-4bit"]["state"] == "done"
    assert "Nothing is to be done: baseline, hqq-4bit and the tables" in capfd.readouterr().out
    # With less than all of it changed the rest is left alone.
    result = real_batch.folder / "results" / real_batch.name / "hqq-4bit.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "date": "2020-01-01"}))
    assert real_batch(*words, again=False)[0] == 0
    assert real_batch.titles == ["quantize quantize_hqq", "evaluate evaluation"] != first
    assert "=== baseline: nothing has changed since it was done" in capfd.readouterr().out
    assert real_batch("--limit", "2", "--group-size", "64", again=False)[0] == 0
    assert "evaluate baseline" in real_batch.titles


def test_looking_imports_nothing_large():
    code = "import sys, common.batch; print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"

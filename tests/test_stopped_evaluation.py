"""An evaluation that ends in the middle keeps the tasks that were done."""

from __future__ import annotations

import argparse
import json

import pytest
from conftest import save_tiny

from common import evaluation
from common.base.errors import UserError
from common.results import documents
from common.results.naming import Subject
from common.tasks import harness, perplexity
from common.tasks.evaluate import evaluate_model

WORDS = ["--tasks", "arc,perplexity", "--limit", "2", "--data", "demo", "--windows", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, "llama", True)
    return folder


@pytest.fixture
def evaluate(tiny, tmp_path):
    """A function that evaluates the tiny model and returns the names of the tasks in its file."""
    parser = argparse.ArgumentParser()
    evaluation.add_evaluation_arguments(parser)
    options = parser.parse_args(
        [*WORDS, "--window-length", "32", "--device", "cpu", "--results-dir", str(tmp_path)]
    )
    subject = Subject(tiny, str(tiny), "tiny", "baseline")

    def run(reuse: bool, fails: bool = False, twice: bool = True, **changes) -> list[str]:
        vars(options).update(changes)
        if fails:
            with pytest.raises(KeyboardInterrupt):
                evaluate_model(subject, options, reuse, twice)
        else:
            evaluate_model(subject, options, reuse, twice)
        return list(json.loads((tmp_path / "tiny" / "baseline.json").read_text())["tasks"])

    return run


@pytest.fixture
def stopped(monkeypatch):
    """A function that says when Ctrl-C comes: at perplexity's first window, in the second run of
    ARC, while records are written, or never."""
    places = {
        "perplexity": (perplexity, "perplexity"),
        "noise": (harness.HarnessTask, "noise"),
        "writing": (documents.gzip, "compress"),
    }

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def stop(place: str | None) -> None:
        monkeypatch.undo()
        if place:
            monkeypatch.setattr(*places[place], interrupt)

    return stop


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tiny" / "baseline.json"


def test_what_was_done_is_kept(evaluate, stopped, file, capsys):
    """The baseline's second run, for the noise floor, too: it is of the records that are there."""
    stopped("perplexity")
    assert evaluate(reuse=False, fails=True) == ["arc"]
    assert "kept: arc; --reuse, which a batch does itself, goes on" in capsys.readouterr().out
    stopped("noise")
    assert evaluate(reuse=True, fails=True) == ["arc", "perplexity"]
    said = capsys.readouterr().out
    assert "arc was run once, not twice" in said and "perplexity was not evaluated yet" in said
    assert "Evaluating tiny baseline on cpu in float32: perplexity\n" in said
    before = json.loads(file.read_text())
    stopped(None)
    evaluate(reuse=True)
    assert "Evaluating" not in capsys.readouterr().out
    after = json.loads(file.read_text())
    assert "noise" not in before and set(after["noise"]) == {"arc"}
    assert after["noise"]["arc"]["changed"] == 0
    assert {**after, "seconds": before["seconds"]} == {**before, "noise": after["noise"]}
    evaluate(reuse=True)
    assert "results of arc, perplexity used again" in capsys.readouterr().out


def test_speed_is_kept_before_the_first_task(evaluate, stopped, file):
    stopped("perplexity")
    assert evaluate(reuse=False, fails=True, tasks=("perplexity", "speed")) == []
    assert json.loads(file.read_text())["speed"]["tokens_per_second"] > 0


@pytest.mark.parametrize("change", ["code", "limit"])
def test_other_results_stay_until_all_is_done(evaluate, stopped, file, capsys, change):
    evaluate(reuse=False)
    changes = {}
    if change == "code":
        file.write_text(json.dumps({**json.loads(file.read_text()), "code": "0" * 64}))
    else:
        changes = {"limit": 3}
    before = file.read_bytes()
    stopped("perplexity")
    evaluate(reuse=False, fails=True, **changes)
    assert file.read_bytes() == before
    said = capsys.readouterr().out
    assert "nothing of these is kept until all is done" in said and "kept: " not in said
    stopped(None)
    evaluate(reuse=False, **changes)
    assert file.read_bytes() != before


def test_the_same_results_stay_beside_parts_and_while_they_are_written(evaluate, stopped, file):
    assert evaluate(reuse=False) == ["arc", "perplexity"]
    stopped("perplexity")
    assert evaluate(reuse=False, fails=True) == ["arc", "perplexity"]
    stopped("writing")
    assert evaluate(reuse=False, fails=True) == ["arc", "perplexity"]


def test_a_single_run_of_the_same_keeps_the_noise_floor(evaluate, file):
    evaluate(reuse=False)
    noise = json.loads(file.read_text())["noise"]
    assert noise and evaluate(reuse=False, twice=False) == ["arc", "perplexity"]
    assert json.loads(file.read_text())["noise"] == noise
    evaluate(reuse=False, twice=False, limit=3)
    assert "noise" not in json.loads(file.read_text())


@pytest.mark.parametrize("place", ["", "tiny", "tiny/samples"])
def test_results_that_cannot_be_written_are_found_first(evaluate, tmp_path, place):
    wrong = tmp_path / "results" / place
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_text("a file")
    with pytest.raises(UserError, match="results cannot be written to .*choose another"):
        evaluate(reuse=False, results_dir=tmp_path / "results")

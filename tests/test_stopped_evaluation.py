"""An evaluation that ends in the middle keeps the tasks that were done."""

from __future__ import annotations

import argparse
import json

import pytest
from conftest import save_tiny

from common import evaluation
from common.results.naming import Subject
from common.tasks import perplexity
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

    def run(reuse: bool, fails: bool = False) -> list[str]:
        if fails:
            with pytest.raises(KeyboardInterrupt):
                evaluate_model(subject, options, reuse)
        else:
            evaluate_model(subject, options, reuse)
        return list(json.loads((tmp_path / "tiny" / "baseline.json").read_text())["tasks"])

    return run


@pytest.fixture
def stopped(monkeypatch):
    """A function that says whether Ctrl-C comes at the first window of perplexity."""
    original = perplexity.perplexity

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    return lambda comes: monkeypatch.setattr(
        perplexity, "perplexity", interrupt if comes else original
    )


def test_what_was_done_is_kept(evaluate, stopped, capsys):
    stopped(True)
    assert evaluate(reuse=False, fails=True) == ["arc"]
    stopped(False)
    assert evaluate(reuse=True) == ["arc", "perplexity"]
    said = capsys.readouterr().out
    assert "results of arc used again" in said and "perplexity was not evaluated yet" in said


def test_results_of_another_code_stay_until_all_is_done(evaluate, stopped, tmp_path):
    evaluate(reuse=False)
    file = tmp_path / "tiny" / "baseline.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "code": "0" * 64}))
    before = file.read_bytes()
    stopped(True)
    evaluate(reuse=False, fails=True)
    assert file.read_bytes() == before
    stopped(False)
    evaluate(reuse=False)
    assert file.read_bytes() != before

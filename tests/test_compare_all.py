"""Comparisons that are remembered are those that were made, and answer for nothing else."""

import json
from dataclasses import replace

import pytest
from made_up_results import model_part

from common.reporting import compare_all as module
from common.reporting import comparison
from common.reporting.compare_all import REMEMBERED, Remembered, compare_all
from common.results.documents import load_model_results, load_samples, write_samples


def said(*compared):
    """All of it as text: NaN is not NaN."""
    return [
        json.dumps({name: [one.kept() for one in rows] for name, rows in found.items()})
        for found in compared
    ]


@pytest.fixture
def made(tmp_path):
    """Results of a made-up model, and their comparisons as remembered on disk."""
    results_dir, file = tmp_path / "results", tmp_path / REMEMBERED
    model_part(results_dir, ["gptq-4bit", "hqq-4bit"])
    results, remembered = load_model_results(results_dir / "tiny"), Remembered(file)
    first = compare_all(results_dir, results, remembered)
    remembered.save()
    assert set(first) == {"gptq-4bit", "hqq-4bit"}
    return results_dir, results, file, first


@pytest.fixture
def counted(made, monkeypatch):
    """How many configurations are compared by their records from here on."""
    calls, original = [], comparison.compare_samples
    monkeypatch.setattr(module, "compare_samples", lambda *pair: calls.append(1) or original(*pair))
    return calls


def test_nothing_is_computed_twice(made, counted):
    results_dir, results, file, first = made
    again = compare_all(results_dir, results, Remembered(file))
    assert len({*said(again, first)}) == 1 and not counted
    assert again["hqq-4bit"][0].kind is first["hqq-4bit"][0].kind
    assert json.loads(file.read_text())


def test_other_records_are_compared_anew(made, counted):
    results_dir, results, file, first = made
    tasks = {}
    for record in load_samples(results_dir, "tiny", "hqq-4bit"):
        own = {key: value for key, value in record.items() if key != "task"}
        tasks.setdefault(record["task"], []).append(own)
    tasks["openmath"][0]["correct"] = 1 - tasks["openmath"][0]["correct"]
    write_samples(results_dir, "tiny", "hqq-4bit", tasks)
    remembered = Remembered(file)
    again = compare_all(results_dir, results, remembered)
    texts = [said(*({name: found[name]} for name in first)) for found in (again, first)]
    assert len(counted) == 1
    assert [one == other for one, other in zip(*texts, strict=True)] == [True, False]
    remembered.save()
    assert len(json.loads(file.read_text())) == 2  # what is of no use any more is forgotten


def test_other_code_and_damage(made, counted, monkeypatch):
    results_dir, results, file, first = made
    monkeypatch.setattr(module, "code_hash", lambda *_, **__: "other")
    assert len({*said(compare_all(results_dir, results, Remembered(file)), first)}) == 1
    assert len(counted) == 2
    monkeypatch.undo()
    for text in (
        "{",
        "[]",
        json.dumps({key: {"stale": []} for key in json.loads(file.read_text())}),
    ):
        file.write_text(text)
        assert len({*said(compare_all(results_dir, results, Remembered(file)), first)}) == 1


def test_a_tasks_other_data_is_part_of_the_key(made, counted):
    results_dir, results, file, _ = made
    document = results.documents["hqq-4bit"]
    arc = {**document["tasks"]["arc"], "fingerprint": "another"}
    other = {**document, "tasks": {**document["tasks"], "arc": arc}}
    changed = replace(results, documents={**results.documents, "hqq-4bit": other})
    found = compare_all(results_dir, changed, Remembered(file))
    assert len(counted) == 1 and "arc" not in {one.kind.task for one in found["hqq-4bit"]}

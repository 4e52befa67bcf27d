"""The documented run, its scripts stood in for: what one stage found, another keeps."""

import json
import sys

import documented_run
import pytest

from common.base.errors import UserError
from common.results.documents import load_samples
from common.results.naming import source_of
from common.tasks.evaluate import write_results


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a model's folder in it; its steps write what an evaluation writes."""
    model = tmp_path / "models" / "Other" / "baseline"
    model.mkdir(parents=True)
    results = tmp_path / "docs" / "results"
    monkeypatch.setattr(documented_run, "ROOT", tmp_path)
    monkeypatch.setattr(documented_run, "DOCUMENTED_FOLDER", results)
    monkeypatch.setattr(documented_run, "resolve_folder", lambda model: model)
    monkeypatch.chdir(tmp_path)

    def step(words, log, environment, interpreter):
        if "common/evaluation.py" not in words:
            return
        document = {
            "model": "Other",
            "configuration": "gptq-4bit",
            "source": source_of(str(model)),
            "checkpoint": "c",
            "tasks": {},
        }
        if "speed" in words:
            write_results(results, {**document, "speed": {"tokens_per_second": 5.0}}, {})
        else:
            document["tasks"] = {"arc": {"samples": 1}}
            write_results(results, document, {"arc": [{"id": "1", "correct": 1.0}]})

    monkeypatch.setattr(documented_run, "run_logged", step)
    return model, results


@pytest.mark.parametrize("calls", [["evaluate", "speed"], ["quantize,speed", "evaluate"]])
def test_a_stage_of_its_own_keeps_what_another_found(project, monkeypatch, calls):
    model, results = project
    for stages in calls:
        words = ["--data-root", "data", "--models", str(model), "--only", "gptq-4bit"]
        monkeypatch.setattr(sys, "argv", ["documented_run.py", *words, "--stages", stages])
        documented_run.main()
        document = json.loads((results / "Other" / "gptq-4bit.json").read_text())
        assert document["source"] == "models/Other/baseline"  # the same on every machine
    assert document["tasks"] == {"arc": {"samples": 1}}
    assert document["speed"] == {"tokens_per_second": 5.0}
    assert [record["id"] for record in load_samples(results, "Other", "gptq-4bit")] == ["1"]
    status = json.loads((results / "Other" / "status.json").read_text())
    assert status == {"gptq-4bit": {"state": "done", "source": "models/Other/baseline"}}


def test_what_evaluating_needs_is_looked_for_first(project, monkeypatch):
    """Not after an hour of quantizing."""
    started = []
    monkeypatch.setattr(documented_run, "document", lambda model, _: started.append(model) or True)
    monkeypatch.setattr(documented_run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["documented_run.py", "--data-root", "data"])
    with pytest.raises(UserError, match="lm_eval is not installed.*--stages quantize"):
        documented_run.main()
    assert not started
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--stages", "quantize"])
    assert documented_run.main() == 0 and started == ["demo"]


def test_a_configuration_that_there_is_not(monkeypatch, capsys):
    words = ["documented_run.py", "--data-root", "data", "--only", "gptq-4bit,nosuch"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        documented_run.main()
    assert "there is no nosuch; there are baseline, gptq-4bit" in capsys.readouterr().err

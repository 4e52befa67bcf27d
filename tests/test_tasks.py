"""A task is one file: one that is made up here, in a folder of its own, goes all the way from flags
to tables.
"""

import json
import sys

import pytest
from conftest import ROOT, run_script

import common.tasks
from common.tasks import harness
from common.tasks.task import all_tasks
from common.text.data import demo_rows

LETTERS = '''
"""Which token follows a letter, as the model has it."""

from common.tasks.task import MetricKind, Task, of_field

RIGHT = of_field("correct")


class Letters(Task):
    name, title, place, limit = "letters", "Letters", 7, 8
    metrics = (
        MetricKind("letters", "share_right", "Letters", RIGHT, binary="correct",
                   column="Letters, share", judged=True),
    )

    def add_arguments(self, parser):
        parser.add_argument("--alphabet", default="abcdefgh")

    def load(self, evaluation):
        return evaluation.options.alphabet[: evaluation.options.limit or self.limit]

    def conditions(self, loaded, evaluation):
        return {"data": "letters", "fingerprint": loaded}

    def run(self, model, prepared, evaluation):
        records = []
        for number, letter in enumerate(prepared):
            tokens = evaluation.tokenizer(letter, return_tensors="pt")["input_ids"]
            best = model(tokens.to(model.device)).logits[0, -1].argmax().item()
            records.append({"id": f"letters-{number}", "correct": float(best % 2), "best": best})
        right = sum(record["correct"] for record in records)
        return {"samples": len(records), "share_right": right / len(records)}, records

    def in_words(self, summary):
        return f"{summary['share_right']:.2f} of letters"


TASK = Letters()
'''


def test_templates_are_filled_in_as_lm_eval_does_and_compiled_once(monkeypatch):
    from lm_eval import utils

    compiled, compile_template = [], utils.env.from_string
    monkeypatch.setattr(
        utils.env, "from_string", lambda text: compiled.append(text) or compile_template(text)
    )
    harness._compiled.cache_clear()
    for task in (task for task in all_tasks() if isinstance(task, harness.HarnessTask)):
        prompt = task.prompt()
        templates = {text for text in prompt.values() if isinstance(text, str) and "{{" in text}
        assert templates, task.name
        before = len(compiled)
        for row in demo_rows(task.demo).rows[:3] if task.demo else ():
            for template in templates:
                assert harness.filled_in(template, row) == compile_template(template).render(**row)
        assert len(compiled) - before <= len(templates)
    assert compiled


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """The made-up task among the others, for one test."""
    folder = tmp_path / "more_tasks"
    folder.mkdir()
    (folder / "letters.py").write_text(LETTERS)
    monkeypatch.setattr(common.tasks, "__path__", [*common.tasks.__path__, str(folder)])
    all_tasks.cache_clear()
    yield
    all_tasks.cache_clear()
    sys.modules.pop("common.tasks.letters", None)


@pytest.mark.usefixtures("undrawn")
def test_one_more_task(letters, tiny, tmp_path):
    assert [task.name for task in all_tasks()][-1] == "letters"
    made, results = tmp_path / tiny.name / "hqq-4bit", tmp_path / "results"
    words = [
        "--tasks",
        "letters",
        "--results-dir",
        results,
        "--limit",
        6,
        "--alphabet",
        "zyxwvutsr",
    ]
    result = run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", made)
    assert result.returncode == 0, result.stderr
    result = run_script(ROOT / "common/baseline.py", "--model", tiny, *words)
    assert result.returncode == 0 and "of letters" in result.stdout, result.stdout + result.stderr
    result = run_script(ROOT / "compare_to_baseline.py", "--quantized", made, *words)
    assert result.returncode == 0 and "Letters" in result.stdout, result.stdout + result.stderr
    document = json.loads((results / tiny.name / "hqq-4bit.json").read_text())
    assert document["tasks"]["letters"]["samples"] == 6
    assert document["tasks"]["letters"]["fingerprint"] == "zyxwvu"
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    result = run_script(
        ROOT / "analyze_results.py", "--results-dir", results, "--readme", readme, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "Letters, share" in readme.read_text() and "| hqq-4bit |" in readme.read_text()

"""compare_to_baseline.py on results that are there already."""

import json

from conftest import ROOT, assert_user_error, run_script
from test_report_and_batch import document

from common.identity import SHARED
from common.results import write_samples

CONDITIONS = ("data", "samples", "windows", "length", "fingerprint", "original")


def records(right, losses):
    arc = [{"id": f"q{i}", "acc": float(r), "acc_norm": float(r), "gold": "AB"[i % 2], "predicted": "AB"[(i + (not r)) % 2]}
           for i, r in enumerate(right)]
    return {"arc": arc, "perplexity": [{"id": f"w{i}", "loss": loss} for i, loss in enumerate(losses)]}


def test_two_models_side_by_side(tiny, tmp_path):
    checkpoint = tmp_path / "hqq-4bit"
    assert run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", checkpoint).returncode == 0
    arguments = [ROOT / "compare_to_baseline.py", "--quantized", checkpoint, "--results-dir", tmp_path / "results", "--tasks",
                 "arc,perplexity,speed", "--data", "demo", "--limit", 2, "--windows", 1, "--window-length", 32]
    assert run_script(*arguments).returncode == 0
    folder = tmp_path / "results" / tiny.name
    for name, accuracy in (("baseline", 0.75), ("hqq-4bit", 0.5)):
        # Made-up figures in the place of the real ones, which say what they were made from.
        real, figures = json.loads((folder / f"{name}.json").read_text()), document(name, accuracy)
        tasks = {task: {**figures["tasks"][task], **{key: real["tasks"][task].get(key) for key in CONDITIONS}}
                 for task in real["tasks"]}
        (folder / f"{name}.json").write_text(json.dumps({**figures, **{key: real[key] for key in SHARED}, "tasks": tasks}))
    write_samples(tmp_path / "results", tiny.name, "baseline", records([1, 1, 1, 0] * 10, [2.0, 3.0, 2.5]))
    write_samples(tmp_path / "results", tiny.name, "hqq-4bit", records([0, 1, 1, 0] * 10, [2.2, 3.2, 2.7]))
    result = run_script(*arguments)
    assert result.returncode == 0, result.stderr
    rows = {line[:32].strip(): line[32:].split() for line in result.stdout.splitlines()}
    assert rows["ARC accuracy"][:3] == ["0.75", "0.5", "-0.250"] and "10/0" in rows["ARC accuracy"]
    assert rows["ARC accuracy"][-1] == "loss" and "0.000977" in rows["ARC accuracy"]     # 2^-10
    assert rows["Weights, MB"] == ["2.0", "0.5", "0.250", "x"]
    assert rows["Perplexity"][2:6] == ["1.221", "x", "[1.221,", "1.221]"]
    assert rows["Quantization, s"][1] == "3.5"
    assert (tmp_path / "results" / tiny.name / "hqq-4bit-against-baseline.png").stat().st_size > 5000
    write_samples(tmp_path / "results", tiny.name, "hqq-4bit", records([0, 1, 1], [2.2, 3.2, 2.7]))
    assert_user_error(run_script(*arguments), "different samples of arc", "--overwrite")

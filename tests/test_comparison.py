"""compare_to_baseline.py on results that are there already."""

import json

from conftest import ROOT, run_script
from test_report_and_batch import document


def test_two_models_side_by_side(tiny, tmp_path):
    checkpoint = tmp_path / "hqq-4bit"
    assert run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", checkpoint).returncode == 0
    folder = tmp_path / "results" / tiny.name
    folder.mkdir(parents=True)
    for name, accuracy in (("baseline", 0.75), ("hqq-4bit", 0.5)):
        (folder / f"{name}.json").write_text(json.dumps(document(name, accuracy)))
    result = run_script(ROOT / "compare_to_baseline.py", "--quantized", checkpoint, "--results-dir", tmp_path / "results",
                        "--tasks", "arc,openmath,perplexity,speed")
    assert result.returncode == 0, result.stderr
    rows = {line[:34].strip(): line[34:].split() for line in result.stdout.splitlines()}
    assert rows["ARC accuracy"] == ["0.750", "0.500", "-0.250", "0.667", "x"]
    assert rows["Weights, MB"] == ["2.0", "0.5", "-1.5", "0.250", "x"]
    assert rows["Perplexity"][-2:] == ["1.500", "x"]
    assert rows["Quantization, s"][1] == "3.5"

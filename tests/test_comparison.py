"""Models side by side, by compare_to_baseline.py and in the tables, on results that are there
already.
"""

import json
import re

import pytest
from conftest import ROOT, assert_user_error, run_script
from made_up_results import README, analyze, arc_records, document
from recomputed import tables

from common.reporting.comparison import Comparison
from common.reporting.report import write_csv
from common.reporting.significance import Difference
from common.results.documents import ModelResults, write_samples
from common.results.identity import SHARED
from common.tasks.task import all_metrics

HEADINGS = {"arc": "ARC-Challenge accuracy", "perplexity": "Perplexity"}
CONDITIONS = ("data", "samples", "windows", "length", "fingerprint", "original")


def records(right, losses):
    return {
        "arc": arc_records(right),
        "perplexity": [{"id": f"w{i}", "loss": loss} for i, loss in enumerate(losses)],
    }


def test_two_models_side_by_side(tiny, tmp_path):
    checkpoint = tmp_path / "hqq-4bit"
    assert (
        run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", checkpoint).returncode
        == 0
    )
    arguments = [
        ROOT / "compare_to_baseline.py",
        "--quantized",
        checkpoint,
        "--results-dir",
        tmp_path / "results",
        "--tasks",
        "arc,perplexity,speed",
        "--data",
        "demo",
        "--limit",
        2,
        "--windows",
        1,
        "--window-length",
        32,
    ]
    assert run_script(*arguments).returncode == 0
    folder = tmp_path / "results" / tiny.name
    for name, accuracy in (("baseline", 0.75), ("hqq-4bit", 0.5)):
        # Made-up figures in the place of the real ones, which say what they were made from.
        real, figures = json.loads((folder / f"{name}.json").read_text()), document(name, accuracy)
        tasks = {
            task: {
                **figures["tasks"][task],
                **{key: real["tasks"][task].get(key) for key in CONDITIONS},
            }
            for task in real["tasks"]
        }
        (folder / f"{name}.json").write_text(
            json.dumps({**figures, **{key: real[key] for key in SHARED}, "tasks": tasks})
        )
    write_samples(
        tmp_path / "results", tiny.name, "baseline", records([1, 1, 1, 0] * 10, [2.0, 3.0, 2.5])
    )
    write_samples(
        tmp_path / "results", tiny.name, "hqq-4bit", records([0, 1, 1, 0] * 10, [2.2, 3.2, 2.7])
    )
    result = run_script(*arguments)
    assert result.returncode == 0, result.stderr
    lines = [line.partition("  ") for line in result.stdout.splitlines()]
    rows = {name: rest.split() for name, _, rest in lines}
    assert (
        rows["ARC-Challenge accuracy"][:3] == ["0.75", "0.5", "-0.250"]
        and "10/0" in rows["ARC-Challenge accuracy"]
    )
    assert (
        rows["ARC-Challenge accuracy"][-1] == "loss"
        and "0.000977" in rows["ARC-Challenge accuracy"]
    )  # 2^-10
    assert rows["Weights, MB"] == ["2.0", "0.5", "0.250", "x"]
    assert rows["Perplexity"][2:6] == ["1.221", "x", "[1.221,", "1.221]"]
    assert rows["Quantization, s"][1] == "3.5"
    assert (
        tmp_path / "results" / tiny.name / "hqq-4bit-against-baseline.png"
    ).stat().st_size > 5000
    write_samples(tmp_path / "results", tiny.name, "hqq-4bit", records([0, 1, 1], [2.2, 3.2, 2.7]))
    assert_user_error(run_script(*arguments), "different samples of arc", "--overwrite")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "sign, stale",
    [("fingerprint", ["arc"]), ("fingerprint", ["arc", "perplexity"]), ("samples", ["perplexity"])],
)
def test_a_stale_task_costs_a_configuration_its_own_cells_alone(tmp_path, sign, stale):
    """Its results are of other data, or its records of other samples than the baseline's."""
    (tmp_path / "results/tiny").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    for name, accuracy, right in (
        ("baseline", 0.75, [1, 1, 1, 0]),
        ("gptq-4bit", 0.5, [0, 1, 1, 0]),
        ("hqq-4bit", 0.5, [0, 1, 1, 0]),
    ):
        content, samples = document(name, accuracy), records(right * 10, [2.0 / accuracy, 3.0, 2.5])
        for task in stale if name == "gptq-4bit" else ():
            if sign == "fingerprint":
                content["tasks"][task]["fingerprint"] = "0" * 64
            else:
                samples[task].pop()
        (tmp_path / f"results/tiny/{name}.json").write_text(json.dumps(content))
        write_samples(tmp_path / "results", "tiny", name, samples)
    result = analyze(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"tiny gptq-4bit: no comparison of {', '.join(stale)} (" in result.stdout
    assert "tiny hqq-4bit" not in result.stdout
    text = (tmp_path / "README.md").read_text()
    assert (f"not to be compared with it: gptq-4bit ({', '.join(stale)})." in text) is (
        sign == "fingerprint"
    )
    found = tables(text)
    for name in ("gptq-4bit", "hqq-4bit"):
        kept = {"arc", "perplexity"} - {*(stale if name == "gptq-4bit" else ())}
        shares, ratios = (
            found["Scores"][name],
            found["Perplexity and divergence from the baseline"][name],
        )
        assert (
            shares["ARC-Challenge accuracy"].startswith("0.500")
            and ratios["Perplexity ± standard error"] == "20.00"
        )
        assert ("[" in shares["ARC-Challenge accuracy"], "[" in ratios["Ratio [95%]"]) == (
            "arc" in kept,
            "perplexity" in kept,
        )
        verdicts = found["What the differences mean"].get(name, {})
        assert {heading for heading, cell in verdicts.items() if cell != "–"} == {
            HEADINGS[task] for task in kept
        }


@pytest.mark.usefixtures("undrawn")
def test_one_window_has_no_interval(tmp_path):
    """Nor has one question: tables show dashes, plots and page their points alone."""
    (tmp_path / "results/tiny").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    for name, right, loss in (("baseline", 1, 2.0), ("gptq-4bit", 0, 2.5)):
        (tmp_path / f"results/tiny/{name}.json").write_text(json.dumps(document(name, 0.5)))
        write_samples(tmp_path / "results", "tiny", name, records([right], [loss]))
    result = analyze(tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "README.md").read_text()
    assert not re.search(r"\bnan\b", text)
    found = tables(text)
    ratio = found["Perplexity and divergence from the baseline"]["gptq-4bit"]["Ratio [95%]"]
    assert ratio == "1.649 x [–, –]"
    assert found["At a glance"]["gptq-4bit"]["Verdict"] == "cannot tell"


def test_csv_is_the_same_on_every_machine(tmp_path):
    """Machines differ in the last digits of sums: eight are written."""
    metric = next(kind for kind in all_metrics() if kind.key == "f1")
    texts = []
    for nudge in (0.0, 1e-15):
        one = Comparison(
            metric,
            0.3 + nudge,
            0.2,
            Difference(-1 / 3 + nudge, -0.4, 2e-3 * (1 + nudge), 0.1, 9, 3, 2.0),
            None,
            1.23456789012e-27 * (1 + nudge),
            1.0,
        )
        write_csv(ModelResults("tiny", {}), {"gptq-4bit": [one]}, tmp_path)
        texts.append((tmp_path / "comparisons.csv").read_text())
    assert texts[0] == texts[1] and ",-0.33333333," in texts[0] and ",1.2345679e-27," in texts[0]

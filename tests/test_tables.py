"""Every number of README's accuracy, verdict and divergence tables, recomputed from the per-sample
records with pandas alone.
"""

import csv
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, run_script
from made_up_results import document
from recomputed import (
    drawn_interval,
    f1_of_classes,
    interval,
    mean_of,
    numbers,
    records,
    swap_p_value,
    tables,
)

from common.reporting.tables import efficiency_table, size_table
from common.results.documents import ModelResults
from common.running.runtime import load_model
from common.running.speed import measure_speed
from common.tasks.speed import method_in_words

CONFIGURATIONS = ("baseline", "gptq-2bit", "hqq-2bit")
DATA = ["--data", "demo", "--limit", 40, "--windows", 4, "--window-length", 96]


@pytest.fixture(scope="module")
def evaluated(tiny_models, tmp_path_factory, undrawn_module):
    """A folder with results of a tiny model and two quantized ones, and the README made from
    them."""
    folder = tmp_path_factory.mktemp("evaluated")
    model, results = tiny_models["llama", True], folder / "results"
    common = [*DATA, "--results-dir", results]
    assert run_script(ROOT / "common/baseline.py", "--model", model, *common).returncode == 0
    for name in CONFIGURATIONS[1:]:
        method, bits = name.removesuffix("bit").split("-")
        # Whole channels, so that answers do change.
        words = ["--model", model, "--output", folder / name]
        words += ["--bits", bits, "--group-size", "channel"]
        if method == "gptq":
            words += ["--calib-data", "demo", "--calib-samples", 4, "--calib-length", 64]
        result = run_script(ROOT / f"quantize_{method}.py", *words)
        assert result.returncode == 0, result.stderr
        result = run_script(ROOT / "common/evaluation.py", "--model-path", folder / name, *common)
        assert result.returncode == 0, result.stderr
    (folder / "README.md").write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    result = run_script(
        ROOT / "analyze_results.py",
        *("--results-dir", results),
        *("--readme", folder / "README.md"),
        *("--figures-dir", folder / "docs" / "figures"),
    )
    assert result.returncode == 0, result.stderr
    return folder, model.name


COLUMNS = {
    "ARC-Challenge accuracy": ("arc", mean_of("acc")),
    "ARC-Challenge F1": ("arc", f1_of_classes),
    "ARC-Easy accuracy": ("arc_easy", mean_of("acc")),
    "ARC-Easy F1": ("arc_easy", f1_of_classes),
    "SQuAD v2 answerable F1": ("squad_v2", lambda f: f[f.answerable.astype(bool)].f1.mean()),
    "SQuAD v2 unanswerable EM": (
        "squad_v2",
        lambda f: f[~f.answerable.astype(bool)].exact_match.mean(),
    ),
    'SQuAD v2 "no answer"': ("squad_v2", lambda f: (f.predicted == "").mean()),
    "SQuAD v2 F1": ("squad_v2", mean_of("f1")),
    "SQuAD v2 EM": ("squad_v2", mean_of("exact_match")),
    "OpenMath correct": ("openmath", mean_of("correct")),
    "OpenMath mean absolute difference": ("openmath", mean_of("absolute_difference")),
    "OpenMath median absolute difference": (
        "openmath",
        lambda f: f["absolute_difference"].median() if "absolute_difference" in f else math.nan,
    ),
    "OpenMath no number": (
        "openmath",
        lambda f: f["absolute_difference"].isna().mean() if "absolute_difference" in f else 1.0,
    ),
    "OpenMath answer length": ("openmath", lambda f: f.text.str.len().mean()),
    "Ratio [95%]": ("perplexity", lambda frame: math.exp(frame.loss.mean())),
}


def test_accuracy_table(evaluated):
    folder, model = evaluated
    table = tables((folder / "README.md").read_text())["Scores"]
    before = records(folder / "results", model, "baseline")
    changed = 0
    for name in CONFIGURATIONS:
        after = records(folder / "results", model, name)
        for column, (task, metric) in COLUMNS.items():
            if column not in table[name]:
                continue
            shown, own = re.subn(r"^(\S+) \[[^]]*\]", r"\1", table[name][column])
            assert own == ("median" in column and shown != "–")  # its own interval
            cell, value = numbers(shown), metric(after[task])
            if value > 1e6:
                assert shown.startswith("> 1000000")
                continue
            if math.isnan(value):
                assert not cell
                continue
            assert cell[0] == pytest.approx(value, rel=1e-3, abs=6e-4)
            if name != "baseline" and len(cell) == 4:
                first, second = before[task], after[task]
                part = first.index == first.index
                if "absolute difference" in column:  # problems that both answered
                    part = first.absolute_difference.notna() & second.absolute_difference.notna()
                elif "answerable" in column:
                    part = first.answerable.astype(bool) == (" answerable" in column)
                first, second = (one[part].reset_index(drop=True) for one in (first, second))
                difference = metric(second) - metric(first)
                assert cell[1] == pytest.approx(difference, rel=2e-3, abs=6e-4)
                if "median" in column:
                    low, high = drawn_interval(first, second, metric)
                    # Two bootstraps agree to a share of the interval's width, and to the digits
                    # shown.
                    close = {"abs": 0.25 * (high - low) + 1e-3}
                else:
                    low, high = interval(
                        first,
                        second,
                        metric,
                        "cluster" if task == "squad_v2" else None,
                        "absolute difference" not in column,
                    )
                    close = {"rel": 2e-3, "abs": 6e-4}
                assert cell[2:] == [pytest.approx(low, **close), pytest.approx(high, **close)], (
                    column
                )
                changed += difference != 0
    assert changed >= 8  # there was something to recompute


def test_verdict_table(evaluated):
    folder, model = evaluated
    table = tables((folder / "README.md").read_text())["What the differences mean"]
    before = records(folder / "results", model, "baseline")
    fields = {
        "ARC-Challenge accuracy": ("arc", "acc"),
        "ARC-Easy accuracy": ("arc_easy", "acc"),
        "SQuAD v2 EM": ("squad_v2", "exact_match"),
        "OpenMath correct": ("openmath", "correct"),
    }
    for column, (task, field) in fields.items():
        p_values = {}
        for name in CONFIGURATIONS[1:]:
            first, after = (
                before[task][field],
                records(folder / "results", model, name)[task][field],
            )
            lost, won = (
                int(((first == 1) & (after == 0)).sum()),
                int(((first == 0) & (after == 1)).sum()),
            )
            assert f"({lost}/{won}, " in table[name][column]
            changed = lost + won
            if task == "squad_v2":
                p_values[name] = swap_p_value(after - first, before[task].cluster)
            else:
                p_values[name] = (
                    sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed
                )
        smallest, largest = sorted(p_values, key=p_values.get)
        adjusted = {smallest: min(1, 2 * p_values[smallest])}
        adjusted[largest] = max(adjusted[smallest], min(1, p_values[largest]))
        for name, expected in adjusted.items():
            cell = table[name][column]
            if not cell.startswith("gain"):  # which shows its own p-value
                assert numbers(cell)[-1] == pytest.approx(
                    expected, rel=0.06, abs=0.015 if task == "squad_v2" else 0
                )


def test_divergence_table(evaluated):
    folder, model = evaluated
    table = tables((folder / "README.md").read_text())[
        "Perplexity and divergence from the baseline"
    ]
    before = records(folder / "results", model, "baseline")["perplexity"]
    for name in CONFIGURATIONS:
        windows = records(folder / "results", model, name)["perplexity"]
        row, divergence = table[name], windows.kl.explode().astype(float)
        value, error = numbers(row["Perplexity ± standard error"])
        assert value == pytest.approx(math.exp(windows.loss.mean()), abs=6e-3)
        assert error == pytest.approx(math.exp(windows.loss.mean()) * windows.loss.sem(), abs=6e-3)
        for column, expected in (
            ("KL mean", divergence.mean()),
            ("KL median", divergence.median()),
            ("KL 99%", divergence.quantile(0.99)),
            ("KL 99.9%", divergence.quantile(0.999)),
            ("Same top token, %", 100 * windows.same_top.sum() / len(divergence)),
        ):
            assert numbers(row[column])[0] == pytest.approx(
                expected, rel=2e-3, abs=1e-7 if "KL" in column else 6e-3
            ), column
        if name == "baseline":
            assert divergence.mean() < 1e-5  # the noise floor
        else:
            assert numbers(row["Ratio [95%]"])[0] == pytest.approx(
                math.exp((windows.loss - before.loss).mean()), abs=6e-4
            )


def test_report_stands_alone_and_csv_holds_everything(evaluated):
    folder, model = evaluated
    page = (folder / "docs" / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for title in (
        "At a glance",
        "Which one?",
        "Status",
        "Model sizes",
        "Accuracy",
        "Scores",
        "What the differences mean",
        "Perplexity and divergence from the baseline",
        "Efficiency",
        "Size and bits",
    ):
        assert f"<h3>{title}</h3>" in page
    with (folder / "docs" / "tables" / model / "comparisons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["configuration"] for row in rows} == set(CONFIGURATIONS[1:])
    assert {
        "difference",
        "low",
        "high",
        "p_value_holm",
        "p_value_gain_holm",
        "verdict",
        "smallest_detectable",
    } <= set(rows[0])
    measured = pd.read_csv(folder / "docs" / "tables" / model / "measurements.csv")
    document = json.loads((folder / "results" / model / "gptq-2bit.json").read_text())
    one = measured[
        (measured.configuration == "gptq-2bit") & (measured.quantity == "tasks.arc.accuracy")
    ]
    assert one.value.item() == document["tasks"]["arc"]["accuracy"]
    assert len(pd.read_csv(folder / "docs" / "tables" / model / "error_by_layer.csv")) == 2 * 14


def test_noise_floor_is_said(evaluated):
    folder, model = evaluated
    noise = json.loads((folder / "results" / model / "baseline.json").read_text())["noise"]
    assert set(noise) == {"arc", "arc_easy", "squad_v2", "openmath"} and all(
        task["changed"] <= 2 for task in noise.values()
    )
    assert "Noise floor: the baseline evaluated twice" in (folder / "README.md").read_text()


def test_compare_prints_the_same(evaluated):
    folder, model = evaluated
    arguments = [
        ROOT / "compare_to_baseline.py",
        *("--quantized", folder / "gptq-2bit"),
        *("--results-dir", folder / "results"),
        *DATA,
    ]
    printed = run_script(*arguments)
    assert printed.returncode == 0, printed.stderr
    assert (
        "KL divergence from the baseline" in printed.stdout
        and "same most likely token" in printed.stdout
    )
    found = run_script(*arguments, "--json")
    content = json.loads(found.stdout)
    table = tables((folder / "README.md").read_text())
    by_name = {row["name"]: row for row in content["metrics"]}
    for column in ("ARC-Challenge accuracy", "SQuAD v2 F1", "OpenMath correct"):
        shown = numbers(table["Scores"]["gptq-2bit"][column])
        row = by_name[column]
        assert shown == pytest.approx(
            [row["quantized"], row["difference"], row["low"], row["high"]], abs=6e-4
        )
    assert content["divergence"]["kl_mean"] > 0
    assert Path(content["chart"]).stat().st_size > 5000


@pytest.mark.parametrize(
    ("facts", "bits"), [({}, "16"), ({"all": 16.0}, "16"), ({"all": 32.0}, "32")]
)
def test_the_baseline_has_the_bits_of_its_type(facts, bits):
    baseline = document("baseline", 0.5)
    if facts:
        baseline["quantization"]["bits_per_weight"] = facts
    (row,) = size_table(ModelResults("tiny", {"baseline": baseline})).rows
    assert row[1] == bits


def test_speed_is_shown_with_its_range():
    """Of records that hold it; those of old show the median alone."""
    old, new = document("baseline", 0.5), document("gptq-4bit", 0.5)
    ends = {"tokens_per_second_low": 38.25, "tokens_per_second_high": 41.5}
    ends |= {"latency_seconds_low": 0.0123456, "latency_seconds_high": 0.75}
    new["speed"] = {**new["speed"], **ends}
    first, second = efficiency_table(ModelResults("tiny", {"baseline": old, "gptq-4bit": new})).rows
    assert first[1:3] == ["0.5", "40"]
    assert second[1:3] == ["0.5 [0.0123, 0.75]", "40 [38.25, 41.5]"]
    assert "range" in method_in_words(new["speed"], "cpu")
    assert "range" not in method_in_words(old["speed"], "cpu")


def test_the_range_is_that_of_the_runs(tiny, monkeypatch):
    """By a clock that is told: three answers, after one that warms up."""
    model, _ = load_model(tiny, torch.device("cpu"), torch.float32)
    times = iter([0, 9, 18, *(0, 1, 33), *(0, 2, 64), *(0, 3, 34)])
    monkeypatch.setattr("common.running.speed.decodes_faster", lambda *_: False)
    monkeypatch.setattr("common.running.speed._now", lambda _: next(times))
    found = measure_speed(model, 320)
    assert found["runs"] == 3 and found["latency_seconds"] == 34
    assert (found["latency_seconds_low"], found["latency_seconds_high"]) == (33, 64)
    assert found["tokens_per_second"] == pytest.approx(31 / 32)
    assert found["tokens_per_second_low"] == pytest.approx(31 / 62)
    assert found["tokens_per_second_high"] == pytest.approx(31 / 31)
    assert (found["prefill_seconds_low"], found["prefill_seconds_high"]) == (1, 3)

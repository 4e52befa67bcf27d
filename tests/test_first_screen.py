"""README as it is committed: every number of its first tables recomputed from the records of the
documented run, and a reader's questions answered by them alone.
"""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from recomputed import mean_over_tasks, numbers, records, tables
from scipy import stats

from common.results.documents import CONFIGURATIONS
from common.results.peers import PEERS

RESULTS = ROOT / "docs" / "results"
MODELS = ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct")
# The score of each task that recovery is about: records' task and field, the samples that count,
# and what chance gives.
SCORES = {
    "ARC-Challenge accuracy": ("arc", "acc", None, 0.25),
    "ARC-Easy accuracy": ("arc_easy", "acc", None, 0.25),
    "SQuAD v2 answerable F1": ("squad_v2", "f1", "answerable", 0.0),
    "OpenMath correct": ("openmath", "correct", None, 0.0),
}


def macro_f1(letters) -> float:
    """Of gold and predicted letters [samples, 2]."""
    gold, predicted = letters.T.astype(int)
    hits = np.bincount(gold[gold == predicted], minlength=128)
    real, given = np.bincount(gold, minlength=128), np.bincount(predicted, minlength=128)
    return float(np.mean((2 * hits / np.maximum(real + given, 1))[real > 0]))


LETTERS = (["gold", "predicted"], macro_f1)
F1 = {"arc": LETTERS, "arc_easy": LETTERS, "squad_v2": ("f1", np.mean)}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def readme(model):
    text = (ROOT / "README.md").read_text()
    start = text.index(f"### {model} (documented run)")
    return re.split(r"\n### |<!-- results:end -->", text[start:])[0]


@pytest.fixture(scope="module")
def shown(readme):
    return tables(readme)


@pytest.fixture(scope="module")
def documents(model):
    files = (RESULTS / model / f"{name}.json" for name in (*CONFIGURATIONS, *PEERS))
    return {file.stem: json.loads(file.read_text()) for file in files if file.is_file()}


@pytest.fixture(scope="module")
def samples(model, documents):
    return {name: records(RESULTS, model, name) for name in documents}


# Bits that a group stores beside its codes, where it is not a scale of 16 bits and a zero-point of
# as many as a code: the package's has 16 as well, NF4 a scale of 32 and no zero-point.
BESIDE_CODES = {"hqq-package-4bit": 32, "bitsandbytes-nf4": 32}
# The GPTQ format has 32 bits for every input channel, which says what group that is in; by the
# shapes of a layer's linears (input channels of all seven, and weights).
GPTQ_FORM = ("autoround-4bit", "gptqmodel-gptq-4bit")
GPTQ_INDEX = {
    "SmolLM2-135M-Instruct": 32 * 4992 / 3_538_944,
    "Qwen2.5-Coder-0.5B-Instruct": 32 * 10_240 / 14_909_440,
}


def test_every_configuration_and_library_is_a_row(shown):
    assert {*CONFIGURATIONS, *PEERS} == {*shown["At a glance"]}


def test_it_comes_first_and_the_rest_is_folded(readme):
    """A table, then which one to take, then three small tables."""
    titles = [line[5:] for line in readme.splitlines() if line.startswith("#### ")]
    first = ["At a glance", "Which one?", "Status", "Model sizes", "Accuracy"]
    assert titles[:5] == first and readme.count("<details>") == readme.count("</details>") == 1
    open_, folded = readme.split("<details>")
    assert [title for title in titles if f"#### {title}\n" in folded] == titles[5:]
    assert "![" not in open_ and open_.index("| Configuration |") < 600
    assert all(len(line.split("|")) <= 11 for line in open_.splitlines())


def test_sizes_bits_and_times(shown, documents, model):
    whole = documents["baseline"]["quantization"]["weights_bytes"]
    for name, row in shown["At a glance"].items():
        facts = documents[name]["quantization"]
        assert row["MB"] == f"{facts['weights_bytes'] / 1e6:.1f}"
        bits = numbers(row["Bits per weight"])
        assert bits[-1] == pytest.approx(16 * facts["weights_bytes"] / whole, abs=6e-3)
        grid = facts.get("grid")
        if grid and grid["group_size"]:
            beside = BESIDE_CODES.get(name) or 16 + grid["bits"] * (not grid["symmetric"])
            exact = (
                grid["bits"] + beside / grid["group_size"] + GPTQ_INDEX[model] * (name in GPTQ_FORM)
            )
            # What is counted from a checkpoint holds the shapes of its matrices, too.
            assert bits[0] == pytest.approx(exact, abs=0.02)
        # Times of another card are not shown beside the others'.
        card = documents[name]["device"]["name"] == documents["baseline"]["device"]["name"]
        timed = [documents[name]["speed"]["tokens_per_second"]] if card else []
        assert numbers(row["Tokens/s"]) == pytest.approx(timed, rel=1e-2, abs=0.06)
        seconds = facts.get("seconds", {}).get("total") if card else None
        assert row["Quantized in, s"] == ("–" if seconds is None else f"{seconds:.1f}")
        size = shown["Model sizes"][name]
        assert numbers(size["Size"]) == pytest.approx(
            [facts["weights_bytes"] / 1e6, bits[-1]], abs=0.06
        )
        assert numbers(size["Compression"])[0] == pytest.approx(
            whole / facts["weights_bytes"], abs=6e-3
        )
        assert size["Precision"].startswith(f"{grid['bits'] if grid else 16} bits")
    assert list(shown["At a glance"]) == list(shown["Model sizes"]) == list(documents)


def test_divergence_and_perplexity(shown, samples):
    before = samples["baseline"]["perplexity"]
    for name, row in shown["At a glance"].items():
        windows = samples[name]["perplexity"]
        kl = np.concatenate([np.asarray(one, float) for one in windows.kl]).mean()
        assert numbers(row["KL"])[0] == pytest.approx(kl, rel=6e-3, abs=1e-9)
        ratio = math.exp((windows.loss - before.loss).mean())
        expected = [] if name == "baseline" else [pytest.approx(ratio, abs=6e-4)]
        assert numbers(row["PPL ratio"]) == expected


def part_of(frame: pd.DataFrame, only: str | None) -> pd.DataFrame:
    return frame if only is None else frame[frame[only].astype(bool)]


def columns_of(frame: pd.DataFrame, names) -> np.ndarray:
    """Columns of records; letters as numbers."""
    found = frame[names]
    return found.map(ord).to_numpy() if isinstance(names, list) else found.to_numpy(float)


def clusters_of(frame: pd.DataFrame) -> np.ndarray:
    return frame["cluster" if "cluster" in frame else "id"].to_numpy(str)


def better_than_chance(frame: pd.DataFrame, field: str, chance: float) -> bool:
    """Whether the 95% interval of the mean lies above chance."""
    values, groups = columns_of(frame, field), clusters_of(frame)
    names, sizes = np.unique(groups, return_counts=True)
    left_out = np.array([values[groups != name].mean() for name in names])
    degrees = len(frame) ** 2 / (sizes**2).sum() - 1
    error = np.std(left_out) * math.sqrt(len(left_out) - 1)
    return values.mean() - stats.t.ppf(0.975, degrees) * error > chance


def test_recovery(readme, shown, samples):
    baseline = {
        name: part_of(samples["baseline"][task], only)
        for name, (task, _, only, _) in SCORES.items()
        if task in samples["baseline"]
    }
    able = [
        name
        for name, frame in baseline.items()
        if better_than_chance(frame, SCORES[name][1], SCORES[name][3])
    ]
    assert able and f"the mean over {', '.join(able)}" in readme
    for name in set(baseline) - set(able):
        assert f"{name}: the baseline is no better there than chance" in readme
    for configuration, row in shown["At a glance"].items():
        cell = numbers(row["Recovery, %"])
        if configuration == "baseline":
            assert not cell
            continue
        found = []
        for name in able:
            task, field, only, _ = SCORES[name]
            both = baseline[name], part_of(samples[configuration][task], only)
            values = (columns_of(frame, field) for frame in both)
            found.append((*values, clusters_of(both[0]), np.mean))
        value, low, high = mean_over_tasks(found, ratios=True)
        digits = 0.06 if high - low < 0.1 else 0.6
        assert cell == pytest.approx([100 * value, 100 * low, 100 * high], abs=digits)


def test_f1(shown, samples):
    for name, row in shown["Accuracy"].items():
        pairs = []
        for task, (columns, f1) in F1.items():
            if task in samples[name]:
                both = samples["baseline"][task], samples[name][task]
                values = (columns_of(frame, columns) for frame in both)
                pairs.append((*values, clusters_of(both[0]), f1))
        assert row["F1"] == f"{np.mean([f1(after) for _, after, _, f1 in pairs]):.3f}"
        cell = numbers(row["Δ vs baseline [95%]"])
        if name == "baseline":
            assert not cell
        else:
            assert cell == pytest.approx(mean_over_tasks(pairs, ratios=False), abs=6e-4)


def test_verdicts_are_those_of_the_table_below(shown):
    for name, verdicts in shown["What the differences mean"].items():
        row = shown["At a glance"][name]
        lost = [column for column, cell in verdicts.items() if cell.startswith("loss")]
        silent = any("answers less" in cell for cell in verdicts.values())
        named = {"perplexity": numbers(row["PPL ratio"])[0] > 1.0105}
        named["KL"] = numbers(row["KL"])[0] > 0.01 and not named["perplexity"]
        for title in ("ARC-Challenge", "ARC-Easy", "SQuAD v2", "OpenMath"):
            named[title] = any(column.startswith(title) for column in lost)
        words = [title for title, one in named.items() if one]
        parts = ([f"loss: {', '.join(words)}"] if words else []) + ["answers less"] * silent
        near = verdicts["Perplexity"].startswith("loss")  # and by no more than 1%
        small = "within 1%, measurable: perplexity" if near else "no loss seen"
        assert row["Verdict"] == ("; ".join(parts) or small)
        assert shown["Accuracy"][name]["Status"].endswith(row["Verdict"])
        # A model whose perplexity is well up has gained nothing.
        if named["perplexity"]:
            assert not any(cell.startswith("gain") for cell in verdicts.values())


def test_a_readers_questions(shown, documents):
    """Which is best in 4 GB, or in 800 MB, which is smallest without loss, and fastest: from the
    cells of the first table.
    """
    rows = {
        name: {
            "size": numbers(row["MB"])[0],
            "kl": 0.0 if name == "baseline" else numbers(row["KL"])[0],
            "speed": max(numbers(row["Tokens/s"]), default=0.0),
            "verdict": row["Verdict"],
        }
        for name, row in shown["At a glance"].items()
    }
    answers = shown["Which one?"]
    wanted, answer = next(iter(answers.items()))
    small = [name for name, one in documents.items() if one["speed"]["memory_bytes"] <= 4e9]
    assert wanted == "Best quality in 4 GB of memory"
    assert answer["Take"] == min(small, key=lambda name: rows[name]["kl"])
    steps = {
        numbers(wanted)[0]: row["Take"] for wanted, row in answers.items() if "budget" in wanted
    }
    for budget in (4000.0, 800.0, *(row["size"] for row in rows.values())):
        fits = [name for name, row in rows.items() if row["size"] <= budget]
        best = min(fits, key=lambda name: (rows[name]["kl"], rows[name]["size"]))
        assert steps[max(size for size in steps if size <= budget)] == best
    for wanted, words in (
        ("Smallest without measurable loss", ["no loss seen"]),
        ("Smallest with at most 1% of loss", ["no loss seen", "within 1%, measurable: perplexity"]),
    ):
        whole = [name for name, row in rows.items() if row["verdict"] in words]
        order = {name: (rows[name]["size"], rows[name]["kl"]) for name in whole}
        assert answers[wanted]["Take"] == min(whole, key=order.get, default="none")
    top = max(row["speed"] for row in rows.values())
    fast = [name for name, row in rows.items() if row["speed"] >= 0.98 * top]
    assert answers["Fastest"]["Take"] == min(fast, key=lambda name: rows[name]["kl"])
    free = [
        name
        for name, document in documents.items()
        if name != "baseline" and document["quantization"]["calibration"] is None
    ]
    best = min(free, key=lambda name: rows[name]["kl"])
    assert answers["Best without calibration data"]["Take"] == best

"""What others report, and ours beside it."""

import json
import math
import re

import pytest
from conftest import ROOT
from made_up_results import document

from common.base.errors import UserError
from common.reporting.compare_all import compare_all
from common.reporting.published import (
    BASE,
    FIGURES,
    INSTRUCT,
    NOT_MEASURED,
    published_table,
    write_published,
)
from common.results.documents import CONFIGURATIONS, load_all, write_samples
from common.results.peers import PEERS
from common.tasks.task import all_metrics

KINDS = {(kind.task, kind.key): kind for kind in all_metrics()}


def test_every_figure_has_a_source_and_a_ratio_that_is_right():
    for model, figures in FIGURES.items():
        for one in figures:
            assert re.search(r"\]\(https://[^)]+\)", one.source)
            whole = re.search(r"(\d+\.\d+) at 16 bits", one.measure)
            if whole and one.ratio != "–":
                ratio = float(one.reported) / float(whole[1])
                assert float(one.ratio) == pytest.approx(ratio, abs=6e-3)
            if one.ours:
                configuration, metric = one.ours
                assert configuration in {**CONFIGURATIONS, **PEERS} and metric in KINDS
        assert {row[-1] for row in published_table(model, None, {}).rows} <= {NOT_MEASURED, "–"}


def test_ours_stand_beside_them(tmp_path):
    """Of the very model; another one of that name is none."""
    losses = {"baseline": 2.0, "awq-4bit": 2.05}
    for folder, source in (
        ("Llama-3.2-1B-Instruct", INSTRUCT),
        ("Llama-3.2-1B", "me/Llama-3.2-1B"),
    ):
        (tmp_path / folder).mkdir()
        for name, loss in losses.items():
            found = {**document(name, 0.5), "source": source, "checkpoint": name}
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(found))
            rows = [{"id": str(i), "loss": loss + i} for i in range(3)]
            write_samples(tmp_path, folder, name, {"perplexity": rows})
    models = [(one, compare_all(tmp_path, one)) for one in load_all(tmp_path)]
    file = tmp_path / "published.md"
    with pytest.raises(UserError, match="needs the lines"):
        write_published(models, file)
    file.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter")
    write_published(models, file)
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after") and "old" not in text
    awq = next(line for line in text.splitlines() if "| AWQ, 4 bits |" in line)
    assert awq.endswith(f"| 1.090 | {math.exp(0.05):.3f} (awq-4bit, Perplexity) |")
    exl2 = next(line for line in text.splitlines() if "| EXL2" in line)
    assert exl2.endswith("not measured: gptq-4bit has no results of perplexity |")
    base = text[text.index(f"#### {BASE.split('/')[1]}\n") :]
    assert base.count(NOT_MEASURED) == len(FIGURES[BASE])


def test_the_committed_file_is_what_results_give(tmp_path):
    copy = tmp_path / "published.md"
    copy.write_text((ROOT / "docs/published.md").read_text())
    folder = ROOT / "docs/results"
    write_published([(one, {}) for one in load_all(folder, documented=True)], copy)
    assert copy.read_text() == (ROOT / "docs/published.md").read_text()

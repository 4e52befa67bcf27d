"""The page that shows results: what stands in it, by its HTML and its data; test_browser.py opens
it.
"""

import base64
import gzip
import json
import random
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from conftest import ROOT, assert_user_error, run_script
from made_up_results import NASTY, README, document, made_up_records, model_part
from plotly.offline import get_plotlyjs

from common.base.errors import UserError
from common.reporting.compare_all import compare_all
from common.reporting.page import ModelPart, inline, page, table_html
from common.reporting.page_plots import plots
from common.reporting.page_samples import flipped
from common.reporting.report import first_tables, more_tables
from common.reporting.tables import Table
from common.results.documents import ModelResults, load_model_results, write_samples
from common.results.hashes import rows_fingerprint
from common.tasks.task import all_metrics, all_tasks
from common.text.data import demo_rows, load_rows

ADDRESSES = ("src", "href", "action", "srcset", "data", "poster")


class Reader(HTMLParser):
    """Tables as rows of texts, data as objects, addresses that a browser would fetch, open tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.data, self.fetched, self.open, self.scripts = [], [], [], [], []
        self._kind = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.fetched += [
            found[name]
            for name in ADDRESSES
            if name in found and (tag != "a" or name != "href") and found[name] != "data:,"
        ]
        assert not any(name.startswith("on") for name in found), found
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "script":
            self._kind = found.get("type", "javascript")
            self.scripts.append("")
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "script" and self._kind == "application/json":
            self.data.append(json.loads(self.scripts[-1]))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def read(text: str) -> Reader:
    found = Reader(text)
    assert not found.open and not found.fetched
    return found


def test_it_stands_alone_and_is_small(tmp_path):
    part = model_part(tmp_path, ["gptq-4bit"])
    text = page([part])
    found = read(text)
    assert len(text.encode()) < 3_000_000
    assert "default-src 'none'" in text
    packed = next(script for script in found.scripts if len(script) > 1_000_000)
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    assert page([part]) == text


def test_tables_are_those_of_the_readme(tmp_path):
    part = model_part(tmp_path, ["gptq-4bit", "hqq-8bit"])
    shown = read(page([part])).tables
    expected = [
        *first_tables(part.results, part.comparisons),
        *more_tables(part.results, part.comparisons),
    ]
    assert len(shown) == len(expected) > 4
    for one, table in zip(shown, expected, strict=True):
        plain = [[cell.replace("`", "") for cell in row] for row in [table.header, *table.rows]]
        assert [[cell.strip() for cell in row] for row in one] == plain


@pytest.mark.parametrize(
    "cell, html",
    [
        ("`packed` **best** *so far*", "<code>packed</code> <strong>best</strong> <em>so far</em>"),
        ("a < b & c > d", "a &lt; b &amp; c &gt; d"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[more](https://example.org/a)", '<a href="https://example.org/a">more</a>'),
        ("[no](javascript:alert(1))", "[no](javascript:alert(1))"),
        ('"quoted" [1, 2]', "&quot;quoted&quot; [1, 2]"),
        ("a_b_c 4*5*6", "a_b_c 4<em>5</em>6"),
        ("", ""),
    ],
)
def test_marks_within_a_cell(cell, html):
    assert inline(cell) == html


def test_no_picture_is_fetched():
    assert "<img" not in inline("![x](https://example.org/x.png)")


def test_a_table_in_a_box():
    table = Table("Which <one>?", ["Configuration", "B"], [["gptq-4bit", "1"], ["other", "2"]])
    text = table_html(table, ["gptq-4bit"])
    assert "<h3>Which &lt;one&gt;?</h3>" in text and 'class="box"' in text
    assert re.findall('data-configuration="([^"]*)"', text) == ["gptq-4bit"]
    read(text)


def test_texts_of_any_kind_stay_texts(tmp_path):
    """In names of configurations, reasons and answers."""
    part = model_part(
        tmp_path, ["gptq-4bit", *NASTY], answers=[*NASTY, "</script><script>alert(1)"]
    )
    found = read(page([part]))
    names = {row[0] for table in found.tables for row in table}
    assert set(NASTY) <= names
    (data,) = found.data
    assert set(NASTY) <= {one["name"] for one in data["configurations"]}
    texts = {
        text
        for task in data["samples"]["tasks"]
        for one in task["samples"]
        for text in one["texts"]
    }
    assert any("<script>" in text for text in texts)
    for plot in data["plots"]:
        for trace in (trace for view in plot["views"] for trace in view["traces"]):
            assert all("<script" not in text for text in trace.get("hovertext", []))


@pytest.mark.parametrize("count", [0, 1, 40])
def test_few_and_many_configurations(tmp_path, count):
    part = model_part(tmp_path, [f"made-{i}" for i in range(count)])
    found = read(page([part]))
    (data,) = found.data
    assert len(data["configurations"]) == count + 1
    assert bool(data["samples"]["tasks"]) == (count > 0)


def test_without_results_samples_or_tasks(tmp_path):
    status = {"gptq-4bit": {"state": "failed", "reason": "disk full"}}
    nothing = ModelResults("tiny", {}, status)
    bare = document("gptq-4bit", 0.5)
    bare.update(tasks={}, speed={})
    no_tasks = ModelResults("tiny", {"baseline": document("baseline", 0.75), "gptq-4bit": bare})
    for results in (nothing, no_tasks):
        samples = flipped(results, {}, tmp_path, True)
        assert samples == {"configurations": ["baseline"], "tasks": []}
        text = page([ModelPart(results, {}, samples)])
        assert read(text).data[0]["samples"]["tasks"] == []
    assert read(page([])).tables == []


def test_points_stand_at_their_sizes(tmp_path):
    """Those of equal sizes too."""
    part = model_part(tmp_path, ["gptq-4bit", "awq-4bit", "hqq-4bit"])
    against = [one for one in plots(part.results, part.comparisons) if "against" in one["title"]]
    assert [one["title"] for one in against] == [
        "Divergence from the baseline against size",
        *[
            f"{kind.name} against size"
            for kind in all_metrics()
            if kind.plotted and kind.task != "arc_easy"
        ],
        "Tokens per second against size",
    ]
    kl = against[0]["views"][0]
    for plot in against:
        for trace in plot["views"][0]["traces"]:
            document = part.results.documents[trace["configuration"]]
            assert trace["x"] == [document["quantization"]["weights_bytes"] / 1e6]
    assert {trace["configuration"]: trace["y"][0] for trace in kl["traces"]} == {
        name: part.results.documents[name]["tasks"]["perplexity"]["divergence"]["kl_mean"]
        for name in ("gptq-4bit", "awq-4bit", "hqq-4bit")
    }
    assert kl["labels"] and kl["layout"]["yaxis"]["type"] == "log" and kl["front"] == "lower"


def test_samples_are_those_that_flipped(tmp_path):
    """Against a count of its own over the records."""
    names = ["baseline", "gptq-4bit", "hqq-4bit"]
    part = model_part(tmp_path, names[1:])
    records = made_up_records(names)
    right = {"arc": "acc", "squad_v2": "exact_match", "openmath": "correct"}
    shown = {task["title"]: task for task in part.samples["tasks"]}
    for task in (task for task in all_tasks() if task.name in right):
        rows = [records[name][task.name] for name in names]
        expected = {
            samples[0]["id"]: [int(one[right[task.name]]) for one in samples]
            for samples in zip(*rows, strict=True)
            if len({one[right[task.name]] for one in samples}) == 2
        }
        found = shown[task.title]
        assert {s["id"]: [a[0] for a in s["answers"]] for s in found["samples"]} == expected
        assert found["total"] == len(rows[0]) and 0 < len(expected) < len(rows[0])
    arc = shown[next(task.title for task in all_tasks() if task.name == "arc")]
    rows = {row["id"]: row for row in demo_rows("arc").rows}
    for sample in arc["samples"]:
        row = rows[sample["id"]]
        gold = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert sample["question"].startswith(row["question"]) and sample["gold"].endswith(gold)
        for name, (_, text) in zip(names, sample["answers"], strict=True):
            record = next(one for one in records[name]["arc"] if one["id"] == sample["id"])
            assert sample["texts"][text].startswith(f"{record['predicted']}. ")


def test_texts_of_a_data_set_are_put_in_on_asking_alone(tmp_path, capsys):
    """And only where they are the very rows that were evaluated."""
    rows = [
        {**row, "id": f"real-{i}", "question": f"Secret question {i}?"}
        for i, row in enumerate(demo_rows("arc").rows)
    ]
    data = tmp_path / "data/allenai/ai2_arc/ARC-Challenge"
    data.mkdir(parents=True)

    def written(content):
        pd.DataFrame(content).to_parquet(data / "test.parquet")

    written(rows)
    folder, records = tmp_path / "results/tiny", made_up_records(["baseline", "gptq-4bit"])
    folder.mkdir(parents=True)
    arc = next(task for task in all_tasks() if task.name == "arc")
    drawn = load_rows(arc.address, tmp_path / "data", *arc.sample(None)).rows
    for name in records:
        one = document(name, 0.5, demo_data=False)
        one["tasks"] = {
            "arc": {**one["tasks"]["arc"], "data": "allenai/ai2_arc/ARC-Challenge:test"}
        }
        one["tasks"]["arc"].update(samples=len(rows), fingerprint="")
        with pytest.raises(UserError, match="other rows"):
            arc.rows_again(one["tasks"]["arc"], tmp_path / "data")
        one["tasks"]["arc"]["fingerprint"] = rows_fingerprint(drawn)
        (folder / f"{name}.json").write_text(json.dumps(one))
        for record, row in zip(records[name]["arc"], drawn, strict=True):
            record.update(id=row["id"])
        write_samples(tmp_path / "results", "tiny", name, {"arc": records[name]["arc"]})
    results = load_model_results(folder)
    comparisons = compare_all(tmp_path / "results", results)

    def found(texts):
        return json.dumps(
            flipped(results, comparisons, tmp_path / "results", texts, tmp_path / "data")
        )

    assert "Secret" not in found(False)
    capsys.readouterr()
    (task,) = json.loads(found(True))["tasks"]
    by_id = {row["id"]: row["question"] for row in rows}
    assert task["texts"] and all(
        sample["question"].startswith(by_id[sample["id"]]) for sample in task["samples"]
    )
    written([{**row, "question": "Another?"} for row in rows])
    (task,) = json.loads(found(True))["tasks"]
    assert not task["texts"] and not any(sample["question"] for sample in task["samples"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "has other rows than those that were evaluated" in said


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_both_pages(tmp_path):
    part = model_part(tmp_path / "results", ["gptq-4bit"])
    (tmp_path / "README.md").write_text(README)
    words = [ROOT / "analyze_results.py", "--results-dir", tmp_path / "results"]
    words += ["--readme", tmp_path / "README.md", "--figures-dir", tmp_path / "docs/figures"]
    said = run_script(*words, "--texts")
    assert said.returncode == 0, said.stderr
    for file in (tmp_path / "docs/report.html", tmp_path / "results/report.html"):
        assert str(file) in said.stdout
        (data,) = read(file.read_text()).data
        assert data["samples"] == part.samples
    assert_user_error(run_script(*words, "--data-root", tmp_path), "--data-root is where --texts")


def test_the_committed_page_holds_no_text_of_a_data_set():
    text = (ROOT / "docs/report.html").read_text()
    assert len(text.encode()) < 6_000_000
    tasks = [task for data in read(text).data for task in data["samples"]["tasks"]]
    assert tasks and not any(task["texts"] for task in tasks)
    for sample in (sample for task in tasks for sample in task["samples"]):
        assert not sample["question"] and not sample["passage"]
        assert all(len(answer) < 40 for answer in sample["texts"])


def test_random_texts_do_not_end_the_data(tmp_path):
    random.seed(5)
    pieces = ["</script>", "<!--", "<script>", "-->", "\u2028", "]]>", "&lt;", "\\u003c", '"', "'"]
    answers = ["".join(random.choices(pieces, k=6)) for _ in range(40)]
    (data,) = read(page([model_part(tmp_path, ["gptq-4bit"], answers=answers)])).data
    shown = {
        text
        for task in data["samples"]["tasks"]
        for one in task["samples"]
        for text in one["texts"]
    }
    assert any(answer in text for text in shown for answer in answers)

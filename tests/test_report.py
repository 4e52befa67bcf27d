"""README's tables from results alone, on made-up ones."""

import json
import shutil
import subprocess

import pytest
from conftest import ROOT, assert_user_error, run_script
from made_up_results import README, analyze, document
from recomputed import tables

from common.reporting.overview import rows_of
from common.reporting.report import warnings
from common.reporting.tracker import METHODS
from common.results.documents import CONFIGURATIONS, ModelResults
from common.results.hashes import checkpoint_hash
from common.results.identity import incomparable, of_one_card, shared_changes


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for name, accuracy in (("baseline", 0.75), ("gptq-4bit", 0.5)):
        (folder / f"{name}.json").write_text(json.dumps(document(name, accuracy)))
    (folder / "status.json").write_text(
        json.dumps(
            {
                "baseline": {"state": "done"},
                "gptq-4bit": {"state": "warning", "reason": "FAIL | perplexity"},
                "adaround-8bit": {"state": "done"},
                "hqq-4bit": {"state": "failed", "reason": "disk full"},
            }
        )
    )
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_tables(results):
    assert analyze(results).returncode == 0
    text = (results / "README.md").read_text()
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("after\n")
    status = tables(text)["Status"]
    assert status["AWQ"] == {
        "Type": "weights, calibrated",
        "4-bit": "⬜ Not started",
        "8-bit": "–",
        "Status": "⬜ Not started",
        "Notes": "–",
    }
    assert status["HQQ"]["4-bit"] == status["HQQ"]["Status"] == "❌ Failed"
    assert status["HQQ"]["8-bit"] == "⬜ Not started"
    assert status["HQQ"]["Notes"] == "4-bit: disk full"
    assert status["GPTQ"]["4-bit"] == status["GPTQ"]["Status"] == "⚠️ Check"
    assert status["GPTQ"]["Notes"] == "4-bit: FAIL / perplexity"
    assert status["AdaRound"]["Status"] == "🔄 In part"
    baseline = status["baseline"]
    assert (baseline["Type"], baseline["Status"]) == ("not quantized", "✅ Done")
    methods = {found[0] for found in CONFIGURATIONS.values() if found}
    assert set(status) == {"baseline", *(METHODS[method][0] for method in methods)}
    assert tables(text)["Model sizes"]["gptq-4bit"] == {
        "Precision": "4 bits",
        "Size": "0.5 MB (4.00 bits per weight)",
        "Compression": "4.00 x",
        "Status": "⚠️ Check",
    }
    assert "| gptq-4bit | 4 | 64 | – | 4.00 | 0.5 | 4.00 | 2.5 |" in text
    # Without records of the samples there are values, but no differences.
    assert (
        "| gptq-4bit | 0.500 | 0.500 | 0.250 | 2 | > 1000000 | 0.250 |" in text
        and "| gptq-4bit | 20.00 | –" in text
    )
    assert "What the differences mean" not in text
    assert "compare methods with each other" in text
    for link in ("accuracy_against_size", "quantization_time", "memory"):
        assert (results / "figures" / "tiny" / f"{link}.png").stat().st_size > 5000
        assert f"figures/tiny/{link}.png" in text


def test_twice_changes_nothing(results):
    def everything():
        analyze(results)
        return {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}

    assert everything() == everything()


@pytest.mark.usefixtures("undrawn")
def test_other_conditions_are_named(results):
    other = document("hqq-8bit", 0.7, device={"type": "cuda", "name": "a GPU", "threads": 2})
    (results / "results/tiny/hqq-8bit.json").write_text(json.dumps(other))
    assert analyze(results).returncode == 0
    text = (results / "README.md").read_text()
    assert "not to be compared with it: hqq-8bit" in text
    assert "hqq-8bit" in tables(text)["At a glance"]
    assert "hqq-8bit" not in {row["Take"] for row in tables(text)["Which one?"].values()}


@pytest.mark.usefixtures("undrawn")
def test_what_was_evaluated_on_fewer_samples_is_left_out(results):
    """A configuration that a later batch with another --limit refused: its figures are not those of
    the header's samples.
    """
    stale = document("gptq-4bit", 0.5)
    stale["tasks"]["arc"]["samples"] = 9
    stale["tasks"]["perplexity"]["windows"] = 9
    (results / "results/tiny/gptq-4bit.json").write_text(json.dumps(stale))
    assert analyze(results).returncode == 0
    text = (results / "README.md").read_text()
    assert (
        "Left out, as evaluated on more or fewer samples than these: gptq-4bit (arc, perplexity)."
        in text
    )
    assert (
        "| gptq-4bit | – | – | 0.250 | 2 | > 1000000 | 0.250 |" in text
        and "| gptq-4bit | – | –" in text
    )
    assert "0.500" not in text and "| gptq-4bit | 4 | 64 | – | 4.00 | 0.5 |" in text


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_that_is_another_by_now_is_named(results, tiny):
    """Quantized again by hand: the tables still show what was evaluated."""
    folder = results / "models/tiny/gptq-4bit"
    shutil.copytree(tiny, folder)
    for found, named in ((checkpoint_hash(folder, results), False), ("0" * 64, True)):
        content = document("gptq-4bit", 0.5, checkpoint=found)
        (results / "results/tiny/gptq-4bit.json").write_text(json.dumps(content))
        said = run_script(
            ROOT / "analyze_results.py", "--readme", results / "README.md", cwd=results
        )
        assert said.returncode == 0, said.stderr
        line = (
            "tiny gptq-4bit: the figures are of another checkpoint than models/tiny/gptq-4bit "
            "holds now; evaluate it again"
        )
        assert (line in said.stdout.splitlines()) is named


@pytest.mark.usefixtures("undrawn")
def test_damaged_results_and_readme(results):
    (results / "results/tiny/gptq-4bit.json").write_text("{")
    before = (results / "README.md").read_text()
    assert_user_error(analyze(results), "gptq-4bit.json is damaged")
    assert (results / "README.md").read_text() == before
    (results / "results/tiny/gptq-4bit.json").unlink()
    (results / "README.md").write_text("no markers")
    assert_user_error(analyze(results), "needs the lines")
    shutil.rmtree(results / "results")
    assert_user_error(analyze(results), "holds no results")


@pytest.mark.usefixtures("undrawn")
def test_another_results_folder_leaves_the_documented_run_in_the_readme(results):
    shutil.copytree(results / "results", results / "docs/results")
    (results / "results").rename(results / "mine")
    for folder, titles in (("mine", {"local", "documented"}), ("docs/results", {"documented"})):
        found = run_script(ROOT / "analyze_results.py", "--results-dir", folder, cwd=results)
        assert found.returncode == 0, found.stderr
        text = (results / "README.md").read_text()
        shown = {kind for kind in ("local", "documented") if f"### tiny ({kind} run)" in text}
        assert shown == titles
    before = (results / "README.md").read_text()
    missing = run_script(ROOT / "analyze_results.py", "--results-dir", "typo", cwd=results)
    assert_user_error(missing, "typo holds no results")
    assert (results / "README.md").read_text() == before
    assert not (results / "typo").exists()


@pytest.mark.usefixtures("undrawn")
def test_documented_and_local_results_are_told_apart(results):
    """The documented run never passes as one of this machine; both are shown, each as what it
    is."""
    words = [ROOT / "analyze_results.py", "--results-dir", results / "results"]
    words += ["--documented-dir", results / "documented", "--readme", results / "README.md"]
    words += ["--figures-dir", results / "figures"]
    shutil.copytree(results / "results", results / "documented")
    file = results / "results/tiny/baseline.json"
    file.write_text(json.dumps(document("baseline", 0.875, date="2031-05-06")))
    assert run_script(*words).returncode == 0
    text = (results / "README.md").read_text()
    local, documented = text.split("### tiny (documented run)")
    assert (
        "### tiny (local run)\n\nA local run of 2031-05-06." in local
        and "| baseline | 0.875 |" in local
    )
    # It has few questions.
    assert "questions a task at most: too few" in local
    assert (
        "with the project" in documented
        and "not of this machine" in documented
        and "| baseline | 0.750 |" in documented
    )
    assert "figures/tiny/memory.png" in local and "figures/documented/tiny/memory.png" in documented
    assert (results / "tables/tiny/measurements.csv").read_bytes() != (
        results / "tables/documented/tiny/measurements.csv"
    ).read_bytes()
    shutil.rmtree(results / "results")  # a fresh clone
    assert run_script(*words).returncode == 0
    assert "local run" not in (results / "README.md").read_text()


@pytest.mark.slow
def test_a_fresh_clone_regenerates_readme(tmp_path):
    """From the committed results alone, to the letter."""
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    result = run_script(
        ROOT / "analyze_results.py",
        "--results-dir",
        tmp_path / "results",
        "--documented-dir",
        ROOT / "docs" / "results",
        "--readme",
        tmp_path / "README.md",
        "--figures-dir",
        tmp_path / "docs/figures",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "README.md").read_text() == readme


def test_nothing_committed_is_where_local_results_are_looked_for():
    listed = subprocess.run(
        ["git", "ls-files", "results", "docs/results"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("no git checkout")
    assert all(line.startswith("docs/results/") for line in listed.stdout.splitlines())


@pytest.mark.parametrize(
    "card, alike", [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False)]
)
def test_two_cards_of_one_chip_answer_alike(card, alike):
    """What a model answers on the other is compared, but its times are not shown."""
    documents = {
        name: document(
            name,
            0.5,
            device={"type": "cuda", "name": one, "memory_bytes": len(one)},
            speed={"tokens_per_second": 7.0, "memory_bytes": 5},
        )
        for name, one in (("baseline", "NVIDIA H200"), ("hqq-4bit", card))
    }
    documents["hqq-4bit"]["quantization"]["device"] = {"type": "cuda", "name": card}
    documents["gptq-4bit"] = {**documents["baseline"], "configuration": "gptq-4bit"}
    made = {**documents["hqq-4bit"]["quantization"], "device": {"type": "cuda", "name": "first"}}
    documents["gptq-4bit"]["quantization"] = made
    assert (not incomparable(documents["baseline"], documents["hqq-4bit"])) == alike
    results = of_one_card(ModelResults("tiny", documents))
    # Another card's seconds are of another card, whatever it answers.
    assert results.other_cards == {"hqq-4bit": card}
    assert all(results.documents[name] == documents[name] for name in ("baseline", "gptq-4bit"))
    found = results.documents["hqq-4bit"]
    assert found["speed"] == ({"memory_bytes": 5} if alike else documents["hqq-4bit"]["speed"])
    assert "seconds" not in found["quantization"]
    said = " ".join(warnings(results))
    assert f"hqq-4bit ({card})" in said and ("not to be compared" in said) != alike
    row = next(row for row in rows_of(results, {}) if row.name == "hqq-4bit")
    assert row.apart != alike and (row.tokens_per_second is None) == alike and row.seconds is None
    # What another card measured is not used again.
    assert shared_changes(documents["baseline"], {"device": documents["hqq-4bit"]["device"]})

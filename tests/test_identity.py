"""Results answer only for what they were made from: checkpoint, data, limits, device and code."""

import copy
import json
import shutil

import pytest
from conftest import ROOT, assert_user_error, build_tiny, run_script, save_tiny

from common.checkpoint.writer import METADATA_FILE
from common.results import identity
from common.results.documents import load_model_results, write_samples
from common.results.naming import Subject

TASKS = ["--tasks", "arc,perplexity", "--windows", 2, "--window-length", 48]
SMALL = ["--data", "demo", "--limit", 3, *TASKS]


def quantize(model, output, *more):
    result = run_script(ROOT / "quantize_hqq.py", "--model", model, "--output", output, *more)
    assert result.returncode == 0, result.stderr
    return output


def compare(checkpoint, results, *more):
    return run_script(
        ROOT / "compare_to_baseline.py",
        "--quantized",
        checkpoint,
        "--results-dir",
        results,
        *SMALL,
        *more,
    )


def perplexities(result):
    assert result.returncode == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith("Perplexity"))
    return [float(number) for number in row.split()[1:3]]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A checkpoint, its results and its baseline's."""
    place = tmp_path_factory.mktemp("identity")
    checkpoint, results = quantize(tiny, place / "hqq-4bit"), place / "results"
    perplexities(compare(checkpoint, results))
    return checkpoint, results


@pytest.fixture
def place(made, tmp_path):
    """Copies of `made`, to be changed."""
    checkpoint, results = tmp_path / "hqq-4bit", tmp_path / "results"
    shutil.copytree(made[0], checkpoint)
    shutil.copytree(made[1], results)
    return checkpoint, results


def document_of(results, tiny, name="hqq-4bit"):
    return json.loads((results / tiny.name / f"{name}.json").read_text())


def test_a_wrecked_checkpoint_is_not_reported_with_the_old_ones_figures(place, tiny):
    """The same folder, overwritten with coarser codes: printed is what a fresh evaluation finds."""
    checkpoint, results = place
    before = document_of(results, tiny)
    quantize(tiny, checkpoint, "--group-size", "channel", "--symmetric", "--overwrite")
    found = compare(checkpoint, results)
    shown = perplexities(found)
    assert "hqq-4bit: evaluated again, as its results are of another checkpoint" in found.stdout
    assert "baseline: results of arc, perplexity used again" in found.stdout
    fresh = perplexities(compare(checkpoint, results.parent / "fresh"))
    assert shown == pytest.approx(fresh, rel=1e-4)
    assert shown[1] != pytest.approx(before["tasks"]["perplexity"]["perplexity"], rel=2e-4)


def test_results_that_do_not_say_what_they_were_made_from(place, tiny):
    """Those of the committed run of earlier versions, with perplexity 22.3 and 2,659 tokens/s."""
    checkpoint, results = place
    document = document_of(results, tiny)
    for key in ("source", "checkpoint", "code"):
        del document[key]
    document["tasks"]["perplexity"]["perplexity"] = 22.3
    document["speed"] = {"tokens_per_second": 2659.5, "latency_seconds": 0.04}
    (results / tiny.name / "hqq-4bit.json").write_text(json.dumps(document))
    found = compare(checkpoint, results)
    assert found.returncode == 0 and "22.3" not in found.stdout and "2659" not in found.stdout
    assert "speed" not in document_of(results, tiny)


def test_used_again_when_all_agrees(place, tiny):
    checkpoint, results = place
    files = {
        name: (results / tiny.name / name)
        for name in ("baseline.json", "hqq-4bit.json", "samples/hqq-4bit.jsonl.gz")
    }
    before = {name: (file.read_bytes(), file.stat().st_mtime_ns) for name, file in files.items()}
    found = compare(checkpoint, results)
    for name in ("baseline", "hqq-4bit"):
        assert (
            f"{name}: results of arc, perplexity used again: same checkpoint, data, device and code"
            in found.stdout
        )
    assert "Evaluating" not in found.stdout
    assert before == {
        name: (file.read_bytes(), file.stat().st_mtime_ns) for name, file in files.items()
    }
    assert (
        found.stdout.count("Evaluating")
        < compare(checkpoint, results, "--overwrite").stdout.count("Evaluating")
        == 2
    )


@pytest.mark.parametrize(
    "flags, words, kept",
    [
        (["--limit", 2], "arc was evaluated with samples 3, not 2", "perplexity"),
        (["--windows", 1], "perplexity was evaluated with windows 2, not 1", "arc"),
        (["--window-length", 40], "perplexity was evaluated with length 48, not 40", "arc"),
    ],
)
def test_other_limits(place, tiny, flags, words, kept):
    """What the limits change is evaluated again, of the baseline too; the rest is used again."""
    checkpoint, results = place
    found = compare(checkpoint, results, *flags)
    assert found.returncode == 0, found.stderr
    for name in ("baseline", "hqq-4bit"):
        assert (
            f"{name}: {words}" in found.stdout
            and f"{name}: results of {kept} used again" in found.stdout
        )
    baseline, quantized = (
        document_of(results, tiny, name)["tasks"] for name in ("baseline", "hqq-4bit")
    )
    assert all(
        baseline[task]["fingerprint"] == quantized[task]["fingerprint"]
        for task in ("arc", "perplexity")
    )


def test_a_quick_comparison_does_not_take_the_baseline_from_others(place, tiny, tmp_path):
    """With other limits the baseline would be evaluated again, and another checkpoint left without
    a comparison.
    """
    checkpoint, results = place
    other = shutil.copytree(checkpoint, tmp_path / "hqq-other")
    perplexities(compare(other, results))
    before = {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}
    quick = ["--limit", 2, "--windows", 1]
    assert_user_error(
        compare(checkpoint, results, *quick),
        "hqq-other",
        "arc was evaluated with samples 3, not 2; perplexity was evaluated with windows 2, not 1",
        "--results-dir",
        "--overwrite",
    )
    assert before == {file: file.read_bytes() for file in before}
    perplexities(compare(checkpoint, tmp_path / "quick", *quick))
    perplexities(compare(checkpoint, results, *quick, "--overwrite"))
    assert document_of(results, tiny, "baseline")["tasks"]["arc"]["samples"] == 2
    # Nothing rests on the baseline any more, but what this comparison evaluates again.
    perplexities(compare(checkpoint, results))
    # Evaluated for its own sake it is not refused, and says who loses it.
    words = ["--model", tiny, "--results-dir", results, "--data", "demo", "--tasks", "arc"]
    alone = run_script(ROOT / "common/baseline.py", *words, "--limit", 2)
    assert alone.returncode == 0, alone.stderr
    assert "hqq-4bit, hqq-other will have no baseline until evaluated again" in alone.stdout


def test_other_rows_under_the_same_name(made, tiny, tmp_path):
    """A data file that was edited: its name and number of rows are as before."""
    rows = [
        json.loads(line) for line in (ROOT / "common/demo/arc.jsonl").read_text().splitlines()[:3]
    ]
    data, results = tmp_path / "arc.jsonl", tmp_path / "results"
    words = [
        ROOT / "common/evaluation.py",
        "--model-path",
        made[0],
        "--results-dir",
        results,
        "--arc-data",
        data,
        "--tasks",
        "arc",
        "--reuse",
    ]
    for change in (False, False, True):
        rows[1]["question"] += " Really?" if change else ""
        data.write_text("\n".join(map(json.dumps, rows)))
        found = run_script(*words)
        assert found.returncode == 0, found.stderr
        assert ("arc was evaluated with another fingerprint" in found.stdout) is change
    assert "Evaluating" in found.stdout


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("checkpoint", "0" * 64, "another checkpoint"),
        ("code", "0" * 64, "another evaluation code"),
        ("source", "somebody/else", "another model (somebody/else then"),
        ("compute_dtype", "bfloat16", "another type (bfloat16 then, float32 now)"),
        (
            "device",
            {"type": "cuda", "name": "NVIDIA H200", "threads": 1},
            "device (name) (NVIDIA H200 then",
        ),
        ("versions", {"torch": "1.0"}, "version (torch) (1.0 then"),
        ("demo_data", False, "demo data (False then, True now)"),
    ],
)
def test_every_condition_counts(made, tiny, tmp_path, capsys, key, value, words):
    document = document_of(made[1], tiny)
    shared = {name: document[name] for name in identity.SHARED}
    tasks = {
        task: {name: found[name] for name in ("data", "fingerprint")}
        for task, found in document["tasks"].items()
    }
    subject = Subject(made[0], str(tiny), tiny.name, "hqq-4bit")
    write_samples(tmp_path, tiny.name, "hqq-4bit", {})
    file = tmp_path / tiny.name / "hqq-4bit.json"
    for content, left in ((document, ()), ({**document, key: value}, ("arc", "perplexity"))):
        file.write_text(json.dumps(content))
        found = identity.left_to_do(subject, tmp_path, shared, tasks, twice=False)
        assert found == (left, ())
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("kind, matters", [("cuda", False), ("cpu", True)])
def test_threads_matter_on_a_cpu_alone(kind, matters):
    """On a GPU the number of CPU threads changes neither a result nor its speed."""
    device = {"type": kind, "name": "a device", "threads": 8}
    changes = identity.shared_changes({"device": device}, {"device": {**device, "threads": 6}})
    assert changes == (["device (threads) (8 then, 6 now)"] if matters else [])
    changes = identity.shared_changes({"device": device}, {"device": {**device, "name": "other"}})
    assert changes == ["device (name) (a device then, other now)"]


def test_missing_samples_and_a_baseline_run_once(made, tiny, tmp_path, capsys):
    shutil.copytree(made[1], tmp_path / "results")
    baseline = [
        ROOT / "common/baseline.py",
        "--model",
        tiny,
        "--results-dir",
        tmp_path / "results",
        *SMALL,
        "--reuse",
    ]
    found = run_script(*baseline)
    assert (
        "arc was run once, not twice" in found.stdout
        and "results of arc, perplexity used again" in found.stdout
        and "Evaluating" not in found.stdout
    )
    assert set(document_of(tmp_path / "results", tiny, "baseline")["noise"]) == {"arc"}
    (tmp_path / "results" / tiny.name / "samples" / "baseline.jsonl.gz").unlink()
    found = run_script(*baseline)
    assert "used again" not in found.stdout and found.returncode == 0
    # The first result does not wait for the second run.
    said = [found.stdout.index(words) for words in (" baseline: ARC", "Once more in other batches")]
    assert said == sorted(said)


def test_a_changed_original_is_refused(tiny, tmp_path):
    """The 16-bit model was trained on in its folder: the checkpoint is of the old one, and
    divergence would be from the new.
    """
    shutil.copytree(tiny, tmp_path / "model")
    checkpoint, results = quantize(tmp_path / "model", tmp_path / "hqq-4bit"), tmp_path / "results"
    perplexities(compare(checkpoint, results))
    build_tiny("llama", True, seed=7).save_pretrained(tmp_path / "model")
    assert_user_error(
        compare(checkpoint, results), "has changed since", "quantize again with --overwrite"
    )


def test_a_stale_baseline_is_not_compared_with(made, tiny, tmp_path, capsys):
    from common.reporting.compare_all import compare_all
    from common.results.identity import incomparable, other_data

    shutil.copytree(made[1], tmp_path / "results")
    results = load_model_results(tmp_path / "results" / tiny.name)
    assert list(compare_all(tmp_path / "results", results)) == ["hqq-4bit"]
    baseline = copy.deepcopy(results.documents["baseline"])
    quantized = results.documents["hqq-4bit"]
    for change, words in (
        (lambda d: d.update(checkpoint="0" * 64), "another 16-bit model"),
        (lambda d: d.update(compute_dtype="bfloat16"), "type (bfloat16 then"),
        (lambda d: d["versions"].update(torch="1.0"), "torch"),
    ):
        stale = copy.deepcopy(baseline)
        change(stale)
        assert any(words in reason for reason in incomparable(stale, quantized))
        results.documents["baseline"] = stale
        assert compare_all(tmp_path / "results", results) == {}
        assert "no comparison" in capsys.readouterr().out
    baseline["tasks"]["arc"]["fingerprint"] = "0" * 64
    assert other_data(baseline, quantized) == ["arc"] and not incomparable(baseline, quantized)


def test_tasks_that_were_not_asked_for_do_not_stop_a_comparison(place, tiny):
    """ARC of the baseline alone was evaluated again on fewer rows since."""
    checkpoint, results = place
    words = [ROOT / "common/evaluation.py", "--model-path", tiny, "--results-dir", results]
    found = run_script(*words, "--data", "demo", "--tasks", "arc", "--limit", 2, "--reuse")
    assert found.returncode == 0, found.stderr
    tasks = [document_of(results, tiny, name)["tasks"] for name in ("baseline", "hqq-4bit")]
    assert [found["arc"]["samples"] for found in tasks] == [2, 3]
    perplexities(compare(checkpoint, results, "--tasks", "perplexity"))


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "tiny"
    save_tiny(folder, "llama", True)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_baseline_that_reads_other_tokens(place, own_tokenizer, tmp_path):
    """Perplexities per token of two tokenizers are no pair, though both have two windows."""
    (place[0] / METADATA_FILE).unlink()
    result = compare(place[0], tmp_path / "fresh", "--baseline", own_tokenizer)
    assert_user_error(
        result, "cannot be compared", "other data of perplexity", "leave", "out of --tasks"
    )
    found = compare(place[0], tmp_path / "fresh", "--baseline", own_tokenizer, "--tasks", "arc")
    assert found.returncode == 0, found.stderr

"""Results answer only for what they were made from: checkpoint, data, limits, device and code."""

import copy
import json
import os
import shutil

import pytest
from conftest import ROOT, assert_user_error, build_tiny, run_script, tiny_tokenizer

from common import identity
from common.naming import Subject
from common.results import load_model_results, write_samples

TASKS = ["--tasks", "arc,perplexity", "--windows", 2, "--window-length", 48]
SMALL = ["--data", "demo", "--limit", 3, *TASKS]


def quantize(model, output, *more):
    result = run_script(ROOT / "quantize_hqq.py", "--model", model, "--output", output, *more)
    assert result.returncode == 0, result.stderr
    return output


def compare(checkpoint, results, *more):
    return run_script(ROOT / "compare_to_baseline.py", "--quantized", checkpoint, "--results-dir", results, *SMALL, *more)


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
    """The same folder, overwritten with two bits: what is printed is what an evaluation of its own finds."""
    checkpoint, results = place
    before = document_of(results, tiny)
    quantize(tiny, checkpoint, "--bits", 2, "--symmetric", "--overwrite")
    found = compare(checkpoint, results)
    shown = perplexities(found)
    assert "hqq-4bit: evaluated again, as its results are of another checkpoint" in found.stdout
    assert "baseline: results of arc, perplexity used again" in found.stdout
    fresh = perplexities(compare(checkpoint, results.parent / "fresh"))
    assert shown == pytest.approx(fresh, rel=1e-3)
    assert shown[1] != pytest.approx(before["tasks"]["perplexity"]["perplexity"], rel=1e-3)


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
    files = {name: (results / tiny.name / name) for name in ("baseline.json", "hqq-4bit.json", "samples/hqq-4bit.jsonl.gz")}
    before = {name: (file.read_bytes(), file.stat().st_mtime_ns) for name, file in files.items()}
    found = compare(checkpoint, results)
    for name in ("baseline", "hqq-4bit"):
        assert f"{name}: results of arc, perplexity used again: same checkpoint, data, device and code" in found.stdout
    assert "Evaluating" not in found.stdout
    assert before == {name: (file.read_bytes(), file.stat().st_mtime_ns) for name, file in files.items()}
    assert found.stdout.count("Evaluating") < compare(checkpoint, results, "--overwrite").stdout.count("Evaluating") == 2


@pytest.mark.parametrize("flags, words, kept", [
    (["--limit", 2], "arc was evaluated with samples 3, not 2", "perplexity"),
    (["--windows", 1], "perplexity was evaluated with windows 2, not 1", "arc"),
    (["--window-length", 40], "perplexity was evaluated with length 48, not 40", "arc"),
])
def test_other_limits(place, tiny, flags, words, kept):
    """What the limits change is evaluated again, of the baseline too; the rest is used again."""
    checkpoint, results = place
    found = compare(checkpoint, results, *flags)
    assert found.returncode == 0, found.stderr
    for name in ("baseline", "hqq-4bit"):
        assert f"{name}: {words}" in found.stdout and f"{name}: results of {kept} used again" in found.stdout
    baseline, quantized = (document_of(results, tiny, name)["tasks"] for name in ("baseline", "hqq-4bit"))
    assert all(baseline[task]["fingerprint"] == quantized[task]["fingerprint"] for task in ("arc", "perplexity"))


def test_other_rows_under_the_same_name(made, tiny, tmp_path):
    """A data file that was edited: its name and number of rows are as before."""
    rows = [json.loads(line) for line in (ROOT / "common/demo/arc.jsonl").read_text().splitlines()[:3]]
    data, results = tmp_path / "arc.jsonl", tmp_path / "results"
    words = [ROOT / "common/evaluation.py", "--model-path", made[0], "--results-dir", results, "--arc-data", data, "--tasks", "arc",
             "--reuse"]
    for change in (False, False, True):
        rows[1]["question"] += " Really?" if change else ""
        data.write_text("\n".join(map(json.dumps, rows)))
        found = run_script(*words)
        assert found.returncode == 0, found.stderr
        assert ("arc was evaluated with another fingerprint" in found.stdout) is change
    assert "Evaluating" in found.stdout


@pytest.mark.parametrize("key, value, words", [
    ("checkpoint", "0" * 64, "another checkpoint"), ("code", "0" * 64, "another evaluation code"),
    ("source", "somebody/else", "another model (somebody/else then"),
    ("compute_dtype", "bfloat16", "another type (bfloat16 then, float32 now)"),
    ("device", {"type": "cuda", "name": "NVIDIA H200", "threads": 1}, "device (name) (NVIDIA H200 then"),
    ("versions", {"torch": "1.0"}, "version (torch) (1.0 then"), ("demo_data", False, "demo data (False then, True now)"),
])
def test_every_condition_counts(made, tiny, tmp_path, capsys, key, value, words):
    document = document_of(made[1], tiny)
    shared = {name: document[name] for name in identity.SHARED}
    tasks = {task: {name: found[name] for name in ("data", "fingerprint")} for task, found in document["tasks"].items()}
    subject = Subject(made[0], str(tiny), tiny.name, "hqq-4bit")
    write_samples(tmp_path, tiny.name, "hqq-4bit", {})
    file = tmp_path / tiny.name / "hqq-4bit.json"
    for content, left in ((document, ()), ({**document, key: value}, ("arc", "perplexity"))):
        file.write_text(json.dumps(content))
        assert identity.left_to_do(subject, tmp_path, shared, tasks, twice=False) == left
    assert words in capsys.readouterr().out


def test_missing_samples_and_a_baseline_run_once(made, tiny, tmp_path, capsys):
    shutil.copytree(made[1], tmp_path / "results")
    baseline = [ROOT / "common/baseline.py", "--model", tiny, "--results-dir", tmp_path / "results", *SMALL, "--reuse"]
    found = run_script(*baseline)
    assert "arc was run once, not twice" in found.stdout and "results of perplexity used again" in found.stdout
    assert set(document_of(tmp_path / "results", tiny, "baseline")["noise"]) == {"arc"}
    (tmp_path / "results" / tiny.name / "samples" / "baseline.jsonl.gz").unlink()
    found = run_script(*baseline)
    assert "used again" not in found.stdout and found.returncode == 0


def test_a_changed_original_is_refused(tiny, tmp_path):
    """The 16-bit model was trained on in its folder: the checkpoint is of the old one, and divergence would be from the new."""
    shutil.copytree(tiny, tmp_path / "model")
    checkpoint, results = quantize(tmp_path / "model", tmp_path / "hqq-4bit"), tmp_path / "results"
    perplexities(compare(checkpoint, results))
    build_tiny("llama", True, seed=7).save_pretrained(tmp_path / "model")
    assert_user_error(compare(checkpoint, results), "has changed since", "quantize again with --overwrite")


def test_a_stale_baseline_is_not_compared_with(made, tiny, tmp_path, capsys):
    from common.comparison import compare_all, incomparable

    shutil.copytree(made[1], tmp_path / "results")
    results = load_model_results(tmp_path / "results" / tiny.name)
    assert list(compare_all(tmp_path / "results", results)) == ["hqq-4bit"]
    baseline = copy.deepcopy(results.documents["baseline"])
    quantized = results.documents["hqq-4bit"]
    for change, words in ((lambda d: d["tasks"]["arc"].update(fingerprint="0" * 64), "other data of arc"),
                          (lambda d: d.update(checkpoint="0" * 64), "another 16-bit model"),
                          (lambda d: d.update(compute_dtype="bfloat16"), "type (bfloat16 then"),
                          (lambda d: d["versions"].update(torch="1.0"), "torch")):
        stale = copy.deepcopy(baseline)
        change(stale)
        assert any(words in reason for reason in incomparable(stale, quantized))
        results.documents["baseline"] = stale
        assert compare_all(tmp_path / "results", results) == {}
        assert "no comparison" in capsys.readouterr().out


def test_the_hash_of_a_checkpoint(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", -1.0)
    read = []
    original = identity.hashlib.file_digest
    monkeypatch.setattr(identity.hashlib, "file_digest", lambda file, name: read.append(file.name) or original(file, name))
    first = identity.checkpoint_hash(folder, tmp_path)
    count = len(read)
    assert count >= 3 and identity.checkpoint_hash(folder, tmp_path) == first and len(read) == count
    # One bit of a weight, under the old size and time.
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1e9, 1e9))
    assert identity.checkpoint_hash(folder, tmp_path) != first
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identity.checkpoint_hash(folder, tmp_path) == first
    # What is young is not remembered: it may be written again within a tick of the clock.
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", 3600.0)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert identity.checkpoint_hash(folder, tmp_path) != first
    count = len(read)
    identity.checkpoint_hash(folder, tmp_path)
    assert len(read) == count + 1


def test_the_hash_of_the_code(tmp_path):
    """Comments, README and what the evaluation does not import are no part of it; code, constants and task files are."""
    files = {"common/__init__.py": "", "common/evaluation.py": 'from common import scoring\n\ndef f():\n    "Words."\n    return 1\n',
             "common/scoring.py": "# why\nLIMIT = 3\n", "common/plots.py": "x = 1\n", "common/tasks/arc.yaml": "a: 1\n",
             "README.md": "text\n"}

    def hashed(**changes):
        for name, content in {**files, **changes}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        identity.code_hash.cache_clear()
        return identity.code_hash(tmp_path)

    first = hashed()
    for name, content in (("README.md", "other\n"), ("common/plots.py", "x = 2\n"), ("common/scoring.py", "LIMIT = 3   # because\n"),
                          ("common/evaluation.py", files["common/evaluation.py"].replace("Words.", "Other words."))):
        assert hashed(**{name: content}) == first, name
    for name, content in (("common/scoring.py", "LIMIT = 4\n"), ("common/tasks/arc.yaml", "a: 2\n"),
                          ("common/evaluation.py", files["common/evaluation.py"].replace("return 1", "return 2"))):
        assert hashed(**{name: content}) != first, name
    identity.code_hash.cache_clear()


def test_the_code_includes_scoring_and_kernels():
    """Of the real project: a module that is imported inside a function counts too."""
    seen = set()
    original = identity._module_file
    identity.code_hash.cache_clear()
    try:
        identity._module_file = lambda root, name: seen.add(name) or original(root, name)
        identity.code_hash()
    finally:
        identity._module_file = original
    assert {"common.tasks.scoring", "common.language_model", "common.packed", "common.divergence"} <= seen
    assert not {"common.plots", "common.report", "common.batch"} & seen


def test_options_that_change_a_checkpoint(tiny, tmp_path):
    """--resume of a finished output keeps what was made with the same options, and refuses what was not."""
    output = quantize(tiny, tmp_path / "out", "--group-size", 32)
    for same in ([], ["--calib-samples", 7], ["--data-root", tmp_path]):          # hqq takes no calibration
        assert "nothing to resume" in run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", output, "--group-size", 32,
                                                 *same, "--resume").stdout
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    for other, words in ((["--group-size", 64], "--group-size 32, not 64"), (["--group-size", 32, "--symmetric"], "--symmetric False"),
                         (["--group-size", 32, "--bits", 8], "--bits 4, not 8"), (["--group-size", 32, "--lp-norm", 0.9], "--lp-norm"),
                         (["--group-size", 32, "--dtype", "bfloat16"], "--dtype float32, not bfloat16")):
        result = run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", output, *other, "--resume")
        assert_user_error(result, words, "--overwrite")
    result = run_script(ROOT / "quantize_gptq.py", "--model", tiny, "--output", output, "--resume")
    assert_user_error(result, "method hqq, not gptq")
    assert before == {file.name: file.read_bytes() for file in output.iterdir()}
    auto = quantize(tiny, tmp_path / "auto")
    assert "nothing to resume" in run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", auto, "--group-size", 64,
                                             "--resume").stdout                     # what auto came to
    shutil.copytree(tiny, tmp_path / "other")
    assert_user_error(run_script(ROOT / "quantize_hqq.py", "--model", tmp_path / "other", "--output", auto, "--resume"), "--model")


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "tiny"
    build_tiny("llama", True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_baseline_that_reads_other_tokens(made, own_tokenizer, tmp_path):
    """Perplexities per token of two tokenizers are no pair, though both have two windows."""
    result = compare(made[0], tmp_path / "results", "--baseline", own_tokenizer)
    assert_user_error(result, "cannot be compared", "other data of perplexity")

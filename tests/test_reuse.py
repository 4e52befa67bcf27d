"""A finished checkpoint answers for the weights, the text, the type and the code that it was made
from, and no others.
"""

import json
import os
import shutil

import pytest
from batch_stand_ins import STAND_INS
from conftest import ROOT, assert_user_error, build_tiny, run_script
from methods import method_options
from test_identity import TASKS, compare, perplexities, quantize

from common.base.errors import UserError
from common.base.files import write_json
from common.checkpoint.writer import METADATA_FILE
from common.results import hashes, identity, reuse
from common.results.documents import write_samples
from common.results.naming import Subject
from common.run_all.passed_on import method_script

ALL_AGREES = "nothing to resume"


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return quantize(tiny, tmp_path_factory.mktemp("made") / "hqq-4bit")


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny, tmp_path / "source" / tiny.name)


def other_weights(model):
    """Of the same shape, as after more training."""
    build_tiny("llama", True, seed=7).save_pretrained(model)


def resume(model, output, *more, method="hqq"):
    return run_script(
        ROOT / f"quantize_{method}.py", "--model", model, "--output", output, *more, "--resume"
    )


def edit(folder, change):
    file = folder / METADATA_FILE
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def test_other_weights_in_the_same_folder(model, tmp_path):
    output = quantize(model, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    os.utime(model / "model.safetensors")  # written again, the same
    (model / "LICENSE.txt").write_text("what another download brings along")
    assert ALL_AGREES in resume(model, output).stdout
    other_weights(model)
    assert_user_error(
        resume(model, output), "was made with other files of --model; --overwrite makes it again"
    )
    assert before == {file.name: file.read_bytes() for file in output.iterdir()}
    edit(output, lambda record: record["made_from"].pop("model"))  # of an earlier version
    assert_user_error(resume(model, output), "was made with unknown files of --model; --overwrite")


def test_another_text_in_the_same_file(tiny, calibration_text, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(calibration_text, text)
    words = ("--calib-data", text, "--calib-samples", 2, "--calib-length", 64)
    output = tmp_path / "out"
    assert resume(tiny, output, *words, method="gptq").returncode == 0
    assert ALL_AGREES in resume(tiny, output, *words, method="gptq").stdout
    text.write_text(calibration_text.read_text()[::-1])
    changed = resume(tiny, output, *words, method="gptq")
    assert_user_error(
        changed, "was made with other text of --calib-data; --overwrite makes it again"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda record: record["made_from"].update(code="0" * 64),
            "was made with other quantization code; --overwrite makes it again",
        ),
        (
            lambda record: record["made_from"].pop("code"),
            "was made with unknown quantization code; --overwrite makes it again",
        ),
        (
            lambda record: record.pop("made_from"),
            "was made with unknown files of --model, unknown quantization code; --overwrite",
        ),
        (
            lambda record: record["options"].pop("lp_norm"),
            "was made with --lp-norm unknown, not 8.0; --overwrite makes it again",
        ),
        (
            lambda record: record["options"].pop("head_bits"),
            "was made with --head-bits unknown, not None; --overwrite",
        ),
        (lambda record: record.update(made_from=[]), "is damaged; quantize again with --overwrite"),
    ],
    ids=[
        "other code",
        "unknown code",
        "earlier version",
        "unknown option",
        "unknown option of None",
        "damaged",
    ],
)
def test_what_metadata_does_not_say_is_not_the_same(made, tiny, tmp_path, change, words):
    output = shutil.copytree(made, tmp_path / "out")
    assert ALL_AGREES in resume(tiny, output).stdout
    edit(output, change)
    assert_user_error(resume(tiny, output), words)


def test_another_type_to_compute_in(tiny, tmp_path):
    output = quantize(tiny, tmp_path / "out", "--dtype", "bfloat16")
    assert_user_error(
        resume(tiny, output),
        "was made with --dtype bfloat16, not float32; --overwrite makes it again",
    )
    assert ALL_AGREES in resume(tiny, output, "--dtype", "bfloat16").stdout


@pytest.mark.parametrize("method", ["gptq", "adaround", "hqq"])
def test_the_code_that_decides_codes(method, monkeypatch):
    """What rounds and what reads the text, not what checks or names the result, nor the other
    methods.
    """
    seen, original = set(), hashes._module_file
    monkeypatch.setattr(
        hashes, "_module_file", lambda root, name: seen.add(name) or original(root, name)
    )
    hashes.code_hash.cache_clear()
    found = reuse.quantization_code_hash(method)
    assert {
        f"quantize_{method}",
        "common.solvers.rounding",
        "common.walk.layers",
        "common.text.windows",
        "common.checkpoint.writer",
    } <= seen
    assert ("common.solvers.adaround" in seen) is (
        method == "adaround"
    ) and "quantize_awq" not in seen
    assert (
        not {
            "common.verification",
            "common.running.runtime",
            "common.results.naming",
            "common.base.machine",
            "common.evaluation",
        }
        & seen
    )
    assert found != reuse.quantization_code_hash("awq") != hashes.code_hash()


def test_a_method_has_the_name_of_its_script():
    scripts = {file.stem.removeprefix("quantize_") for file in ROOT.glob("quantize_*.py")}
    assert scripts == set(method_options())
    for name in scripts:
        script = method_script(name)
        method = script.method(script.argument_parser().parse_args([]))
        assert method.name == name
        assert method.needs_calibration is (name != "hqq")


def test_a_method_without_a_script_of_its_name_is_refused(tiny, tmp_path):
    """The hash of its code would be that of none, the same whatever changes in the code."""
    script = tmp_path / "quantize_nearest.py"
    source = (ROOT / "quantize_hqq.py").read_text()
    script.write_text(source.replace('Method("hqq"', 'Method("rtn"'))
    output = tmp_path / "out"
    result = run_script(script, "--model", tiny, "--output", output)
    assert_user_error(result, "there is no quantize_rtn.py", 'here "rtn"')
    assert not output.exists()


def test_unchanged_weights_are_read_once(model, tmp_path, monkeypatch):
    for file in model.iterdir():
        os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -1.0)
    output = quantize(model, tmp_path / "out")
    read = []
    original = hashes.hashlib.file_digest
    monkeypatch.setattr(
        hashes.hashlib,
        "file_digest",
        lambda file, name: read.append(file.name) or original(file, name),
    )
    assert ALL_AGREES in resume(model, output).stdout and not read


def test_a_baseline_that_the_checkpoint_was_not_made_from(model, tmp_path):
    """The model was moved, and another of its shape is named: perplexities of two unrelated models
    are no comparison.
    """
    output = quantize(model, tmp_path / "out")
    moved, results = shutil.move(model, tmp_path / "moved"), tmp_path / "results"
    perplexities(compare(output, results, "--baseline", moved))
    other_weights(moved)
    compared = compare(output, results, "--baseline", moved, "--tasks", "arc", "--overwrite")
    assert_user_error(compared, "has changed since", "or is another model", "--baseline")
    evaluated = run_script(
        ROOT / "common/evaluation.py",
        "--model-path",
        output,
        "--baseline",
        moved,
        "--results-dir",
        tmp_path / "fresh",
        "--data",
        "demo",
        "--limit",
        2,
        *TASKS,
    )
    assert_user_error(evaluated, "has changed since", "or is another model", "--baseline")


@pytest.mark.parametrize(
    "key, value", [("device", {"type": "cuda"}), ("versions", {"torch": "1.0"})]
)
def test_a_changed_original_is_refused_on_another_device_too(tmp_path, key, value):
    """Unless the checkpoint has been made again since: then it is evaluated again."""
    shared = {
        "source": "tiny",
        "checkpoint": "1" * 64,
        "device": {"type": "cpu"},
        "versions": {"torch": "2.0"},
    }
    subject = Subject(tmp_path / "hqq-4bit", "tiny", "tiny", "hqq-4bit")
    document = {**shared, key: value, "tasks": {"perplexity": {"original": "2" * 64}}}
    write_json(tmp_path / "tiny" / "hqq-4bit.json", document)
    write_samples(tmp_path, "tiny", "hqq-4bit", {})
    tasks = {"perplexity": {"original": "3" * 64}}
    with pytest.raises(UserError, match="has changed since"):
        identity.left_to_do(subject, tmp_path, shared, tasks, twice=False)
    again = {**shared, "checkpoint": "4" * 64}
    assert identity.left_to_do(subject, tmp_path, again, tasks, twice=False)[0] == ("perplexity",)


@pytest.mark.parametrize("metadata", [[], ["--no-save-metadata"]])
def test_a_batch_on_other_weights(real_batch, model, metadata):
    words = ["--model", str(model), "--limit", "2", *metadata]
    code, status = real_batch(*words)
    assert code == 0 and status["hqq-4bit"]["state"] == "done"
    assert real_batch(*words)[0] == 0
    other_weights(model)
    code, status = real_batch(*words)
    assert (
        code == 1
        and status["baseline"]["state"] == "done"
        and status["hqq-4bit"]["state"] == "warning"
    )
    assert "made with other files of --model" in status["hqq-4bit"]["reason"]
    assert (
        "--overwrite" in status["hqq-4bit"]["reason"]
        and "evaluate evaluation" not in real_batch.titles
    )
    code, status = real_batch(*words, "--overwrite")
    assert code == 0 and status["hqq-4bit"]["state"] == "done"


def test_a_batch_without_metadata_after_a_change_of_the_code(real_batch):
    words = ["--limit", "2", "--no-save-metadata", "--only", "hqq-4bit"]
    code, status = real_batch(*words)
    assert code == 0
    status["hqq-4bit"]["made"]["made_from"]["code"] = "0" * 64
    (real_batch.folder / "results" / real_batch.name / "status.json").write_text(json.dumps(status))
    code, status = real_batch(*words)
    assert (
        code == 1
        and "was made with other quantization code; --overwrite" in status["hqq-4bit"]["reason"]
    )


def test_a_batch_marks_a_wrecked_checkpoint_without_metadata(batch, monkeypatch):
    """Its verification cannot know; the batch does, on a second run too."""
    monkeypatch.setattr("common.run_all.steps.checkpoint_hash", lambda *_: "1" * 64)
    monkeypatch.setattr("common.run_all.steps.made_from", lambda *_: {})
    said = (
        "lm_head is wrecked, its output is off by 0.98 of its size; saved without metadata, so "
        "verify_model.py cannot know"
    )
    (batch.folder / "quantize_hqq.py").write_text(
        f"{STAND_INS['quantize_hqq.py']}; print('warning: {said}'); print('more')"
    )
    for _ in range(2):
        assert batch("--only", "hqq-4bit", "--no-save-metadata") == 1
        status = json.loads((batch.folder / "results/tiny/status.json").read_text())["hqq-4bit"]
        assert status["state"] == "warning" and status["reason"] == said
    calls = [line.split()[0] for line in (batch.folder / "calls").read_text().splitlines()]
    assert calls == ["quantize_hqq.py"]  # neither made again nor evaluated
    (batch.folder / "quantize_hqq.py").write_text(STAND_INS["quantize_hqq.py"])
    assert batch("--only", "hqq-4bit", "--no-save-metadata", "--overwrite") == 0


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_batch_hashes_a_new_checkpoint_once_it_is_evaluated(batch, monkeypatch, evaluated):
    """Which has hashed it beside other work; also where that failed. What an earlier checkpoint
    without metadata was does not count.
    """
    calls = batch.folder / "calls"
    hashed = []

    def checkpoint_hash(*_):
        hashed.append(len(calls.read_text().splitlines()))
        return "1" * 64

    monkeypatch.setattr("common.run_all.steps.checkpoint_hash", checkpoint_hash)
    monkeypatch.setattr("common.run_all.steps.made_from", lambda *_: {})
    script, verify = batch.folder / "quantize_hqq.py", batch.folder / "verify_model.py"
    verify.write_text(STAND_INS["common/evaluation.py"])  # which notes that it ran
    script.write_text(
        f"{STAND_INS['quantize_hqq.py']}; print('warning: lm_head is wrecked'); print('more')"
    )
    assert batch("--only", "hqq-4bit", "--no-save-metadata") == 1
    script.write_text(
        STAND_INS["quantize_hqq.py"]
        + "; (pathlib.Path(a[a.index('--output') + 1]) / 'quantization_metadata.json')"
        + ".write_text('{}')"
    )
    calls.write_text("")
    hashed.clear()
    if not evaluated:
        evaluation = batch.folder / "common/evaluation.py"
        evaluation.write_text(f"{evaluation.read_text()}sys.exit(1)")
    assert batch("--only", "hqq-4bit", "--overwrite") == (0 if evaluated else 1)
    names = [line.split()[0] for line in calls.read_text().splitlines()]
    assert names == ["quantize_hqq.py", "verify_model.py", "common/evaluation.py"]
    assert hashed == [3]
    status = json.loads((batch.folder / "results/tiny/status.json").read_text())["hqq-4bit"]
    assert status["made"]["checkpoint"] == "1" * 64
    assert status.get("verified") == ("1" * 64 if evaluated else None)

"""The hashes by which checkpoints and code are told apart; the options that make a checkpoint."""

import os
import shutil

from conftest import ROOT, assert_user_error, run_script
from test_identity import quantize

from common.results import hashes


def test_the_hash_of_a_checkpoint(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -1.0)
    read = []
    original = hashes.hashlib.file_digest
    monkeypatch.setattr(
        hashes.hashlib,
        "file_digest",
        lambda file, name: read.append(file.name) or original(file, name),
    )
    first = hashes.checkpoint_hash(folder, tmp_path)
    count = len(read)
    assert count >= 3 and hashes.checkpoint_hash(folder, tmp_path) == first and len(read) == count
    # One bit of a weight, under the old size and time.
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1e9, 1e9))
    assert hashes.checkpoint_hash(folder, tmp_path) != first
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hashes.checkpoint_hash(folder, tmp_path) == first
    # What is young is not remembered: it may be written again within a tick of the clock.
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 3600.0)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert hashes.checkpoint_hash(folder, tmp_path) != first
    count = len(read)
    hashes.checkpoint_hash(folder, tmp_path)
    assert len(read) == count + 1


def test_the_hash_of_the_code(tmp_path):
    """Comments, README and what the evaluation does not import are no part of it; code, constants
    and task files are.
    """
    files = {
        "common/__init__.py": "",
        "common/evaluation.py": 'from common import scoring\n\ndef f():\n    "Words."\n'
        "    return 1\n",
        "common/scoring.py": "# why\nLIMIT = 3\n",
        "common/plots.py": "x = 1\n",
        "common/tasks/arc.yaml": "a: 1\n",
        "README.md": "text\n",
    }

    def hashed(**changes):
        for name, content in {**files, **changes}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        hashes.code_hash.cache_clear()
        return hashes.code_hash(tmp_path)

    first = hashed()
    for name, content in (
        ("README.md", "other\n"),
        ("common/plots.py", "x = 2\n"),
        ("common/scoring.py", "LIMIT = 3   # because\n"),
        ("common/evaluation.py", files["common/evaluation.py"].replace("Words.", "Other words.")),
    ):
        assert hashed(**{name: content}) == first, name
    for name, content in (
        ("common/scoring.py", "LIMIT = 4\n"),
        ("common/tasks/arc.yaml", "a: 2\n"),
        ("common/evaluation.py", files["common/evaluation.py"].replace("return 1", "return 2")),
    ):
        assert hashed(**{name: content}) != first, name
    hashes.code_hash.cache_clear()


def test_the_code_includes_scoring_and_kernels():
    """Of the real project: a module that is imported inside a function counts too."""
    seen = set()
    original = hashes._module_file
    hashes.code_hash.cache_clear()
    try:
        hashes._module_file = lambda root, name: seen.add(name) or original(root, name)
        hashes.code_hash()
    finally:
        hashes._module_file = original
    assert {
        "common.tasks.scoring",
        "common.tasks.language_model",
        "common.running.packed",
        "common.numerics.divergence",
    } <= seen
    assert not {"common.reporting.plots", "common.reporting.report", "common.batch"} & seen


def test_options_that_change_a_checkpoint(tiny, tmp_path):
    """--resume keeps a finished output that was made with the same options and refuses another."""
    output = quantize(tiny, tmp_path / "out", "--group-size", 32)

    def resume(*options, model=tiny, output=output, method="hqq"):
        return run_script(
            ROOT / f"quantize_{method}.py",
            *("--model", model, "--output", output, *options, "--resume"),
        )

    for same in ([], ["--calib-samples", 7], ["--data-root", tmp_path]):  # hqq takes no calibration
        assert "nothing to resume" in resume("--group-size", 32, *same).stdout
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    for other, words in (
        (["--group-size", 64], "--group-size 32, not 64"),
        (["--group-size", 32, "--symmetric"], "--symmetric False"),
        (["--group-size", 32, "--bits", 8], "--bits 4, not 8"),
        (["--group-size", 32, "--lp-norm", 0.9], "--lp-norm"),
        (["--group-size", 32, "--dtype", "bfloat16"], "--dtype float32, not bfloat16"),
    ):
        assert_user_error(resume(*other), words, "--overwrite")
    assert_user_error(resume(method="gptq"), "method hqq, not gptq")
    assert before == {file.name: file.read_bytes() for file in output.iterdir()}
    auto = quantize(tiny, tmp_path / "auto")
    # What auto came to.
    assert "nothing to resume" in resume("--group-size", 64, output=auto).stdout
    shutil.copytree(tiny, tmp_path / "other")
    assert_user_error(resume(model=tmp_path / "other", output=auto), "--model")

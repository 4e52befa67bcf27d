"""Interrupted runs: what is left is marked, can be gone on with, and gives the same bits; nobody
writes over another.
"""

import fcntl
import itertools
import json
import multiprocessing
import os
import random
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    assert_user_error,
    interrupt_after,
    run_script,
    sampled,
    save_tiny,
)
from methods import method_options

from common.base import progress
from common.base.errors import UserError
from common.checkpoint.writer import METADATA_FILE, CheckpointWriter
from common.walk import layers as walk
from common.walk import tuning

METHODS = method_options(
    iterations=15,
    gptq=["--tune-scales", "6"],
    awq=["--embedding-bits", "8"],
    quarot=["--act-bits", "4", "--kv-bits", "4", "--head-bits", "8"],
)


def command(method, model, output, text, *extra):
    calibration = (
        []
        if method == "hqq"
        else ["--calib-data", text, "--calib-samples", 8, "--calib-length", 64]
    )
    return [
        ROOT / f"quantize_{method}.py",
        "--model",
        model,
        "--output",
        output,
        *METHODS[method],
        *calibration,
        *extra,
    ]


def content(folder):
    """Everything in a checkpoint, but for times, memory and the options of the run in the
    metadata."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    record = json.loads(files.pop(METADATA_FILE))
    for key in ("seconds", "memory", "options"):
        del record[key]
    del record["bytes"]["quantized_folder"]  # the metadata are in it
    return files, record


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A tiny model of five layers."""
    return save_tiny(tmp_path_factory.mktemp("five") / "five", "llama", True, layers=5)


@pytest.mark.parametrize(
    "method, stops",
    sampled(
        itertools.product(METHODS, [(3,), (2, 4)]),
        lambda method, stops: (len(stops) == 2) == (method == "gptq"),
    ),
)
def test_resumed_is_bit_identical(five, calibration_text, tmp_path, monkeypatch, method, stops):
    """Ended once or twice on the way."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_script(*command(method, five, whole, calibration_text)).returncode == 0
    seconds, quick = 0, []

    def counted(*arguments, **options):
        quick.append(options["quick"])
        return progress.track(*arguments, **options)

    monkeypatch.setattr(walk, "track", counted)
    for layers in stops:
        with monkeypatch.context() as patch:
            interrupt_after(patch, layers)
            result = run_script(*command(method, five, parts, calibration_text, "--resume"))
        assert result.returncode == 130 and "--resume goes on from there" in result.stdout
        assert not parts.exists() and (tmp_path / "parts.unfinished").is_dir()
        file = tmp_path / "parts.unfinished" / "progress.json"
        noted = json.loads(file.read_text())
        assert noted["seconds"] > seconds
        # As if it had taken long.
        noted["seconds"] = seconds = noted["seconds"] + 1000
        file.write_text(json.dumps(noted))
    result = run_script(*command(method, five, parts, calibration_text, "--resume"))
    assert result.returncode == 0, result.stderr
    assert f"after {stops[-1]} layers" in result.stdout
    assert content(parts) == content(whole)
    # All runs count, not the last alone; and of time left those layers tell that took some.
    assert json.loads((parts / METADATA_FILE).read_text())["seconds"]["total"] > seconds
    assert quick == [0, *stops]
    assert not (tmp_path / "parts.unfinished").exists()
    if len(stops) == 1:  # of a method in the quick run
        return
    assert run_script(ROOT / "verify_model.py", "--model-path", parts).returncode == 0
    again = run_script(*command(method, five, parts, calibration_text, "--resume"))
    assert again.returncode == 0 and "nothing to resume" in again.stdout


@pytest.fixture
def one_thread():
    """Torch with one thread, also in processes forked off this one, where its others do not
    exist."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_and_exit(*words):
    sys.exit(run_script(*words).returncode)


def kill_and_resume(method, model, text, folder, kills, seed):
    """Run in processes of their own, killed -9 at random moments of the quantization, until one
    comes through.
    """
    rng = random.Random(seed)
    # A fork spares the imports; CUDA does not survive one.
    start = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork").Process
    output = folder / "killed"
    progress = folder / "killed.unfinished" / "progress.json"
    done = 0
    while done < kills:
        process = start(target=run_and_exit, args=command(method, model, output, text, "--resume"))
        process.start()
        before = progress.stat().st_mtime_ns if progress.is_file() else 0
        # From the moment that this run has touched its folder, it may be killed at any time.
        while process.is_alive() and (
            not progress.is_file() or progress.stat().st_mtime_ns == before
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.15)
        process.kill()
        process.join()
        if process.exitcode == 0:
            return done
        done += 1
        assert not output.exists() or (output / METADATA_FILE).is_file()
    result = run_script(*command(method, model, output, text, "--resume"))
    assert result.returncode == 0, result.stderr
    return done


def killed_often(method, model, text, tmp_path, kills):
    whole = tmp_path / "whole"
    assert run_script(*command(method, model, whole, text)).returncode == 0
    done = 0
    for attempt in range(100):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        done += kill_and_resume(method, model, text, folder, min(4, kills - done), seed=attempt)
        assert content(folder / "killed") == content(whole)
        if done >= kills:
            return
    pytest.fail(f"only {done} kills landed")


def test_killed_at_random_moments(deep, calibration_text, tmp_path, one_thread):
    killed_often("gptq", deep, calibration_text, tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["gptq", "quarot", "smoothquant"])
def test_killed_twenty_times(deep, calibration_text, tmp_path, one_thread, method):
    killed_often(method, deep, calibration_text, tmp_path, kills=20)


def stopped(*_):
    raise KeyboardInterrupt


def stopped_at_the_second(original):
    """`CheckpointWriter._save` that does not write the second layer's tuned scales."""

    def save(writer, tensors, file):
        if file.startswith("model-00002") and file.endswith(".tuned"):
            raise UserError("no room")
        return original(writer, tensors, file)

    return save


@pytest.mark.parametrize(
    "where, steps",
    [("in the tuning", 0), ("between new scales", 0), ("between new scales", 6), ("after them", 6)],
)
def test_stopped_when_all_layers_are_done(
    five, calibration_text, tmp_path, monkeypatch, where, steps
):
    """What is gone on with is what was not interrupted, with other scales as long as there are
    none.
    """
    # On a model of random weights and so little text it need not be.
    monkeypatch.setattr(tuning.Tuned, "better", True)
    begun, whole = (
        command("gptq", five, tmp_path / name, calibration_text, "--bits", 3, "--tune-scales")
        for name in ("out", "whole")
    )
    with monkeypatch.context() as patch:
        if where == "in the tuning":
            patch.setattr(walk, "tune_scales", stopped)
        elif where == "after them":
            patch.setattr(CheckpointWriter, "write_rest", stopped)
        else:
            patch.setattr(CheckpointWriter, "_save", stopped_at_the_second(CheckpointWriter._save))
        assert run_script(*begun, 6).returncode
    if where == "after them":
        refused = run_script(*begun, 0, "--resume")
        assert_user_error(refused, "cannot resume", "--tune-scales 6")
    result = run_script(*begun, steps, "--resume")
    assert result.returncode == 0, result.stderr
    assert "after 5 layers" in result.stdout
    assert run_script(*whole, steps).returncode == 0
    files, record = content(tmp_path / "whole")
    assert content(tmp_path / "out") == (files, record)
    assert ("tuned" in record) is (steps > 0)


def test_only_the_same_run_is_gone_on_with(five, tiny, calibration_text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        run_script(*command("gptq", five, output, calibration_text))
    other_text = tmp_path / "other.txt"
    other_text.write_text(calibration_text.read_text()[5000:])
    for extra, words in (
        (["--damping", 0.3], ["--damping", "0.1 then", "0.3 now"]),
        (["--bits", 3], ["--bits", "4 then"]),
        (["--calib-data", other_text], ["calibration"]),
        (["--seed", 1], ["--seed"]),
    ):
        changed = run_script(*command("gptq", five, output, calibration_text, "--resume", *extra))
        assert_user_error(changed, "cannot resume", *words)
    assert_user_error(
        run_script(*command("gptq", tiny, output, calibration_text, "--resume")),
        "cannot resume",
        "model",
    )
    assert_user_error(
        run_script(*command("awq", five, output, calibration_text, "--resume")),
        "method gptq then, awq now",
    )
    # A damaged shard is done again.
    shards = sorted((tmp_path / "out.unfinished").glob("*.safetensors"))
    assert len(shards) == 3
    shards[1].write_bytes(shards[1].read_bytes()[:200])
    result = run_script(*command("gptq", five, output, calibration_text, "--resume"))
    assert result.returncode == 0, result.stderr
    whole = tmp_path / "whole"
    assert run_script(*command("gptq", five, whole, calibration_text)).returncode == 0
    assert content(output) == content(whole)


def test_without_resume_it_starts_again(five, calibration_text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        run_script(*command("hqq", five, output, calibration_text))
    result = run_script(*command("hqq", five, output, calibration_text))
    assert result.returncode == 0 and "resuming" not in result.stdout
    other = run_script(*command("hqq", five, tmp_path / "new", calibration_text, "--resume"))
    assert other.returncode == 0 and "nothing to resume" in other.stdout


def test_damaged_progress(five, calibration_text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        run_script(*command("hqq", five, output, calibration_text))
    (tmp_path / "out.unfinished" / "progress.json").write_text("{")
    assert_user_error(
        run_script(*command("hqq", five, output, calibration_text, "--resume")),
        "damaged",
        "without --resume",
    )


def test_two_processes_on_one_output(five, calibration_text, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    handle = os.open(tmp_path / "out.unfinished" / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert_user_error(
            run_script(*command("hqq", five, tmp_path / "out", calibration_text)),
            "another process is writing",
        )
        assert (tmp_path / "out.unfinished" / "lock").is_file()
    finally:
        os.close(handle)
    assert run_script(*command("hqq", five, tmp_path / "out", calibration_text)).returncode == 0

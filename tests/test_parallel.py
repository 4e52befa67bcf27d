"""Several processes, as torchrun starts them (gloo, on CPUs), give what one gives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, run_script
from forks import forks
from methods import method_options
from safetensors.torch import load_file
from torch import distributed

from common.base import parallel
from common.base.errors import UserError
from common.checkpoint.format import open_checkpoint, weight_format
from common.checkpoint.tensors import stored_codes, stored_parts

COMMON = ["--calib-data", "demo", "--calib-samples", "5", "--calib-length", "64", "--device", "cpu"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(processes: int, *words) -> list[str]:
    return list(
        map(
            str,
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                processes,
                *words,
            ],
        )
    )


def torchrun(processes: int, *words) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(processes, *words),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )


def codes_of(folder) -> torch.Tensor:
    content, _ = open_checkpoint(folder)
    grid = weight_format(content).grid
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name in sorted(
            name.removesuffix(".weight_scale") for name in tensors if name.endswith("weight_scale")
        ):
            state = stored_parts(tensors.__getitem__, tensors, name)
            found.append(stored_codes(state, grid)[0].flatten())
    return torch.cat(found)


OPTIONS = method_options(group_size=32, iterations=100, gptq=["--tune-scales", "6"])
# AWQ stands for what scales channels, and so does what is marked slow.
METHODS = [
    "gptq",
    "awq",
    *[
        pytest.param(method, marks=pytest.mark.slow)
        for method in ("smoothquant", "quarot", "hqq", "adaround")
    ],
]
# AdaRound starts where its gradient is zero but for rounding, and Adam's first step takes only the
# sign.
SHARES = {"adaround": 0.9}


# Runs scripts one after the other, in two processes that torchrun's own launcher forks off one that
# has imported what they need, which takes longer than all that they do. They stay together until
# the last script, as processes that have parted find each other's old addresses.
IN_TURN = """
import json, runpy, sys
import common.quantization, common.verification
from common.base import parallel
from torch import distributed
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run(scripts):
    stop = parallel.stop
    for words in scripts:
        parallel.stop = stop if words is scripts[-1] else distributed.barrier
        sys.argv = words
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "by two"}
config = LaunchConfig(1, 1, 2, **where, start_method="fork", max_restarts=0)
elastic_launch(config, run)(json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def by_two(tiny_models, tmp_path_factory, request) -> tuple[Path, subprocess.CompletedProcess]:
    """A folder with what two processes made with every method that is tested, and what they
    said."""
    folder = tmp_path_factory.mktemp("two")
    names = [item.name for item in request.session.items]
    wanted = [method for method in OPTIONS if any(f"one_gives[{method}]" in name for name in names)]
    runs = [
        [
            f"quantize_{method}.py",
            "--model",
            str(tiny_models["qwen2", True]),
            "--output",
            str(folder / method),
            *COMMON,
            *OPTIONS[method],
        ]
        for method in wanted
    ]
    result = forks().run(["-c", IN_TURN, json.dumps(runs)], ROOT, ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_what_one_gives(tiny_models, tmp_path, by_two, method):
    source, script, (folder, both) = tiny_models["qwen2", True], f"quantize_{method}.py", by_two
    alone = run_script(
        script, "--model", source, "--output", tmp_path / "one", *COMMON, *OPTIONS[method]
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    shutil.copytree(folder / method, tmp_path / "two")
    lines = [line for line in both.stdout.splitlines() if f"{folder / method}:" in line]
    assert sum("MB of weights" in line for line in lines) == 1  # one process talks
    one, two = codes_of(tmp_path / "one"), codes_of(tmp_path / "two")
    assert one.shape == two.shape and len(one) > 1000
    # Sums in another order: a weight that lies between two codes may go either way.
    assert (one == two).float().mean() > SHARES.get(method, 0.99)
    documents = [
        json.loads((tmp_path / name / "quantization_metadata.json").read_text())
        for name in ("one", "two")
    ]
    assert [document["processes"] for document in documents] == [1, 2]
    assert documents[1]["probe"]["perplexity"] == pytest.approx(
        documents[0]["probe"]["perplexity"], rel=0.01
    )
    assert documents[1]["linears"].keys() == documents[0]["linears"].keys()
    result = run_script("verify_model.py", "--model-path", tmp_path / "two")
    assert result.returncode == 0, result.stdout + result.stderr


def kill_all(word: str) -> None:
    """Kill -9 every process with a word in its command line, the last started first: torchrun's
    children have sessions of their own.
    """
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda entry: -int(entry.name)):
        try:
            if word in (entry / "cmdline").read_text():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


@pytest.mark.slow
def test_killed_and_resumed(deep, tmp_path):
    """All processes are killed in the middle; going on with two gives the same bits as two that
    were left alone.
    """
    words = ["quantize_gptq.py", "--model", deep, "--group-size", "32", *COMMON, "--output"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert torchrun(2, *words, whole).returncode == 0
    progress = tmp_path / "parts.unfinished" / "progress.json"
    process = subprocess.Popen(
        command(2, *words, parts),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (
        progress.is_file() and len(json.loads(progress.read_text())["layers"]) >= 3
    ):
        time.sleep(0.005)
    kill_all(str(parts))
    process.wait()
    assert not parts.exists()
    result = torchrun(2, *words, parts, "--resume")
    assert result.returncode == 0 and "resuming" in result.stdout, result.stdout + result.stderr
    assert torch.equal(codes_of(parts), codes_of(whole))
    assert {file.name: file.read_bytes() for file in parts.glob("*.safetensors")} == {
        file.name: file.read_bytes() for file in whole.glob("*.safetensors")
    }


def test_windows_are_shared_out(monkeypatch):
    windows = torch.arange(10).view(5, 2)
    assert torch.equal(parallel.own_windows(windows), windows)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(parallel.own_windows(windows))
    assert torch.equal(torch.cat(shares), windows) and {len(part) for part in shares} == {2, 3}
    with pytest.raises(UserError, match="raise --calib-samples"):
        parallel.own_windows(windows[:1])


def test_that_another_process_has_ended_is_said(monkeypatch):
    """In one line, by whatever is being exchanged; a GPU's own errors stay what they are."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = torch.ones(3, 2)
    exchanges = {
        "all_reduce": (parallel.add, parallel.largest, parallel.mean),
        "all_gather": (lambda rows: parallel.join_rows(rows, 6),),
        "broadcast": (parallel.from_first,),
        "all_gather_object": (parallel.gather, parallel.join_rows),
    }
    for error, seen in (
        (RuntimeError("Connection closed by peer\nmore"), UserError),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError),
        (torch.AcceleratorError("a kernel's"), torch.AcceleratorError),
    ):
        for exchange, functions in exchanges.items():
            monkeypatch.setattr(distributed, exchange, Mock(side_effect=error))
            for function in functions:
                with pytest.raises(seen) as raised:
                    function(rows)
                if seen is UserError:
                    assert re.search(r"\(Connection closed by peer\).*--resume", str(raised.value))

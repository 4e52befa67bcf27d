"""run_all_quantization.sh --check: what it asks the hub, and what of it the batch shows."""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, assert_user_error, run_script, run_scripts
from stub_data import build_datasets
from stub_hub import StubHub

from common import batch
from common.base import machine
from common.base.errors import UserError
from common.base.machine import Driver
from common.run_all import check, check_lines
from common.run_all.check_lines import FAIL, PASS, SKIP, WARN, ModelFacts


class Hub(BaseHTTPRequestHandler):
    """owner/open gives its files, owner/gated its list alone, as the hub does."""

    def do_GET(self):
        body = b""
        if "/api/" in self.path:
            files = [
                {"rfilename": name, "size": size}
                for name, size in (
                    ("model-1.safetensors", 3_000_000),
                    ("model-2.safetensors", 1_000_000),
                    ("original/consolidated.pth", 9),
                )
            ]
            body = json.dumps(
                {"id": "owner/x", "sha": "0" * 40, "siblings": files, "private": False, "tags": []}
            ).encode()
        self.send_response(
            403 if "gated" in self.path and not body else 200 if "owner/" in self.path else 401
        )
        for name, value in {
            "X-Error-Code": "GatedRepo" if "gated" in self.path else "",
            "ETag": '"1"',
            "X-Repo-Commit": "0" * 40,
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield tmp_path / "cache"
    server.shutdown()


def test_a_model_of_the_hub(hub, tiny, monkeypatch):
    from huggingface_hub import constants

    assert check.model_facts("owner/open") == ModelFacts(
        "owner/open, on the hub, access granted", 4e6, 4e6
    )
    gated = check_lines.model_line(check.model_facts("owner/gated"))
    assert (
        gated.state == FAIL
        and "accept its licence" in gated.found
        and "hf auth login" in gated.found
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        "owner/open is not in the cache and HF_HUB_OFFLINE is set"
        in check.model_facts("owner/open").problem
    )
    snapshot = hub / "models--owner--open/snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny)
    (hub / "models--owner--open/refs").mkdir()
    (hub / "models--owner--open/refs/main").write_text("0" * 40)
    cached = check.model_facts("owner/open")
    assert "in the cache" in cached.where and cached.weights > 0 and cached.missing == 0


def test_a_model_in_a_folder(tiny, tmp_path):
    assert check_lines.model_line(check.model_facts(str(tiny))).state == PASS
    (tmp_path / "config.json").write_text("{")
    assert (
        "config.json cannot be read"
        in check_lines.model_line(check.model_facts(str(tmp_path))).found
    )
    assert "does not exist" in check.model_facts("./nowhere").problem


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    build_datasets(folder / "datasets", articles=2, math=300, chats=300)
    return folder


def test_data_that_a_run_would_not_get(tiny, served, tmp_path):
    """It would stop at once. Those of the options that are given are looked up, and of those
    alone."""
    root = tmp_path / "data"
    for name, part in (
        ("allenai/ai2_arc", "ARC-Challenge/test"),
        ("allenai/ai2_arc", "ARC-Easy/validation"),  # in the place of the test split
        ("rajpurkar/squad_v2", "squad_v2/validation"),
        ("nvidia/OpenMathInstruct-2", "train_sample"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1/test"),
    ):
        (root / name / part).parent.mkdir(parents=True)
        (root / name / f"{part}.parquet").touch()
    (tmp_path / "own.txt").write_text("some text")
    cases = (
        ([], "HuggingFaceH4/ultrachat_200k"),
        (["--calib-data", "own.txt"], "own.txt"),
        (["--calib-data", tmp_path / "own.txt"], None),
        (["--only", "baseline,hqq-4bit"], None),
    )
    words = (ROOT / "common/batch.py", "--check", "--model", tiny, "--device", "cpu")
    found, *others = run_scripts(
        [words, *((*words, "--data-root", root, *more) for more, _ in cases)],
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    said = " ".join(found.stdout.split())
    assert found.returncode == 1 and "FAIL Data" in said and "-> unset it, or give" in said
    for name in (
        "HuggingFaceH4/ultrachat_200k",
        "allenai/ai2_arc",
        "rajpurkar/squad_v2",
        "Salesforce/wikitext",
    ):
        assert f"data set {name}" in said
    for found, (_, missing) in zip(others, cases, strict=True):
        assert found.returncode == (1 if missing else 0), found.stdout
        assert ("FAIL" in found.stdout) is (missing is not None) and (
            missing or "PASS"
        ) in found.stdout
        assert "ai2_arc cannot" not in found.stdout


def test_unknown_options_are_refused():
    assert_user_error(
        run_script(ROOT / "common/batch.py", "--check", "--nonsense", "3"),
        "unknown option --nonsense 3",
    )


def test_the_command(tiny, served, tmp_path):
    """On this machine, as far as a command without a GPU goes; on a terminal of 80 columns."""
    words = ["-m", "common.batch", "--check", "--model", tiny, "--device", "cpu"]
    with StubHub(served) as hub:
        there = hub.environment(tmp_path / "home")
        result = run_script(*words, **there)
        assert hub.by_repository == {}  # nothing was fetched
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "Nothing here stops a run." and all(
        len(line) <= 80 or "/" in line for line in lines
    )
    names = [line.split()[1] for line in lines if line[:4] in (PASS, WARN, FAIL, SKIP)]
    assert (
        names == ["Python", "Packages", "Disk", "Memory", "Card", "Model", "Data"]
        and len(lines) <= 24
    )
    result = run_script(
        ROOT / "common/batch.py",
        "--check",
        "--model",
        "./nowhere",
        "--data-root",
        tmp_path / "none",
    )
    assert result.returncode == 1 and result.stdout.count(FAIL + "  ") == 2


def test_the_batch_shows_what_is_wrong_and_no_more(tiny, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1e12})())
    check.show_problems(str(tiny), "cpu", None)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1})())
    check.show_problems(str(tiny), "cpu", None)
    assert "WARN  Disk" in (printed := capsys.readouterr().out) and "PASS" not in printed


@pytest.mark.parametrize(
    "words, said",
    [
        (["--model", "./nowhere"], ["model folder ./nowhere does not exist"]),
        (["--model", "MODEL", "--data-root", "nowhere"], ["--data-root nowhere is not a folder"]),
        (["--model", "."], ["config.json cannot be read"]),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(tiny, tmp_path, words, said):
    words = [str(tiny) if word == "MODEL" else word for word in words]
    result = run_script(ROOT / "common/batch.py", "--device", "cpu", *words, cwd=tmp_path)
    assert_user_error(result, *said)
    assert not result.stdout and not list(tmp_path.iterdir())


def test_the_batch_does_not_start_beside_a_card_that_cannot_be_used(tmp_path, monkeypatch):
    """Before anything is fetched or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        machine,
        "look",
        lambda: machine.Machine("13.0", card=True, driver=Driver("535.183.01", "12.2")),
    )
    monkeypatch.setattr("sys.argv", ["batch", "--model", "demo"])
    with pytest.raises(
        UserError, match="driver 535.183.01 runs CUDA 12.2.*install NVIDIA driver 580.*--device cpu"
    ):
        batch.main()
    assert not list(tmp_path.iterdir())


def test_the_rows_of_the_tasks_that_are_chosen_are_looked_for():
    """Of another data set, where one is given."""
    told = argparse.Namespace(tasks=("arc", "perplexity"), arc_data="my/arc", perplexity_data=None)
    found = check.evaluation_samples(7, None, told)
    assert [address for address, *_ in found][0] == "my/arc" and len(found) == 2
    assert "wikitext" in found[1][0]

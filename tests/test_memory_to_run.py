"""What running a model takes: measured while it is alone, apart from all else the process does."""

import argparse
import os
import sys

import pytest
import torch
from conftest import build_tiny

from common import evaluation
from common.base import host_memory
from common.model.source import SourceModel
from common.results.naming import Subject
from common.running import speed as running_speed
from common.tasks import evaluate, perplexity, speed

CPU = torch.device("cpu")


@pytest.mark.skipif(
    sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK),
    reason="Linux tells, others do not",
)
def test_growth_of_resident_memory():
    kept = [torch.ones(40 << 18)]  # a peak of before does not count
    kept.clear()
    assert 60 << 20 < host_memory.growth(lambda: torch.ones(64 << 18).sum()) < 80 << 20
    assert host_memory.growth(lambda: None) < 8 << 20


def test_growth_is_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(host_memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(host_memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    assert host_memory.growth(lambda: None) is None
    assert running_speed.measure_memory(build_tiny("llama", True), 320) is None


def test_memory_is_weights_and_what_a_full_context_takes(monkeypatch):
    model, lengths = build_tiny("llama", True), []
    original = model.forward

    def forward(tokens, **arguments):
        output = original(tokens, **arguments)
        lengths.append(output.past_key_values.get_seq_length())
        return output

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(host_memory, "growth", lambda work: work() and 1234)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2
    assert running_speed.measure_memory(model, 320) == pytest.approx(
        weights + 1234, abs=100
    )  # rotary frequencies
    assert lengths[0] == 256 - 8 and lengths[-1] == 256 - 1  # the tiny model reads 256 tokens
    lengths.clear()
    running_speed.measure_memory(model, 320, context=100)
    assert lengths[0] == 92 and len(lengths) == 8


def test_the_model_is_alone_when_it_is_measured(tiny, tmp_path, monkeypatch):
    """Before, it was the process's peak, with the original's embedding and a cache as large as
    fits.
    """
    events = []
    for module, name in (
        (perplexity, "hidden_states"),
        (evaluate, "load_for_running"),
        (speed, "measure_speed"),
        (speed, "measure_memory"),
        (perplexity, "perplexity"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *arguments, name=name, original=original: (
                events.append(name) or original(*arguments)
            ),
        )
    monkeypatch.setattr(
        SourceModel, "move_vocabulary", lambda self, device: events.append(f"ends to {device}")
    )
    parser = argparse.ArgumentParser()
    evaluation.add_evaluation_arguments(parser)
    options = parser.parse_args(
        [
            "--tasks",
            "perplexity,speed",
            "--data",
            "demo",
            "--windows",
            "2",
            "--window-length",
            "32",
            "--results-dir",
            str(tmp_path),
        ]
    )
    subject = Subject(tiny, str(tiny), "tiny", "baseline")
    document = evaluation.evaluate_model(subject, options, reuse=False)
    assert events == [
        "hidden_states",
        "ends to cpu",
        "load_for_running",
        "measure_speed",
        "measure_memory",
        "perplexity",
    ]
    weights = document["memory"]["weights_bytes"]
    assert (
        weights
        <= document["speed"]["memory_bytes"]
        < weights + (64 << 20)
        < document["memory"]["peak_host_bytes"]
    )

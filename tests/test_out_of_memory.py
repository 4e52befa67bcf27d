"""A GPU without room for a chunk of hidden states: the chunk is halved, the result the same;
played on the CPU.
"""

import json

import pytest
import torch
from conftest import ROOT, assert_user_error, run_script

from common.walk import inputs as inputs_module
from common.walk import layers, streams
from common.walk.inputs import InputSums, Needs, add_in_parts

LENGTH = 64


def run(tiny, calibration_text, output, method="gptq"):
    return run_script(
        ROOT / f"quantize_{method}.py",
        "--model",
        tiny,
        "--calib-data",
        calibration_text,
        "--calib-samples",
        8,
        "--calib-length",
        LENGTH,
        "--output",
        output,
    )


def room_for(windows: int, monkeypatch) -> list[int]:
    """Let layers run out of memory above so many calibration windows. Returns the numbers that were
    asked for.
    """
    asked, original = [], streams.run_layer

    def limited(module, hidden, arguments):
        if hidden.shape[1] == LENGTH:  # not the probe text
            asked.append(len(hidden))
            if len(hidden) > windows:
                raise torch.cuda.OutOfMemoryError("no room")
        return original(module, hidden, arguments)

    monkeypatch.setattr(layers, "run_layer", limited)
    return asked


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_chunks_are_halved(tiny, calibration_text, tmp_path, monkeypatch, method):
    whole = run(tiny, calibration_text, tmp_path / "whole", method)
    asked = room_for(2, monkeypatch)
    halved = run(tiny, calibration_text, tmp_path / "halved", method)
    assert whole.returncode == halved.returncode == 0, halved.stderr
    assert (halved.stdout + halved.stderr).count(f"no room for {8 * LENGTH} tokens") == 1
    assert asked.count(8) == asked.count(4) == 1  # each size is tried once in all
    one, other = (
        json.loads((tmp_path / name / "quantization_metadata.json").read_text())
        for name in ("whole", "halved")
    )
    for name, record in one["linears"].items():
        assert other["linears"][name]["relative_output_error"] == pytest.approx(
            record["relative_output_error"], rel=0.02
        )


def test_no_room_for_one_window(tiny, calibration_text, tmp_path, monkeypatch):
    room_for(0, monkeypatch)
    result = run(tiny, calibration_text, tmp_path / "out")
    assert_user_error(
        result, f"no room for one calibration window of {LENGTH} tokens", "--calib-length"
    )


def test_statistics_added_in_halves(generator, monkeypatch):
    inputs, weights = (
        torch.randn(6, 10, 24, generator=generator),
        torch.rand(6, 10, generator=generator),
    )
    lag = torch.randn(6, 10, 8, generator=generator)
    needs = Needs.GRAM | Needs.MAGNITUDES | Needs.SAMPLES
    whole, parts = (InputSums(24, torch.device("cpu"), needs) for _ in range(2))
    whole.add(inputs, weights, lag)
    original = InputSums.add

    def limited(self, batch, *rest):
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        original(self, batch, *rest)

    monkeypatch.setattr(InputSums, "add", limited)
    add_in_parts(parts, inputs, weights, lag)
    whole, parts = whole.finish(), parts.finish()
    for name in ("gram", "lag", "abs_max", "abs_mean", "sample"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_nothing_is_added_twice_where_the_sample_has_no_room(generator, monkeypatch):
    inputs, drawn = torch.randn(4, 10, 8, generator=generator), inputs_module._drawn

    def limited(batch, *rest):
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return drawn(batch, *rest)

    monkeypatch.setattr(inputs_module, "_drawn", limited)
    sums = InputSums(8, torch.device("cpu"), Needs.MAGNITUDES | Needs.SAMPLES)
    add_in_parts(sums, inputs, None, None)
    found = sums.finish()
    torch.testing.assert_close(found.abs_mean, inputs.abs().mean((0, 1)))
    torch.testing.assert_close(found.mean_square, inputs.square().mean((0, 1)))
    assert sums._tokens == 40

"""Scales tuned on what the model says: against Adam written in float64, and what must hold."""

import itertools
import json
import math

import pytest
import torch
from conftest import assert_user_error, run_quantize, sampled
from tuning_problem import CPU, HELD_OUT, LENGTH, Problem

import quantize_adaround
import quantize_awq
import quantize_gptq
import quantize_quarot
from common import cli
from common.base import host_memory, parallel
from common.base.errors import UserError
from common.checkpoint.writer import METADATA_FILE
from common.model.tensors import TensorReader
from common.numerics.grid import grouped
from common.running.runtime import load_model
from common.walk import tuning


def by_hand(problem, steps):
    """Logarithms of the multipliers of all scales by full name, by Adam written out; every step
    takes all windows that are not held out.
    """
    codes = problem.by_name(problem.codes)
    plain = {name: grouped(one.dequantize().double(), one.grid) for name, one in codes.items()}
    logs = {name: torch.zeros(found.scale.shape).double() for name, found in codes.items()}
    first = {name: torch.zeros_like(log) for name, log in logs.items()}
    second = {name: torch.zeros_like(log) for name, log in logs.items()}
    before = problem.divergence(problem.weights(problem.codes), problem.windows[HELD_OUT])
    for step in range(steps):
        weights = {
            name: (plain[name] * logs[name].exp()[..., None]).flatten(1).requires_grad_(True)
            for name in codes
        }
        loss = problem.divergence(weights, problem.windows[~HELD_OUT])
        gradients = torch.autograd.grad(loss, list(weights.values()))
        rate = tuning.RATE * before.sqrt() * 0.5 * (1 + math.cos(math.pi * step / steps))
        rate *= min(1, (step + 1) / (steps // 4))
        for name, gradient, weight in zip(codes, gradients, weights.values(), strict=True):
            slope = grouped(gradient * weight.detach(), codes[name].grid).sum(-1)
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.95 * second[name] + 0.05 * slope**2
            size = (second[name] / (1 - 0.95 ** (step + 1))).sqrt()
            logs[name] -= rate * first[name] / (1 - 0.9 ** (step + 1)) / size
    return logs


def test_against_adam_written_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "STEP_TOKENS", 10 * LENGTH)
    monkeypatch.setattr(tuning, "RATE", 0.05)
    monkeypatch.setattr(tuning.Tuned, "better", True)
    problem = Problem(tmp_path)
    wanted = by_hand(problem, 16)
    tuned = problem.by_name(problem.tune(16).codes)
    for name, found in problem.by_name(problem.codes).items():
        change = (tuned[name].scale.double() / found.scale.double()).log()
        # Of a scale's bfloat16; and Adam makes steps of the smallest slopes, too, whose last digits
        # float32 does not have.
        difference = (change - wanted[name]).abs()
        assert difference.mean() < 2**-9 and difference.max() < 0.01
        assert wanted[name].abs().mean() > 0.03


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma3_text", "granite"])
def test_the_model_comes_nearer(tmp_path, monkeypatch, architecture):
    # Such models are nearly right: steps as they are by default would be small.
    monkeypatch.setattr(tuning, "RATE", 0.05)
    problem = Problem(tmp_path, architecture)
    tuned = problem.tune(32)
    old, new = problem.by_name(problem.codes), problem.by_name(tuned.codes)
    for name, found in new.items():
        assert torch.equal(found.codes, old[name].codes)
        assert torch.equal(found.zero_point, old[name].zero_point)
        assert torch.equal(found.scale, found.scale.bfloat16().to(found.scale.dtype))
        assert (found.scale > 0).all() and not found.scale.requires_grad
    assert [layer.codes for layer in problem.layers] == tuned.codes
    assert all(layer.module.mlp.down_proj.weight.is_meta for layer in problem.layers)
    with torch.no_grad():
        for codes, stated in ((problem.codes, tuned.before), (tuned.codes, tuned.after)):
            held_out = problem.divergence(problem.weights(codes), problem.windows[HELD_OUT])
            assert held_out.item() == pytest.approx(stated, rel=0.02)
    assert tuned.better and tuned.after < 0.9 * tuned.before


@pytest.mark.parametrize(
    "dtype, bits, size",
    sampled(
        itertools.product([torch.bfloat16, torch.float16], [2, 4], [64, None]),
        lambda dtype, bits, size: (
            (dtype, bits, size) in ((torch.bfloat16, 2, 64), (torch.float16, 4, None))
        ),
    ),
)
def test_every_type(tmp_path, monkeypatch, dtype, bits, size):
    monkeypatch.setattr(tuning, "RATE", 0.05)
    problem = Problem(tmp_path, bits=bits, size=size, dtype=dtype)
    tuned = problem.tune(8)
    assert tuned.better
    for found in problem.by_name(tuned.codes).values():
        assert torch.isfinite(found.scale).all()
    problem.layers[0].put(dtype, CPU)
    weight = problem.layers[0].module.mlp.down_proj.weight
    assert torch.equal(weight, tuned.codes[0]["mlp.down_proj"].dequantize(dtype))


@pytest.mark.parametrize("rate", [3.0, 1e6])  # runs away, overflows
def test_what_does_not_help_is_not_kept(tmp_path, monkeypatch, rate):
    problem = Problem(tmp_path)
    monkeypatch.setattr(tuning, "RATE", rate)
    tuned = problem.tune(5)
    assert tuned.codes == problem.codes and not tuned.better
    assert [layer.codes for layer in problem.layers] == problem.codes
    assert tuned.describe()["kept"] is False


def test_without_error_there_is_nothing_to_tune(tmp_path):
    problem = Problem(tmp_path)
    for layer in problem.layers:
        layer.put(torch.float32, CPU)
    hidden = problem.source.embed(problem.windows)
    for layer in problem.layers:
        hidden = tuning.run_layer(layer.module, hidden, layer.arguments)
        layer.clear()
    problem.targets = [hidden]
    tuned = problem.tune(3)
    assert abs(tuned.before) < 1e-6 and abs(tuned.after) < 1e-6
    for name, found in problem.by_name(tuned.codes).items():
        assert torch.allclose(found.scale, problem.by_name(problem.codes)[name].scale, rtol=2**-7)


def test_a_divergence_that_is_not_finite_is_left_to_the_walk(tmp_path):
    problem = Problem(tmp_path)
    problem.source.model.model.norm.weight[3] = math.nan
    assert problem.tune(5) is None
    assert [layer.codes for layer in problem.layers] == problem.codes


def test_weights_of_one_layer_at_a_time(tmp_path, monkeypatch):
    problem = Problem(tmp_path)
    held = []
    original = tuning.run_layer

    def watched(module, *arguments):
        linears = [layer.module.mlp.down_proj.weight for layer in problem.layers]
        held.append(sum(not weight.is_meta for weight in linears))
        return original(module, *arguments)

    monkeypatch.setattr(tuning, "run_layer", watched)
    problem.tune(2)
    assert set(held) == {1}


def test_one_window_cannot_be_held_out(tmp_path, capsys):
    problem = Problem(tmp_path)
    problem.windows, problem.targets = problem.windows[:1], [problem.targets[0][:1]]
    assert problem.tune(5) is None
    assert [layer.codes for layer in problem.layers] == problem.codes
    assert "two calibration windows" in capsys.readouterr().out


def out_of_memory_above(monkeypatch, windows):
    original = tuning._Tuning.divergence

    def limited(self, hidden, part, with_gradient=False):
        if len(part) > windows:
            raise torch.cuda.OutOfMemoryError("made up")
        return original(self, hidden, part, with_gradient)

    monkeypatch.setattr(tuning._Tuning, "divergence", limited)


@pytest.mark.parametrize("windows", sampled([(1,), (2,), (5,)], lambda windows: windows == 2))
def test_windows_that_do_not_fit_go_in_parts(tmp_path, monkeypatch, windows):
    problem = Problem(tmp_path)
    monkeypatch.setattr(tuning, "STEP_TOKENS", 7 * LENGTH)  # of ten windows seven at a time
    whole = problem.by_name(problem.tune(10).codes)
    for layer, codes in zip(problem.layers, problem.codes, strict=True):
        layer.codes = codes
    out_of_memory_above(monkeypatch, windows)
    parts = problem.by_name(problem.tune(10).codes)
    for name, found in whole.items():
        assert torch.allclose(parts[name].scale, found.scale, rtol=2**-7)


def test_no_room_for_one_window(tmp_path, monkeypatch, capsys):
    problem = Problem(tmp_path)
    out_of_memory_above(monkeypatch, 0)
    assert problem.tune(10) is None
    assert "--tune-scales 0" in capsys.readouterr().out
    assert [layer.codes for layer in problem.layers] == problem.codes
    assert problem.layers[0].module.mlp.down_proj.weight.is_meta
    monkeypatch.setattr(parallel, "size", lambda: 2)  # the others would wait for this one
    monkeypatch.setattr(parallel, "gather", lambda value: [value])
    with pytest.raises(UserError, match="--tune-scales 0"):
        problem.tune(10)


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        (quantize_gptq, ["--bits", "3"], 64),
        (quantize_gptq, ["--bits", "3", "--model", "demo"], 0),
        (quantize_gptq, ["--bits", "3", "--model", "demo", "--calib-data", "a/b"], 64),
        (quantize_awq, [], 32),
        (quantize_awq, ["--tune-scales", "7"], 7),
        (quantize_quarot, ["--bits", "2"], 64),
        (quantize_adaround, [], 32),
        (quantize_adaround, ["--bits", "8"], 0),
        (quantize_adaround, ["--tune-scales", "0"], 0),
    ],
)
def test_default_steps(monkeypatch, script, words, expected):
    monkeypatch.setattr(cli, "resolve_device", lambda _: torch.device("cuda"))
    options = script.argument_parser().parse_args(words)
    cli.resolve_tuning(options)
    assert options.tune_scales == expected


def test_on_a_cpu_it_has_to_be_asked_for():
    for words, expected in (([], 0), (["--tune-scales", "9"], 9)):
        options = quantize_gptq.argument_parser().parse_args(
            ["--bits", "3", "--device", "cpu", *words]
        )
        cli.resolve_tuning(options)
        assert options.tune_scales == expected


@pytest.mark.parametrize(
    "script, bits, extra",
    sampled(
        [
            ("gptq", 3, ()),
            ("quarot", 2, ()),
            ("awq", 3, ("--catch-up", 0)),
            (
                "adaround",
                3,
                ("--catch-up", 0, "--reconstruction", "block", "--iterations", 20),
            ),
        ],
        lambda script, *_: script in ("gptq", "awq"),
    ),
)
def test_a_checkpoint(tmp_path, tiny, calibration_text, script, bits, extra):
    """With scales tuned a checkpoint loads as any other, is nearer to the original, and says so."""
    found, models = {}, {}
    for steps in (0, 32):
        output = tmp_path / f"{steps}"
        options = ("--bits", bits, "--group-size", 32, "--tune-scales", steps)
        options += extra
        result = run_quantize(script, tiny, output, *options, text=calibration_text, samples=16)
        assert result.returncode == 0, result.stderr
        found[steps] = json.loads((output / METADATA_FILE).read_text())
        models[steps] = load_model(output, CPU, torch.float32)[0]
    assert "tune" in found[32]["seconds"] and "tune" not in found[0]["seconds"]
    assert "tuned" not in found[0]
    tuned = found[32]["tuned"]
    assert tuned["kept"]
    assert tuned["held_out_divergence"]["after"] < tuned["held_out_divergence"]["before"]
    # What the probe text says is of the scales that were saved.
    assert found[32]["probe"]["perplexity"] != found[0]["probe"]["perplexity"]
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        for model in models.values():
            assert torch.isfinite(model(torch.arange(2, 40)[None]).logits).all()
        old, new = (model.get_submodule(name).weight for model in models.values())
    assert not torch.equal(old, new)
    one, other = (TensorReader(tmp_path / f"{steps}") for steps in models)
    packed = [name for name in one.names() if name.endswith("weight_packed")]
    assert packed and all(torch.equal(one.read(name), other.read(name)) for name in packed)


def test_no_room_for_all_codes(tmp_path, tiny, calibration_text, monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: 100_000)
    options = ("--bits", 3, "--tune-scales", 4)
    result = run_quantize("gptq", tiny, tmp_path / "out", *options, text=calibration_text)
    assert result.returncode == 0, result.stderr
    assert "scales are not tuned" in result.stdout
    assert "tuned" not in json.loads((tmp_path / "out" / METADATA_FILE).read_text())


def test_inputs_rounded_as_the_model_runs_have_no_gradient(tmp_path, tiny):
    words = ("--act-bits", 4, "--tune-scales", 5)
    result = run_quantize("quarot", tiny, tmp_path / "out", *words)
    assert_user_error(result, "--tune-scales", "--act-bits")


def test_a_negative_number_of_steps(tmp_path, tiny):
    result = run_quantize("gptq", tiny, tmp_path / "out", "--tune-scales", -3)
    assert_user_error(result, "-3 is negative")

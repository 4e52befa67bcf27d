"""Scales tuned on what a layer puts out: against Adam written in float64, and what must hold."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import assert_user_error, build_tiny, run_quantize
from torch.func import functional_call

import quantize_adaround
import quantize_awq
import quantize_gptq
from common import cli
from common.base import parallel
from common.base.errors import UserError
from common.checkpoint.writer import METADATA_FILE
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max, round_scale
from common.running.runtime import load_model
from common.walk import tuning
from common.walk.method import Layer
from common.walk.streams import run_layer
from common.walk.tuning import tune_scales

LENGTH = 16
# Of the twelve windows.
HELD_OUT = torch.arange(12) % tuning.HELD_OUT == 0


def rounded(weight, grid, generator):
    """Nearest codes, their scales then off by a tenth, so that there is something to tune."""
    scale, zero_point = min_max(grouped(weight, grid), grid, scale_dtype=torch.bfloat16)
    found = QuantizedLinear.nearest(weight, scale, zero_point, grid)
    off = scale * torch.exp(0.1 * torch.randn(scale.shape, generator=generator))
    return replace(found, scale=round_scale(off, torch.bfloat16))


def problem(architecture="llama", bits=3, size=32, targets=True, dtype=torch.float32):
    """A layer, its rounded linears, and its windows, one of them with a massive token."""
    model = build_tiny(architecture, True, layers=1).to(dtype).requires_grad_(False)
    module, grid = model.model.layers[0], Grid(bits, size)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(12, LENGTH, 64, generator=generator)
    hidden[3, 0] *= 100
    positions = torch.arange(LENGTH).unsqueeze(0)
    kinds = getattr(model.config, "layer_types", [])
    kind = {"layer_type": kinds[0]} if architecture == "gemma3_text" else {}
    embeddings = model.model.rotary_emb(hidden.to(dtype), positions, **kind)
    arguments = {"position_embeddings": embeddings, "position_ids": positions}
    layer = Layer(0, module, grid, torch.bfloat16)
    layer.forward = partial(run_layer, module, arguments=arguments)
    layer.inputs = list(hidden.to(dtype).split([5, 4, 3]))
    if targets:
        shifted = hidden + 0.05 * torch.randn(hidden.shape, generator=generator)
        with torch.no_grad():
            layer.targets = [layer.forward(part) for part in shifted.to(dtype).split([5, 4, 3])]
    codes = {name: rounded(layer.weight(name), grid, generator) for name in layer.family.linears}
    return layer, codes, arguments


def error(layer, codes, arguments, chunks, wanted):
    """The mean relative error over all tokens, by another way of calling the layer, in float64."""
    weights = {f"{name}.weight": found.dequantize().double() for name, found in codes.items()}
    module = layer.module.double()
    embeddings = tuple(part.double() for part in arguments["position_embeddings"])
    arguments = {**arguments, "position_embeddings": embeddings}
    found = functional_call(module, weights, (torch.cat(chunks).double(),), arguments)
    found = found[0] if isinstance(found, tuple) else found
    wanted = torch.cat(wanted).double()
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


def by_hand(layer, codes, arguments, steps):
    """Logarithms of the multipliers of all scales, by Adam written out; every step takes all
    windows that are not held out.
    """
    inputs = torch.cat(layer.inputs)[~HELD_OUT]
    wanted = torch.cat(layer.targets)[~HELD_OUT]
    count = sum(found.scale.numel() for found in codes.values())
    plain = {
        name: grouped(found.dequantize().double(), found.grid) for name, found in codes.items()
    }
    logs = {name: torch.zeros(found.scale.shape).double() for name, found in codes.items()}
    first = {name: torch.zeros_like(log) for name, log in logs.items()}
    second = {name: torch.zeros_like(log) for name, log in logs.items()}
    held = [torch.cat(chunks)[HELD_OUT] for chunks in (layer.inputs, layer.targets)]
    unit = error(layer, codes, arguments, *[[one] for one in held]).item()
    module = layer.module.double()
    embeddings = tuple(part.double() for part in arguments["position_embeddings"])
    for step in range(steps):
        weights = {
            f"{name}.weight": (plain[name] * logs[name].exp()[..., None])
            .flatten(1)
            .requires_grad_(True)
            for name in codes
        }
        output = functional_call(
            module,
            weights,
            (inputs.double(),),
            {**arguments, "position_embeddings": embeddings},
        )
        output = output[0] if isinstance(output, tuple) else output
        target = wanted.double()
        loss = ((output - target).square().sum(-1) / target.square().sum(-1)).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        rate = tuning.RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        for name, gradient, weight in zip(codes, gradients, weights.values(), strict=True):
            by_weight = grouped(gradient * weight.detach(), codes[name].grid).sum(-1)
            slope = by_weight * count / unit
            first[name] = 0.9 * first[name] + 0.1 * slope
            second[name] = 0.95 * second[name] + 0.05 * slope**2
            size = (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 0.1
            logs[name] -= rate * first[name] / (1 - 0.9 ** (step + 1)) / size
    return logs


def test_against_adam_written_out(monkeypatch):
    monkeypatch.setattr(tuning, "STEP_TOKENS", 10 * LENGTH)
    layer, codes, arguments = problem()
    tuned = tune_scales(layer, codes, 12)
    wanted = by_hand(layer, codes, arguments, 12)
    for name, found in codes.items():
        change = (tuned[name].scale.double() / found.scale.double()).log()
        # Of a scale's bfloat16, and of Adam's steps in float32.
        assert (change - wanted[name]).abs().max() < 2**-8 + 1e-3
        assert wanted[name].abs().max() > 0.02


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma3_text", "granite"])
@pytest.mark.parametrize("targets", [True, False])
def test_the_output_comes_nearer(architecture, targets):
    layer, codes, arguments = problem(architecture, targets=targets)
    linears = {name: layer.module.get_submodule(name) for name in codes}
    before = {name: linear.weight for name, linear in linears.items()}
    values = {name: weight.clone() for name, weight in before.items()}
    with torch.no_grad():
        wanted = layer.targets or [layer.forward(chunk) for chunk in layer.inputs]
    tuned = tune_scales(layer, codes, 40)
    for name, found in tuned.items():
        assert linears[name].weight is before[name] and torch.equal(before[name], values[name])
        assert not before[name].requires_grad or before[name].grad is None
        assert torch.equal(found.codes, codes[name].codes)
        assert torch.equal(found.zero_point, codes[name].zero_point)
        assert torch.equal(found.scale, found.scale.bfloat16().to(found.scale.dtype))
        assert (found.scale > 0).all() and not found.scale.requires_grad
    chunks, wanted = torch.cat(layer.inputs)[HELD_OUT], torch.cat(wanted)[HELD_OUT]
    with torch.no_grad():
        left = error(layer, tuned, arguments, [chunks], [wanted])
        left /= error(layer, codes, arguments, [chunks], [wanted])
    assert left.item() == pytest.approx(layer.notes["tuned"], rel=0.02)
    assert left < 0.97


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "size"), [(2, 64), (4, None)])
def test_every_type(dtype, bits, size):
    layer, codes, _ = problem(bits=bits, size=size, dtype=dtype)
    tuned = tune_scales(layer, codes, 20)
    assert layer.notes["tuned"] < 1
    assert all(torch.isfinite(found.scale).all() for found in tuned.values())
    assert layer.module.mlp.down_proj.weight.dtype == dtype


@pytest.mark.parametrize("rate", [3.0, 1e6])  # runs away, overflows
def test_what_does_not_help_is_not_kept(monkeypatch, rate):
    layer, codes, _ = problem()
    monkeypatch.setattr(tuning, "RATE", rate)
    assert tune_scales(layer, codes, 5) is codes
    assert layer.notes["tuned"] == 1.0


def test_without_error_there_is_nothing_to_tune():
    layer, codes, _ = problem(targets=False)
    for name, found in codes.items():
        layer.module.get_submodule(name).weight.data = found.dequantize()
    tuned = tune_scales(layer, codes, 3)
    assert all(torch.equal(tuned[name].scale, found.scale) for name, found in codes.items())
    assert 0 <= layer.notes["tuned"] <= 1


def test_one_window_cannot_be_held_out(capsys):
    layer, codes, _ = problem()
    layer.inputs, layer.targets = layer.inputs[0][:1].split(1), layer.targets[0][:1].split(1)
    assert tune_scales(layer, codes, 5) is codes and not layer.notes
    assert "two calibration windows" in capsys.readouterr().out


def out_of_memory_above(monkeypatch, windows):
    original = tuning._Tuning.error

    def limited(self, places, weights):
        if len(places) > windows:
            raise torch.cuda.OutOfMemoryError("made up")
        return original(self, places, weights)

    monkeypatch.setattr(tuning._Tuning, "error", limited)


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_windows_that_do_not_fit_go_in_parts(monkeypatch, windows):
    layer, codes, _ = problem()
    monkeypatch.setattr(tuning, "STEP_TOKENS", 7 * LENGTH)  # ten windows: seven, then three
    whole = tune_scales(layer, codes, 10)
    out_of_memory_above(monkeypatch, windows)
    parts = tune_scales(layer, codes, 10)
    for name, found in whole.items():
        # In a scale's bfloat16, and the unit of the loss is the first part's.
        assert torch.allclose(parts[name].scale, found.scale, rtol=2**-7)


def test_no_room_for_one_window(monkeypatch, capsys):
    layer, codes, _ = problem()
    before = layer.module.mlp.down_proj.weight
    out_of_memory_above(monkeypatch, 0)
    assert tune_scales(layer, codes, 10) is codes
    assert "--tune-scales 0" in capsys.readouterr().out
    assert layer.module.mlp.down_proj.weight is before
    monkeypatch.setattr(parallel, "size", lambda: 2)  # the others would wait for this one
    monkeypatch.setattr(parallel, "gather", lambda value: [value])
    with pytest.raises(UserError, match="--tune-scales 0"):
        tune_scales(layer, codes, 10)


@pytest.mark.parametrize(
    ("script", "steps", "words", "expected"),
    [
        (quantize_gptq, 0, ["--bits", "3"], 128),
        (quantize_gptq, 0, ["--bits", "3", "--model", "demo"], 0),
        (quantize_gptq, 0, ["--bits", "3", "--model", "demo", "--calib-data", "a/b"], 128),
        (quantize_awq, 0, [], 0),
        (quantize_awq, 0, ["--tune-scales", "7"], 7),
        (quantize_adaround, quantize_adaround.TUNE_STEPS, [], 32),
        (quantize_adaround, quantize_adaround.TUNE_STEPS, ["--bits", "8"], 0),
        (quantize_adaround, quantize_adaround.TUNE_STEPS, ["--tune-scales", "0"], 0),
    ],
)
def test_default_steps(monkeypatch, script, steps, words, expected):
    monkeypatch.setattr(cli, "resolve_device", lambda _: torch.device("cuda"))
    options = script.argument_parser().parse_args(words)
    cli.resolve_tuning(options, steps)
    assert options.tune_scales == expected


def test_on_a_cpu_it_has_to_be_asked_for():
    for words, expected in (([], 0), (["--tune-scales", "9"], 9)):
        options = quantize_gptq.argument_parser().parse_args(
            ["--bits", "3", "--device", "cpu", *words]
        )
        cli.resolve_tuning(options)
        assert options.tune_scales == expected


def test_a_checkpoint(tmp_path, tiny, calibration_text):
    """With scales tuned a checkpoint loads as any other, is nearer to the original, and says so."""
    found = {}
    for steps in (0, 30):
        output = tmp_path / f"{steps}"
        options = ("--bits", 3, "--group-size", 32, "--tune-scales", steps)
        result = run_quantize("gptq", tiny, output, *options, text=calibration_text, samples=16)
        assert result.returncode == 0, result.stderr
        found[steps] = json.loads((output / METADATA_FILE).read_text())
        model, _ = load_model(output, torch.device("cpu"), torch.float32)
        assert torch.isfinite(model(torch.arange(2, 40)[None]).logits).all()
    assert "tune" in found[30]["seconds"] and "tune" not in found[0]["seconds"]
    notes = [layer["tuned"] for layer in found[30]["layers"]]
    assert len(notes) == 2 and all(0 < left <= 1 for left in notes)


def test_inputs_rounded_as_the_model_runs_have_no_gradient(tmp_path, tiny):
    words = ("--act-bits", 4, "--tune-scales", 5)
    result = run_quantize("quarot", tiny, tmp_path / "out", *words)
    assert_user_error(result, "--tune-scales", "--act-bits")


def test_a_negative_number_of_steps(tmp_path, tiny):
    result = run_quantize("gptq", tiny, tmp_path / "out", "--tune-scales", -3)
    assert_user_error(result, "-3 is negative")

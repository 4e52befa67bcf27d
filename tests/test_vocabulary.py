"""Embedding and lm_head in a checkpoint: a head of its own is packed, as every engine takes it; an
embedding is int8, which transformers and this project alone run.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file, save_file

from common.checkpoint import tensors as checkpoint_tensors
from common.checkpoint.format import INTEGER, open_checkpoint, weight_format
from common.checkpoint.tensors import compress, stored_codes
from common.model.tensors import TensorReader
from common.numerics.grid import Grid, QuantizedLinear

METHODS = {
    "gptq": ("--sweeps", 0),
    "awq": (),
    "hqq": (),
    "smoothquant": (),
    "adaround": ("--iterations", 10),
    "quarot": ("--sweeps", 0),
}


def quantize(method, model, output, *options, text=None):
    few = ("--calib-data", text, "--calib-samples", 4, "--calib-length", 32) if text else ()
    result = run_script(
        ROOT / f"quantize_{method}.py", "--model", model, "--output", output, *options, *few
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def unpacked(words: torch.Tensor, columns: int) -> np.ndarray:
    """Codes [rows, columns] of packed 8-bit words [rows, words] int32: a byte each, stored with an
    offset of 128.
    """
    return words.numpy().view(np.uint8).astype(np.int64)[:, :columns] - 128


@pytest.mark.parametrize("method", METHODS)
def test_a_head_of_its_own_is_packed(tiny_models, calibration_text, tmp_path, method):
    """With every method; as any linear in the configuration, and each weight is within half a step
    of the matrix that was rounded.
    """
    source, output = tiny_models["llama", False], tmp_path / "out"
    quantize(method, source, output, *METHODS[method], "--head-bits", 8, text=calibration_text)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    head = config["config_groups"]["group_1"]
    assert head["targets"] == ["re:.*lm_head$"] and config["ignore"] == []
    assert head["format"] == "pack-quantized" and "input_activations" not in head
    weights = head["weights"]
    assert weights["num_bits"] == 8 and weights["symmetric"] and weights["strategy"] == "channel"
    forms = {group["format"] for group in config["config_groups"].values()}
    assert config["format"] == (forms.pop() if len(forms) == 1 else "mixed-precision")
    # vLLM's rule: int8 weights only where activations are rounded.
    for group in config["config_groups"].values():
        assert ("input_activations" in group) is (group["format"] == "int-quantized")

    read = TensorReader(output).read
    rows, columns = read("lm_head.weight_shape").tolist()
    assert (rows, columns) == (320, 64) and "lm_head.weight" not in TensorReader(output)
    codes, scale = unpacked(read("lm_head.weight_packed"), columns), read("lm_head.weight_scale")
    assert codes.min() >= -128 and abs(codes).max() >= 120
    if method != "quarot":  # which rotates it first
        original = TensorReader(source).read("lm_head.weight").double().numpy()
        steps = scale.double().numpy()
        # The scales are stored in bfloat16, and a range is cut where that is better on the whole.
        inside = abs(codes) < 127
        off = abs(codes * steps - original)
        assert inside.mean() > 0.95 and (off <= 0.5 * steps * 1.0001)[inside].all()
    verified = run_script(ROOT / "verify_model.py", "--model-path", output)
    assert verified.returncode == 0, verified.stdout
    assert "8-bit codes of lm_head" in verified.stdout


@pytest.fixture(scope="module")
def both_forms(tiny_models, tmp_path_factory):
    """A checkpoint as it is written now, and with the head in int8 as earlier versions wrote it."""
    folder = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        quantize("hqq", tiny_models["llama", False], folder / "now", "--head-bits", 8)
        for module in ("common.checkpoint.format", "common.checkpoint.writer"):
            patch.setattr(f"{module}.form_of_vocabulary", lambda name: INTEGER)
        quantize("hqq", tiny_models["llama", False], folder / "before", "--head-bits", 8)
    return folder / "now", folder / "before"


def test_a_head_of_an_earlier_version_still_runs(both_forms):
    """Verified, loaded plainly and packed, with the same logits bit for bit."""
    from common.running.packed import can_be_packed, load_packed
    from common.running.runtime import load_model

    cpu, logits = torch.device("cpu"), []
    tokens = torch.randint(0, 320, (1, 9), generator=torch.Generator().manual_seed(3))
    for folder, form in zip(both_forms, ("pack-quantized", "int-quantized"), strict=True):
        config, tensors = open_checkpoint(folder)
        assert weight_format(config).vocabulary_forms == {"lm_head": form}
        assert can_be_packed(config, tensors)
        assert run_script(ROOT / "verify_model.py", "--model-path", folder).returncode == 0
        models = [
            load_packed(folder, cpu, torch.float32),
            load_model(folder, cpu, torch.float32)[0],
        ]
        with torch.no_grad():
            logits.append([model(tokens).logits for model in models])
    for now, before in zip(*logits, strict=True):
        assert torch.equal(now, before)
    torch.testing.assert_close(logits[0][0], logits[0][1], rtol=1e-4, atol=1e-4)


def change_head(name, change):
    def apply(folder):
        shard = folder / "model-00003-of-00003.safetensors"
        tensors = load_file(shard)
        tensors[f"lm_head.{name}"] = change(tensors[f"lm_head.{name}"]).contiguous()
        save_file(tensors, shard, metadata={"format": "pt"})

    return apply


def without_codes(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight_packed"]
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change, failing",
    [
        (change_head("weight_scale", lambda t: -t), "scales positive: 1 linears are not: lm_head"),
        (
            change_head("weight_packed", lambda t: t[:-1]),
            "codes within range: 1 linears are not: lm_head",
        ),
        (
            change_head("weight_packed", lambda t: t.float()),
            "tensors readable: 1 linears are not: lm_head",
        ),
        (change_head("weight_packed", lambda t: t.roll(1, 0)), "recorded logits"),
        (without_codes, "files complete: missing: lm_head.weight_packed"),
    ],
    ids=["negative", "shape", "type", "rows", "missing"],
)
def test_a_damaged_head_is_found(both_forms, tmp_path, change, failing):
    folder = tmp_path / "copy"
    shutil.copytree(both_forms[0], folder)
    change(folder)
    result = run_script(ROOT / "verify_model.py", "--model-path", folder)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"FAIL  {failing}" in result.stdout, result.stdout


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rows, columns", [(37, 21), (8, 64), (1, 5)])
def test_codes_are_unpacked_some_rows_at_a_time(
    generator, monkeypatch, bits, symmetric, rows, columns
):
    monkeypatch.setattr(checkpoint_tensors, "_UNPACKED_AT_ONCE", 5)
    grid = Grid(bits, None, symmetric)
    codes = torch.randint(
        grid.code_min, grid.code_max + 1, (rows, columns), generator=generator, dtype=torch.int8
    )
    zero_point = torch.zeros(rows, 1, dtype=torch.int8)
    if not symmetric:
        zero_point.random_(grid.code_min, grid.code_max + 1, generator=generator)
    scale = torch.rand(rows, 1, generator=generator) + 0.5
    state = compress(QuantizedLinear(codes, scale, zero_point, grid), torch.float32)
    found, found_zero = stored_codes(state, grid)
    assert found.dtype == torch.int8 and torch.equal(found, codes)
    assert found_zero is None if symmetric else torch.equal(found_zero, zero_point)


def test_the_room_that_unpacking_a_head_takes(both_forms, monkeypatch):
    """Beside the unpacked weights: ten bytes for each code of the largest packed matrix."""
    from common.running import runtime

    cuda = torch.device("cuda")
    monkeypatch.setattr(runtime, "DENSE_ROOM", 0)
    for folder, largest in zip(both_forms, (320 * 64, 128 * 64), strict=True):
        needed = runtime.dense_bytes(folder, torch.bfloat16) + 10 * largest
        for room, device in ((needed, cuda), (needed - 1, torch.device("cpu"))):
            monkeypatch.setattr(runtime, "available", lambda _, room=room: room)
            assert runtime._with_room(folder, cuda, torch.bfloat16) == device

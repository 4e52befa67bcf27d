"""Checkpoints from elsewhere: on packed weights what a plain load computes, or left to it;
verify_model.py says what is not ours.
"""

import json
import shutil

import pytest
import torch
from conftest import ROOT, assert_user_error, run_script
from safetensors.torch import load_file, save_file

from common.base.errors import UserError
from common.model.architecture import FAMILIES
from common.model.tensors import INDEX_FILE, TensorReader
from common.running.packed import can_be_packed, load_packed
from common.running.runtime import load_model

CPU = torch.device("cpu")
TOKENS = torch.arange(2, 42)[None]
LINEAR = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoints(tiny_models, calibration_text, tmp_path_factory):
    """Checkpoints of the quantize scripts, by what changes are made to."""
    root = tmp_path_factory.mktemp("ours")
    forms = {
        "w4": ("hqq", "--group-size", 32),
        "w8": ("hqq", "--bits", 8, "--group-size", "channel", "--symmetric"),
        "w8a8": ("smoothquant",),
    }
    for name, (method, *options) in forms.items():
        calibration = ("--calib-data", calibration_text, "--calib-samples", 2, "--calib-length", 64)
        result = run_script(
            ROOT / f"quantize_{method}.py",
            "--model",
            tiny_models["llama", False],
            "--output",
            root / name,
            "--no-save-metadata",
            *options,
            *calibration,
        )
        assert result.returncode == 0, result.stderr
    return root


def changed(folder, target, change, tensors=None):
    """A copy whose quantization_config, and tensors by name, went through the given functions."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    if tensors:
        weights = {}
        for file in sorted(target.glob("*.safetensors")):
            weights.update(load_file(file))
            file.unlink()
        tensors(weights)
        (target / INDEX_FILE).unlink()
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            target / "model.safetensors",
            metadata={"format": "pt"},
        )
    return target


def group(**changes):
    return lambda quantization: quantization["config_groups"]["group_0"].update(changes)


def weights(**changes):
    return lambda quantization: quantization["config_groups"]["group_0"]["weights"].update(changes)


def inputs(**changes):
    return lambda quantization: quantization["config_groups"]["group_0"][
        "input_activations"
    ].update(changes)


def whole(**changes):
    return lambda quantization: quantization.update(changes)


def nothing(_):
    pass


# Of the same weights, as llm-compressor writes them: these run packed.
KNOWN = {
    "ours": ("w4", nothing),
    "ours w8a8": ("w8a8", nothing),
    "class": ("w4", group(targets=["Linear"])),
    "format above": ("w8", group(format=None)),
    # Nothing is ignored, and the head is none of the targets either.
    "nothing ignored": ("w4", whole(ignore=[])),
    "static order": ("w4", weights(actorder="static")),
    "empty parts": (
        "w4",
        whole(
            kv_cache_scheme=None,
            sparsity_config={},
            transform_config={},
            global_compression_ratio=None,
        ),
    ),
    "observer": ("w4", weights(observer="minmax", block_structure=None, scale_dtype=None)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_forms_run_packed(checkpoints, tmp_path, name):
    source, change = KNOWN[name]
    folder = changed(checkpoints / source, tmp_path / "copy", change)
    assert can_be_packed(json.loads((folder / "config.json").read_text()), TensorReader(folder))
    plain, _ = load_model(folder, CPU, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_packed(folder, CPU, torch.float32)(TOKENS).logits,
            plain(TOKENS).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def two_groups(quantization):
    first = quantization["config_groups"]["group_0"]
    quantization["config_groups"] = {
        "group_0": {**first, "targets": [r"re:.*self_attn.*_proj$"]},
        "group_1": {**first, "targets": [r"re:.*mlp.*_proj$"]},
    }


def to_float8(tensors):
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = (tensors[name].float() / 127 * 400).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = tensors[f"{name}_scale"] * (127 / 400)


def float8(quantization):
    whole(format="float-quantized")(quantization)
    group(format="float-quantized")(quantization)
    weights(type="float")(quantization)
    quantization["config_groups"]["group_0"].pop("input_activations", None)


def dense(tensors):
    """One linear as a plain matrix."""
    codes, scale = tensors[f"{LINEAR}.weight"], tensors.pop(f"{LINEAR}.weight_scale")
    tensors[f"{LINEAR}.weight"] = (codes.float() * scale.float()).to(scale.dtype)


def tensor_scale(tensors):
    for name in [name for name in tensors if name.endswith("_proj.weight_scale")]:
        tensors[name] = tensors[name][:1, 0].clone()


PER_TENSOR = {"strategy": "tensor", "group_size": None}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
ORDER = {f"{LINEAR}.weight_g_idx": torch.arange(128, dtype=torch.int32) // 32}
# Name: checkpoint, change of the configuration, change of the tensors, whether a plain load can
# read it.
UNKNOWN = {
    "float8": ("w8a8", float8, to_float8, True),
    "order of channels": (
        "w4",
        weights(actorder="group"),
        lambda tensors: tensors.update(ORDER),
        False,
    ),
    "order unsaid": ("w4", nothing, lambda tensors: tensors.update(ORDER), False),
    "order without tensors": ("w4", weights(actorder="group"), None, None),
    "one dense": ("w8a8", whole(ignore=["lm_head", LINEAR]), dense, True),
    "one dense unsaid": ("w8a8", nothing, dense, None),
    "a scale for a whole matrix": ("w8a8", weights(**PER_TENSOR), tensor_scale, True),
    "two groups": ("w4", two_groups, None, True),
    "all linears": (
        "w4",
        lambda q: (group(targets=["Linear"])(q), whole(ignore=[])(q)),
        None,
        False,
    ),
    "output activations": (
        "w8a8",
        group(output_activations={**STATIC, "strategy": "token", "dynamic": True}),
        None,
        True,
    ),
    "static inputs": ("w8a8", inputs(**STATIC), None, False),
    "asymmetric inputs": ("w8a8", inputs(symmetric=False), None, True),
    "four-bit inputs": ("w8a8", inputs(num_bits=4), None, True),
    "inputs by tensor": ("w8a8", inputs(strategy="tensor"), None, True),
    "inputs by group": ("w8a8", inputs(strategy="group", group_size=32), None, True),
    "float inputs": ("w8a8", inputs(type="float"), None, True),
    "cache": ("w4", whole(kv_cache_scheme={**STATIC}), None, None),
    "sparsity": ("w4", whole(sparsity_config={"format": "sparse-24-bitmask"}), None, None),
    "transforms": (
        "w4",
        whole(transform_config={"config_groups": {"u": {"type": "hadamard", "apply": []}}}),
        None,
        None,
    ),
    "rounded scales": ("w8a8", weights(scale_dtype="torch.float8_e4m3fn"), None, None),
    "other method": ("w4", whole(quant_method="gptq"), None, None),
    "other status": ("w4", whole(quantization_status="frozen"), None, None),
    "something new": ("w4", whole(smoothing={"alpha": 0.5}), None, None),
    "groups of no known size": ("w4", weights(group_size=0), None, None),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_anything_else_is_left_to_transformers(checkpoints, tmp_path, name):
    source, change, tensors, readable = UNKNOWN[name]
    folder = changed(checkpoints / source, tmp_path / "copy", change, tensors)
    assert not can_be_packed(json.loads((folder / "config.json").read_text()), TensorReader(folder))
    verified = run_script(ROOT / "verify_model.py", "--model-path", folder)
    assert verified.returncode in (1, 2) and "Traceback" not in verified.stderr, verified.stdout
    if verified.returncode == 2:
        assert_user_error(verified, str(folder))
    if readable is False:  # one line, never random numbers
        with pytest.raises(UserError, match="copy"):
            load_model(folder, CPU, torch.float32)
    elif readable:
        plain, _ = load_model(folder, CPU, torch.float32)
        if name in ("float8", "a scale for a whole matrix"):
            found = plain.get_submodule(LINEAR).weight
            stored = load_file(folder / "model.safetensors")
            exact = stored[f"{LINEAR}.weight"].float() * stored[
                f"{LINEAR}.weight_scale"
            ].float().view(-1, 1)
            torch.testing.assert_close(found, exact)


def test_a_linear_that_lacks_its_scale_is_not_packed(checkpoints):
    config = json.loads((checkpoints / "w4" / "config.json").read_text())
    names = set(TensorReader(checkpoints / "w4"))
    assert can_be_packed(config, names)
    for index in range(2):
        for linear in FAMILIES["llama"].linears:
            assert not can_be_packed(
                config, names - {f"model.layers.{index}.{linear}.weight_scale"}
            )
    assert not can_be_packed({**config, "model_type": "olmo2"}, names)

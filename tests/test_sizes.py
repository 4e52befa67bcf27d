"""Bits for each weight of a checkpoint, against its files counted by hand."""

import json
import math
import struct

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file, save_file

from common.checkpoint.format import INTEGER, PACKED
from common.checkpoint.metadata import quantization_facts
from common.checkpoint.sizes import code_bits, weights_of
from common.checkpoint.tensors import compress
from common.model.tensors import TensorReader
from common.numerics.grid import Grid, QuantizedLinear


def data_bytes(file) -> int:
    """Bytes of a safetensors file without its header."""
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    return file.stat().st_size - 8 - header


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "bits, group_size, symmetric, form",
    [
        (2, 32, False, PACKED),
        (3, 16, False, PACKED),
        (4, 64, False, PACKED),
        (4, 32, True, PACKED),
        (4, None, False, PACKED),
        (8, 64, True, PACKED),
        (8, None, True, INTEGER),
    ],
)
def test_bits_of_codes(tmp_path, bits, group_size, symmetric, form, scale_dtype):
    """The file holds the codes and what belongs to them, and beside it what has no codes."""
    generator, grid = torch.Generator().manual_seed(1), Grid(bits, group_size, symmetric)
    tensors, weights = {}, 0
    for name, rows, columns in (("a_proj", 24, 64), ("b_proj", 40, 128)):
        weight = torch.randn(rows, columns, generator=generator)
        scale = torch.rand(rows, grid.groups(columns), generator=generator) + 0.5
        scale = scale.to(torch.bfloat16).float()
        parts = compress(
            QuantizedLinear.nearest(weight, scale, torch.zeros_like(scale), grid), scale_dtype, form
        )
        tensors.update({f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()})
        weights += rows * columns
    save_file(tensors, tmp_path / "coded.safetensors")
    expected = 8 * data_bytes(tmp_path / "coded.safetensors") / weights
    others = {
        "norm.weight": torch.ones(7),
        "a_proj.bias": torch.ones(24),
        "lm_head.weight_scale": 1,
    }
    others["lm_head.weight_scale"] = torch.ones(3, 1)  # of a head that shares the codes
    save_file({**tensors, **others}, tmp_path / "model.safetensors")
    found = code_bits(TensorReader(tmp_path))
    assert found == pytest.approx(expected + 8 * 12 / weights)
    assert bits <= found < bits + 6


def test_a_model_without_codes(tmp_path):
    save_file({"a.weight": torch.ones(3, 5), "b": torch.ones(7)}, tmp_path / "model.safetensors")
    tensors = TensorReader(tmp_path)
    assert code_bits(tensors) is None and weights_of(tensors) == 22


def test_a_checkpoint_and_its_results_tell_them(tiny, tmp_path):
    """Its embedding and the head that shares it are rounded, too."""
    output = tmp_path / "hqq-4bit"
    words = ["--model", tiny, "--output", output, "--embedding-bits", 8]
    result = run_script(ROOT / "quantize_hqq.py", *words)
    assert result.returncode == 0, result.stderr
    stored = {}
    for file in output.glob("*.safetensors"):
        stored.update(load_file(file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    coded = weights = 0
    for name, tensor in stored.items():
        matrix, _, part = name.rpartition(".")
        if part != "bias" and f"{matrix}.weight_scale" in stored:
            coded += tensor.numel() * tensor.element_size()
            if part == "weight_shape":
                weights += math.prod(tensor.tolist())
            elif part == "weight":
                weights += tensor.numel()
    before = sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    expected = {"coded": round(8 * coded / weights, 4), "all": round(8 * size / before, 4)}
    record = json.loads((output / "quantization_metadata.json").read_text())
    assert record["bits_per_weight"] == expected
    said = f"{expected['coded']:.2f} bits for each weight with a code"
    assert said in result.stdout and said in (output / "README.md").read_text()
    assert quantization_facts(output)["bits_per_weight"] == expected
    # Of an earlier version.
    del record["bits_per_weight"]
    (output / "quantization_metadata.json").write_text(json.dumps(record))
    assert quantization_facts(output)["bits_per_weight"] is None
    # Without metadata the codes' are counted; what the whole model had is not known.
    (output / "quantization_metadata.json").unlink()
    assert quantization_facts(output)["bits_per_weight"] == {**expected, "all": None}
    width = {"F32": 32.0, "BF16": 16.0}[TensorReader(tiny).form("model.norm.weight")[1]]
    assert quantization_facts(tiny)["bits_per_weight"] == {"coded": None, "all": width}

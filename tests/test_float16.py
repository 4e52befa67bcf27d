"""Models stored in float16: no linear, token or checkpoint loses what bfloat16 would keep."""

import json

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from conftest import (
    ROOT,
    assert_user_error,
    build_tiny,
    run_quantize,
    run_script,
    tiny_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import method_options

from common.base.errors import UserError
from common.checkpoint.format import open_checkpoint, scheme_of
from common.checkpoint.tensors import compress, decompress, stored_parts
from common.checkpoint.writer import METADATA_FILE
from common.kernels.rounding import search_range
from common.model.architecture import FAMILIES
from common.numerics.grid import (
    Grid,
    QuantizedLinear,
    quantize,
    round_clipped,
    round_per_token,
    scale_type,
)
from common.running.packed import load_packed
from common.running.runtime import load_model
from common.solvers import ranges, rounding
from quantize_hqq import quantize_weight

CPU = torch.device("cpu")


def solved(
    solver: str, weight: torch.Tensor, gram: torch.Tensor, grid: Grid, storage: torch.dtype
) -> QuantizedLinear:
    """One linear as a method quantizes it, its scales in the type that the walk chooses."""
    scales = scale_type([weight], grid, storage)
    if solver == "hqq":
        return quantize_weight(weight, grid, 4.0, scales)
    if solver == "ranges":
        scale, zero_point = ranges.choose_ranges(weight, gram, grid, scales)
        return QuantizedLinear(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)
    scale, zero_point = search_range(weight, grid, gram.diagonal(), scale_dtype=scales)
    if solver == "nearest":
        return QuantizedLinear(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)
    codes, _ = rounding.solve(weight, gram, scale, zero_point, grid)
    codes, scale = rounding.refine(weight, codes, scale, zero_point, gram, grid, scales, 1)
    return QuantizedLinear(codes, scale, zero_point, grid)


@settings(max_examples=80, deadline=None)
@given(
    exponent=st.floats(-5, 0),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([32, None]),
    symmetric=st.booleans(),
    solver=st.sampled_from(["nearest", "ranges", "gptq", "hqq"]),
    dead=st.sampled_from([0, 1, 8]),
    seed=st.integers(0, 999),
)
def test_no_linear_loses_more_than_in_bfloat16(exponent, bits, size, symmetric, solver, dead, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, size, symmetric)
    weight = (torch.randn(48, 64, generator=generator) * 10**exponent).half().float()
    weight[:dead] *= 1e-3  # rows that nothing was learned in
    weight[-1, :32] = 0
    inputs = torch.randn(256, 64, generator=generator)
    errors = {}
    for storage in (torch.float16, torch.bfloat16):
        linear = solved(solver, weight, inputs.T @ inputs / 256, grid, storage)
        read = decompress(compress(linear, storage), grid)
        assert torch.equal(read, linear.dequantize())
        assert (read[-1, :32] == 0).all() or solver == "gptq" or size is None
        errors[storage] = ((read.double() - weight.double()).norm() / weight.double().norm()).item()
    assert errors[torch.float16] <= 1.1 * errors[torch.bfloat16]


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_rounded_as_the_library_does(bits, generator):
    """At every size of a token that float16 has; above 32752 twice the largest value is
    infinite."""
    sizes = torch.logspace(-7, 4.8, 120).clamp(max=65504)
    tokens = (torch.rand(1, 120, 64, generator=generator) * 2 - 1) * sizes[:, None]
    tokens[..., 0] = sizes
    tokens = tokens.half()
    found = round_per_token(tokens, bits)
    scheme = scheme_of(Grid(8, None, True), bits).input_activations
    expected = fake_quantize(
        tokens, *compute_dynamic_scales_and_zp(tokens, scheme, torch.nn.Module()), scheme
    )
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_clipped_rounding_loses_no_small_token(bits, generator):
    """Against float64 at sizes down to float16's last thousand steps; what is left there is
    float16's own rounding.
    """
    sizes = torch.logspace(-4.2, 4.8, 60, dtype=torch.float64).clamp(max=65000)
    tokens = ((torch.rand(60, 64, generator=generator) * 2 - 1) * sizes[:, None]).half()
    found = round_clipped(tokens, bits, (1.0,)).double()
    exact = tokens.double()
    step = exact.abs().amax(1, keepdim=True) * 2 / (2**bits - 1)
    assert ((found - exact).abs() <= 0.5 * step * 1.01 + 2**-24 + exact.abs() * 2**-11).all()


METHODS = method_options(iterations=20)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One tiny model stored in float16 and in bfloat16, by type; one of its linears has weights of
    1e-5.
    """
    folders = {}
    for dtype in (torch.float16, torch.bfloat16):
        model = build_tiny("llama", True)
        for layer, factor in zip(model.model.layers, (0.04, 0.000125), strict=True):
            layer.self_attn.k_proj.weight.data.mul_(factor)
        folders[dtype] = tmp_path_factory.mktemp("stored") / str(dtype).removeprefix("torch.")
        model.to(dtype).save_pretrained(folders[dtype])
        tiny_tokenizer().save_pretrained(folders[dtype])
    return folders


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_chain(sources, calibration_text, tmp_path, method):
    """Quantize, verify, load plainly and packed: what both types of the same model give."""
    records = {}
    for dtype, folder in sources.items():
        output = tmp_path / folder.name
        result = run_script(
            ROOT / f"quantize_{method}.py",
            "--model",
            folder,
            "--output",
            output,
            "--bits",
            "8",
            "--embedding-bits",
            "8",
            "--calib-data",
            calibration_text,
            "--calib-samples",
            "4",
            "--calib-length",
            "64",
            *METHODS[method],
        )
        assert result.returncode == 0, result.stderr
        records[dtype] = json.loads((output / METADATA_FILE).read_text())["linears"]
    for name, linear in records[torch.float16].items():
        assert (
            linear["relative_output_error"]
            <= 1.1 * records[torch.bfloat16][name]["relative_output_error"] + 2e-3
        ), name
    output = tmp_path / "float16"
    config, tensors = open_checkpoint(output)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(output)
    assert str(plain.dtype).removeprefix("torch.") == config["dtype"]
    tokens = torch.arange(2, 42)[None]
    with torch.inference_mode():
        plain(tokens)  # unpacks
    grid = Grid(8, None if method == "smoothquant" else 64, symmetric=True)
    for layer in range(2):
        for linear in FAMILIES["llama"].linears:
            name = f"model.layers.{layer}.{linear}"
            exact = decompress(stored_parts(tensors.read, tensors, name), grid)
            found = plain.get_submodule(name).weight
            assert ((found - exact).norm() / exact.norm()).item() < 3e-3, name
    dense, _ = load_model(output, CPU, torch.float32)
    packed = load_packed(output, CPU, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(
            packed(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4
        )
    assert config["dtype"] == "bfloat16"
    with pytest.raises(
        UserError,
        match=r"scales of model.layers.1.self_attn.k_proj; use --dtype bfloat16 or float32",
    ):
        load_model(output, CPU, torch.float16)


def test_what_float16_does_not_hold_once_rotated_is_refused(tmp_path, calibration_text):
    """A row of the embedding that float16 just holds is longer than its largest number, and a
    rotation may lay all its length on one channel.
    """
    model = build_tiny("llama", False).half()
    model.model.embed_tokens.weight.data[0] = 60000.0
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    result = run_quantize("quarot", tmp_path / "source", tmp_path / "out", text=calibration_text)
    assert_user_error(result, "model.embed_tokens.weight", "float16", "convert the model to bf")
    assert not (tmp_path / "out").exists()


def test_an_ordinary_model_stays_float16(tmp_path):
    build_tiny("llama", True).half().save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    result = run_script(
        ROOT / "quantize_hqq.py", "--model", tmp_path / "source", "--output", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    config, tensors = open_checkpoint(tmp_path / "out")
    assert config["dtype"] == "float16"
    assert {tensors.read(name).dtype for name in tensors if name.endswith("_scale")} == {
        torch.float16
    }

"""Inputs that break naive arithmetic: handled, or a clear error that names the layer; never NaN in
a checkpoint.
"""

import json

import pytest
import torch
from conftest import ROOT, assert_user_error, build_tiny, run_script, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from methods import method_options

from common.checkpoint.writer import METADATA_FILE
from common.kernels.rounding import search_range
from common.numerics.grid import Grid, dequantize, grouped, min_max, quantize
from common.solvers.adaround import learn_rounding
from common.solvers.ranges import choose_ranges
from common.solvers.rounding import damped, output_error, refine, solve
from common.walk.scaling import power_ratio

METHODS = method_options(iterations=5)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.integers(1, 6),
    rank=st.integers(0, 64),
    dead=st.integers(0, 64),
    spread=st.sampled_from([0.0, 3.0, 8.0]),
    constant=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(bits=2, symmetric=False, rows=1, rank=10, dead=0, spread=0.0, constant=False, seed=6168)
def test_solvers_on_any_gram_matrix(bits, symmetric, rows, rank, dead, spread, constant, seed):
    """Of any rank, with dead channels, and channels that differ by many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, 32, symmetric)
    inputs = torch.randn(rank, 64, generator=generator) * torch.exp(
        spread * torch.randn(64, generator=generator)
    )
    inputs[:, torch.randperm(64, generator=generator)[:dead]] = 0
    gram = inputs.T @ inputs / max(rank, 1)
    weight = torch.randn(rows, 64, generator=generator)
    if constant:
        weight[0] = weight[0, 0]
    scale, zero_point = search_range(weight, grid, gram.diagonal())

    def check(codes, scale, zero_point):
        assert codes.min() >= grid.code_min and codes.max() <= grid.code_max
        assert (
            torch.isfinite(dequantize(codes, scale, zero_point, grid)).all() and (scale > 0).all()
        )

    codes, used = solve(weight, gram, scale, zero_point, grid)
    check(codes, scale, zero_point)
    refined, fitted = refine(weight, codes, scale, zero_point, gram, grid, torch.bfloat16, 1, used)
    check(refined, fitted, zero_point)
    exact = damped(gram, used).double()

    def loss(codes, scale):
        return output_error(
            dequantize(codes, scale, zero_point, grid).double() - weight.double(), exact
        )

    assert (loss(refined, fitted) <= loss(codes, scale) * (1 + 1e-4) + 1e-12).all()
    ranges = choose_ranges(weight, gram, grid, torch.bfloat16)
    check(quantize(weight, *ranges, grid), *ranges)
    check(
        learn_rounding(weight, damped(gram, 1.0), scale, zero_point, grid, 5, 1.0, 0.5).codes(),
        scale,
        zero_point,
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=4, max_size=4),
    st.lists(st.floats(0, 1e4, width=32), min_size=4, max_size=4),
    st.floats(0, 1),
)
def test_scales_are_positive_and_finite(activation, weight, exponent):
    scale = power_ratio(torch.tensor(activation), torch.tensor(weight), exponent)
    assert torch.isfinite(scale).all() and (scale > 0).all()


@settings(max_examples=40, deadline=None)
@given(
    value=st.floats(-(2.0**100), 2.0**100, width=32),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
)
def test_constant_groups(value, bits, symmetric):
    grid = Grid(bits, 32, symmetric)
    weight = torch.full((2, 32), value)
    scale, zero_point = min_max(grouped(weight, grid), grid)
    found = dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)
    assert torch.isfinite(found).all()
    assert ((found - weight).abs() <= scale.max() * 0.51 + abs(value) * 2**-7).all()


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A tiny model with dead channels, rows of zeros and of one value, and a channel far larger
    than the others.
    """
    folder = tmp_path_factory.mktemp("nasty") / "nasty"
    model = build_tiny("llama", tied=True)
    layer = model.model.layers[0]
    layer.input_layernorm.weight.data[3:6] = 0
    layer.mlp.down_proj.weight.data[7] = 0.25
    layer.self_attn.v_proj.weight.data[:4] = 0
    layer.mlp.up_proj.weight.data[10] = 0
    model.model.layers[1].post_attention_layernorm.weight.data[0] = 300.0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_dead_channels_and_constant_rows(nasty, calibration_text, tmp_path, method):
    output = tmp_path / "out"
    result = run_script(
        ROOT / f"quantize_{method}.py",
        "--model",
        nasty,
        "--calib-data",
        calibration_text,
        "--calib-samples",
        4,
        "--calib-length",
        64,
        "--output",
        output,
        *METHODS[method],
    )
    assert result.returncode == 0, result.stderr
    assert "NaN" not in (output / METADATA_FILE).read_text()
    verified = run_script(ROOT / "verify_model.py", "--model-path", output)
    assert "PASS  no NaN or Inf" in verified.stdout and "PASS  plain load" in verified.stdout, (
        verified.stdout
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "adaround"])
def test_calibration_of_one_word(tiny, tmp_path, method):
    """As when all of it is padding: every token the same, inputs that span next to nothing."""
    text = tmp_path / "text.txt"
    text.write_text("a" * 4000)
    output = tmp_path / "out"
    result = run_script(
        ROOT / f"quantize_{method}.py",
        "--model",
        tiny,
        "--calib-data",
        text,
        "--calib-samples",
        4,
        "--calib-length",
        64,
        "--output",
        output,
        *METHODS[method],
    )
    assert result.returncode == 0, result.stderr
    document = json.loads((output / METADATA_FILE).read_text())
    assert all(0 <= record["relative_output_error"] < 3 for record in document["linears"].values())


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A tiny model in which the gate's product with up_proj leaves float16's range."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    model = build_tiny("llama", tied=True)
    for name in ("up_proj", "gate_proj"):
        model.model.layers[1].mlp.get_submodule(name).weight.data *= 3000
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_overflow_names_the_layer(overflowing, tmp_path, calibration_text, method):
    output = tmp_path / "out"
    result = run_script(
        ROOT / f"quantize_{method}.py",
        "--model",
        overflowing,
        "--calib-data",
        calibration_text,
        "--calib-samples",
        4,
        "--calib-length",
        64,
        "--output",
        output,
        "--dtype",
        "float16",
        *METHODS[method],
    )
    assert_user_error(result, "model.layers.1.", "--dtype float32")
    assert not output.exists()

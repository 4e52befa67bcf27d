"""QuaRot's online rotations and rounding: function kept, plain loading refused, cache and full
forward alike.
"""

import json

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, FUSED, ROOT, run_script, sampled
from test_rotation_and_scaling import IN_BOTH_TYPES, all_logits, hidden_rotation

from common.checkpoint.writer import METADATA_FILE
from common.model.architecture import family_of
from common.model.online import KEYS_FILE, KeyForm, OnlineTransforms, enable_attention
from common.model.source import SourceModel
from common.numerics.grid import Grid, round_clipped, round_per_token, round_per_vector
from common.numerics.hadamard import factors, hadamard, rotate, rotation
from common.running.runtime import load_model
from common.walk.method import Layer
from quantize_quarot import (
    align,
    input_squares,
    rotate_layer,
    rotate_online,
    rotate_values,
    rotate_vocabulary,
)


@pytest.mark.parametrize("order", [16, 64, 96, 128, 1536, 4864, 5632, 8192])
def test_rotating_by_factors_is_the_product_with_the_whole_matrix(order):
    inputs = torch.randn(
        3, order, generator=torch.Generator().manual_seed(order), dtype=torch.float64
    )
    left, right = factors(order)
    assert len(left) * len(right) == order and max(len(left), len(right)) < order
    assert torch.allclose(
        rotate(inputs, left, right), inputs @ hadamard(order) / order**0.5, atol=1e-12
    )


@pytest.mark.parametrize("bits, clip", [(4, 1.0), (4, 0.95), (8, 1.0)])
def test_rounding_of_cache_vectors(bits, clip):
    values = torch.randn(5, 2, 7, 16, generator=torch.Generator().manual_seed(bits)) * 3 + 0.5
    rounded = round_per_vector(values, bits, clip).double().numpy()
    for vector, found in zip(
        values.double().numpy().reshape(-1, 16), rounded.reshape(-1, 16), strict=True
    ):
        low, high = min(vector.min(), 0) * clip, max(vector.max(), 0) * clip
        step = (high - low) / (2**bits - 1)
        first = -np.round(-low / step) * step  # zero is on the grid
        grid = first + step * np.arange(2**bits)
        nearest = grid[np.abs(grid[None] - vector[:, None]).argmin(1)]
        assert (
            np.allclose(found, nearest, atol=1e-5)
            or np.abs(np.abs(found - vector) - np.abs(nearest - vector)).max() < 1e-5
        )
    assert torch.equal(round_per_vector(torch.zeros(3, 16), bits, clip), torch.zeros(3, 16))


def test_each_token_gets_its_best_clip():
    inputs = torch.randn(50, 96, generator=torch.Generator().manual_seed(1)) ** 3
    clips = (1.0, 0.8, 0.6, 0.4)
    rounded = round_clipped(inputs, 4, clips)
    for token, found in zip(inputs.double().numpy(), rounded.double().numpy(), strict=True):
        steps = [np.abs(token).max() * 2 * clip / 15 for clip in clips]
        tries = [np.clip(np.round(token / step), -8, 7) * step for step in steps]
        best = min(((one - token) ** 2).sum() for one in tries)
        assert ((found - token) ** 2).sum() == pytest.approx(best, rel=1e-4)
    assert torch.equal(round_clipped(torch.zeros(2, 8), 4, clips), torch.zeros(2, 8))
    alike = (round_clipped(inputs, 4, (1.0,)) - round_per_token(inputs, 4)).abs() < 1e-5
    assert alike.float().mean() > 0.98  # a value half-way may fall either way


@torch.no_grad()
def change_of_logits(folder, dtype, change_ends, change_layer) -> float:
    """By how much changes of a whole model, and then of each of its layers, change its logits, as a
    share of the largest.
    """
    tokens = torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(2))
    before, source = (SourceModel(str(folder), torch.device("cpu"), dtype) for _ in range(2))
    before = all_logits(before, tokens)
    change_ends(source)
    enable_attention(source.model)
    after = all_logits(source, tokens, lambda _, module: change_layer(module))
    return ((before - after).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("architecture, tied, dtype, bound", IN_BOTH_TYPES)
def test_online_rotations_leave_logits_unchanged(tiny_models, architecture, tied, dtype, bound):
    hidden, value = hidden_rotation(architecture), rotation(16, seed=1)

    def change_ends(source):
        if hidden is not None:
            rotate_vocabulary(source, hidden)

    def change(module):
        rotate_layer(module, hidden, value)
        rotate_online(module, OnlineTransforms(None, None, (1.0,), 1.0))

    assert change_of_logits(tiny_models[architecture, tied], dtype, change_ends, change) < bound


def layer_with_inputs(module: torch.nn.Module) -> Layer:
    """A layer of a tiny model that is given hidden states whose channels differ much in size."""
    generator = torch.Generator().manual_seed(3)
    chunks = [
        torch.randn(2, 20, 64, generator=generator) * torch.rand(64, generator=generator) ** 2
        for _ in range(2)
    ]
    attention, mlp = family_of(module).reading

    def forward(hidden):
        normed = module.get_submodule(attention.fed_by)(hidden)
        read = module.get_submodule(attention.linears[0])(normed)
        return module.mlp(module.get_submodule(mlp.fed_by)(read[..., :64]))

    return Layer(
        0,
        module,
        Grid(4, None),
        torch.float32,
        inputs=[chunk.to(module.mlp.down_proj.weight.dtype) for chunk in chunks],
        forward=forward,
    )


@pytest.mark.parametrize("architecture, tied, dtype, bound", IN_BOTH_TYPES)
def test_aligned_channels_and_online_rotations_leave_logits_unchanged(
    tiny_models, architecture, tied, dtype, bound
):
    changed = []

    def change(module):
        gain = module.input_layernorm.weight.clone()
        align(layer_with_inputs(module))
        changed.append((module.input_layernorm.weight / gain).std())
        rotate_values(module, rotation(16, seed=1))
        rotate_online(module, OnlineTransforms(None, None, (1.0,), 1.0, hidden=True))

    assert (
        change_of_logits(tiny_models[architecture, tied], dtype, lambda source: None, change)
        < bound
    )
    assert min(changed) > 0.05


@torch.no_grad()
def test_alignment_reaches_the_least_expected_error_whatever_the_channels_scales(tiny_models):
    """E|Dx|² |W D⁻¹|² of q/k/v: Cauchy and Schwarz say what the least is, and no other scales of
    the same weights have less.
    """
    module = SourceModel(
        str(tiny_models["llama", True]), torch.device("cpu"), torch.float32
    ).load_layer(0)
    layer, generator = layer_with_inputs(module), torch.Generator().manual_seed(5)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def error():
        squares = input_squares(layer)[layer.family.reading[0]].double()
        columns = sum(layer.weight(name).double().square().sum(0) for name in names)
        return (squares.sum() * columns.sum()).item(), (
            squares * columns
        ).sqrt().sum().square().item()

    unscaled, least = error()
    align(layer)
    assert error()[0] < 0.98 * unscaled and error()[0] == pytest.approx(least, rel=0.02)
    aligned = [layer.weight(name) for name in names]
    scale = torch.exp(0.7 * torch.randn(64, generator=generator))
    module.input_layernorm.weight.data /= scale
    for name in names:
        module.get_submodule(name).weight.data *= scale
    align(layer)
    for name, weight in zip(names, aligned, strict=True):
        assert torch.allclose(layer.weight(name), weight, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("architecture, tied, dtype, bound", IN_BOTH_TYPES)
def test_the_form_of_keys_leaves_logits_unchanged(tiny_models, architecture, tied, dtype, bound):
    """Whatever the mean and the scales."""
    generator = torch.Generator().manual_seed(11)
    heads = SourceModel(
        str(tiny_models[architecture, tied]), torch.device("cpu"), dtype
    ).config.num_key_value_heads

    def change(module):
        keys = KeyForm(
            torch.randn(heads, 16, generator=generator),
            torch.exp(torch.randn(heads, 16, generator=generator)),
        )
        rotate_online(module, OnlineTransforms(None, None, (1.0,), 1.0), keys)

    assert (
        change_of_logits(tiny_models[architecture, tied], dtype, lambda source: None, change)
        < bound
    )


def key_statistics(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `KeyForm.fitted` wants of queries [1, heads, n, size] and keys [1, key-value heads, n,
    size], in float64.
    """
    by_key = queries.double().unflatten(1, (keys.shape[1], -1))
    return (
        keys.double().mean((0, 2)),
        keys.double().square().mean((0, 2)),
        by_key.square().mean((0, 2, 3)),
    )


def test_no_other_scales_of_keys_have_a_smaller_expected_error():
    generator = torch.Generator().manual_seed(12)
    queries, keys = (
        torch.randn(1, heads, 300, 16, generator=generator) * torch.rand(16, generator=generator)
        for heads in (4, 2)
    )
    form = KeyForm.fitted(*key_statistics(queries, keys))
    variance = keys.double().var((0, 2), correction=0)

    def error(scale):
        return (variance * scale**2).sum(1) * (key_statistics(queries, keys)[2] / scale**2).sum(1)

    least = error(form.scale.double())
    for _ in range(20):
        other = form.scale * torch.exp(0.3 * torch.randn(2, 16, generator=generator))
        assert (error(other.double()) > least).all()


def test_keys_that_are_nearly_constant_keep_what_tells_them_apart():
    """Scores of 4-bit keys with a large constant part, as Qwen2's biases give them."""
    generator = torch.Generator().manual_seed(13)
    constant = torch.randn(2, 1, 16, generator=generator) * 60
    keys, queries = (
        torch.randn(1, 2, 200, 16, generator=generator) + constant,
        torch.randn(1, 4, 200, 16, generator=generator),
    )
    transforms, sides = OnlineTransforms(None, 4, (1.0,), 0.95), factors(16)

    def attention(queries, keys):
        scores = queries.double() @ keys.double().repeat_interleave(2, 1).transpose(2, 3) / 4
        return scores.softmax(-1)

    def error(form):
        q, k = form.apply(queries, keys) if form else (queries, keys)
        rounded = attention(rotate(q, *sides), transforms.round_cache(rotate(k, *sides)))
        return (rounded - attention(queries, keys)).abs().sum(-1).mean().item()

    assert error(KeyForm.fitted(*key_statistics(queries, keys))) < 0.15 < 1.0 < error(None)


FULL = ("--act-bits", 4, "--kv-bits", 4)


@pytest.mark.parametrize(
    "architecture, tied, options",
    [
        *sampled(
            [(*one, FULL) for one in ARCHITECTURES],
            # Untied Llama and Mistral compute what Llama does, Qwen2 is below.
            lambda *case: case[:2] == ("llama", True) or case[:2] not in FUSED[:4],
        ),
        ("llama", True, ("--act-bits", 8)),
        ("qwen2", True, ("--kv-bits", 8)),
    ],
)
def test_online_checkpoint(tiny_models, calibration_text, tmp_path, architecture, tied, options):
    output = tmp_path / "online"
    result = run_script(
        ROOT / "quantize_quarot.py",
        "--model",
        tiny_models[architecture, tied],
        "--output",
        output,
        *options,
        "--calib-data",
        calibration_text,
        "--calib-samples",
        8,
        "--calib-length",
        64,
    )
    assert result.returncode == 0, result.stderr
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=f"{architecture}_with_online_transforms"):
        AutoModelForCausalLM.from_pretrained(output)
    verified = run_script(ROOT / "verify_model.py", "--model-path", output)
    assert verified.returncode == 0, verified.stdout
    assert "PASS  plain load: refused" in verified.stdout
    record = json.loads((output / METADATA_FILE).read_text())["online_transforms"]
    assert [record["activation_bits"], record["kv_bits"]] == [
        dict(zip(options[::2], options[1::2], strict=True)).get(flag)
        for flag in ("--act-bits", "--kv-bits")
    ]
    assert (output / KEYS_FILE).is_file() == ("--kv-bits" in options)
    # In float32 a value on the edge between two codes may fall either way, and move all tokens
    # after it.
    model, _ = load_model(output, torch.device("cpu"), torch.float64)
    tokens = torch.randint(2, 300, (1, 40), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :25], use_cache=True)
        rest = model(tokens[:, 25:], past_key_values=first.past_key_values, use_cache=True)
    in_parts = torch.cat([first.logits, rest.logits], dim=1)
    assert (whole - in_parts).abs().max() < 1e-3 * whole.abs().max()


def test_its_default_output_says_what_is_rounded(tiny, calibration_text, tmp_path):
    result = run_script(
        ROOT / "quantize_quarot.py",
        "--model",
        tiny,
        "--act-bits",
        4,
        "--calib-data",
        calibration_text,
        "--calib-samples",
        4,
        "--calib-length",
        64,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "models" / tiny.name / "quarot-w4a4kv16" / "config.json").is_file()

"""On a card only: kernels against their twins, packed models against the plain dense load, codes
against the CPU's.
"""

from __future__ import annotations

import gc
import json

import pytest
import torch
from conftest import run_script

from common.base import gpu
from common.kernels import forms, inference
from common.kernels.dispatch import triton_works
from common.kernels.forms import PackedWeight
from common.kernels.rounding import search_range
from common.model.fused import fuse_layers
from common.numerics import grid
from common.numerics.grid import Grid
from common.running import runtime
from common.running.decoding import Decoder
from common.running.runtime import load_for_running, load_model
from common.running.speed import measure_memory, weight_bytes
from common.solvers import adaround, rounding
from common.walk.inputs import InputSums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# Largest relative difference of logits between packed kernels and the dense load, both in bfloat16;
# rounded activations make small differences large where a value lies between two codes.
LOGITS_TOLERANCE = {"smoothquant": 0.06}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (
        (found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()
    ).item()


def test_triton_works_here():
    assert triton_works()


def moved(weight: PackedWeight) -> PackedWeight:
    zero = None if weight.zero_point is None else weight.zero_point.cuda()
    return PackedWeight(weight.packed.cuda(), weight.scale.cuda(), zero, weight.bits)


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group", "asymmetric"),
    [(4, 128, True), (4, 64, False), (8, None, False), (8, 64, True)],
)
def test_packed_matmul(generator, rows, bits, group, asymmetric, dtype):
    channels, out, half = 1152, 192, 1 << bits - 1
    groups = 1 if group is None else channels // group
    codes = torch.randint(-half, half, (out, channels), generator=generator).to(torch.int8)
    zero = (
        torch.randint(-half, half, (out, groups), generator=generator).to(torch.int8)
        if asymmetric
        else None
    )
    weight = forms.pack(codes, torch.rand(out, groups, generator=generator).to(dtype), zero, bits)
    inputs = torch.randn(rows, channels, generator=generator).to(dtype)
    exact = inputs.double() @ inference.unpack(weight, torch.float64).T
    assert relative(inference.packed_matmul(inputs.cuda(), moved(weight)), exact) < 6e-3
    assert torch.equal(
        inference.unpack(moved(weight), dtype).cpu(), inference.unpack(weight, dtype)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "groups", "asymmetric"), [(4, 9, True), (4, 18, False), (8, 1, False)]
)
@pytest.mark.parametrize("out", [192, 8192])
def test_row_matmul(generator, out, bits, groups, asymmetric, dtype):
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (out, 1152), generator=generator).to(torch.int8)
    zero = (
        torch.randint(-half, half, (out, groups), generator=generator).to(torch.int8)
        if asymmetric
        else None
    )
    scale = (0.01 * torch.rand(out, groups, generator=generator)).to(dtype)
    weight = forms.pack(codes, scale, zero, bits)
    exact, on_card = inference.unpack(weight, torch.float64), moved(weight)
    inputs, gain = (
        torch.randn(1, 1152, generator=generator).to(dtype),
        torch.rand(1152, generator=generator).to(dtype),
    )
    hidden = torch.randn(1, out, generator=generator).to(dtype)
    product = inputs.double() @ exact.T
    normed = (
        inputs.double() / (inputs.double().square().mean() + 1e-5).sqrt() * gain.double()
    ) @ exact.T
    gate, up = normed.chunk(2, -1)
    norm = gain.cuda(), 1e-5
    assert relative(inference.row_matmul(inputs.cuda(), on_card), product) < 6e-3
    assert relative(inference.row_matmul(inputs.cuda(), on_card, norm), normed) < 6e-3
    assert (
        relative(
            inference.row_matmul(inputs.cuda(), on_card, norm, gated=True),
            gate / (1 + (-gate).exp()) * up,
        )
        < 6e-3
    )
    target = hidden.cuda()
    inference.row_matmul(inputs.cuda(), on_card, added_to=target)
    assert relative(target, hidden.double() + product) < 6e-3


@pytest.mark.parametrize("out", [192, 8192])
def test_row_matmul_with_rounded_inputs(generator, out):
    """Rounded as the kernels for several rows do it."""
    codes = torch.randint(-128, 128, (out, 1152), generator=generator).to(torch.int8)
    weight = moved(
        forms.pack(codes, (0.01 * torch.rand(out, 1, generator=generator)).bfloat16(), None, 8)
    )
    inputs = torch.randn(1, 1152, generator=generator).bfloat16().cuda()
    norm = torch.rand(1152, generator=generator).bfloat16().cuda(), 1e-5
    exact = inference.unpack(weight, torch.float64)
    plain = inference.round_rows(inputs, 8).values().double() @ exact.T
    gate, up = (inference.add_rms_norm(inputs, None, *norm, 8).values().double() @ exact.T).chunk(
        2, -1
    )
    assert relative(inference.row_matmul(inputs, weight, bits=8), plain) < 6e-3
    assert (
        relative(
            inference.row_matmul(inputs, weight, norm, gated=True, bits=8),
            gate / (1 + (-gate).exp()) * up,
        )
        < 2e-2
    )


@pytest.mark.parametrize("rows", [1, 8, 33, 64, 200])
def test_integer_matmul(generator, rows):
    codes = torch.randint(-128, 128, (192, 1152), generator=generator).to(torch.int8)
    weight = forms.pack(codes, torch.rand(192, 1, generator=generator).bfloat16(), None, 8)
    rounded = inference.round_rows(
        torch.randn(rows, 1152, generator=generator).bfloat16().cuda(), 8
    )
    exact = (
        rounded.codes.cpu().double()
        * rounded.scale.cpu().double()
        @ inference.unpack(weight, torch.float64).T
    )
    assert relative(inference.integer_matmul(rounded, moved(weight)), exact) < 6e-3


@pytest.mark.parametrize("rows", [1, 2, 64, 200])
def test_products_as_on_an_rtx_20(generator, monkeypatch, rows):
    """In float16, by what is left without tensor cores in Triton, bfloat16 units and overlapping
    launches.
    """
    monkeypatch.setattr(gpu, "card", lambda: gpu.Card((7, 5), 64 << 10))
    inputs = torch.randn(rows, 1152, generator=generator).half().cuda()
    for bits, groups in ((4, 9), (8, 1)):
        half = 1 << bits - 1
        codes = torch.randint(-half, half, (192, 1152), generator=generator).to(torch.int8)
        weight = forms.pack(
            codes, (0.01 * torch.rand(192, groups, generator=generator)).half(), None, bits
        )
        exact, weight = inference.unpack(weight, torch.float64), moved(weight)
        assert (
            relative(inference.packed_matmul(inputs, weight), inputs.cpu().double() @ exact.T)
            < 2e-3
        )
    rounded = inference.round_rows(inputs, 8)
    expected = rounded.codes.cpu().double() * rounded.scale.cpu().double() @ exact.T
    assert relative(inference.integer_matmul(rounded, weight), expected) < 2e-3


def test_gram_matrix_in_float16(generator):
    """A token of next to no size, whose weight float16 does not hold, leaves it finite; without it
    nothing changes.
    """
    inputs = torch.randn(300, 256, generator=generator)
    sizes = torch.rand(300, generator=generator) + 0.5
    gram = (inputs / sizes.unsqueeze(1)).double()
    expected = gram.T @ gram / (1 / sizes.double().square()).sum()
    found = InputSums(256, CUDA)
    found.add(inputs.half().cuda(), 1 / sizes.square().cuda())
    assert relative(found.finish().gram, expected) < 2e-3
    sizes[7] = 1e-6
    found = InputSums(256, CUDA)
    found.add(inputs.half().cuda(), 1 / sizes.square().cuda())
    assert torch.isfinite(found.finish().gram).all()


def test_round_rows(generator):
    inputs = torch.randn(40, 576, generator=generator).bfloat16().cuda()
    expected = grid.round_per_token(inputs, 8)
    assert torch.equal(inference.round_rows(inputs, 8).values(), expected)
    gain = torch.ones(576, device=CUDA, dtype=torch.bfloat16)
    normed = inference.add_rms_norm(inputs, None, gain, 1e-5)
    rounded = inference.add_rms_norm(inputs, None, gain, 1e-5, 8)
    assert torch.equal(rounded.values(), grid.round_per_token(normed, 8))
    both = torch.randn(40, 1152, generator=generator).bfloat16().cuda()
    gated = inference.silu_mul(*both.chunk(2, -1))
    assert torch.equal(
        inference.silu_mul(*both.chunk(2, -1), 8).values(), grid.round_per_token(gated, 8)
    )


@pytest.mark.parametrize("form", [Grid(4, 64), Grid(4, 128, True), Grid(8, None)], ids=str)
def test_rounding_kernels(generator, form):
    """The same ranges, codes and learned roundings as on the CPU, but for ties."""
    inputs = torch.randn(4000, 256, generator=generator) * torch.rand(256, generator=generator)
    gram, weight = inputs.T @ inputs / 4000, torch.randn(300, 256, generator=generator)
    for keep in (True, False):
        scale, zero = search_range(weight, form, gram.diagonal(), keep_larger_end=keep)
        on_card = search_range(weight.cuda(), form, gram.cuda().diagonal(), keep_larger_end=keep)
        assert (on_card[0].cpu() == scale).float().mean() > 0.99
    for function in (
        lambda *tensors: rounding.solve(*tensors, form)[0],
        lambda weight, gram, scale, zero: rounding.refine(
            weight,
            grid.quantize(weight, scale, zero, form),
            scale,
            zero,
            gram,
            form,
            torch.bfloat16,
            1,
        )[0],
        lambda weight, gram, scale, zero: adaround.learn_rounding(
            weight, gram, scale, zero, form, 20, 1.0, 0.5
        ).codes(),
    ):
        expected = function(weight, gram, scale, zero)
        found = function(weight.cuda(), gram.cuda(), scale.cuda(), zero.cuda()).cpu()
        assert (found == expected).float().mean() > 0.97


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_fused_layers(tiny_models, architecture):
    """The same logits as from transformers' own layers, and the same gradients, which those have to
    compute.
    """
    folder = next(folder for (name, _), folder in tiny_models.items() if name == architecture)
    tokens = torch.randint(2, 320, (3, 50), generator=torch.Generator().manual_seed(1)).cuda()
    plain, fused = (load_model(folder, CUDA, torch.float32)[0] for _ in range(2))
    fuse_layers(fused)
    with torch.inference_mode():
        assert (
            relative(fused(tokens, use_cache=False).logits, plain(tokens, use_cache=False).logits)
            < 1e-3
        )
        assert relative(fused(tokens).logits, plain(tokens).logits) < 1e-3
    gradients = []
    for model in (plain, fused):
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        model(tokens).logits.square().mean().backward()
        gradients.append(weight.grad)
    assert relative(gradients[1], gradients[0]) < 1e-3


FORMS = {
    "gptq": ["--bits", "4"],
    "awq": ["--bits", "4", "--symmetric"],
    "hqq": ["--bits", "8"],
    "smoothquant": [],
    "adaround": ["--bits", "8", "--iterations", "5"],
    "quarot": ["--bits", "4", "--head-bits", "8", "--embedding-bits", "8"],
}


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_method_packed_and_dense(tiny_models, tmp_path, method, architecture):
    """Quantized on the card; its logits on packed kernels agree with the plain load's, and the
    decoder with both.
    """
    source = next(folder for (name, _), folder in tiny_models.items() if name == architecture)
    size = [] if method == "smoothquant" else ["--group-size", "32"]
    codes = {}
    for device in ("cuda", "cpu"):
        output = tmp_path / device
        result = run_script(
            f"quantize_{method}.py",
            "--model",
            source,
            "--output",
            output,
            "--calib-samples",
            "4",
            "--calib-length",
            "128",
            "--calib-data",
            "demo",
            "--device",
            device,
            *size,
            *FORMS[method],
        )
        assert result.returncode == 0, result.stdout + result.stderr
        codes[device] = json.loads((output / "quantization_metadata.json").read_text())
    assert (
        abs(codes["cuda"]["probe"]["perplexity"] / codes["cpu"]["probe"]["perplexity"] - 1) < 0.05
    )
    tolerance = LOGITS_TOLERANCE.get(method, 0.02)
    plain, _ = load_model(tmp_path / "cuda", CUDA, torch.bfloat16)
    packed, _ = load_for_running(tmp_path / "cuda", CUDA, torch.bfloat16)
    exact, _ = load_model(tmp_path / "cuda", CUDA, torch.float32)
    tokens = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        expected = plain(tokens).logits.float()
        assert relative(packed(tokens).logits.float(), expected) < tolerance
        exact = exact(tokens).logits[:, -1]
        # One position's logits are few: where bfloat16 itself is further off, as far as that.
        allowed = max(tolerance, 1.5 * relative(expected[:, -1], exact))
        for rows in (2, 1):
            decoder = Decoder(packed, rows, 128)
            first = decoder.start(tokens[:rows].tolist())
            assert relative(first.float(), exact[:rows]) < allowed
            written = torch.cat(
                [
                    decoder.tokens[:rows].cpu()[None],
                    decoder.run(rows).cpu(),
                    decoder.run(rows).cpu(),
                ]
            )
            # Teacher-forced: what the decoder chose has nearly the largest logit of the plain
            # model.
            whole = torch.cat([tokens[:rows], written.T.cuda()], dim=1)
            logits = plain(whole[:, :-1]).logits[:, 39:].float()
            chosen = logits.gather(2, whole[:, 40:].unsqueeze(2)).squeeze(2)
            assert ((logits.amax(2) - chosen) <= 0.05 * logits.std()).float().mean() > 0.9


@pytest.mark.parametrize("architecture", ["gemma3_text", "granite", "phi3", "smollm3"])
def test_other_families_packed_and_dense(tiny_models, tmp_path, architecture):
    """They run through their own layers, on packed weights too; their head gives the logits."""
    source = next(folder for (name, _), folder in tiny_models.items() if name == architecture)
    output = tmp_path / "cuda"
    result = run_script(
        "quantize_gptq.py",
        "--model",
        source,
        "--output",
        output,
        "--calib-samples",
        "4",
        "--calib-length",
        "128",
        "--calib-data",
        "demo",
        "--group-size",
        "32",
        "--embedding-bits",
        "8",
        "--device",
        "cuda",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    plain, _ = load_model(output, CUDA, torch.bfloat16)
    packed, _ = load_for_running(output, CUDA, torch.bfloat16)
    tokens = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        expected = plain(tokens).logits.float()
        assert relative(packed(tokens).logits.float(), expected) < 0.02
        hidden = packed.model(tokens).last_hidden_state
        assert relative(packed.lm_head(hidden).float(), expected) < 0.02


def test_the_limit_on_device_memory_holds():
    """Beyond it torch raises its out-of-memory error, though the card has room."""
    from common.base import device_memory

    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    try:
        device_memory.limit(CUDA, 2 + before / 2**30)
        room = device_memory.available(CUDA)
        assert room <= 1.01 * 2**30 + before and torch.cuda.mem_get_info()[0] > 2 * room
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(1.2 * room), dtype=torch.int8, device=CUDA)
        taken = torch.empty(int(0.5 * room), dtype=torch.int8, device=CUDA)
        assert device_memory.available(CUDA) == pytest.approx(0.5 * room, rel=0.01)
        del taken
    finally:
        torch.cuda.empty_cache()
        device_memory.limit(CUDA)


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_memory_to_run(demo_model, tmp_path, name):
    """At least weights and cache; the same however much else is allocated; nothing is left
    behind."""
    if name == "packed":
        result = run_script(
            "quantize_hqq.py", "--model", demo_model, "--output", tmp_path / "packed"
        )
        assert result.returncode == 0, result.stderr
    model, _ = load_for_running(
        demo_model if name == "plain" else tmp_path / "packed", CUDA, torch.bfloat16
    )
    config = model.config
    cache = 2048 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    measure_memory(model, config.vocab_size)  # compiles, joins, starts libraries
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    alone = measure_memory(model, config.vocab_size)
    assert weight_bytes(model) + cache <= alone < weight_bytes(model) + 4 * cache + 2**29
    assert torch.cuda.memory_allocated() <= before + 2**20
    beside = torch.zeros(2**30, dtype=torch.int8, device=CUDA)
    assert measure_memory(model, config.vocab_size) == pytest.approx(alone, rel=0.02)
    del beside


def test_a_streamed_model_computes_what_a_resident_one_does(demo_model, monkeypatch):
    plain, _ = load_model(demo_model, CUDA, torch.bfloat16)
    fuse_layers(plain)
    monkeypatch.setattr(runtime, "available", lambda _: 0)
    streamed, _ = load_for_running(demo_model, CUDA, torch.bfloat16)
    assert streamed.streamed == streamed.config.num_hidden_layers
    tokens = torch.arange(10, 60, device=CUDA).unsqueeze(0)
    with torch.inference_mode():
        assert relative(streamed(tokens).logits, plain(tokens).logits) < 1e-3

"""On a GPU only: packed models against the plain dense load, fused layers against transformers'
own, and the memory that models take.
"""

from __future__ import annotations

import gc
import json

import pytest
import torch
from conftest import run_quantize
from kernel_checks import relative
from methods import method_options
from tuning_problem import Problem

from common.model.fused import fuse_layers
from common.running import runtime
from common.running.decoding import Decoder
from common.running.runtime import load_for_running, load_model
from common.running.speed import measure_memory, weight_bytes
from common.walk import tuning

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
# Largest relative difference of logits between packed kernels and the dense load, both in bfloat16;
# rounded activations make small differences large where a value lies between two codes.
LOGITS_TOLERANCE = {"smoothquant": 0.06}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_fused_layers(tiny_models, architecture):
    """The same logits as from transformers' own layers, and the same gradients."""
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
        layer = model.model.layers[0]
        parts = layer.self_attn.q_proj, layer.mlp.gate_proj, layer.post_attention_layernorm
        weights = [part.weight.requires_grad_(True) for part in parts]
        model(tokens, use_cache=False).logits.square().mean().backward()
        gradients.append([weight.grad for weight in weights])
    for own, other in zip(*gradients, strict=True):
        assert relative(other, own) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_scales_are_tuned_as_on_a_cpu(tmp_path, monkeypatch, dtype, home):
    monkeypatch.setattr(tuning, "RATE", 0.05)
    wanted = Problem(tmp_path / "cpu").tune(16)
    problem = Problem(tmp_path / "cuda", dtype=dtype, device=CUDA, home=torch.device(home))
    found = problem.tune(16)
    assert found.before == pytest.approx(wanted.before, rel=0.05)
    assert found.better and found.after == pytest.approx(wanted.after, rel=0.05)
    for own, other in zip(found.codes, wanted.codes, strict=True):
        for name, linear in own.items():
            assert linear.scale.device.type == home
            if dtype == torch.float32:
                change = (linear.scale.cpu() / other[name].scale).log().abs()
                assert change.mean() < 2**-8


FORMS = method_options(
    group_size=32,
    iterations=5,
    awq=["--symmetric"],
    hqq=["--bits", "8"],
    adaround=["--bits", "8"],
    quarot=["--head-bits", "8", "--embedding-bits", "8"],
)


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_method_packed_and_dense(tiny_models, tmp_path, method, architecture):
    """Quantized on the GPU; its logits on packed kernels agree with the plain load's, and the
    decoder with both.
    """
    source = next(folder for (name, _), folder in tiny_models.items() if name == architecture)
    codes = {}
    for device in ("cuda", "cpu"):
        output = tmp_path / device
        words = ["--device", device, *FORMS[method]]
        result = run_quantize(method, source, output, *words, text="demo", samples=4, length=128)
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
    words = ["--group-size", 32, "--embedding-bits", 8, "--device", "cuda"]
    result = run_quantize("gptq", source, output, *words, text="demo", samples=4, length=128)
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
    """Beyond it torch raises its out-of-memory error, though the GPU has room."""
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
        result = run_quantize("hqq", demo_model, tmp_path / "packed")
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

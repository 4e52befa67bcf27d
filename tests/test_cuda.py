"""On a card only: kernels against their twins, packed models against the plain dense load, codes against the CPU's."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import run_script

from common import adaround, grid, rounding
from common.decoding import Decoder
from common.grid import Grid
from common.kernels import inference, triton_works
from common.kernels.inference import PackedWeight
from common.runtime import load_for_running, load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# Largest relative difference of logits between packed kernels and the dense load, both in bfloat16; rounded activations make
# small differences large where a value lies between two codes.
LOGITS_TOLERANCE = {"smoothquant": 0.06}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()).item()


def test_triton_works_here():
    assert triton_works()


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64, 200])
@pytest.mark.parametrize(("bits", "group", "asymmetric"), [(4, 128, True), (4, 64, False), (8, None, False), (8, 64, True)])
def test_packed_matmul(generator, rows, bits, group, asymmetric):
    channels, out = 576, 192
    groups = 1 if group is None else channels // 64
    packed = torch.randint(-2**31, 2**31, (out, channels * bits // 32), generator=generator).to(torch.int32)
    zero = torch.randint(0, 1 << bits, (out, groups), generator=generator).to(torch.uint8) if asymmetric else None
    weight = PackedWeight(packed, torch.rand(out, groups, generator=generator).bfloat16(), zero, bits)
    inputs = torch.randn(rows, channels, generator=generator).bfloat16()
    exact = inputs.double() @ inference.unpack(weight, torch.float64).T
    moved = PackedWeight(packed.cuda(), weight.scale.cuda(), None if zero is None else zero.cuda(), bits)
    assert relative(inference.packed_matmul(inputs.cuda(), moved), exact) < 6e-3
    assert torch.equal(inference.unpack(moved, torch.bfloat16).cpu(), inference.unpack(weight, torch.bfloat16))


def test_round_rows(generator):
    inputs = torch.randn(40, 576, generator=generator).bfloat16().cuda()
    assert torch.equal(inference.round_rows(inputs, 8), grid.round_per_token(inputs, 8))


@pytest.mark.parametrize("form", [Grid(4, 64), Grid(4, 128, True), Grid(8, None)], ids=str)
def test_rounding_kernels(generator, form):
    """The same ranges, codes and learned roundings as on the CPU, but for ties."""
    inputs = torch.randn(4000, 256, generator=generator) * torch.rand(256, generator=generator)
    gram, weight = inputs.T @ inputs / 4000, torch.randn(300, 256, generator=generator)
    scale, zero = grid.search_range(weight, form, gram.diagonal())
    on_card = grid.search_range(weight.cuda(), form, gram.diagonal().cuda())
    assert (on_card[0].cpu() == scale).float().mean() > 0.99
    for function in (lambda *tensors: rounding.solve(*tensors, form)[0],
                     lambda weight, gram, scale, zero: rounding.refine(
                         weight, grid.quantize(weight, scale, zero, form), scale, zero, gram, form, torch.bfloat16, 1)[0],
                     lambda weight, gram, scale, zero: adaround.learn_rounding(
                         weight, gram, scale, zero, form, 20, 1.0, 0.5).codes()):
        expected = function(weight, gram, scale, zero)
        found = function(weight.cuda(), gram.cuda(), scale.cuda(), zero.cuda()).cpu()
        assert (found == expected).float().mean() > 0.97


FORMS = {"gptq": ["--bits", "4"], "awq": ["--bits", "4", "--symmetric"], "hqq": ["--bits", "8"], "smoothquant": [],
         "adaround": ["--bits", "8", "--iterations", "5"], "quarot": ["--bits", "4", "--head-bits", "8", "--embedding-bits", "8"]}


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_method_packed_and_dense(tiny_models, tmp_path, method, architecture):
    """Quantized on the card; its logits on packed kernels agree with the plain load's, and the decoder with both."""
    source = next(folder for (name, _), folder in tiny_models.items() if name == architecture)
    size = [] if method == "smoothquant" else ["--group-size", "32"]
    codes = {}
    for device in ("cuda", "cpu"):
        output = tmp_path / device
        result = run_script(f"quantize_{method}.py", "--model", source, "--output", output, "--calib-samples", "4",
                            "--calib-length", "128", "--calib-data", "demo", "--device", device, *size, *FORMS[method])
        assert result.returncode == 0, result.stdout + result.stderr
        codes[device] = json.loads((output / "quantization_metadata.json").read_text())
    assert abs(codes["cuda"]["probe"]["perplexity"] / codes["cpu"]["probe"]["perplexity"] - 1) < 0.05
    tolerance = LOGITS_TOLERANCE.get(method, 0.02)
    plain, _ = load_model(tmp_path / "cuda", CUDA, torch.bfloat16)
    packed, _ = load_for_running(tmp_path / "cuda", CUDA, torch.bfloat16)
    tokens = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        expected = plain(tokens).logits.float()
        assert relative(packed(tokens).logits.float(), expected) < tolerance
        decoder = Decoder(packed, 2, 128)
        first = decoder.start(tokens.tolist())
        assert relative(first.float(), expected[:, -1]) < tolerance
        written = torch.cat([decoder.tokens[:2].cpu()[None], decoder.run(2).cpu(), decoder.run(2).cpu()])
        # Teacher-forced: what the decoder chose has nearly the largest logit of the plain model.
        whole = torch.cat([tokens, written.T.cuda()], dim=1)
        logits = plain(whole[:, :-1]).logits[:, 39:].float()
        chosen = logits.gather(2, whole[:, 40:].unsqueeze(2)).squeeze(2)
        assert ((logits.amax(2) - chosen) <= 0.05 * logits.std()).float().mean() > 0.9

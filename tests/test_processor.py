"""Packed weights on a CPU: torch's own products with them against float64, and models that run on
them against plain transformers.
"""

from __future__ import annotations

import pytest
import torch
from conftest import run_quantize, save_tiny
from kernel_checks import close

from common.kernels import forms, inference, processor
from common.numerics.divergence import divergence_of_logits
from common.running.decoding import Decoder, decodes_faster
from common.running.packed import PackedLinear, stack, unpack_for_prompts
from common.running.runtime import kernels_of, load_for_running, load_model
from common.running.speed import measure_speed, weight_bytes

CPU = torch.device("cpu")
# Of a product whose inputs and outputs are rounded to bfloat16, each by 2^-9 at most.
ROUNDED = 2**-8
pytestmark = pytest.mark.skipif(
    processor.block_rows() is None, reason="torch has no form of 4-bit weights for this CPU"
)


def random_weight(generator, bits: int, out: int, channels: int, groups: int, asymmetric: bool):
    """A weight, and what it stands for in float64, value by value."""
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (out, channels), generator=generator)
    scale = (torch.rand(out, groups, generator=generator) + 0.5).bfloat16()
    zero = torch.randint(-half, half, (out, groups), generator=generator) if asymmetric else None
    size = channels // groups
    exact = torch.empty(out, channels, dtype=torch.float64)
    for channel in range(channels):
        group = channel // size
        shift = 0 if zero is None else zero[:, group]
        exact[:, channel] = (codes[:, channel] - shift).double() * scale[:, group].double()
    return forms.pack(codes.to(torch.int8), scale, zero, bits), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "channels", "groups"),
    [(4, 576, 9), (4, 512, 1), (4, 192, 2), (8, 576, 9), (8, 256, 2), (8, 320, 1), (8, 96, 1)],
)
def test_products(generator, bits, channels, groups, asymmetric, dtype):
    packed, exact = random_weight(generator, bits, 192, channels, groups, asymmetric)
    assert processor.fits(packed)
    weight = processor.repack(packed)
    assert weight.shape == exact.shape and weight.packed.nbytes == exact.numel() * bits // 8
    for rows in (1, 5, processor.FUSED_ROWS, processor.FUSED_ROWS + 1):
        inputs = torch.randn(rows, channels, generator=generator).to(dtype)
        found = inference.packed_matmul(inputs, weight)
        assert found.dtype == dtype
        fused = rows <= processor.FUSED_ROWS
        bound = ROUNDED if fused or dtype == torch.bfloat16 else 1e-6
        close(found, inputs.double() @ exact.T, max(bound, 1e-3 * (dtype == torch.float16)))


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_in_tiles_it_is_the_weight_bit_for_bit(generator, monkeypatch, bits):
    packed, exact = random_weight(generator, bits, 192, 576, 9, True)
    weight = processor.repack(packed)
    assert torch.equal(processor.unpack_transposed(weight).T, exact.float())
    inputs = torch.randn(40, 576, generator=generator)
    whole = inference.packed_matmul(inputs, weight)
    monkeypatch.setattr(processor, "TILE", 1)
    close(inference.packed_matmul(inputs, weight), whole.double(), 1e-6)


@pytest.mark.parametrize(
    ("bits", "out", "channels", "groups"),
    [
        (4, 21, 576, 9),
        (4, 192, 576, 12),
        (4, 192, 96, 6),
        (8, 200, 576, 9),
        (8, 192, 48, 3),
        (8, 75, 64, 1),
        (8, 64, 99, 1),
    ],
)
def test_odd_sizes_have_no_such_form(generator, bits, out, channels, groups):
    packed, _ = random_weight(generator, bits, out, channels, groups, False)
    assert not processor.fits(packed)


def test_another_form_than_the_known_ones_is_not_read(monkeypatch):
    monkeypatch.setattr(
        processor, "_convert", lambda codes: codes[:, ::2].to(torch.uint8).contiguous()
    )
    assert processor.block_rows.__wrapped__() is None


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_integers(generator, monkeypatch, units, dtype):
    """Sums as large as they get: exact with units for them, else rounded once."""
    monkeypatch.setattr(processor, "multiplies_integers", lambda: units)
    packed, exact = random_weight(generator, 8, 80, 640, 1, False)
    packed.packed[0] = 127
    exact[0] = 127 * packed.scale[0].double()
    weight = processor.repack(packed)
    for rows in (1, 7, 33):
        codes = torch.randint(-128, 128, (rows, 640), generator=generator).to(torch.int8)
        codes[0] = 127
        scale = (torch.rand(rows, 1, generator=generator) / 512).to(dtype)
        found = inference.integer_matmul(forms.Rounded(codes, scale), weight)
        assert found.dtype == dtype
        exactly = (units or rows > processor.FUSED_ROWS) and dtype == torch.float32
        expected = codes.double() * scale.double() @ exact.T
        close(found, expected, 1e-6 if exactly else ROUNDED)


@pytest.mark.parametrize("bits", [4, 8])
def test_linears_that_were_joined_still_give_what_they_gave(generator, bits):
    """They become views of the joined one, whose scales have gaps between them."""
    parts = [random_weight(generator, bits, out, 128, 2, True)[0] for out in (64, 128, 64)]
    bias = [torch.randn(len(part.packed), generator=generator) for part in parts]
    linears = [
        PackedLinear(processor.repack(part), one) for part, one in zip(parts, bias, strict=True)
    ]
    inputs = torch.randn(3, 128, generator=generator)
    before = [linear(inputs) for linear in linears]
    whole = stack(linears)
    assert torch.equal(whole(inputs), torch.cat(before, 1))
    for linear, expected in zip(linears, before, strict=True):
        assert torch.equal(linear(inputs), expected)


def test_a_linear_that_is_moved_multiplies_by_what_it_then_holds(generator):
    packed, exact = random_weight(generator, 4, 64, 128, 2, True)
    linear = PackedLinear(packed, None).to(torch.float64)
    for name in ("packed", "scale", "zero_point", "kernel_scale"):
        assert getattr(linear.codes, name) is getattr(linear, name)
    assert linear.codes.scale.dtype == torch.float64 and linear.codes.bits == 4
    inputs = torch.randn(3, 128, generator=generator).double()
    close(linear(inputs), inputs @ exact.T, 1e-12)


FORMS = {
    "gptq": ["--bits", "4", "--group-size", "32"],
    "hqq": ["--bits", "8", "--group-size", "32", "--embedding-bits", "8"],
    "smoothquant": [],
}
WORDS = {"gptq": "packed W4A16", "hqq": "packed W8A16", "smoothquant": "packed W8A8"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    # All output channels come in blocks of 64, which is what a CPU with AVX-512 wants.
    save_tiny(folder / "model", "llama", True, head_dim=32)
    for method, options in FORMS.items():
        result = run_quantize(
            method, folder / "model", folder / method, *options, text="demo", samples=2
        )
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("method", FORMS)
def test_a_checkpoint_runs_packed_and_agrees_with_plain_transformers(checkpoints, method):
    plain, _ = load_model(checkpoints / method, CPU, torch.float32)
    model, _ = load_for_running(checkpoints / method, CPU, torch.float32)
    assert kernels_of(model) == WORDS[method]
    assert weight_bytes(model) < 0.6 * weight_bytes(plain)
    tokens = torch.randint(2, 320, (1, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = plain(tokens).logits
        # A prompt's weights are unpacked: nothing is rounded. With rounded inputs the last bit
        # may turn into another code.
        bound = 2e-2 if method == "smoothquant" else 1e-4
        close(model(tokens).logits, expected.double(), bound)
        rows = model(tokens[:, :16]).logits
    close(rows, expected[:, :16].double(), 2e-2)
    assert divergence_of_logits(expected[0, :16], rows[0]) < 1e-3


@pytest.mark.parametrize("method", FORMS)
def test_it_is_decoded_by_the_decoder(checkpoints, method):
    model, _ = load_for_running(checkpoints / method, CPU, torch.float32)
    plain, _ = load_model(checkpoints / method, CPU, torch.float32)
    assert decodes_faster(model, 32) and not decodes_faster(plain, 32)
    assert measure_speed(model, 320)["kernels"] == WORDS[method]
    prompt = torch.randint(2, 320, (20,), generator=torch.Generator().manual_seed(6)).tolist()
    with torch.inference_mode():
        decoder = Decoder(model, 1, 32)
        decoder.start([prompt])
        written = [decoder.tokens[0].item(), *decoder.run(1)[:, 0].tolist()]
        # Each is the most likely token, or as good as that.
        logits = plain(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(written).unsqueeze(1)).squeeze(1)
    assert (logits.max(-1).values - chosen <= 0.02 * logits.abs().max()).all()


def test_weights_held_dense_for_prompts(checkpoints):
    """Give the same logits, and few tokens do without them."""
    model, _ = load_for_running(checkpoints / "gptq", CPU, torch.float32)
    tokens = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        before = [model(part).logits for part in (tokens, tokens[:1, :9])]
        unpack_for_prompts(model)
        linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert all(linear.dense is not None for linear in linears) and linears
        close(model(tokens).logits, before[0].double(), 1e-5)
        assert torch.equal(model(tokens[:1, :9]).logits, before[1])


def test_what_does_not_fit_or_is_not_worth_it_runs_dense(checkpoints, monkeypatch, capsys):
    folder = checkpoints / "gptq"
    with monkeypatch.context() as patch:
        patch.setattr(processor, "block_rows", lambda: None)
        model, _ = load_for_running(folder, CPU, torch.float32)
        assert kernels_of(model) == "dense"
        assert f"{folder} runs on dense weights" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(processor, "is_worth_it", lambda dtype: False)
        model, _ = load_for_running(folder, CPU, torch.bfloat16)
        assert kernels_of(model) == "dense"

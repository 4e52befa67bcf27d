"""What gradients go through, its twins in plain torch and its kernels (on a GPU where there is one,
else in Triton's interpreter), against autograd in float64.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_checks import close, quicken_the_interpreter
from torch.nn import functional

from common.kernels import gradients
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max

BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND))


@pytest.fixture(params=["twin", "kernel"])
def device(request, monkeypatch) -> str:
    """Where to compute, and by what."""
    if request.param == "twin":
        return "cpu"
    pytest.importorskip("triton", reason="triton is not installed: there are no kernels")
    if torch.cuda.is_available():
        return "cuda"
    quicken_the_interpreter()
    from common.kernels import gradients_triton

    kernels = SimpleNamespace(gradients=gradients_triton)
    monkeypatch.setattr(gradients, "triton_kernels", lambda _: kernels)
    return "cpu"


def slopes(function, inputs, outer):
    """What a function of tensors puts out, and its derivatives."""
    inputs = [tensor.detach().requires_grad_(True) for tensor in inputs]
    output = function(*inputs)
    return output, *torch.autograd.grad(output, inputs, outer.to(output.dtype))


def assert_as_exact(function, exact, inputs, outer, device):
    """Output and derivatives against those of `exact` in float64."""
    dtype = inputs[0].dtype
    found = slopes(function, [tensor.to(device) for tensor in inputs], outer.to(device))
    wanted = slopes(exact, [tensor.double() for tensor in inputs], outer.double())
    for own, other in zip(found, wanted, strict=True):
        assert own.shape == other.shape and own.dtype == dtype
        close(own, other, BOUND[dtype])


@DTYPES
@pytest.mark.parametrize("rows, size", [(1, 64), (7, 96)])
def test_rms_norm(generator, monkeypatch, device, dtype, rows, size):
    if device == "cpu" and rows > 1:  # fewer programs than rows
        triton_side = pytest.importorskip("common.kernels.gradients_triton")
        monkeypatch.setattr(triton_side, "PROGRAMS", 3)
    hidden = torch.randn(rows, size, generator=generator).to(dtype) * 3
    gain = torch.rand(size, generator=generator).to(dtype) + 0.5
    outer = torch.randn(rows, size, generator=generator).to(dtype)
    assert_as_exact(
        lambda hidden, gain: gradients.rms_norm(hidden, gain, 1e-5),
        lambda hidden, gain: functional.rms_norm(hidden, (size,), gain, 1e-5),
        (hidden, gain),
        outer,
        device,
    )
    # Where the gain's is not wanted.
    alone = hidden.to(device).requires_grad_(True)
    gradients.rms_norm(alone, gain.to(device), 1e-5).backward(outer.to(device))
    assert alone.grad is not None


@DTYPES
def test_silu_mul(generator, device, dtype):
    gate, up, outer = torch.randn(3, 5, 77, generator=generator).to(dtype).unbind(0)
    assert_as_exact(
        gradients.silu_mul,
        lambda gate, up: functional.silu(gate) * up,
        (4 * gate, up),
        outer,
        device,
    )


@DTYPES
@pytest.mark.parametrize("batch", [1, 2])
def test_rotated_heads(generator, device, dtype, batch):
    heads, outer = torch.randn(2, 2, 5, 3, 16, generator=generator).to(dtype)
    angles = torch.rand(batch, 5, 8, generator=generator).repeat(1, 1, 2) * 6
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)

    def exact(heads):
        first, second = heads.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        tables = (table.double()[:, :, None] for table in (cosine, sine))
        return heads * next(tables) + turned * next(tables)

    assert_as_exact(
        lambda heads: gradients.rotated_heads(heads, cosine.to(device), sine.to(device)),
        exact,
        (heads,),
        outer,
        device,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 48, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scaled_weights(generator, device, dtype, size, symmetric):
    grid = Grid(3, size, symmetric)
    weight = torch.randn(6, 96, generator=generator)
    found = QuantizedLinear.nearest(weight, *min_max(grouped(weight, grid), grid), grid)
    change = 0.2 * torch.randn(found.scale.shape, generator=generator)
    outer = torch.randn(6, 96, generator=generator).to(dtype)
    here = found.map(lambda tensor: tensor.to(device))

    def own(change):
        return gradients.scaled_weights(here, change, dtype)

    def exact(change):
        return (grouped(found.dequantize().double(), grid) * change.exp()[..., None]).flatten(1)

    output, slope = slopes(own, [change.to(device)], outer.to(device))
    wanted, wanted_slope = slopes(exact, [change.double()], outer.double())
    assert output.dtype == dtype and slope.dtype == torch.float32
    close(output, wanted, BOUND[dtype])
    close(slope, wanted_slope, BOUND[dtype])
    # Without a change the weights are those of the codes, to the last bit.
    assert torch.equal(own(torch.zeros_like(change).to(device)).cpu(), found.dequantize(dtype))


@DTYPES
@pytest.mark.parametrize("vocabulary", [50, 5000])  # less than a block, more than one
def test_divergence_and_slope(generator, device, dtype, vocabulary):
    expected = (4 * torch.randn(3, vocabulary, generator=generator)).to(dtype)
    found = expected + torch.randn(3, vocabulary, generator=generator).to(dtype)
    found[0, 7] += 80  # all but certain of something else
    found[1], expected[2, :9] = expected[1], -200.0
    exact = found.double().requires_grad_(True)
    wanted = functional.kl_div(
        exact.log_softmax(-1), expected.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    wanted.sum().backward()
    divergence, slope = gradients.divergence_and_slope(expected.to(device), found.to(device), True)
    assert divergence.dtype == torch.float32 and slope.dtype == dtype
    assert torch.allclose(divergence.cpu().double(), wanted.detach(), rtol=1e-5, atol=2e-5)
    close(slope, exact.grad, max(BOUND[dtype], 1e-5))
    alone, nothing = gradients.divergence_and_slope(expected.to(device), found.to(device), False)
    assert nothing is None and torch.equal(alone, divergence)


def test_logits_that_are_not_numbers_are_not_hidden(generator, device):
    expected = torch.randn(2, 60, generator=generator)
    found = expected.clone()
    found[0, 3], found[1, 5] = torch.nan, torch.inf
    divergence, _ = gradients.divergence_and_slope(expected.to(device), found.to(device), True)
    assert not torch.isfinite(divergence).any()

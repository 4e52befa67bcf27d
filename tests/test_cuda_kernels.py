"""On a GPU only: kernels against their twins and float64, rounding against the CPU's."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import relative

from common.base import gpu
from common.kernels import float_product_triton, forms, inference
from common.kernels.dispatch import triton_works
from common.kernels.forms import PackedWeight, Rounding
from common.kernels.rounding import search_range
from common.kernels.sums import channel_sums
from common.numerics import grid
from common.numerics.grid import Grid
from common.solvers import adaround, rounding
from common.solvers.ranges import choose_ranges
from common.walk.inputs import InputSums
from quantize_hqq import half_quadratic

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


def moved(weight: PackedWeight) -> PackedWeight:
    zero = None if weight.zero_point is None else weight.zero_point.cuda()
    return PackedWeight(weight.packed.cuda(), weight.scale.cuda(), zero, weight.bits)


def test_triton_works_here():
    assert triton_works()


@pytest.mark.parametrize("rows", [1, 2, 8, 32, 64, 100, 128, 200])
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
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "rows"), [(32, 3), (32, 128), (64, 70), (128, 128), (128, 200)])
@pytest.mark.parametrize("out", [70, 5000])
def test_weights_as_floats(generator, out, group, rows, scale_dtype, dtype):
    """Of inputs that take one channel each, so that the product is the weights themselves: rounded
    once, as those that are unpacked.
    """
    codes = torch.randint(-8, 8, (out, 256), generator=generator).to(torch.int8)
    zero = torch.randint(-8, 8, (out, 256 // group), generator=generator).to(torch.int8)
    scale = (0.01 * torch.rand(out, 256 // group, generator=generator)).to(scale_dtype)
    weight = moved(forms.pack(codes, scale, zero, 4))
    inputs = torch.zeros(rows, 256, dtype=dtype, device="cuda")
    taken = torch.randint(256, (rows,), generator=generator).cuda()
    inputs[torch.arange(rows).cuda(), taken] = 1
    found = float_product_triton.float_matmul(inputs, weight)
    assert torch.equal(found, inference.unpack(weight, dtype).T[taken])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out", "channels", "group"), [(3072, 576, 64), (9728, 896, 128), (4096, 2048, 32)]
)
def test_products_of_several_blocks_are_the_same_every_time(generator, out, channels, group, dtype):
    """Where a program adds up several blocks of channels, what Triton 3.6 compiled was a race."""
    codes = torch.randint(-8, 8, (out, channels), generator=generator).to(torch.int8)
    zero = torch.randint(-8, 8, (out, channels // group), generator=generator).to(torch.int8)
    scale = (0.01 * torch.rand(out, channels // group, generator=generator)).to(dtype)
    weight = forms.pack(codes, scale, zero, 4)
    inputs = torch.randn(128, channels, generator=generator).to(dtype)
    exact = inputs.double() @ inference.unpack(weight, torch.float64).T
    given, weight = inputs.cuda(), moved(weight)
    first = float_product_triton.float_matmul(given, weight)
    assert relative(first, exact) < 6e-3
    again = [float_product_triton.float_matmul(given, weight) for _ in range(300)]
    assert all(torch.equal(one, first) for one in again)


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
    plain = inference.round_rows(inputs, Rounding(8)).values().double() @ exact.T
    gate, up = (
        inference.add_rms_norm(inputs, None, *norm, Rounding(8)).values().double() @ exact.T
    ).chunk(2, -1)
    assert relative(inference.row_matmul(inputs, weight, bits=8), plain) < 6e-3
    assert (
        relative(
            inference.row_matmul(inputs, weight, norm, gated=True, bits=8),
            gate / (1 + (-gate).exp()) * up,
        )
        < 2e-2
    )


@pytest.mark.parametrize("out", [192, 8320])
@pytest.mark.parametrize("rows", [1, 8, 33, 64, 65, 200, 300])
def test_integer_matmul(generator, rows, out):
    codes = torch.randint(-128, 128, (out, 1152), generator=generator).to(torch.int8)
    weight = forms.pack(codes, torch.rand(out, 1, generator=generator).bfloat16(), None, 8)
    rounded = inference.round_rows(
        torch.randn(rows, 1152, generator=generator).bfloat16().cuda(), Rounding(8)
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
    monkeypatch.setattr(gpu, "properties", lambda: gpu.Properties((7, 5), 64 << 10))
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
    rounded = inference.round_rows(inputs, Rounding(8))
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
    assert torch.equal(inference.round_rows(inputs, Rounding(8)).values(), expected)
    gain = torch.ones(576, device=CUDA, dtype=torch.bfloat16)
    normed = inference.add_rms_norm(inputs, None, gain, 1e-5)
    rounded = inference.add_rms_norm(inputs, None, gain, 1e-5, Rounding(8))
    assert torch.equal(rounded.values(), grid.round_per_token(normed, 8))
    both = torch.randn(40, 1152, generator=generator).bfloat16().cuda()
    gated = inference.silu_mul(*both.chunk(2, -1))
    assert torch.equal(
        inference.silu_mul(*both.chunk(2, -1), Rounding(8)).values(), grid.round_per_token(gated, 8)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_heads_of_a_wider_tensor(generator, dtype, normed):
    whole = torch.randn(3, 50, 14, 64, generator=generator).to(dtype)
    angle = torch.randn(1, 50, 32, generator=generator).repeat(1, 1, 2)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    gains = torch.rand(2, 64, generator=generator).to(dtype)
    exact, found = whole.double(), whole.cuda()
    for heads, place in ((exact, "cpu"), (found, "cuda")):
        table = [one.to(place).to(heads.dtype) for one in tables]
        norms = (*gains.to(place).to(heads.dtype), 1e-6) if normed else None
        inference.rotate_heads(heads[:, :, :11], *table, norms, 8 if normed else 0)
    assert relative(found, exact) < {torch.float32: 1e-5, torch.bfloat16: 0.01}.get(dtype, 1e-3)
    assert torch.equal(found[:, :, 11:].cpu(), whole[:, :, 11:])


@pytest.mark.parametrize("form", [Grid(4, 64), Grid(4, 128, True), Grid(8, None)], ids=str)
def test_rounding_kernels(generator, form):
    """The same ranges, codes and learned roundings as on the CPU, but for ties."""
    inputs = torch.randn(4000, 256, generator=generator) * torch.rand(256, generator=generator)
    gram, weight = inputs.T @ inputs / 4000, torch.randn(300, 256, generator=generator)
    scale, zero = search_range(weight, form, gram.diagonal())
    on_card = search_range(weight.cuda(), form, gram.cuda().diagonal())
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


@pytest.mark.parametrize("form", [Grid(4, 64), Grid(4, 128, True), Grid(3, 32)], ids=str)
def test_ranges_by_the_output_error(generator, form):
    inputs = torch.randn(4000, 256, generator=generator) * torch.rand(256, generator=generator)
    gram, weight = inputs.T @ inputs / 4000, torch.randn(300, 256, generator=generator)
    losses = []
    for device in ("cpu", "cuda"):
        found = choose_ranges(weight.to(device), gram.to(device), form, torch.bfloat16)
        codes = grid.QuantizedLinear.nearest(weight.to(device), *found, form)
        error = codes.dequantize().cpu() - weight
        losses.append(((error @ gram) * error).sum(1))
    assert relative(losses[1], losses[0]) < 0.01
    assert abs(losses[1].sum() / losses[0].sum() - 1) < 0.003


@pytest.mark.parametrize("norm", [0.7, 4.0, 8.0])
@pytest.mark.parametrize("form", [Grid(4, 64), Grid(3, 48, True), Grid(8, None)], ids=str)
def test_half_quadratic(generator, form, norm):
    """As on the CPU, but where two codes are equally near."""
    weight = torch.randn(300, 768, generator=generator).pow(3)
    start = search_range(weight, form, norm=norm)
    rest = form, norm, 4, torch.bfloat16
    expected = half_quadratic(grid.grouped(weight, form), *start, *rest)
    on_card = (tensor.cuda() for tensor in start)
    found = half_quadratic(grid.grouped(weight.cuda(), form), *on_card, *rest)
    losses = [
        grid.rounding_error(grid.grouped(weight, form), scale.cpu(), zero.cpu(), form)
        .abs()
        .pow(norm)
        for scale, zero in (found, expected)
    ]
    assert relative(losses[0].sum(-1), losses[1].sum(-1)) < 0.02
    assert (found[0].cpu() == expected[0]).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_channel_sums(generator, dtype):
    rows = torch.randn(3000, 1100, generator=generator).to(dtype)
    weights = torch.rand(3000, generator=generator)
    exact = rows.double()
    expected = weights.double() @ exact.square(), exact.abs().amax(0), exact.abs().sum(0)
    for found, wanted in zip(channel_sums(rows.cuda(), weights.cuda()), expected, strict=True):
        assert relative(found, wanted) < 1e-5

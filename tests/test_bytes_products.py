"""Products on bytes and the integers of 16 bits that they take, in Triton's interpreter and in
plain torch, against float64.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from kernel_checks import close, crossed, packed_weights, skip_without_the_interpreter

skip_without_the_interpreter()

from common.kernels import (
    bytes_product_triton,
    forms,
    inference,
    products_triton,
    splits_triton,
)
from common.kernels import inference_triton as kernels


@pytest.mark.parametrize(
    ("bits", "channels", "groups", "asymmetric"),
    crossed([(4, 576, 9), (4, 1024, 1), (4, 512, 8), (8, 192, 3), (8, 1024, 1)], (True, False)),
)
def test_products_on_bytes(generator, monkeypatch, bits, channels, groups, asymmetric):
    """In one and in several programs for the same outputs and for several rows."""
    packed, weight = packed_weights(generator, 70, channels, groups, bits, asymmetric)
    for rows, programs in ((2, 1), (9, 264), (35, 6)):
        monkeypatch.setattr(bytes_product_triton, "PROGRAMS", programs)
        inputs = torch.randn(rows, channels, generator=generator)
        given = inference.round_rows(inputs, forms.Rounding(16, packed.block))
        close(inference.packed_matmul(given, packed), inputs.double() @ weight.T, 1e-4)
        expected = given.values().double() @ weight.T
        for _ in range(2):  # a second time: counters are back at zero
            close(products_triton.packed_matmul(given, packed), expected, 1e-6)


@pytest.mark.parametrize(("size", "block"), [(192, 64), (128, 128), (1152, 128)])
def test_two_bytes(generator, size, block):
    """Every number within half a step of its block, also beside one that is a thousand times as
    large; zeros stay zeros.
    """
    inputs = torch.randn(3, size, generator=generator)
    inputs[1, ::100] *= 1000
    inputs[2, :block] = 0
    largest = inputs.double().unflatten(1, (-1, block)).abs().amax(2)
    rounding = forms.Rounding(16, block)
    for module in (inference, kernels):
        found = module.round_rows(inputs, rounding)
        error = (found.values().double() - inputs).unflatten(1, (-1, block)).abs()
        assert (error <= 1.01 * largest.unsqueeze(2) / 65024).all() and error.any()
        assert not found.values()[2, :block].any()
        sums = found.values().double().unflatten(1, (-1, block)).sum(2)
        assert torch.allclose(found.sums.double(), sums, rtol=1e-4, atol=1e-5 * largest.max())
    gain = torch.rand(size, generator=generator)
    for module in (inference, kernels):
        normed = module.add_rms_norm(inputs.clone(), None, gain, 1e-5)
        halves = module.add_rms_norm(inputs.clone(), None, gain, 1e-5, rounding)
        close(halves.values(), normed, 1e-4)
        gated = module.silu_mul(inputs, inputs.flip(0))
        close(module.silu_mul(inputs, inputs.flip(0), rounding).values(), gated, 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is not finite
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(generator, bits, value):
    """In its row alone; also after a norm, where a row's other numbers become so, too."""
    packed, weight = packed_weights(generator, 70, 256, 2, bits, True)
    inputs = torch.randn(3, 256, generator=generator).half()
    inputs[1, 200] = value
    rounding, gain = forms.Rounding(16, 128), torch.ones(256, dtype=torch.float16)
    for module in (inference, kernels):
        for halves in (
            module.round_rows(inputs, rounding),
            module.add_rms_norm(inputs.clone(), None, gain, 1e-5, rounding),
        ):
            for product in (inference, products_triton):
                found = product.packed_matmul(halves, packed)
                assert torch.isfinite(found[[0, 2]]).all() and not torch.isfinite(found[1]).any()


@pytest.mark.parametrize("rows", [2, 32, 33, 128])
@pytest.mark.parametrize("out", [32, 320, 4096, 4224, 16384])
def test_partial_sums_are_no_more_than_is_counted(monkeypatch, rows, out):
    taken, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **how: taken.append(size) or empty(*size, **how)
    )
    monkeypatch.setattr(splits_triton, "counters", lambda *_: None)
    launch = mock.MagicMock()
    monkeypatch.setattr(bytes_product_triton, "_bytes_matmul", launch)
    bits = 4 if rows <= 64 else 8
    packed, scale = empty(out, 1024 * bits, device="meta"), empty(out, 64, device="meta")
    codes = empty(rows, 2, 8192, device="meta", dtype=torch.int8)
    units, weight = empty(rows, 64, device="meta"), forms.PackedWeight(packed, scale, None, bits)
    inputs = forms.TwoBytes(codes, units, units, torch.bfloat16)
    bytes_product_triton.bytes_matmul(inputs, weight)
    partial = [math.prod(size) for size in taken if len(size) == 3]
    assert sum(partial) <= rows * inference.PARTIAL_SUMS
    needed = 4 * rows * inference.PARTIAL_SUMS + codes.nbytes + 2 * units.nbytes
    assert inference.product_bytes(rows, weight, 2) == needed
    _, splits, _ = launch.__getitem__.call_args.args[0]
    assert bool(partial) == (splits > 1)

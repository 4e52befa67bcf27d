"""Triton's products with packed weights, in its interpreter, against float64, and what they take of
memory. Those on bytes are in test_bytes_products.
"""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from kernel_checks import close, crossed, packed_weights, skip_without_the_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode

skip_without_the_interpreter()

from common.base import gpu
from common.kernels import (
    dispatch,
    float_product_triton,
    forms,
    inference,
    integer_product_triton,
    products_triton,
    splits_triton,
)
from common.running.packed import PackedLinear


@pytest.mark.parametrize(
    ("bits", "channels", "groups", "asymmetric"),
    crossed(
        [(4, 576, 9), (4, 1024, 1), (4, 96, 6), (8, 192, 3), (8, 64, 1), (8, 63, 1), (8, 65, 5)],
        (True, False),
    ),
)
def test_packed_matmul(generator, bits, channels, groups, asymmetric):
    packed, weight = packed_weights(generator, 21, channels, groups, bits, asymmetric)
    assert packed.shape == weight.shape and packed.packed.nbytes == weight.numel() * bits // 8
    assert torch.equal(inference.unpack(packed, torch.float64), weight)
    assert torch.equal(products_triton.unpack(packed, torch.float32), weight.float())
    some = torch.tensor([3, 20, 3])
    assert torch.equal(inference.unpack(packed[some], torch.float64), weight[some])
    for rows in (1, 3, 17):
        inputs = torch.randn(rows, channels, generator=generator)
        expected = inputs.double() @ weight.T
        close(inference.packed_matmul(inputs, packed), expected, 1e-6)
        if packed.block >= 32:
            close(products_triton.packed_matmul(inputs, packed), expected, 1e-6)
            half = inputs.half()
            close(products_triton.packed_matmul(half, packed), half.double() @ weight.T, 1e-3)


@pytest.mark.parametrize("rows", [3, 64, 65, 200, 256])
@pytest.mark.parametrize("out", [32, 64, 320, 4096, 4224, 16384])
def test_partial_sums_are_no_more_than_is_counted(monkeypatch, rows, out):
    taken, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **how: taken.append(size) or empty(*size, device="meta")
    )
    monkeypatch.setattr(splits_triton, "counters", lambda *_: None)
    launched = [mock.MagicMock(), mock.MagicMock()]
    monkeypatch.setattr(float_product_triton, "_float_matmul", launched[0])
    monkeypatch.setattr(integer_product_triton, "_integer_matmul", launched[1])
    for group in (32, 128):
        scale = empty(out, 8192 // group, device="meta")
        weight = forms.PackedWeight(empty(out, 4096, device="meta"), scale, None, 4)
        products_triton.packed_matmul(empty(rows, 8192, device="meta"), weight)
    rounded = forms.Rounded(empty(rows, 8192, device="meta"), empty(rows, 1, device="meta"))
    whole = forms.PackedWeight(empty(out, 8192, device="meta"), empty(out, 1), None, 8)
    products_triton.integer_matmul(rounded, whole)
    partial = [math.prod(size) for size in taken if len(size) == 3]
    assert all(one <= rows * inference.PARTIAL_SUMS for one in partial)
    for launch in launched:
        *_, splits, row_tiles = launch.__getitem__.call_args.args[0]
        assert row_tiles >= rows / 256
        assert partial or splits == 1


@pytest.mark.parametrize(
    ("rows", "out", "group", "dtype"),
    [
        *[(rows, 70, 64, torch.float32) for rows in (2, 70, 130, 256)],
        *[(rows, 70, 32, torch.float16) for rows in (3, 130)],
        (130, 4100, 64, torch.float16),
        (9, 4100, 32, torch.float16),
    ],
)
def test_float_matmul(generator, rows, out, group, dtype):
    """Of inputs that take one channel each, so that the product is the weights themselves; they are
    rounded once, as those that are unpacked.
    """
    packed, weight = packed_weights(generator, out, 128, 128 // group, 4, True)
    inputs = torch.zeros(rows, 128, dtype=dtype)
    taken = torch.randint(128, (rows,), generator=generator)
    inputs[torch.arange(rows), taken] = 1
    found = products_triton.packed_matmul(inputs, packed)
    assert torch.equal(found, weight.to(dtype).T[taken])


@pytest.mark.parametrize("most", [1, 128 * 64 + 63, 1 << 26])
def test_weights_are_unpacked_in_tiles(generator, monkeypatch, most):
    """Of 300 rows: 128 each, or all at once."""
    monkeypatch.setattr(inference, "UNPACKED_ELEMENTS", most)
    packed, weight = packed_weights(generator, 300, 64, 2, 4, True)
    sizes, original = [], inference.unpack
    monkeypatch.setattr(
        inference,
        "unpack",
        lambda part, dtype: sizes.append(part.shape[0]) or original(part, dtype),
    )
    inputs = torch.randn(2, 70, 64, generator=generator)
    close(inference.packed_matmul(inputs, packed), inputs.double() @ weight.T, 1e-6)
    assert sizes == ([300] if most == 1 << 26 else [128, 128, 44])


@pytest.mark.parametrize("channels", [576, 1024, 48])
def test_integer_matmul(generator, channels):
    packed, weight = packed_weights(generator, 70, channels, 1, 8, False)
    for rows in (1, 17, 130):
        rounded = inference.round_rows(
            torch.randn(rows, channels, generator=generator), forms.Rounding(8)
        )
        expected = rounded.codes.double() * rounded.scale.double() @ weight.T
        close(inference.integer_matmul(rounded, packed), expected, 1e-6)
        if channels % 32 == 0:
            close(products_triton.integer_matmul(rounded, packed), expected, 1e-6)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (4, torch.float16), (8, None)])
def test_inputs_of_any_strides(generator, monkeypatch, kernels, bits, dtype):
    """Rows that lie apart, and numbers of a row that do; and no rows at all."""
    for module in (dispatch, inference):
        monkeypatch.setattr(module, "use_triton", lambda tensor: kernels)
    packed, weight = packed_weights(generator, 70, 128, 1 if dtype is None else 2, bits, False)
    linear = PackedLinear(packed, None, 8 if dtype is None else None)
    wide = torch.randn(5, 3, 256, generator=generator).to(dtype or torch.float32)
    columns = torch.randn(128, 6, generator=generator).to(wide.dtype)
    for inputs in (wide[:, -1, :128], wide[..., :128], wide[:, 0, ::2], columns.T):
        found = linear(inputs)
        assert torch.equal(found, linear(inputs.contiguous()))
        assert found.shape == (*inputs.shape[:-1], 70)
        close(found, inputs.double() @ weight.T, 1e-3 if dtype else 0.02)
    assert linear(wide[:0, 0, :128]).shape == (0, 70)
    assert linear(wide[0, :0, :128].unsqueeze(0)).shape == (1, 0, 70)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "rows"), [(16, 1), (16, 64), (16, 300), (128, 1), (128, 300)])
def test_memory_of_a_product(monkeypatch, bits, group, rows):
    """What is unpacked, as on a GPU, is what is counted."""
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    monkeypatch.setattr(gpu, "properties", lambda: gpu.Properties((9, 0), 227 << 10))
    unpacked = [0]

    def unpack(weight, dtype):
        unpacked.append(2 * math.prod(weight.shape))
        return torch.empty(weight.shape, device="cuda", dtype=dtype)

    def product(inputs, weight):
        return torch.empty(len(inputs), len(weight.packed), device="cuda")

    monkeypatch.setattr(products_triton, "unpack", unpack)
    monkeypatch.setattr(products_triton, "packed_matmul", product)
    with FakeTensorMode():
        codes = torch.empty(8192, 4096 * bits // 8, device="cuda", dtype=torch.uint8)
        scale = torch.empty(8192, 4096 // group, device="cuda", dtype=torch.bfloat16)
        weight = forms.PackedWeight(codes, scale, None, bits)
        inputs = torch.empty(rows, 4096, device="cuda", dtype=torch.bfloat16)
        inference.packed_matmul(inputs, weight)
    assert inference.product_bytes(rows, weight, 2) == max(unpacked)
    sums = 4 * rows * inference.PARTIAL_SUMS if rows > 1 else 0
    assert inference.product_bytes(rows, weight, 2, integers=True) == sums + rows * 4096

"""Triton kernels, in Triton's interpreter, against their twins in plain torch; the twins against
float64.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from kernel_checks import close, crossed, packed_weights, skip_without_the_interpreter

skip_without_the_interpreter()

from common.kernels import (
    attention_triton,
    forms,
    inference,
    products_triton,
    row_product_triton,
)
from common.kernels import inference_triton as kernels
from common.numerics import grid


@pytest.mark.parametrize(
    ("bits", "channels", "groups", "members"),
    crossed([(4, 576, 9), (4, 1024, 1), (4, 192, 6), (8, 576, 1), (8, 512, 4)], (32, 4)),
)
def test_row_matmul(generator, monkeypatch, bits, channels, groups, members):
    """With a norm before it, a gate or a sum after it: kernel and twin against float64."""
    monkeypatch.setattr(row_product_triton, "_members", lambda weight: members)
    # Several programs, the last of which is not full.
    out = 38 if members == 32 else 14
    packed, weight = packed_weights(generator, out, channels, groups, bits, groups > 1)
    inputs, gain = (
        torch.randn(1, channels, generator=generator),
        torch.rand(channels, generator=generator),
    )
    hidden = torch.randn(1, out, generator=generator)
    exact = inputs.double()
    normed = exact / (exact.square().mean() + 1e-5).sqrt() * gain
    gate, up = (normed @ weight.T).chunk(2, -1)
    for module, bound in ((inference, 1e-6), (products_triton, 1e-4)):
        close(module.row_matmul(inputs, packed, None, False, None, None), exact @ weight.T, bound)
        close(
            module.row_matmul(inputs, packed, (gain, 1e-5), False, None, None),
            normed @ weight.T,
            bound,
        )
        close(
            module.row_matmul(inputs, packed, (gain, 1e-5), True, None, None),
            gate / (1 + (-gate).exp()) * up,
            10 * bound,
        )
        target = hidden.clone()
        assert (
            module.row_matmul(inputs, packed, None, False, target, None).data_ptr()
            == target.data_ptr()
        )
        close(target, hidden.double() + exact @ weight.T, bound)


@pytest.mark.parametrize(("channels", "input_bits"), [(576, 8), (1024, 8), (576, 4)])
def test_row_matmul_with_rounded_inputs(generator, channels, input_bits):
    packed, weight = packed_weights(generator, 38, channels, 1, 8, False)
    inputs, gain = (
        torch.randn(1, channels, generator=generator),
        torch.rand(channels, generator=generator),
    )
    expected = grid.round_per_token(inputs, input_bits).double() @ weight.T
    normed = inputs.double() / (inputs.double().square().mean() + 1e-5).sqrt() * gain
    # A value at a tie may go either way after the norm.
    gate, up = (grid.round_per_token(normed, input_bits) @ weight.T).chunk(2, -1)
    for module in (inference, products_triton):
        close(module.row_matmul(inputs, packed, None, False, None, input_bits), expected, 1e-6)
        close(
            module.row_matmul(inputs, packed, (gain, 1e-5), True, None, input_bits),
            gate / (1 + (-gate).exp()) * up,
            1e-2,
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_row_matmul_rounds_inputs_to_16_bits(generator, bits):
    """Every input within half a step of its block, also beside one that is a thousand times as
    large; and zeros stay zeros.
    """
    packed, weight = packed_weights(generator, 12, 576, 9, bits, True)
    inputs = torch.randn(1, 576, generator=generator)
    inputs[0, ::100] *= 1000
    inputs[0, 64:128] = 0
    half_step = inputs.double().view(9, 64).abs().amax(1) / 65024
    bound = (weight.abs().view(12, 9, 64).sum(2) * half_step).sum(1)
    exact = inputs.double() @ weight.T
    error = (
        products_triton.row_matmul(inputs, packed, None, False, None, None).double() - exact
    ).abs()
    assert (error <= bound + 1e-5 * exact.abs()).all() and error.any()
    assert not products_triton.row_matmul(
        torch.zeros(1, 576), packed, None, False, None, None
    ).any()


def test_round_rows_of_every_size(generator):
    """In float16 also where twice the largest value is infinite."""
    inputs = (
        (torch.rand(40, 96, generator=generator) * 2 - 1) * torch.logspace(-6, 4.8, 40)[:, None]
    ).half()
    expected = inference.round_rows(inputs, forms.Rounding(8))
    found = kernels.round_rows(inputs, forms.Rounding(8))
    assert torch.isfinite(expected.values()).all()
    assert torch.equal(found.scale, expected.scale) and torch.equal(found.codes, expected.codes)


def test_add_rms_norm(generator):
    hidden, update = (
        torch.randn(3, 100, generator=generator),
        torch.randn(3, 100, generator=generator),
    )
    gain = torch.rand(100, generator=generator)
    for added in (None, update):
        first, second = hidden.clone(), hidden.clone()
        expected = inference.add_rms_norm(first, added, gain, 1e-5)
        close(kernels.add_rms_norm(second, added, gain, 1e-5), expected, 1e-6)
        assert torch.equal(first, second)
        exact = (hidden if added is None else hidden + added).double()
        close(expected, exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain, 1e-6)
        for module in (inference, kernels):
            rounded = module.add_rms_norm(hidden.clone(), added, gain, 1e-5, forms.Rounding(8))
            close(rounded.values(), grid.round_per_token(expected, 8), 1e-3)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("length", [100, 1100])
def test_attend(generator, length, normed):
    heads, key_heads, size, rows = 6, 2, 16, 4
    projected = torch.randn(rows, (heads + 2 * key_heads) * size, generator=generator)
    angle = torch.randn(length, size // 2, generator=generator).repeat(1, 2)
    positions = torch.tensor([0, 70, length // 2, length - 1])
    cached = torch.randn(2, rows, key_heads, length, size, generator=generator)
    gains = torch.rand(2, size, generator=generator) + 0.5
    expected = torch.empty(rows, heads, size, dtype=torch.float64)
    after = cached.double()
    for row, position in enumerate(positions.tolist()):
        vectors = projected[row].double().view(-1, size)
        turned = []
        for head, vector in enumerate(vectors[: heads + key_heads]):
            if normed:
                vector = vector / (vector.square().mean() + 1e-6).sqrt() * gains[int(head >= heads)]
            # As complex numbers: channel c is the real part, c + size / 2 the imaginary one.
            number = torch.complex(vector[: size // 2], vector[size // 2 :]) * torch.exp(
                1j * angle[position, : size // 2].double()
            )
            turned.append(torch.cat([number.real, number.imag]))
        after[0, row, :, position] = torch.stack(turned[heads:])
        after[1, row, :, position] = vectors[heads + key_heads :]
        for head in range(heads):
            key, value = after[:, row, head // (heads // key_heads), : position + 1]
            expected[row, head] = torch.softmax(0.3 * key @ turned[head], 0) @ value
    for function in (inference.attend, attention_triton.attend):
        keys, values = cached.clone()
        rotary = inference.Rotary(
            angle.cos(), angle.sin(), (gains[0], gains[1], 1e-6) if normed else None
        )
        for _ in range(2):  # a second time: counters are back at zero
            close(
                function(projected, rotary, positions, keys, values, 0.3), expected.flatten(1), 1e-5
            )
        close(keys, after[0], 1e-6)
        assert torch.equal(values.double(), after[1])
    for function in (inference.attend, attention_triton.attend):
        given = projected, rotary, positions, keys, values, 0.3
        halves = function(*given, forms.Rounding(16, 16))
        close(halves.values(), expected.flatten(1), 1e-4)
    # Not in blocks that have heads of several keys.
    whole = attention_triton.attend(*given, forms.Rounding(16, 32))
    close(whole, expected.flatten(1), 1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_heads(generator, batch, normed):
    """Against complex numbers: channel c is the real part, c + size / 2 the imaginary one. The
    heads are the first of a wider tensor, whose others stay as they are.
    """
    whole = torch.randn(2, 5, 4, 16, generator=generator)
    angle = torch.randn(batch, 5, 8, generator=generator)
    gains = torch.randn(2, 16, generator=generator)
    expected = whole.double()
    if normed:
        gain = gains[torch.tensor([0, 0, 1])].double()
        root = (expected[..., :3, :].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected[..., :3, :] *= gain / root
    numbers = torch.complex(expected[..., :3, :8], expected[..., :3, 8:])
    numbers = numbers * torch.exp(1j * angle.double()).unsqueeze(2)
    expected[..., :3, :] = torch.cat([numbers.real, numbers.imag], -1)
    tables = angle.repeat(1, 1, 2).cos(), angle.repeat(1, 1, 2).sin()
    norms = ((gains[0], gains[1], 1e-6), 2) if normed else ()
    for module in (inference, attention_triton):
        heads, wide = whole[:, :, :3].contiguous(), whole.clone()
        module.rotate_heads(heads, *tables, *norms)
        close(heads, expected[:, :, :3], 1e-6)
        module.rotate_heads(wide[:, :, :3], *tables, *norms)
        close(wide, expected, 1e-6)


def test_silu_mul(generator):
    both = torch.randn(3, 2 * 100, generator=generator)
    gate, up = both.chunk(2, -1)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up
    for module in (inference, kernels):
        close(module.silu_mul(gate, up), expected, 1e-6)
        close(
            module.silu_mul(gate.contiguous(), up, forms.Rounding(8)).values(),
            grid.round_per_token(expected.float(), 8),
            1e-3,
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN
def test_largest_index(generator):
    for size in (5000, 4096):  # the second in whole parts
        values = torch.randn(7, size, generator=generator).bfloat16()
        values[1] = values[1, 0]
        values[2, size - 1] = values[2, 10] = 9.0
        values[3], values[4], values[5, 7], values[6, 2500] = (
            math.nan,
            -math.inf,
            math.inf,
            math.nan,
        )
        for function in (inference.largest_index, kernels.largest_index):
            expected = [values[0].float().argmax().item(), 0, 10, -1, -1, -1, -1]
            assert function(values).tolist() == expected


def test_round_rows(generator):
    inputs = torch.randn(4, 100, generator=generator)
    inputs[1] = 0
    for module in (inference, kernels):
        rounded = module.round_rows(inputs, forms.Rounding(8))
        assert rounded.codes.dtype == torch.int8
        assert torch.equal(rounded.values(), grid.round_per_token(inputs, 8))
    # The interpreter cuts where a GPU rounds to bfloat16.
    half = inputs.bfloat16()
    close(kernels.round_rows(half, forms.Rounding(8)).values(), grid.round_per_token(half, 8), 0.02)


LOOP = """
scf.for %i = %a to %b step %c iter_args(%t = %z) -> (tensor<64x128xf32, #mma>)  : i32 {{
  %1 = ttng.warp_group_dot %w, %v, %t {{isAsync = true}} : {left} * !ttg.memdesc<32x128xbf16> -> f32
  {wait}
  scf.yield %1 : tensor<64x128xf32, #mma>
}}
"""
REGISTERS, SHARED = "tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0}>>", "!ttg.memdesc<64x32xbf16>"
WAIT = "%2:2 = ttng.warp_group_dot_wait %1, %v {pendings = "


@pytest.mark.parametrize(
    "left, wait, runs",
    [
        (REGISTERS, "", True),
        (REGISTERS, WAIT + "1 : i32}", True),
        (REGISTERS, WAIT + "0 : i32}", False),
        (SHARED, "", False),
    ],
)
def test_products_that_a_loop_leaves_running_are_found(left, wait, runs):
    """As Triton 3.6 and 3.9 write a Hopper's: what is not awaited still reads registers."""
    from compile_kernels import leaves_product_running

    assert leaves_product_running(LOOP.format(left=left, wait=wait)) is runs


@pytest.mark.parametrize(
    "which", ["", pytest.param("--all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_every_kernel_compiles(tmp_path, which):
    """For all GPUs from compute capability 7.5 to 12.0, on a machine without one, and none needs
    more shared memory than the GPU has: the interpreter takes things that the compiler refuses.
    What Triton has compiled it keeps, by the kernel's source, from one quick run to the next.
    """
    kept = tmp_path if which else Path(sys.prefix) / "compiled_kernels"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "compile_kernels.py", *which.split()]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=3600 if which else 800,
        env={**environment, "TRITON_CACHE_DIR": str(kept)},
    )
    assert result.returncode == 0, result.stdout + result.stderr

"""How far apart two tensors are, packed weights, and where Triton's interpreter runs kernels."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from conftest import sampled

from common.kernels import forms


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (
        (found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()
    ).item()


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    difference = relative(found, expected)
    assert difference < bound, difference


def packed_weights(generator, out: int, channels: int, groups: int, bits: int, asymmetric: bool):
    """Packed weights, and the weights themselves in float64."""
    half = 1 << bits - 1
    codes = torch.randint(-half, half, (out, channels), generator=generator).to(torch.int8)
    scale = (torch.rand(out, groups, generator=generator) + 0.5).to(torch.bfloat16)
    zero = (
        torch.randint(-half, half, (out, groups), generator=generator).to(torch.int8)
        if asymmetric
        else None
    )
    exact = codes.double().unflatten(1, (groups, -1)) - (
        0 if zero is None else zero.double().unsqueeze(2)
    )
    return forms.pack(codes, scale, zero, bits), (exact * scale.double().unsqueeze(2)).flatten(1)


def crossed(shapes: list[tuple], others: tuple) -> list:
    """Each of `shapes` with each of two others, of which the quick run takes one."""
    cases = [(*form, other) for form in shapes for other in others]
    quick = {(*form, others[place % 2]) for place, form in enumerate(shapes)}
    return sampled(cases, lambda *case: case in quick)


def skip_without_the_interpreter() -> None:
    """Skips the test file that calls it, before it imports kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "there is a card: test_cuda_kernels.py runs the kernels themselves",
            allow_module_level=True,
        )
    pytest.importorskip(
        "triton", reason="triton is not installed: its kernels are tested where it is"
    )
    quicken_the_interpreter()


def quicken_the_interpreter() -> None:
    """It takes half of the time when it leaves out what has no effect: sums for a check of
    overflows that it makes only with its option `debug`, and putting its operations in place of
    the language's for every call of a function by a kernel, where they are in place.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    in_place = set()

    def call(self, *arguments, **options):
        if self.fn.__module__ not in in_place:
            in_place.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call

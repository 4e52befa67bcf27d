"""How far apart two tensors are, and where Triton's interpreter runs the kernels."""

from __future__ import annotations

import os

import pytest
import torch


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (
        (found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm().cpu()
    ).item()


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    difference = relative(found, expected)
    assert difference < bound, difference


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

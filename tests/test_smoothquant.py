"""The smoothing scale of the least expected error, of rounding inputs and weights."""

from functools import partial

import pytest
import torch
from torch import Tensor

from common.numerics.grid import round_per_token
from common.walk.scaling import centred, largest_weight, power_ratio
from quantize_smoothquant import ACTIVATION_BITS, ALPHA, least_error_scale

TOKENS, ROWS, CHANNELS = 200, 96, 24


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [rows, in], inputs [tokens, in] of which a few channels and a few values are large,
    and the scale that equation 4 gives for them.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TOKENS, CHANNELS, generator=generator) ** 3
    weight = torch.randn(ROWS, CHANNELS, generator=generator)
    inputs *= (1.5 * torch.randn(CHANNELS, generator=generator)).exp()
    inputs[0, 3] *= 500
    return weight, inputs, power_ratio(inputs.abs().amax(0), largest_weight([weight]), ALPHA)


def expected_error(weight: Tensor, inputs: Tensor, scale: Tensor) -> float:
    """The docstring's sum, in float64 and token by token."""
    inputs, weight = inputs.double() / scale.double(), weight.double() * scale.double()
    of_inputs = sum(max(abs(x) for x in row) ** 2 for row in inputs.tolist()) / len(inputs)
    of_weights = sum(max(abs(w) for w in row) ** 2 for row in weight.tolist())
    energy = inputs.norm().item() ** 2 / len(inputs)
    return of_inputs * weight.norm().item() ** 2 + of_weights * energy


def by_two(values: Tensor) -> Tensor:
    """Values made equal in pairs of neighbours."""
    return values.view(-1, 2).mean(1).repeat_interleave(2)


@pytest.mark.parametrize("share", [None, by_two], ids=["free", "shared"])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_scale_has_a_smaller_expected_error(seed, share):
    weight, inputs, start = problem(seed)
    start = share(start) if share else start
    shared = {"share": share} if share else {}
    found = least_error_scale(weight, inputs, start, **shared)
    least = expected_error(weight, inputs, found)
    assert least < 0.9 * expected_error(weight, inputs, start)
    if share:
        torch.testing.assert_close(share(found), found)
    generator = torch.Generator().manual_seed(seed)
    others = [0.05 * torch.randn(CHANNELS, generator=generator) for _ in range(40)]
    others += [size * row for size in (-0.3, 0.1, 0.5) for row in torch.eye(CHANNELS)]
    for change in others:
        moved = found * (share(change) if share else change).exp()
        # A search of few steps: within half a percent.
        assert expected_error(weight, inputs, moved) > 0.995 * least
    # And wherever it begins.
    again = least_error_scale(weight, inputs, torch.ones(CHANNELS), **shared)
    assert expected_error(weight, inputs, again) < 1.01 * least


@pytest.mark.parametrize("seed", range(3))
def test_rounding_at_that_scale_changes_outputs_less_than_at_that_of_equation_4(seed):
    weight, inputs, start = problem(seed)

    def error(scale: Tensor) -> float:
        rounded = partial(round_per_token, bits=ACTIVATION_BITS)  # weights too: by row
        outputs = rounded(inputs / scale).double() @ rounded(weight * scale).double().T
        return (outputs - inputs.double() @ weight.double().T).square().sum().item()

    assert error(least_error_scale(weight, inputs, start)) < 0.9 * error(start)


def test_the_same_function_gets_the_same_scale():
    weight, inputs, start = problem(5)
    factors = (0.7 * torch.randn(CHANNELS, generator=torch.Generator().manual_seed(6))).exp()
    found = least_error_scale(weight, inputs, start)
    other = least_error_scale(weight / factors, inputs * factors, start * factors)
    torch.testing.assert_close(other, centred(found * factors), rtol=1e-3, atol=0)


def test_channels_of_zeros_and_many_rows():
    weight, inputs, start = problem(7)
    weight = weight.repeat(50, 1)
    inputs[:, 4], weight[:, 9] = 0, 0
    found = least_error_scale(weight, inputs, start)
    assert found.isfinite().all() and (found > 0).all()
    least = expected_error(weight, inputs, found)
    assert least < 0.9 * expected_error(weight, inputs, start)

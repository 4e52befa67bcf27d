"""The smoothing scale of the least expected error, of rounding inputs and weights."""

from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import quantize_smoothquant
from common.numerics.grid import round_per_token
from common.walk.scaling import centred, largest_weight, power_ratio
from quantize_smoothquant import ACTIVATION_BITS, ALPHA, ROWS, least_error_scale, smoothing_scale

TOKENS, CHANNELS = 200, 24


Group = namedtuple("Group", ["linears", "by_head", "heads"])


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [rows, in], inputs [tokens, in] of which a few channels and a few values are large,
    and the scale that equation 4 gives for them.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TOKENS, CHANNELS, generator=generator) ** 3
    weight = torch.randn(96, CHANNELS, generator=generator)
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
    shared = {"shared": share} if share else {}
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
def test_many_more_steps_gain_next_to_nothing(monkeypatch, seed):
    """From the worst beginning: no scale at all."""
    weight, inputs, start = problem(seed)
    few = least_error_scale(weight, inputs, torch.ones_like(start))
    monkeypatch.setattr(quantize_smoothquant, "STEPS", 64)
    many = least_error_scale(weight, inputs, torch.ones_like(start))
    assert expected_error(weight, inputs, few) < 1.001 * expected_error(weight, inputs, many)


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
    # Far below one: no floor is in the way.
    other = least_error_scale(1e-5 * weight / factors, 1e-4 * inputs * factors, start * factors)
    torch.testing.assert_close(other, centred(found * factors), rtol=1e-3, atol=0)


def test_channels_that_are_next_to_nothing_get_scales_that_16_bits_hold():
    weight, inputs, start = problem(7)
    weight = weight.repeat(50, 1)
    inputs[:, 4], weight[:, 9] = 0, 0
    inputs[:, 5] *= 1e-20  # behind a gate that is shut
    found = least_error_scale(weight, inputs, start)
    assert found.isfinite().all() and found.min() > 1e-4 and found.max() < 1e4
    least = expected_error(weight, inputs, found)
    assert least < 0.9 * expected_error(weight, inputs, start)


@pytest.mark.parametrize("nothing", ["weights", "inputs", "both"])
def test_where_nothing_is_rounded_the_scale_stays(nothing):
    """As behind linears that a model's maker has set to zero."""
    weight, inputs, start = problem(9)
    weight = weight * (nothing == "inputs")
    inputs = inputs * (nothing == "weights")
    torch.testing.assert_close(least_error_scale(weight, inputs, start), centred(start))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_of_any_size_and_type(dtype):
    weight, inputs, start = (values.to(dtype) for values in problem(10))
    found = least_error_scale(weight, inputs, start.float())
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    if dtype.itemsize < 4:
        torch.testing.assert_close(found, least_error_scale(*problem(10)), rtol=0.1, atol=0)
        return
    large = least_error_scale(1e15 * weight, 1e18 * inputs, start)
    torch.testing.assert_close(large, found, rtol=1e-4, atol=0)


def test_a_group_gets_the_scale_of_all_its_linears_and_of_its_heads(monkeypatch):
    """For no α; for one it gets equation 4."""
    generator = torch.Generator().manual_seed(8)
    weights = {
        name: size * torch.randn(ROWS, CHANNELS, generator=generator)
        for name, size in (("gate", 0.1), ("up", 3.0))
    }
    _, inputs, _ = problem(8)
    for by_head in (False, True):
        group = Group(tuple(weights), by_head, lambda size, _: (size // 4, 2, 2))
        layer = SimpleNamespace(
            statistics={group: SimpleNamespace(abs_max=inputs.abs().amax(0), sample=inputs)},
            weight=weights.__getitem__,
            config=None,
        )
        given = []

        def kept(*arguments, given=given):
            given.append(arguments)
            return least_error_scale(*arguments)

        monkeypatch.setattr(quantize_smoothquant, "least_error_scale", kept)
        rule = smoothing_scale(layer, group, ALPHA)
        assert not given
        found = smoothing_scale(layer, group, None)
        (rows, sample, start, _), whole = given[0], torch.cat(list(weights.values()))
        # Every second row of both.
        assert torch.equal(rows, torch.cat([weight[::2] for weight in weights.values()]))
        assert sample is inputs and torch.equal(start, rule)
        for scale in (rule, found):
            heads = scale.view(-1, 2, 2)
            assert torch.equal(heads[:, 0], heads[:, 1]) == by_head
        least = expected_error(whole[::64], inputs, found)
        assert least < 0.95 * expected_error(whole[::64], inputs, rule)

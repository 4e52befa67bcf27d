"""GPTQ's solver against the paper's algorithm, written independently in float64 with an explicit
inverse.
"""

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from layer_problems import problem

from common.base.errors import UserError
from common.kernels.rounding import search_range
from common.model.architecture import FAMILIES
from common.numerics.grid import Grid, dequantize, quantize
from common.solvers.rounding import (
    BLOCK,
    CATCH_UP_DAMPING,
    DAMPING,
    catch_up,
    damped,
    output_error,
    refine,
    solve,
)
from common.walk.collecting import token_weights
from common.walk.inputs import FIRST_TOKEN, SAMPLES, InputStatistics, InputSums, Needs


def gptq_by_the_paper(weight, gram, scale, zero_point, grid, damping):
    """Algorithm 1 of arXiv 2210.17323 without blocks, in numpy float64, channels in order of the
    Gram's diagonal.
    """
    w, hessian = weight.double().numpy().copy(), gram.double().numpy().copy()
    scale, zero_point = scale.double().numpy(), zero_point.double().numpy()
    n = w.shape[1]
    size = n // scale.shape[1]
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian = hessian[np.ix_(order, order)]
    hessian += np.eye(n) * damping * np.diag(hessian).mean()
    inverse = np.linalg.inv(hessian)
    upper = np.linalg.cholesky(inverse).T  # inverse = upperᵀ upper
    w = w[:, order]
    codes = np.zeros(w.shape, dtype=np.int64)
    for j in range(n):
        s, z = scale[:, order[j] // size], zero_point[:, order[j] // size]
        codes[:, j] = np.clip(np.round(w[:, j] / s) + z, grid.code_min, grid.code_max)
        error = (w[:, j] - (codes[:, j] - z) * s) / upper[j, j]
        w[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    back = np.empty_like(codes)
    back[:, order] = codes
    return back


@pytest.mark.parametrize(
    "grid", [Grid(4, 64), Grid(3, 32, True), Grid(8, None), Grid(2, 64)], ids=str
)
def test_same_codes_as_the_paper(grid, generator):
    weight, _, gram, scale, zero_point = problem(24, 2 * BLOCK + 64, grid, generator)
    codes, damping = solve(weight, gram, scale, zero_point, grid, damping=0.01)
    expected = gptq_by_the_paper(weight, gram, scale, zero_point, grid, damping)
    same = (codes.numpy() == expected).mean()
    # float32 against float64: a value on the edge between two codes may fall either way, and move
    # later ones.
    assert same > (0.995 if grid.bits < 8 else 0.97)
    assert np.abs(codes.numpy().astype(int) - expected).max() <= 2 ** max(0, grid.bits - 4) + 1
    losses = [
        output_error(dequantize(c, scale, zero_point, grid) - weight, gram).sum().item()
        for c in (codes, torch.from_numpy(expected))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(3, 64), Grid(2, 64), Grid(8, 64)], ids=str)
def test_loss_is_below_round_to_nearest(grid, generator):
    weight, _, gram, scale, zero_point = problem(32, 192, grid, generator)
    codes, _ = solve(weight, gram, scale, zero_point, grid)
    nearest = quantize(weight, scale, zero_point, grid)
    losses = [
        output_error(dequantize(c, scale, zero_point, grid) - weight, gram).sum().item()
        for c in (codes, nearest)
    ]
    assert losses[0] < 0.8 * losses[1]


def test_output_error_is_the_error_of_the_outputs(generator):
    grid = Grid(4, 64)
    weight, x, gram, scale, zero_point = problem(16, 64, grid, generator)
    difference = (
        dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid) - weight
    )
    direct = (x.double() @ difference.double().T).square().mean(0)
    assert torch.allclose(output_error(difference, gram).double(), direct, rtol=1e-4)


def test_dead_and_repeated_channels(generator):
    grid = Grid(4, 64)
    weight = torch.randn(8, 64, generator=generator)
    x = torch.randn(40, 64, generator=generator)  # fewer tokens than channels: rank deficient
    x[:, 5] = 0
    x[:, 7] = x[:, 6]
    gram = x.T @ x / len(x)
    scale, zero_point = search_range(weight, grid, gram.diagonal())
    codes, damping = solve(weight, gram, scale, zero_point, grid)
    assert torch.isfinite(dequantize(codes, scale, zero_point, grid)).all()
    assert damping >= DAMPING


def test_indefinite_gram_gets_more_damping_and_nan_is_named(generator):
    grid = Grid(4, 64)
    weight = torch.randn(8, 64, generator=generator)
    gram = torch.eye(64)
    gram[0, 1] = gram[1, 0] = 1.02  # not positive definite
    scale, zero_point = search_range(weight, grid)
    _, damping = solve(weight, gram, scale, zero_point, grid, damping=0.001)
    assert damping > 0.001
    gram[3, 3] = float("nan")
    with pytest.raises(UserError, match="layers.7.mlp"):
        solve(weight, gram, scale, zero_point, grid, name="model.layers.7.mlp.up_proj")


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 64, True), Grid(8, None)], ids=str)
def test_refinement_never_raises_the_loss(grid, generator):
    weight, _, gram, scale, zero_point = problem(16, 192, grid, generator)
    codes, damping = solve(weight, gram, scale, zero_point, grid)
    full = damped(gram, damping)

    def loss(codes, scale):
        return output_error(dequantize(codes, scale, zero_point, grid) - weight, full)

    refined, fitted = refine(
        weight, codes, scale, zero_point, gram, grid, torch.bfloat16, 2, damping
    )
    assert (loss(refined, fitted) <= loss(codes, scale) * (1 + 1e-4)).all()
    assert loss(refined, fitted).sum() < 0.998 * loss(codes, scale).sum()
    assert refined.min() >= grid.code_min and refined.max() <= grid.code_max


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_catching_up_is_damped_least_squares(share):
    """Against ridge regression of the lag on the inputs, by an augmented system in float64."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    lag = inputs @ torch.randn(24, 10, generator=generator) * 0.1 + 0.3 * torch.randn(
        300, 10, generator=generator
    )
    weight = torch.randn(10, 24, generator=generator)
    sums = InputSums(24, torch.device("cpu"))
    for part, behind in zip(inputs.split(100), lag.split(100), strict=True):
        sums.add(part, lag=behind)
    statistics = sums.finish()
    changed = catch_up(weight, statistics.gram, statistics.lag, share)
    x, y = inputs.double() / 300**0.5, lag.double() / 300**0.5
    ridge = (CATCH_UP_DAMPING * x.square().sum(0).mean()).sqrt() * torch.eye(
        24, dtype=torch.float64
    )
    expected = torch.linalg.lstsq(
        torch.cat([x, ridge]), torch.cat([y, torch.zeros(24, 10, dtype=torch.float64)])
    ).solution.T
    assert torch.allclose(changed.double() - weight, share * expected, atol=1e-4)
    left = (lag - inputs @ (changed - weight).T).square().sum()
    assert left < lag.square().sum()
    assert torch.equal(catch_up(weight, statistics.gram, statistics.lag, 0.0), weight)


def test_token_weights_count_in_the_lag_as_in_the_gram_matrix():
    generator = torch.Generator().manual_seed(12)
    inputs, lag = (
        torch.randn(2, 15, 8, generator=generator),
        torch.randn(2, 15, 6, generator=generator),
    )
    weights = torch.rand(2, 15, generator=generator) + 0.1
    sums = InputSums(8, torch.device("cpu"))
    sums.add(inputs, weights, lag)
    statistics = sums.finish()
    expected = (
        torch.einsum("bt,bth,bti->hi", weights.double(), lag.double(), inputs.double())
        / weights.sum()
    )
    assert torch.allclose(statistics.lag.double(), expected, atol=1e-5)


@pytest.mark.parametrize("architecture, tied", [("llama", False), ("granite", True)])
def test_catching_up_brings_the_model_nearer_to_the_original(
    tiny_models, calibration_text, tmp_path, architecture, tied
):
    """On the very windows of the calibration, three bits: hidden states after the last layer, and
    the untouched linears.
    """
    from common.model.source import load_tokenizer
    from common.running.runtime import load_model
    from common.text.windows import calibration_windows

    source = tiny_models[architecture, tied]
    windows = calibration_windows(
        str(calibration_text), load_tokenizer(source), 16, 64, 0, None
    ).tokens
    cpu = torch.device("cpu")
    errors, weights = [], []
    with torch.no_grad():
        expected = load_model(source, cpu, torch.float32)[0].model(windows).last_hidden_state
        for share in (0.0, 0.5):
            output = tmp_path / str(share)
            result = run_script(
                ROOT / "quantize_gptq.py",
                "--model",
                source,
                "--bits",
                3,
                "--catch-up",
                share,
                "--tune-scales",
                0,
                "--output",
                output,
                "--calib-data",
                calibration_text,
                "--calib-samples",
                16,
                "--calib-length",
                64,
            )
            assert result.returncode == 0, result.stderr
            model = load_model(output, cpu, torch.float32)[0]
            errors.append(
                (model.model(windows).last_hidden_state - expected).square().mean().item()
            )
            weights.append(
                [
                    model.model.layers[0].get_submodule(name).weight
                    for name in FAMILIES[architecture].linears
                ]
            )
    assert errors[1] < 0.97 * errors[0]
    same = [torch.equal(a, b) for a, b in zip(*weights, strict=True)]
    # In the first layer nothing lags yet, so both have the same codes there.
    assert all(same)


def test_token_weights_count_in_squares_and_not_in_magnitudes():
    generator = torch.Generator().manual_seed(14)
    inputs = torch.randn(2, 15, 8, generator=generator)
    weights = torch.rand(2, 15, generator=generator) + 0.1
    sums = InputSums(8, torch.device("cpu"), Needs.MAGNITUDES)
    for part, counts in zip(inputs, weights, strict=True):
        sums.add(part, counts)
    statistics = sums.finish()
    squares = torch.einsum("bt,bti->i", weights.double(), inputs.double().square())
    torch.testing.assert_close(statistics.mean_square.double(), squares / weights.sum())
    torch.testing.assert_close(statistics.abs_mean, inputs.abs().mean((0, 1)))


def test_the_sample_is_drawn_from_each_sequence_and_weighted():
    generator = torch.Generator().manual_seed(21)
    inputs = torch.randn(3, 500, 8, generator=generator).to(torch.bfloat16)
    weights = torch.rand(3, 500, generator=generator) + 0.1
    drawn = range(0, 500, 3)
    for counts in (None, weights):
        sums = InputSums(8, torch.device("cpu"), Needs.SAMPLES, 3 * SAMPLES - 100)
        sums.add(inputs, counts)
        expected = [
            inputs[i, j].double()
            * (1 if counts is None else counts[i, j].double() ** 0.5)
            * (1 if j else (len(drawn) * FIRST_TOKEN) ** 0.5)
            for i in range(3)
            for j in drawn
        ]
        torch.testing.assert_close(sums.finish().sample.double(), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_token_weights(dtype):
    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(15)).to(dtype)
    hidden[0, 0] *= 300
    hidden[1, 2] = 0
    expected = hidden.double().square().mean(-1).clamp(min=1e-12).rsqrt()
    torch.testing.assert_close(token_weights(hidden).double(), expected, rtol=1e-5, atol=0)


def test_statistics_hold_what_was_asked_for_and_say_what_was_not():
    inputs = torch.randn(40, 8, generator=torch.Generator().manual_seed(13))

    def found(needs: Needs) -> InputStatistics:
        sums = InputSums(8, torch.device("cpu"), needs)
        for part in inputs.split(25):
            sums.add(part)
        return sums.finish()

    counts = torch.ones(40, 1)
    counts[0], counts[25] = 25 * FIRST_TOKEN, 15 * FIRST_TOKEN

    values = {
        Needs.GRAM: {"gram": inputs.T @ inputs / 40},
        Needs.MAGNITUDES: {"abs_max": inputs.abs().amax(0), "abs_mean": inputs.abs().mean(0)},
        Needs.SAMPLES: {"sample": inputs * counts.sqrt()},
    }
    scale = torch.rand(8) + 0.5
    for needs in (Needs.GRAM, Needs.MAGNITUDES, Needs.SAMPLES, ~Needs.NOTHING):
        statistics = found(needs)
        torch.testing.assert_close(statistics.mean_square, inputs.square().mean(0))
        for part, expected in values.items():
            for name, value in expected.items():
                if part in needs:
                    torch.testing.assert_close(getattr(statistics, name), value)
                    divided = value / scale if name != "gram" else value / torch.outer(scale, scale)
                    torch.testing.assert_close(getattr(statistics.divided(scale), name), divided)
                else:
                    with pytest.raises(LookupError, match=f"{name} was not collected"):
                        getattr(statistics, name)

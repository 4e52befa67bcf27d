"""Paired statistics against scipy and formulas written out, and cases worked by hand."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from common.reporting.comparison import compare_samples
from common.reporting.significance import (
    NO_LOSS,
    Flips,
    difference,
    flips,
    holm,
    pair,
    swap_test,
    t_test,
    verdict,
)
from common.tasks.metrics import macro_f1, mean, median


def means(before, after, clusters=None):
    return pair(mean(np.concatenate([before, after])), clusters)


def test_interval_and_p_value_of_a_mean_are_students():
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, 1, 30), rng.normal(-0.1, 1.2, 30)
    found, other = difference(means(before, after)), stats.ttest_rel(after, before)
    assert found.value == pytest.approx((after - before).mean())
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval()))
    assert found.standard_error == pytest.approx((after - before).std(ddof=1) / 30**0.5)
    less, greater = (
        stats.ttest_rel(after, before, alternative=side).pvalue for side in ("less", "greater")
    )
    assert t_test(found) == pytest.approx((less, greater))


def test_swaps_are_scipys_permutation_test():
    rng = np.random.default_rng(1)
    before, after = rng.normal(0, 1, 9), rng.normal(-0.5, 1, 9)
    for side, p_value in zip(("less", "greater"), swap_test(means(before, after)), strict=True):
        other = stats.permutation_test(
            (after, before),
            lambda a, b: np.mean(a - b),
            permutation_type="samples",
            alternative=side,
            n_resamples=np.inf,
        )
        assert p_value == pytest.approx(other.pvalue)


def test_swaps_of_clusters_by_hand():
    """Three articles whose differences sum to -3, -1 and +1: of the eight ways to give signs one is
    below -3 and two are -3.
    """
    clusters = np.array(list("aaabbbc"))
    before, after = np.array([1, 1, 1, 1, 0, 0, 0.0]), np.array([0, 0, 0, 0, 0, 0, 1.0])
    sums = [-3, -1, 1]
    swapped = [
        sum(s * d for s, d in zip(signs, sums, strict=True)) for signs in product((1, -1), repeat=3)
    ]
    expected = np.mean([one <= -3 for one in swapped]), np.mean([one >= -3 for one in swapped])
    assert swap_test(means(before, after, clusters)) == pytest.approx(expected) == (0.375, 0.875)


def test_clusters_stay_together():
    """Twenty articles of ten equal samples carry as much as twenty samples; unequal ones by a
    formula written out.
    """
    rng = np.random.default_rng(2)
    values = np.repeat(rng.normal(0, 1, 20), 10)
    names = [f"article {i // 10:02d}" for i in range(200)]
    together, few = (
        difference(means(np.zeros(200), values, names)),
        difference(means(np.zeros(20), values[::10])),
    )
    assert (together.low, together.high) == pytest.approx((few.low, few.high))
    assert swap_test(means(np.zeros(200), values, names)) == pytest.approx(
        swap_test(means(np.zeros(20), values[::10]))
    )
    labels = rng.choice(5, 60, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    values = rng.normal(size=60) + rng.normal(size=5)[labels]
    without = np.array([values[labels != label].mean() for label in range(5)])
    error = np.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
    found = difference(means(np.zeros(60), values, labels))
    assert found.standard_error == pytest.approx(error)
    degrees = 1 / sum(np.mean(labels == label) ** 2 for label in range(5)) - 1
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, degrees) * error)


def macro_f1_by_class(gold: list[str], predicted: list[str]) -> float:
    scores = []
    for label in sorted(set(gold)):
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        scores.append(2 * hits / (gold.count(label) + predicted.count(label)))
    return float(np.mean(scores))


def test_metrics_are_those_of_the_resample():
    rng = np.random.default_rng(3)
    gold, predicted = rng.choice(list("ABCDE"), 60).tolist(), rng.choice(list("ABCD"), 60).tolist()
    values = rng.integers(0, 20, 60).astype(float)
    for size in (60, 59, 2, 1) * 5:
        drawn = rng.integers(0, 60, size)
        for metric, expected in (
            (
                macro_f1(gold, predicted),
                macro_f1_by_class([gold[i] for i in drawn], [predicted[i] for i in drawn]),
            ),
            (mean(values), values[drawn].mean()),
            (median(values), np.median(values[drawn])),
        ):
            assert metric.of_sums(metric.features[drawn].sum(0)) == pytest.approx(expected)


def test_interval_of_a_median_is_scipys():
    rng = np.random.default_rng(4)
    before, after = rng.exponential(10, 90).round(), rng.exponential(14, 90).round()
    found = difference(pair(median(np.concatenate([before, after]))))
    other = stats.bootstrap(
        (before, after),
        lambda b, a, axis: np.median(a, axis) - np.median(b, axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert found.value == np.median(after) - np.median(before)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=1)


@pytest.mark.parametrize("lost, won", [(0, 0), (1, 0), (5, 1), (12, 12), (3, 20), (40, 22)])
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    before = [1.0] * lost + [0.0] * won + [1.0] * 10 + [0.0] * 5
    after = [0.0] * lost + [1.0] * won + [1.0] * 10 + [0.0] * 5
    found = flips(before, after)
    assert found == Flips(lost, won)
    for count, p_value in zip((lost, won), found.p_values, strict=True):
        expected = (
            stats.binomtest(count, lost + won, 0.5, alternative="greater").pvalue
            if lost + won
            else 1.0
        )
        assert p_value == pytest.approx(expected)
    # Without articles, swapping is the same test.
    assert swap_test(means(before, after)) == pytest.approx(found.p_values, abs=0.02)


def test_holm_by_hand():
    # 0.01 * 4 = 0.04; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06; 0.5 * 1 = 0.5, none below the one before
    # it.
    assert holm({"d": 0.5, "a": 0.01, "c": 0.03, "b": 0.02}) == pytest.approx(
        {"d": 0.5, "a": 0.04, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize("count", [1, 2, 5, 50, 182, 183, 1000])
def test_no_change_says_as_much_as_so_many_answers_can(count):
    """Not one flip among n: the bound is the exact binomial one. n = 183 is the first that excludes
    0.02.
    """
    found = difference(means(np.ones(count), np.ones(count)), share=True)
    if count > 1:
        upper = stats.binomtest(0, count).proportion_ci(0.95, "exact").high
        assert (found.low, found.high) == pytest.approx((-upper, upper))
        assert (
            found.detectable >= 3 / count or count < 50
        )  # for few the rule of three is a rough one
    word = verdict(found, True, 0.02, 1.0, 1.0)
    assert word == (NO_LOSS if count >= 183 else f"cannot tell with n = {count}")
    arc = [
        {"id": str(i), "acc": 1.0, "acc_norm": 1.0, "gold": "A", "predicted": "A"}
        for i in range(count)
    ]
    assert {one.verdict() for one in compare_samples({"arc": arc}, {"arc": arc})} == {word}


def test_an_article_without_a_change_is_one_observation():
    """Six articles of 50 questions: without one change they say as much as six answers; with a
    change in each, as 300.
    """
    articles, before = np.repeat(np.arange(6), 50), np.ones(300)
    for changed, counted in ((0, 6), (3, 6 * 50**0.5), (6, 300)):
        after = np.where((articles < changed) & (np.arange(300) % 50 == 0), 0.0, 1.0)
        found = difference(means(before, after, articles), share=True)
        assert found.unseen == pytest.approx(1 - 0.025 ** (1 / counted))
        assert found.value - found.low == pytest.approx(
            np.hypot(stats.t.ppf(0.975, 5) * found.standard_error, found.unseen)
        )
    # One answer lost and one won in each: the articles' sums are as before, and yet they changed.
    before, after = (
        np.where(np.arange(300) % 50 == 0, 0.0, 1.0),
        np.where(np.arange(300) % 50 == 1, 0.0, 1.0),
    )
    assert difference(means(before, after, articles), share=True).unseen == pytest.approx(
        1 - 0.025 ** (1 / 300)
    )


def test_the_detectable_difference_is_detected_four_times_in_five():
    rng = np.random.default_rng(8)
    size = difference(means(np.zeros(400), rng.normal(0, 1, 400))).detectable
    assert size == pytest.approx(2.8 / 400**0.5, rel=0.1)
    hits = sum(
        difference(means(np.zeros(400), rng.normal(-size, 1, 400))).high < 0 for _ in range(300)
    )
    assert 0.72 < hits / 300 < 0.88

"""Paired statistics against scipy and against resampling written out."""

import numpy as np
import pytest
from scipy import stats

from common import significance
from common.comparison import compare
from common.significance import GAIN, LOSS, NO_LOSS, Difference, Flips, flips, holm, macro_f1, mean, paired_bootstrap, verdict
from common.tasks import scoring


def test_interval_of_a_mean_is_scipys():
    rng = np.random.default_rng(0)
    before, after = rng.normal(0, 1, 300), rng.normal(-0.1, 1.2, 300)
    found = paired_bootstrap(mean(before), mean(after), 300)
    other = stats.bootstrap((after - before,), np.mean, n_resamples=10000, method="percentile", rng=np.random.default_rng(1))
    assert found.value == pytest.approx((after - before).mean())
    assert found.low == pytest.approx(other.confidence_interval.low, abs=0.01)
    assert found.high == pytest.approx(other.confidence_interval.high, abs=0.01)
    assert found.standard_error == pytest.approx((after - before).std(ddof=1) / 300**0.5, rel=0.05)
    assert found.p_lower == pytest.approx(stats.ttest_1samp(after - before, 0, alternative="less").pvalue, abs=0.03)


def test_clusters_are_drawn_together():
    """Twenty passages of ten equal samples carry as much as twenty samples."""
    rng = np.random.default_rng(2)
    values = np.repeat(rng.normal(0, 1, 20), 10)
    names = [f"passage {i // 10}" for i in range(200)]
    together = paired_bootstrap(mean(np.zeros(200)), mean(values), 200, clusters=names)
    apart = paired_bootstrap(mean(np.zeros(200)), mean(values), 200)
    assert together.standard_error == pytest.approx(values[::10].std() / 20**0.5, rel=0.05)
    assert together.standard_error > 2.5 * apart.standard_error


def test_weighted_metrics_are_those_of_the_resample():
    rng = np.random.default_rng(3)
    gold, predicted = rng.choice(list("ABCDE"), 60).tolist(), rng.choice(list("ABCD"), 60).tolist()
    values = rng.normal(size=60)
    values[::7] = np.nan
    for _ in range(20):
        drawn = rng.integers(0, 60, 60)
        weights = np.bincount(drawn, minlength=60)[None].astype(float)
        assert macro_f1(gold, predicted)(weights)[0] == pytest.approx(
            scoring.macro_f1([gold[i] for i in drawn], [predicted[i] for i in drawn]))
        assert mean(values)(weights)[0] == pytest.approx(np.nanmean(values[drawn]))


@pytest.mark.parametrize("lost, won", [(0, 0), (1, 0), (5, 1), (12, 12), (3, 20), (40, 22)])
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    before = [1.0] * lost + [0.0] * won + [1.0] * 10 + [0.0] * 5
    after = [0.0] * lost + [1.0] * won + [1.0] * 10 + [0.0] * 5
    found = flips(before, after)
    assert found == Flips(lost, won)
    if lost + won:
        assert found.p_value == pytest.approx(stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue)
    else:
        assert found.p_value == 1.0


def test_holm_by_hand():
    # 0.01 * 4 = 0.04; 0.02 * 3 = 0.06; 0.03 * 2 = 0.06; 0.5 * 1 = 0.5, none below the one before it.
    assert holm({"d": 0.5, "a": 0.01, "c": 0.03, "b": 0.02}) == pytest.approx({"d": 0.5, "a": 0.04, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize("low, high, larger, p, expected", [
    (-0.05, -0.01, True, 0.01, LOSS), (-0.05, -0.01, True, 0.2, "cannot tell with n = 50"), (-0.05, -0.01, False, 1.0, GAIN),
    (0.01, 0.05, False, 0.01, LOSS), (-0.01, 0.03, True, 0.3, NO_LOSS), (-0.1, 0.1, True, 0.3, "cannot tell with n = 50"),
    (0.0, 0.0, True, 1.0, NO_LOSS), (float("nan"), float("nan"), True, 1.0, "cannot tell with n = 50")])
def test_verdicts(low, high, larger, p, expected):
    difference = Difference((low + high) / 2, low, high, (high - low) / 4, 50, p, 1 - p)
    assert verdict(difference, larger, 0.02, p) == expected


def samples(rng, count, accuracy, like=None, flip=0.0):
    """Records of a made-up model: ARC-like answers and windows; of `like`, with a share of the answers drawn anew."""
    if like is None:
        right = rng.random(count) < accuracy
        loss = rng.normal(3, 0.4, 40)
    else:
        right = np.array([sample["acc"] > 0.5 for sample in like["arc"]])
        again = rng.random(count) < flip
        right = np.where(again, rng.random(count) < accuracy, right)
        loss = np.array([sample["loss"] for sample in like["perplexity"]]) + rng.normal(0, 0.01, 40)
    arc = [{"id": str(i), "acc": float(r), "acc_norm": float(r), "gold": "AB"[i % 2], "predicted": "AB"[(i + (not r)) % 2]}
           for i, r in enumerate(right)]
    return {"arc": arc, "perplexity": [{"id": str(i), "loss": float(one)} for i, one in enumerate(loss)]}


def words(before, after):
    return {one.kind.key: one.verdict() for one in compare(before, after)}


def test_a_known_loss_is_called_a_loss():
    rng = np.random.default_rng(5)
    before = samples(rng, 600, 0.7)
    after = samples(rng, 600, 0.35, like=before, flip=0.3)
    for sample in after["perplexity"]:
        sample["loss"] += 0.05
    found = words(before, after)
    assert set(found.values()) == {LOSS}
    assert set(words(after, before).values()) == {GAIN}


def test_the_baseline_against_itself_is_never_a_loss():
    """The very same answers: no loss in 200 seeds. Answers that differ by chance alone: at most the nominal rate."""
    alarms = {"accuracy": 0, "macro_f1": 0, "perplexity": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        before = samples(rng, 200, 0.6)
        if seed < 20:
            assert set(words(before, before).values()) == {NO_LOSS}
        after = samples(rng, 200, 0.6, like=before, flip=0.2)
        found = words(before, after)
        for key in alarms:
            alarms[key] += found[key] == LOSS
    # 5% of 200 are 10; the number of alarms is itself random (95% of the time up to 15).
    assert max(alarms.values()) <= 15, alarms


def test_the_detectable_difference_is_detected_four_times_in_five():
    rng = np.random.default_rng(8)
    size = paired_bootstrap(mean(np.zeros(400)), mean(rng.normal(0, 1, 400)), 400).detectable
    assert size == pytest.approx(2.8 / 400**0.5, rel=0.1)
    hits = 0
    for _ in range(300):
        found = paired_bootstrap(mean(np.zeros(400)), mean(rng.normal(-size, 1, 400)), 400, resamples=400)
        hits += found.high < 0
    assert 0.72 < hits / 300 < 0.88


def test_significance_counts_each_resample_once():
    assert significance.value(mean([1.0, 0.0, 1.0, 1.0]), 4) == 0.75

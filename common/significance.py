"""Paired statistics between two models that answered the same questions.

A metric is a function of per-sample weights: all ones give its value, the counts of a bootstrap resample its value there.
Both models are resampled together, whole clusters at a time where samples share a passage (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

RESAMPLES, CONFIDENCE, POWER = 10000, 0.95, 0.8
# Resamples that are worked on at once, so that thousands of samples need no gigabytes.
_CHUNK = 1000

# weights [resamples, samples] -> the metric's value in each resample [resamples].
Metric = Callable[[np.ndarray], np.ndarray]


def mean(values: Sequence[float]) -> Metric:
    """The weighted mean of per-sample values; a NaN is a sample the metric leaves out."""
    values = np.asarray(values, float)
    valid = np.isfinite(values)
    filled = np.where(valid, values, 0.0)

    def metric(weights: np.ndarray) -> np.ndarray:
        count = weights @ valid.astype(float)
        return np.divide(weights @ filled, count, out=np.full(len(weights), np.nan), where=count > 0)

    return metric


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> Metric:
    """Mean over the gold classes of the F1 of each class."""
    gold, predicted = np.asarray(gold), np.asarray(predicted)

    def metric(weights: np.ndarray) -> np.ndarray:
        total, classes = np.zeros(len(weights)), np.zeros(len(weights))
        for label in np.unique(gold):
            wanted, found = gold == label, predicted == label
            present = weights @ wanted.astype(float)
            both = present + weights @ found.astype(float)
            total += np.divide(2 * (weights @ (wanted & found).astype(float)), both, out=np.zeros(len(weights)), where=both > 0)
            classes += present > 0
        return total / np.maximum(classes, 1)

    return metric


def value(metric: Metric, samples: int) -> float:
    """The metric on the samples as they are."""
    return float(metric(np.ones((1, samples)))[0])


@dataclass(frozen=True)
class Difference:
    """quantized - baseline of a metric: the value, its 95% interval, its standard error and on how many samples.

    p_lower, p_higher: one-sided bootstrap p-values of a true difference below and above zero.
    """

    value: float
    low: float
    high: float
    standard_error: float
    samples: int
    p_lower: float
    p_higher: float

    @property
    def detectable(self) -> float:
        """The smallest true difference that a sample of this size would show, at 95% confidence four times in five."""
        return float((stats.norm.ppf(0.5 + CONFIDENCE / 2) + stats.norm.ppf(POWER)) * self.standard_error)


def paired_bootstrap(baseline: Metric, quantized: Metric, samples: int, clusters: Sequence[str] | None = None,
                     resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The difference of a metric between two models with a percentile bootstrap interval.

    Args:
        clusters: for each sample, what it shares with others (a passage): drawn together.
    """
    labels = np.arange(samples) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    groups = labels.max() + 1
    found = []
    for counts in _resampled(int(groups), resamples, seed):
        weights = counts[:, labels].astype(float)
        found.append(quantized(weights) - baseline(weights))
    found = np.concatenate(found)
    found = found[np.isfinite(found)]
    point = value(quantized, samples) - value(baseline, samples)
    if not len(found):
        return Difference(point, float("nan"), float("nan"), float("nan"), samples, 1.0, 1.0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    p_values = [(int(count) + 1) / (len(found) + 1) for count in ((found >= 0).sum(), (found <= 0).sum())]
    return Difference(point, float(low), float(high), float(found.std()), samples, *p_values)


@lru_cache(maxsize=8)
def _resampled(groups: int, resamples: int, seed: int) -> list[np.ndarray]:
    """How often each of `groups` is drawn in each resample, in chunks [resamples, groups]; the same for every metric."""
    generator = np.random.default_rng(seed)
    chunks = []
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        drawn = generator.integers(0, groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        chunks.append(np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.uint16))
    return chunks


@dataclass(frozen=True)
class Flips:
    """Answers that changed between right and wrong (Dutta et al. 2024, arXiv 2407.09141)."""

    to_wrong: int
    to_right: int

    @property
    def p_value(self) -> float:
        """Exact one-sided McNemar test: the chance of so many losses among the flips if losses and gains were as likely."""
        changed = self.to_wrong + self.to_right
        return float(stats.binom.sf(self.to_wrong - 1, changed, 0.5)) if changed else 1.0


def flips(baseline: Sequence[float], quantized: Sequence[float]) -> Flips:
    """Count flips of right (1) and wrong (0) answers to the same questions."""
    before, after = np.asarray(baseline) > 0.5, np.asarray(quantized) > 0.5
    return Flips(int((before & ~after).sum()), int((~before & after).sum()))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values of a family of tests, by name: the chance of one false alarm in the family stays what it was."""
    adjusted, largest = {}, 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


NO_LOSS, LOSS, GAIN = "no loss seen", "loss", "gain"


def verdict(difference: Difference, larger_is_better: bool, margin: float, p_value: float) -> str:
    """A word for a difference.

    "loss": the interval lies wholly on the worse side of zero and p_value, of a loss, is at most 0.05. "gain": it lies wholly on
    the better side. "no loss seen": it excludes a loss larger than `margin`. Otherwise the sample is too small to say.
    """
    if difference.low == difference.high == 0:
        return NO_LOSS
    low, high = (difference.low, difference.high) if larger_is_better else (-difference.high, -difference.low)
    if not np.isfinite(low + high):
        return f"cannot tell with n = {difference.samples}"
    if high < 0 and p_value <= 1 - CONFIDENCE:
        return LOSS
    if low > 0:
        return GAIN
    return NO_LOSS if low >= -margin else f"cannot tell with n = {difference.samples}"

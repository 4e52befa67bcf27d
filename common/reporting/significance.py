"""Paired statistics between two models that answered the same questions.

A metric (`common.tasks.metrics`) is a function of sums over samples, so every resample is a sum of
other samples. Samples that share an article (a cluster) stay together throughout (Miller 2024,
arXiv 2411.00640). Intervals are Student's t on the jackknife that leaves out a cluster at a time,
p-values come from swapping the two models' answers cluster by cluster; benchmarks/nominal_rates.py
measures both beside the alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from common.tasks.metrics import Metric

CONFIDENCE, POWER = 0.95, 0.8
TAIL = (1 - CONFIDENCE) / 2
# Up to this many clusters every swap is gone through; else that many random ones.
_ALL_SWAPS, _RANDOM_SWAPS = 13, 9999
_RESAMPLES = 4000
# Swaps or resamples that are worked on at once, so that thousands of samples need no gigabytes.
_CHUNK = 1000
# How many numbers of clusters have their swaps and resamples kept: a comparison has five or six.
_SIZES = 8


@dataclass(frozen=True)
class Pair:
    """Two models' sums by cluster: before, after [clusters, k], of the same samples of the same
    metric;
    sizes: samples in each cluster [clusters]; changed: whether a sample of it is another after
    [clusters].
    """

    before: np.ndarray
    after: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    smooth: bool
    sizes: np.ndarray
    changed: np.ndarray

    @property
    def values(self) -> tuple[float, float]:
        """The metric of the baseline and of the quantized model."""
        return float(self.of_sums(self.before.sum(0))), float(self.of_sums(self.after.sum(0)))

    @property
    def degrees(self) -> float:
        """Degrees of freedom of a standard error: one less than the number of equal clusters that
        would vary as much (Kish's effective number)."""
        return max(float(self.sizes.sum() ** 2 / np.square(self.sizes).sum()) - 1, 1.0)

    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """The metric of baseline and quantized model without each cluster in turn [clusters]."""
        before, after = (self.of_sums(one.sum(0) - one) for one in (self.before, self.after))
        return before, after

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """quantized - baseline where each cluster is there `counts` times [resamples, clusters]."""
        counts = counts.astype(self.after.dtype)
        return self.of_sums(counts @ self.after) - self.of_sums(counts @ self.before)

    def swapped(self, swaps: np.ndarray) -> np.ndarray:
        """quantized - baseline after the models' answers were swapped in some clusters, 1 or 0
        [resamples, clusters]."""
        # Most answers are the same, and swapping those moves nothing.
        swaps = swaps[:, self.changed].astype(self.after.dtype)
        moved = swaps @ (self.after - self.before)[self.changed]
        return self.of_sums(self.after.sum(0) - moved) - self.of_sums(self.before.sum(0) + moved)


def pair(metric: Metric, clusters: Sequence[str] | None = None) -> Pair:
    """A metric of the baseline's samples and then the quantized model's, taken apart.

    Args:
        clusters: for each question, what it shares with others.
    """
    samples = len(metric.features) // 2
    sums, sizes = [metric.features[:samples], metric.features[samples:]], np.ones(samples)
    changed = (sums[0] != sums[1]).any(-1)
    if clusters is not None:
        names, labels = np.unique(np.asarray(clusters), return_inverse=True)
        members = (labels == np.arange(len(names))[:, None]).astype(float)
        sums, sizes, changed = (
            [members @ one for one in sums],
            members.sum(1),
            members @ changed > 0,
        )
    before, after = sums
    return Pair(before, after, metric.of_sums, metric.smooth, sizes, changed)


@dataclass(frozen=True)
class Difference:
    """quantized - baseline of a metric: its value, its 95% interval and its standard error.

    samples in `clusters` groups; without groups each is its own. degrees: degrees of freedom of the
    standard error. unseen: how often a change can be and still have been missed by all that was
    seen, where the metric is a share (else 0).
    """

    value: float
    low: float
    high: float
    standard_error: float
    samples: int
    clusters: int
    degrees: float
    unseen: float = 0.0

    @property
    def detectable(self) -> float:
        """The smallest true difference that a sample of this size would show, at 95% confidence
        four times in five."""
        t = stats.t(self.degrees)
        return float(
            np.hypot(t.ppf(1 - TAIL) * self.standard_error, self.unseen)
            + t.ppf(POWER) * self.standard_error
        )


def difference(paired: Pair, share: bool = False) -> Difference:
    """The difference of a metric between two models.

    Smooth metrics have Student's t interval on the standard error of the jackknife that leaves out
    a cluster at a time (`jackknife_error`): unlike a bootstrap it holds its rate with few clusters
    of unequal sizes. A median, for which the jackknife fails, has a percentile bootstrap's.

    Args:
        share: the metric lies between 0 and 1. The interval then reaches at least as far as the
            share of changed answers that may be there though no sample shows one (the exact form of
            the rule of three): no change in five samples says little. Clusters count as one sample
            each where none shows a change, as all their samples where every one does, in between
            as the geometric mean that the share of clusters with a change weighs: only changes
            show whether it is samples or whole clusters that change.
    """
    groups, samples = len(paired.sizes), int(paired.sizes.sum())
    before, after = paired.values
    value = after - before
    unseen = (
        1 - TAIL ** (1 / (groups * (samples / groups) ** paired.changed.mean()))
        if share and groups
        else 0.0
    )
    if groups < 2:
        return Difference(value, np.nan, np.nan, np.nan, samples, groups, 1.0, unseen)
    degrees = paired.degrees
    if not paired.smooth:
        found = np.concatenate([paired.resampled(chunk) for chunk in _drawn(groups)])
        low, high = np.quantile(found, [TAIL, 1 - TAIL])
        return Difference(
            value, float(low), float(high), float(found.std()), samples, groups, degrees
        )
    without_before, without_after = paired.left_out()
    error = jackknife_error(without_after - without_before)
    half = np.hypot(stats.t.ppf(1 - TAIL, degrees) * error, unseen)
    low, high = value - half, value + half
    if share:
        low, high = max(low, -1.0), min(high, 1.0)
    return Difference(value, float(low), float(high), error, samples, groups, degrees, unseen)


def jackknife_error(left_out: np.ndarray) -> float:
    """The standard error of a figure, from what it is without each cluster in turn [clusters]."""
    groups = len(left_out)
    return float(np.sqrt((groups - 1) / groups * np.square(left_out - left_out.mean()).sum()))


@dataclass(frozen=True)
class Ratio:
    """quantized / baseline of a metric, which counts where the baseline does better than chance.

    standard_error, degrees, unseen: as of a `Difference`, in parts of the baseline's value.
    lowest: the lower end of the 95% interval of the baseline's own value.
    """

    value: float
    standard_error: float
    degrees: float
    unseen: float
    lowest: float


def ratio(paired: Pair, unseen: float) -> Ratio | None:
    """How many times a metric of the baseline the quantized model's is; None where the baseline's
    is zero or there are fewer than two clusters. unseen: of their `Difference`.
    """
    before, after = paired.values
    if len(paired.sizes) < 2 or not before > 0:
        return None
    value, (without_before, without_after) = after / before, paired.left_out()
    # Linear in what is left out: a baseline with one right answer has no ratio without it.
    error = jackknife_error((without_after - value * without_before) / before)
    reach = stats.t.ppf(1 - TAIL, paired.degrees) * jackknife_error(without_before)
    return Ratio(value, error, paired.degrees, unseen / before, before - reach)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.low, factor * self.high)

    def shown(self, digits: int, sign: str = "") -> str:
        """Value and interval; sign "+" shows that of a gain."""
        point, low, high = (
            f"{x:{sign}.{digits}f}" if np.isfinite(x) else "–"
            for x in (self.value, self.low, self.high)
        )
        return f"{point} [{low}, {high}]"


def mean_of_tasks(found: Sequence[Difference | Ratio]) -> Estimate:
    """The mean of figures of different tasks, at least one: their samples are independent, so the
    variances add up, with Welch and Satterthwaite's degrees of freedom.
    """
    variances = np.square([one.standard_error for one in found])
    spread = (np.square(variances) / [one.degrees for one in found]).sum()
    degrees = variances.sum() ** 2 / spread if spread > 0 else 1.0
    reach = stats.t.ppf(1 - TAIL, degrees) * np.sqrt(variances.sum())
    half = float(np.hypot(reach, np.linalg.norm([one.unseen for one in found]))) / len(found)
    value = float(np.mean([one.value for one in found]))
    return Estimate(value, value - half, value + half)


def swap_test(paired: Pair) -> tuple[float, float]:
    """One-sided p-values of a true difference below and above zero.

    How often a difference as low, or as high, comes about when chance decides, cluster by cluster,
    which answers are which model's. Exact where the two models' answers to a cluster are
    exchangeable, however the answers within it hang together; with six clusters the smallest
    p-value is 1/64.
    """
    groups = len(paired.sizes)
    if groups == 0:
        return 1.0, 1.0
    found = np.concatenate([paired.swapped(chunk) for chunk in _swaps(groups)])
    before, after = paired.values
    value, slack = after - before, 1e-12
    # Among random swaps the one that was observed counts too; among all of them it already is.
    observed = int(groups > _ALL_SWAPS)
    lower, higher = [
        (int(count) + observed) / (len(found) + observed)
        for count in ((found <= value + slack).sum(), (found >= value - slack).sum())
    ]
    return lower, higher


def t_test(found: Difference) -> tuple[float, float]:
    """One-sided p-values of a true difference below and above zero by Student's t: for means over
    long texts, which are nearly normal, however few."""
    if not np.isfinite(found.standard_error):
        return 1.0, 1.0
    if found.standard_error == 0:
        return float(found.value >= 0), float(found.value <= 0)
    t = found.value / found.standard_error
    return float(stats.t.cdf(t, found.degrees)), float(stats.t.sf(t, found.degrees))


@lru_cache(maxsize=_SIZES)
def _swaps(groups: int) -> list[np.ndarray]:
    """Which clusters are swapped, 1 or 0, in chunks [resamples, clusters]; the same for every
    metric.
    """
    if groups <= _ALL_SWAPS:
        whole = np.arange(2**groups)[:, None] >> np.arange(groups) & 1
    else:
        whole = np.random.default_rng(0).integers(0, 2, (_RANDOM_SWAPS, groups), np.uint8)
    return np.split(whole.astype(np.uint8), range(_CHUNK, len(whole), _CHUNK))


@lru_cache(maxsize=_SIZES)
def _drawn(groups: int) -> list[np.ndarray]:
    """How often each cluster is drawn in each bootstrap resample, in chunks [resamples,
    clusters]."""
    counts = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), _RESAMPLES)
    return np.split(counts.astype(np.uint16), range(_CHUNK, _RESAMPLES, _CHUNK))


@dataclass(frozen=True)
class Flips:
    """Answers that changed between right and wrong (Dutta et al. 2024, arXiv 2407.09141)."""

    to_wrong: int
    to_right: int

    @property
    def p_values(self) -> tuple[float, float]:
        """Of a loss and of a gain, by exact one-sided McNemar tests: the chance of so many among
        the flips if losses and gains were as likely and every answer stood for itself."""
        changed = self.to_wrong + self.to_right
        loss, gain = [
            float(stats.binom.sf(count - 1, changed, 0.5)) if changed else 1.0
            for count in (self.to_wrong, self.to_right)
        ]
        return loss, gain


def flips(baseline: Sequence[float], quantized: Sequence[float]) -> Flips:
    """Count flips of right (1) and wrong (0) answers to the same questions."""
    before, after = np.asarray(baseline) > 0.5, np.asarray(quantized) > 0.5
    return Flips(int((before & ~after).sum()), int((~before & after).sum()))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values of a family of tests, by name: the chance of one false alarm in the
    family stays what it was.
    """
    adjusted, largest = {}, 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


NO_LOSS, LOSS, GAIN = "no loss seen", "loss", "gain"


def verdict(
    found: Difference, larger_is_better: bool, margin: float, p_loss: float, p_gain: float
) -> str:
    """A word for a difference.

    "loss": the interval lies wholly on the worse side of zero and p_loss is at most 0.05. "gain":
    it lies wholly on the better side and p_gain is at most 0.05. "no loss seen": it excludes a loss
    as large as `margin`. Otherwise the sample is too small to say.
    """
    low, high = (found.low, found.high) if larger_is_better else (-found.high, -found.low)
    if high < 0 and p_loss <= 1 - CONFIDENCE:
        return LOSS
    if low > 0 and p_gain <= 1 - CONFIDENCE:
        return GAIN
    # NaN ends up here too, and compares as false.
    return NO_LOSS if low > -margin else f"cannot tell with n = {found.samples}"

"""Metrics of per-sample records: mean, median, macro F1, each a function of sums over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# A figure above this tells a reader no more than that it is: one answer of many digits makes a
# mean of them that large. CSV files and records have it whole.
LARGE = 1e6


def readable(value: float, digits: int = 4, sign: str = "") -> str:
    """A figure to so many significant digits, never with an exponent where it is large.

    Args:
        sign: "+" shows that of a positive one.
    """
    if abs(value) > LARGE:
        return f"{'<' if value < 0 else '>'} {math.copysign(LARGE, value):{sign}.0f}"
    shown = f"{value:{sign}.{digits}g}"
    return f"{float(shown):{sign}.0f}" if abs(float(shown)) >= 10**digits else shown


@dataclass(frozen=True)
class Metric:
    """A metric of one model as a function of sums over its samples.

    features [samples, k]: what is summed over samples. of_sums: sums [..., k] -> the metric [...].
    smooth: whether small changes of the sums change it little, as the jackknife needs; a median is
    not.
    """

    features: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    smooth: bool = True

    @property
    def value(self) -> float:
        """The metric of all samples."""
        return float(self.of_sums(self.features.sum(0)))


def mean(values: Sequence[float]) -> Metric:
    """The mean of per-sample values; NaN of no samples."""
    values = np.asarray(values, float)
    return Metric(
        np.stack([values, np.ones_like(values)], -1),
        lambda sums: _ratio(sums[..., 0], sums[..., 1], np.nan),
    )


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> Metric:
    """Mean over the gold classes of the F1 of each class."""
    labels = np.unique(np.asarray(gold))
    wanted, found = (np.asarray(one)[:, None] == labels for one in (gold, predicted))

    def of_sums(sums: np.ndarray) -> np.ndarray:
        present, hits, both = np.split(sums, 3, -1)
        return _ratio(_ratio(2 * hits, both, 0.0).sum(-1), (present > 0).sum(-1), np.nan)

    return Metric(
        np.concatenate([wanted, wanted & found, wanted.astype(float) + found], -1), of_sums
    )


def median(values: Sequence[float]) -> Metric:
    """The median of per-sample values; NaN of no samples. Summed is how often each value occurs."""
    support, places = np.unique(np.asarray(values, float), return_inverse=True)

    def of_sums(sums: np.ndarray) -> np.ndarray:
        if not len(support):
            return np.full(sums.shape[:-1], np.nan)
        below = sums.cumsum(-1)
        half = below[..., -1:] / 2
        middle = support[(below >= half).argmax(-1)] + support[(below > half).argmax(-1)]
        return np.where(half[..., 0] > 0, middle / 2, np.nan)

    # Counts are exact in float32, which is summed in half the time.
    return Metric(np.eye(len(support), dtype=np.float32)[places], of_sums, smooth=False)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the median of values [n] by their ranks, which holds for any distribution
    however far single values are off; None of fewer than 6.
    """
    ordered = np.sort(np.asarray(values, float))
    # As many values lie below the median as heads fall among n tosses of a coin.
    rank = int(stats.binom.ppf(0.025, len(ordered), 0.5)) if len(ordered) else 0
    return (float(ordered[rank - 1]), float(ordered[-rank])) if rank else None


def _ratio(top: np.ndarray, bottom: np.ndarray, otherwise: float) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), otherwise), where=bottom > 0)

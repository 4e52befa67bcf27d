"""How often intervals and tests are wrong where the truth is known: answers in articles, no true
difference.

    python benchmarks/nominal_rates.py --runs 4000

Prints a markdown table: for several numbers and sizes of articles, and by several methods, in how
many percent of the runs a 95% interval holds the truth / a one-sided p-value of a loss is at most
0.05.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
from scipy import stats

from common.reporting import significance
from common.tasks import metrics

# Questions per article: SQuAD v2 as it was sampled for the tables; few articles; one that outweighs
# the rest.
SIZES = {
    "17 articles": [79, 78, 76, 73, 68, 68, 67, 63, 62, 56, 54, 54, 48, 45, 38, 36, 35],
    "6 articles": [79, 68, 63, 54, 38, 20],
    "6 articles, one with half of all questions": [160, 45, 40, 35, 25, 15],
}
# Share of answers that change, the changes' correlation within an article, scores of F1's kind or
# right and wrong.
KINDS = ((0.2, 0.03, False), (0.2, 0.03, True), (0.3, 0.09, False), (0.02, 0.0, False))


def made_up_answers(
    rng: np.random.Generator,
    sizes: list[int],
    flips: float,
    within: float,
    graded: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of a model, of the same with answers changed without a loss or gain on the whole, and
    each one's article.

    Args:
        flips: share of answers that change. within: correlation of the changes within an article,
            below flips / 3: in each, changes to wrong and to right are unequally likely. graded:
            scores between 0 and 1 as F1 has them, not right or wrong.
    """
    article = np.repeat(np.arange(len(sizes)), sizes)
    # A lean of variance s^2 gives the changes (+1 or -1) the correlation flips * s^2.
    lean = rng.uniform(-1, 1, len(sizes)) * np.sqrt(3 * within / flips)
    change = np.where(rng.random(len(article)) < (1 + lean[article]) / 2, 1.0, -1.0)
    change *= rng.random(len(article)) < flips
    if graded:
        change *= rng.uniform(0.2, 1.0, len(article))
    before = np.where(
        change < 0, 1.0, np.where(change > 0, 0.0, rng.integers(0, 2, len(article)) * 1.0)
    )
    return before, before + change, article


def lost_articles(
    rng: np.random.Generator,
    sizes: list[int],
    chance: float,
    loss: float,
    flips: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `made_up_answers`, with a true effect of -chance * loss that few articles carry, or none
    that is there.

    Args:
        chance: of an article to be one that loses answers. loss: share of its answers that it
            loses. flips: share of all answers that change besides, to right and to wrong alike.
    """
    article = np.repeat(np.arange(len(sizes)), sizes)
    change = rng.choice([-1.0, 1.0], len(article)) * (rng.random(len(article)) < flips)
    lost = (rng.random(len(sizes)) < chance)[article] & (rng.random(len(article)) < loss)
    change = np.where(lost, -1.0, change)
    before = np.where(
        change < 0, 1.0, np.where(change > 0, 0.0, rng.integers(0, 2, len(article)) * 1.0)
    )
    return before, before + change, article


def paired(before: np.ndarray, after: np.ndarray, article: np.ndarray | None) -> significance.Pair:
    """The mean of scores [samples] of two models."""
    return significance.pair(metrics.mean(np.concatenate([before, after])), article)


def by_hand(
    change: np.ndarray, article: np.ndarray, rng: np.random.Generator
) -> dict[str, tuple[bool, bool]]:
    """For each alternative, whether its 95% interval holds zero and whether it calls a loss at
    0.05.
    """
    sizes, sums = np.bincount(article), np.bincount(article, change)
    samples, groups, value = len(change), len(sizes), change.mean()
    drawn = rng.integers(0, groups, (1000, groups))
    resampled = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    found = {"bootstrap over articles": (low <= 0 <= high, (resampled >= 0).mean() <= 0.05)}
    residuals = sums - sizes * value
    errors = {
        "CR1": np.sqrt(groups / (groups - 1) * np.square(residuals).sum()) / samples,
        "CR2": np.sqrt((np.square(residuals) / (1 - sizes / samples)).sum()) / samples,
    }
    for name, error in errors.items():
        t = value / error if error else 0.0
        found[f"{name}, t with G - 1"] = (
            abs(t) <= stats.t.ppf(0.975, groups - 1),
            stats.t.cdf(t, groups - 1) <= 0.05,
        )
    alone = significance.Flips(int((change < 0).sum()), int((change > 0).sum()))
    error = change.std(ddof=1) / samples**0.5
    found["every answer for itself, McNemar"] = (
        abs(value) <= 1.96 * error,
        alone.p_values[0] <= 0.05,
    )
    return found


def ours(
    before: np.ndarray, after: np.ndarray, article: np.ndarray
) -> dict[str, tuple[bool, bool]]:
    """The same of common/reporting/significance.py: jackknife and t beside swaps, and its
    verdicts."""
    pair = paired(before, after, article)
    found = significance.difference(pair, share=True)
    p_loss, p_gain = significance.swap_test(pair)
    word = significance.verdict(found, True, 0.02, p_loss, p_gain)
    holds = found.low <= 0 <= found.high
    t, degrees = found.value / (found.standard_error or np.inf), found.clusters - 1
    return {
        "jackknife, t with G - 1": (
            abs(t) <= stats.t.ppf(0.975, degrees),
            stats.t.cdf(t, degrees) <= 0.05,
        ),
        "jackknife, t with G* - 1": (
            abs(t) <= stats.t.ppf(0.975, found.degrees),
            significance.t_test(found)[0] <= 0.05,
        ),
        "used: the same with a floor; swaps": (holds, p_loss <= 0.05),
        "verdict `loss`": (holds, word == significance.LOSS),
        "verdict `gain`": (holds, word == significance.GAIN),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    options = parser.parse_args()
    names: list[str] = []
    for name, sizes in SIZES.items():
        for flips, within, graded in KINDS:
            rng = np.random.default_rng(1)
            counts: dict[str, np.ndarray] = {}
            for _ in range(options.runs):
                before, after, article = made_up_answers(rng, sizes, flips, within, graded)
                found = {**by_hand(after - before, article, rng), **ours(before, after, article)}
                for method, outcome in found.items():
                    counts[method] = counts.get(method, np.zeros(2)) + outcome
            if not names:
                names = list(counts)
                print(f"| | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
            rates = [
                " / ".join(f"{one:.1f}" for one in 100 * counts[method] / options.runs)
                for method in names
            ]
            print(
                f"| {name}; {flips:.0%} {'graded' if graded else 'right or wrong'}, {within} | "
                f"{' | '.join(rates)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""How often intervals and verdicts are wrong, by simulation: answers in articles of unequal sizes
that hang together.
"""

import numpy as np
import pytest
from nominal_rates import KINDS, SIZES, by_hand, lost_articles, made_up_answers, paired

from common.reporting import significance
from common.reporting.significance import GAIN, LOSS, NO_LOSS


def rates(sizes, kind, runs, seed):
    """Shares of runs without a true loss or gain in which: the 95% interval misses it, p of a loss
    and of a gain is at most 0.05, the verdict is a loss, the verdict is a gain."""
    rng, wrong = np.random.default_rng(seed), np.zeros(5)
    for _ in range(runs):
        pair = paired(*made_up_answers(rng, sizes, *kind))
        found, (p_loss, p_gain) = (
            significance.difference(pair, share=True),
            significance.swap_test(pair),
        )
        word = significance.verdict(found, True, 0.02, p_loss, p_gain)
        wrong += (
            found.low > 0 or found.high < 0,
            p_loss <= 0.05,
            p_gain <= 0.05,
            word == LOSS,
            word == GAIN,
        )
    return wrong / runs


def assert_nominal(found, runs):
    """Nominal rates and what chance adds to them, two and a half standard errors: p-values 5%;
    verdicts, whose interval has 2.5% on either side, 2.5%; the interval both sides, 5%, with a
    point more for six articles of correlation 0.09.
    """
    nominal = np.array([0.06, 0.05, 0.05, 0.025, 0.025])
    allowed = nominal + 2.5 * (nominal * (1 - nominal) / runs) ** 0.5
    assert (found <= allowed).all(), (found, allowed)


@pytest.mark.parametrize("name", SIZES)
def test_nominal_rates(name):
    for seed, kind in enumerate(KINDS):
        assert_nominal(rates(SIZES[name], kind, 300, seed), 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_nominal_rates_closely(name, kind):
    found = rates(SIZES[name], kind, 4000, 7)
    print(name, kind, found)
    assert_nominal(found, 4000)


@pytest.mark.parametrize("sizes", [[50] * 6, *SIZES.values()])
@pytest.mark.parametrize("flips", [0.0, 0.005])
def test_whole_articles_lost(sizes, flips):
    """A tenth of the articles lose 30% of their answers, and of the others few change or none: half
    of all samples of six articles show no such article, whatever the number of their questions."""
    rng, missed, unseen, runs = np.random.default_rng(3), 0, 0, 400
    for _ in range(runs):
        found = significance.difference(
            paired(*lost_articles(rng, sizes, 0.1, 0.3, flips)), share=True
        )
        missed += not found.low <= -0.03 <= found.high
        unseen += significance.verdict(found, True, 0.02, 1.0, 1.0) == NO_LOSS
    assert missed <= 0.05 * runs and unseen <= 0.025 * runs, (missed, unseen)


def test_the_simulation_shows_what_ignoring_articles_does():
    """The made-up answers are such that McNemar's test is wrong too often, or the rates above would
    show nothing.
    """
    rng, called, correlated = np.random.default_rng(5), 0, []
    for _ in range(300):
        before, after, article = made_up_answers(rng, SIZES["17 articles"], 0.2, 0.03, False)
        change = after - before
        called += by_hand(change, article, rng)["every answer for itself, McNemar"][1]
        products = [
            np.outer(part, part)[np.triu_indices(len(part), 1)].mean()
            for part in (change[article == one] for one in range(17))
        ]
        correlated.append(np.mean(products) / np.square(change).mean())
    assert called / 300 > 0.1
    assert np.mean(correlated) == pytest.approx(0.03, abs=0.006)


def test_a_true_loss_is_found():
    """A tenth of the answers lost in every article of 17: always a loss; the rule is not just
    silent.
    """
    rng, found = np.random.default_rng(6), 0
    for _ in range(40):
        before, after, article = made_up_answers(rng, SIZES["17 articles"], 0.2, 0.03, False)
        pair = paired(before, np.where(rng.random(len(after)) < 0.2, 0.0, after), article)
        p_loss, p_gain = significance.swap_test(pair)
        found += (
            significance.verdict(
                significance.difference(pair, share=True), True, 0.02, p_loss, p_gain
            )
            == LOSS
        )
    assert found >= 36

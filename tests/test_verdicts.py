"""Verdicts: what the differences between two models' samples are called."""

import numpy as np
import pytest
from made_up_results import arc_records

from common.reporting.comparison import RUNAWAY, adjusted_p_values, compare_samples, signed
from common.reporting.significance import GAIN, LOSS, NO_LOSS, Difference, verdict
from common.tasks.metrics import readable


@pytest.mark.parametrize(
    "low, high, larger, p_loss, p_gain, expected",
    [
        (-0.05, -0.01, True, 0.01, 0.99, LOSS),
        (-0.05, -0.01, True, 0.2, 0.8, "cannot tell with n = 50"),
        (-0.05, -0.01, False, 0.99, 0.01, GAIN),
        (0.01, 0.05, False, 0.01, 0.99, LOSS),
        (0.01, 0.05, True, 0.99, 0.01, GAIN),
        (0.01, 0.05, True, 0.8, 0.2, NO_LOSS),
        (-0.01, 0.03, True, 0.3, 0.7, NO_LOSS),
        (-0.1, 0.1, True, 0.3, 0.7, "cannot tell with n = 50"),
        (float("nan"), float("nan"), True, 1.0, 1.0, "cannot tell with n = 50"),
    ],
)
def test_verdicts(low, high, larger, p_loss, p_gain, expected):
    found = Difference((low + high) / 2, low, high, (high - low) / 4, 50, 50, 49.0)
    assert verdict(found, larger, 0.02, p_loss, p_gain) == expected


def openmath(differences):
    return {
        "openmath": [
            {"id": str(i), "correct": float(one == 0), "absolute_difference": one}
            for i, one in enumerate(differences)
        ]
    }


def test_a_silent_model_gains_nothing():
    """Silent where it was worst: mean and median absolute difference are over problems that both
    answered.
    """
    rng = np.random.default_rng(9)
    before = rng.exponential(20, 200).round(1).tolist()
    after = [one if one < sorted(before)[120] else None for one in before]
    found = {one.kind.key: one for one in compare_samples(openmath(before), openmath(after))}
    for key, metric in (
        ("mean_absolute_difference", np.mean),
        ("median_absolute_difference", np.median),
    ):
        one = found[key]
        assert (
            one.baseline
            == one.quantized
            == pytest.approx(metric([x for x in after if x is not None]))
        )
        assert one.difference.samples == 120 and one.difference.value == 0 and one.verdict() != GAIN
    assert found["no_number"].verdict() == LOSS and found["no_number"].quantized == 0.4
    nothing = {
        one.kind.key: one for one in compare_samples(openmath(before), openmath([None] * 200))
    }
    assert nothing["mean_absolute_difference"].verdict() == "cannot tell with n = 0"


def test_answers_grow_shorter_or_longer_and_that_is_no_loss():
    before, after = openmath([1.0] * 40), openmath([1.0] * 40)
    for i, (one, other) in enumerate(zip(before["openmath"], after["openmath"], strict=True)):
        one["text"], other["text"] = "4 + 3 = 7" * (1 + i % 5), "7" * (1 + i % 3)
    for pair, word in (((before, after), "shorter"), ((after, before), "longer")):
        found = {one.kind.key: one for one in compare_samples(*pair)}
        assert found["answer_length"].verdict() == word
    found = {one.kind.key: one for one in compare_samples(before, before)}
    assert found["answer_length"].verdict() not in (LOSS, "shorter", "longer")


@pytest.mark.parametrize("key", ["f1", "exact_match"])
def test_losses_in_one_article_are_one_piece_of_evidence(key):
    """Twelve answers lost in one article of six and none elsewhere: McNemar's p would be 2^-12, an
    article's is 1/2.
    """
    before = [
        {
            "id": str(i),
            "f1": 1.0,
            "exact_match": 1.0,
            "answerable": True,
            "predicted": "",
            "cluster": f"article {i // 20}",
        }
        for i in range(120)
    ]
    after = [
        {**one, "f1": float(i >= 12), "exact_match": float(i >= 12)} for i, one in enumerate(before)
    ]
    one = next(
        one
        for one in compare_samples({"squad_v2": before}, {"squad_v2": after})
        if one.kind.key == key
    )
    assert (one.p_loss, one.p_gain) == (0.5, 1.0) and one.difference.clusters == 6
    assert (
        one.difference.value == pytest.approx(-0.1) and one.verdict() == "cannot tell with n = 120"
    )


def test_gain_needs_holm_as_loss_does():
    """Ten right answers more and none less, p = 0.001: a gain alone, and none among a hundred such
    comparisons.
    """
    before = openmath([1.0] * 10 + [0.0] * 90)
    after = openmath([0.0] * 100)
    for first, second, word in ((before, after, GAIN), (after, before, LOSS)):
        one = next(
            one for one in compare_samples(first, second) if one.kind.key == "within_tolerance"
        )
        assert min(one.p_loss, one.p_gain) == pytest.approx(2**-10) and one.verdict() == word
        adjusted = adjusted_p_values({str(i): [one] for i in range(100)})[
            "0", "openmath", "within_tolerance"
        ]
        assert min(adjusted) == pytest.approx(100 * 2**-10)
        assert one.verdict(*adjusted) not in (GAIN, LOSS)


def samples(rng, count, accuracy, like=None, flip=0.0):
    """Records of a made-up model: ARC-like answers and windows; of `like`, with a share of the
    answers drawn anew.
    """
    if like is None:
        right = rng.random(count) < accuracy
        loss = rng.normal(3, 0.4, 40)
    else:
        right = np.array([sample["acc"] > 0.5 for sample in like["arc"]])
        again = rng.random(count) < flip
        right = np.where(again, rng.random(count) < accuracy, right)
        loss = np.array([sample["loss"] for sample in like["perplexity"]]) + rng.normal(0, 0.01, 40)
    return {
        "arc": arc_records(right),
        "perplexity": [{"id": str(i), "loss": float(one)} for i, one in enumerate(loss)],
    }


def words(before, after):
    return {one.kind.key: one.verdict() for one in compare_samples(before, after)}


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
    """The very same answers: no loss in 200 seeds. Answers that differ by chance alone: at most the
    nominal rate.
    """
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


def test_a_mean_that_hangs_on_one_answer_is_readable():
    """One answer of 287 digits: its size is in the CSV, a reader is told what it is."""
    rng = np.random.default_rng(3)
    before = rng.exponential(20, 300).tolist()
    for far, shown, difference in (
        (1e287, "> 1000000", RUNAWAY),
        (5.2e9, "> 1000000", RUNAWAY),
        (3e7, "100000", "+100000 [-96790, +296800]"),
    ):
        found = {
            one.kind.key: one
            for one in compare_samples(openmath(before), openmath([*before[:-1], far]))
        }
        mean = found["mean_absolute_difference"]
        assert mean.quantized == mean.as_dict()["quantized"] == pytest.approx(far / 300, rel=0.01)
        assert readable(mean.quantized) == shown and mean.shown_difference() == difference
        assert "e" not in found["median_absolute_difference"].shown_difference()
    assert [signed(x) for x in (-18560.4, 5575.04, 243.21, 0.5)] == [
        "-18560",
        "+5575",
        "+243.2",
        "+0.500",
    ]
    assert [readable(x) for x in (999999, 12345.6, 0.0012345, -2e9, 0.0)] == [
        "1000000",
        "12350",
        "0.001234",
        "< -1000000",
        "0",
    ]

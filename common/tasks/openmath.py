"""OpenMathInstruct-2: problems with a numeric answer (Toshniwal et al. 2024, arXiv 2410.01560)."""

from __future__ import annotations

import numpy as np

from common.base.errors import UserError
from common.tasks import metrics
from common.tasks.harness import HarnessTask, Shown
from common.tasks.metrics import LARGE
from common.tasks.numbers import extract_number, parse_number
from common.tasks.scoring import mean_of
from common.tasks.task import MetricKind, Record, of_field
from common.text.data import Rows

TOLERANCE = 1e-6


def _holds_a_number(sample: Record) -> bool:
    return sample["absolute_difference"] is not None


def _has_text(sample: Record) -> bool:
    return sample.get("text") is not None


def _lengths(samples: list[Record]) -> list[float]:
    return [float(len(sample["text"])) for sample in samples]


def _no_number(samples: list[Record]) -> metrics.Metric:
    return metrics.mean([float(not _holds_a_number(sample)) for sample in samples])


class OpenMath(HarnessTask):
    """How far the number in an answer is from the expected one."""

    name, title, place = "openmath", "OpenMath", 4
    address = "nvidia/OpenMathInstruct-2:train"
    # Where one answer in ten changes, a difference of 0.04 shows (0.06 with 200, which take a model
    # of a billion weights less than three minutes on a GPU).
    limit = 500
    flag = "--openmath-data"
    demo = "openmath"
    needs = columns = ("problem", "expected_answer")
    # Many problems have no numeric answer.
    fetch = 1024
    answer_score = "correct"
    note = (
        "Median and mean absolute difference are over the answers that hold a number, their "
        "differences over the problems that both models answered with one, so that silence is "
        "no gain; `no number` is the share of answers that hold none. Look at the median, in "
        "square brackets with its own 95% interval: one answer of twenty digits makes the mean "
        f"what it is, which is why a mean above {LARGE:.0f} is not written out here (the CSV files "
        "have it whole). `answer length` is the mean number of characters: a model may calculate "
        "step by step, or in one line as the worked examples do, and how often it does which "
        "decides much of how often it is right."
    )
    metrics = (
        MetricKind(
            name,
            "within_tolerance",
            "OpenMath correct",
            of_field("correct"),
            binary="correct",
            column="OpenMath correct",
            judged=True,
            recovered=True,
        ),
        MetricKind(
            name,
            "median_absolute_difference",
            "OpenMath median absolute difference",
            of_field("absolute_difference", metrics.median),
            larger_is_better=False,
            margin=0.0,
            only=_holds_a_number,
            share=False,
            column="OpenMath median absolute difference",
            interval=("median_low", "median_high"),
        ),
        MetricKind(
            name,
            "mean_absolute_difference",
            "OpenMath mean absolute difference",
            of_field("absolute_difference"),
            larger_is_better=False,
            margin=0.0,
            only=_holds_a_number,
            share=False,
            column="OpenMath mean absolute difference",
        ),
        MetricKind(
            name,
            "no_number",
            "OpenMath no number",
            _no_number,
            larger_is_better=False,
            silence=True,
            column="OpenMath no number",
        ),
        MetricKind(
            name,
            "answer_length",
            "OpenMath answer length",
            lambda samples: metrics.mean(_lengths(samples)),
            margin=0.0,
            only=_has_text,
            share=False,
            words=("shorter", "longer"),
            column="OpenMath answer length",
        ),
    )

    def usable(self, loaded: Rows) -> list[dict]:
        """Those with a numeric answer: an expression has no distance from a number. Raises
        UserError where there is none.
        """
        numeric = [
            row for row in loaded.rows if parse_number(str(row["expected_answer"])) is not None
        ]
        if not numeric:
            raise UserError(f"{loaded.source} has no row with a numeric expected_answer")
        return numeric

    def score(self, row: dict, results: list[str]) -> Record:
        """Distance of the answer from the expected number, None where the text holds no number."""
        expected = parse_number(str(row["expected_answer"]))
        predicted = extract_number(results[0])
        difference = None
        if predicted is not None and expected is not None:
            difference = abs(predicted - expected)
        return {
            "correct": float(difference is not None and difference <= TOLERANCE),
            "expected": expected,
            "predicted": predicted,
            "absolute_difference": difference,
            "text": results[0],
        }

    def shown(self, record: Record, row: dict | None) -> Shown:
        expected, predicted = (
            "(no number)" if value is None else f"{value:.12g}"
            for value in (record["expected"], record["predicted"])
        )
        if row is None:
            # A solution mostly repeats the problem.
            return Shown(gold=expected, answer=predicted)
        return Shown(row["problem"], expected, f"{predicted}: {record['text'].strip()}")

    def summary(self, samples: list[Record]) -> dict:
        """Mean and median of the absolute difference, and the median's 95% interval `median_low` to
        `median_high`, are over the answers that hold a number; the share of answers that hold none
        is `no_number`, their mean number of characters `answer_length`.
        """
        differences = [
            sample["absolute_difference"] for sample in samples if _holds_a_number(sample)
        ]
        mean, median = [
            float(of(differences)) if differences else None for of in (np.mean, np.median)
        ]
        low, high = metrics.median_interval(differences) or (None, None)
        return {
            "samples": len(samples),
            "within_tolerance": mean_of(samples, "correct"),
            "mean_absolute_difference": mean,
            "median_absolute_difference": median,
            "median_low": low,
            "median_high": high,
            "no_number": 1 - len(differences) / len(samples),
            "answer_length": float(np.mean(_lengths(samples))),
        }

    def in_words(self, summary: dict) -> str:
        found = [summary[f"{of}_absolute_difference"] for of in ("median", "mean")]
        median, mean = ["none" if one is None else metrics.readable(one) for one in found]
        return (
            f"OpenMath correct {summary['within_tolerance']:.3f}, median difference {median}, "
            f"mean {mean}"
        )


TASK = OpenMath()

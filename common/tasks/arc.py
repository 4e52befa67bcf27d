"""ARC-Challenge: science questions with four choices (Clark et al. 2018, arXiv 1803.05457). What
ARC-Easy (`arc_easy.py`) does likewise is here, too.
"""

from __future__ import annotations

import numpy as np

from common.base.errors import UserError
from common.tasks.harness import HarnessTask, Shown
from common.tasks.metrics import Metric, macro_f1
from common.tasks.scoring import mean_of
from common.tasks.task import MetricKind, Record, of_field
from common.text.data import Rows

LETTERS = "ABCDEFGH"


def _macro_f1(samples: list[Record]) -> Metric:
    return macro_f1(
        [sample["gold"] for sample in samples], [sample["predicted"] for sample in samples]
    )


def arc_metrics(task: str, title: str) -> tuple[MetricKind, ...]:
    """The metrics of a task of questions with four choices, by its name and title."""
    return (
        MetricKind(
            task,
            "accuracy",
            f"{title} accuracy",
            of_field("acc"),
            binary="acc",
            column=f"{title} accuracy",
            judged=True,
            plotted=True,
            recovered=True,
            chance=0.25,
        ),
        MetricKind(
            task,
            "accuracy_norm",
            f"{title} accuracy, length-normalised",
            of_field("acc_norm"),
            binary="acc_norm",
        ),
        MetricKind(task, "macro_f1", f"{title} macro F1", _macro_f1, column=f"{title} F1", f1=True),
    )


class Arc(HarnessTask):
    """The model does not pick a letter: each choice's text is scored as the answer."""

    name, title, place = "arc", "ARC-Challenge", 1
    address = "allenai/ai2_arc/ARC-Challenge:test"
    # The whole split.
    limit = 1172
    flag = "--arc-data"
    demo = "arc"
    prompts = "arc"
    needs = ("question", "choices.text", "choices.label", "answerKey")
    chat = False
    answer_score = "acc"
    metrics = arc_metrics(name, title)

    def usable(self, loaded: Rows) -> list[dict]:
        """All rows. Raises UserError, naming the first question whose right answer is none of its
        choices.
        """
        for row in loaded.rows:
            key, labels = row["answerKey"], row["choices"]["label"] or []
            if key not in labels:
                raise UserError(
                    f"{loaded.source}: the answerKey {key!r} of "
                    f"{row.get('id') or row['question']} is none of its labels {labels}; correct "
                    f"it, give other data with {self.flag}, or leave {self.name} out of --tasks"
                )
        return loaded.rows

    def score(self, row: dict, results: list[tuple[float, bool]]) -> Record:
        """The choice with the highest log-likelihood, plain and by its length in characters."""
        scores = np.array([score for score, _ in results])
        lengths = np.array([max(len(text), 1) for text in row["choices"]["text"]])
        gold = row["choices"]["label"].index(row["answerKey"])
        plain, normalised = int(scores.argmax()), int((scores / lengths).argmax())
        # Some questions label their choices 1 to 4: positions are mapped to letters, so that macro
        # F1 has one class each.
        return {
            "acc": float(plain == gold),
            "acc_norm": float(normalised == gold),
            "gold": LETTERS[gold],
            "predicted": LETTERS[plain],
            "predicted_norm": LETTERS[normalised],
            "scores": [round(float(score), 4) for score in scores],
        }

    def shown(self, record: Record, row: dict | None) -> Shown:
        if row is None:
            return Shown(gold=record["gold"], answer=record["predicted"])
        choices = dict(zip(LETTERS, row["choices"]["text"], strict=False))
        lines = [f"{letter}. {text}" for letter, text in choices.items()]
        gold, answer = (
            f"{letter}. {choices[letter]}" for letter in (record["gold"], record["predicted"])
        )
        return Shown("\n".join([row["question"], *lines]), gold, answer)

    def summary(self, samples: list[Record]) -> dict:
        return {
            "samples": len(samples),
            "accuracy": mean_of(samples, "acc"),
            "accuracy_norm": mean_of(samples, "acc_norm"),
            "macro_f1": _macro_f1(samples).value,
        }

    def in_words(self, summary: dict) -> str:
        return f"{self.title} accuracy {summary['accuracy']:.3f} F1 {summary['macro_f1']:.3f}"


TASK = Arc()

"""SQuAD v2: questions on a passage, some of which it does not answer (Rajpurkar et al. 2018, arXiv
1806.03822).
"""

from __future__ import annotations

from common.tasks import metrics
from common.tasks.harness import HarnessTask, Shown
from common.tasks.scoring import exact_match, mean_of, normalise_answer, token_f1
from common.tasks.task import MetricKind, Record, of_field


def prediction(text: str) -> str:
    """The answer in a model's text: its first line, empty where it says that the question is
    unanswerable.
    """
    lines = text.strip().splitlines()
    answer = lines[0].strip() if lines else ""
    unanswerable = ("unanswerable", "not answerable", "no answer")
    return "" if normalise_answer(answer).startswith(unanswerable) else answer


def _is_answerable(sample: Record) -> bool:
    return sample["answerable"]


def _no_answer(samples: list[Record]) -> metrics.Metric:
    return metrics.mean([float(sample["predicted"] == "") for sample in samples])


class SquadV2(HarnessTask):
    """Answers in a few words; an unanswerable question's gold answer is empty."""

    name, title, place = "squad_v2", "SQuAD v2", 3
    address = "rajpurkar/squad_v2/squad_v2:validation"
    # With this many a model of a billion weights takes less than three minutes on a GPU.
    limit = 1000
    flag = "--squad-data"
    demo = "squad"
    needs = ("context", "question", "answers.text")
    answer_score = "f1"
    clustered = "article"
    note = (
        "SQuAD v2: many questions have no answer in their passage, and a model that gives up "
        'answering scores on all of those; `"no answer"` is the share of all questions '
        "to which it says so, or nothing."
    )
    metrics = (
        MetricKind(
            name,
            "f1",
            "SQuAD v2 F1",
            of_field("f1"),
            cluster="cluster",
            column="SQuAD v2 F1",
            rewards_silence=True,
            judged=True,
            f1=True,
        ),
        MetricKind(
            name,
            "exact_match",
            "SQuAD v2 exact match",
            of_field("exact_match"),
            binary="exact_match",
            cluster="cluster",
            column="SQuAD v2 EM",
            rewards_silence=True,
            judged=True,
        ),
        MetricKind(
            name,
            "answerable_f1",
            "SQuAD v2 answerable F1",
            of_field("f1"),
            cluster="cluster",
            only=_is_answerable,
            column="SQuAD v2 answerable F1",
            judged=True,
            recovered=True,
        ),
        MetricKind(
            name,
            "unanswerable_exact_match",
            "SQuAD v2 unanswerable EM",
            of_field("exact_match"),
            binary="exact_match",
            cluster="cluster",
            only=lambda sample: not _is_answerable(sample),
            column="SQuAD v2 unanswerable EM",
            rewards_silence=True,
            judged=True,
        ),
        MetricKind(
            name,
            "no_answer",
            'SQuAD v2 "no answer"',
            _no_answer,
            larger_is_better=False,
            cluster="cluster",
            silence=True,
            column='SQuAD v2 "no answer"',
        ),
    )

    def score(self, row: dict, results: list[str]) -> Record:
        """Best exact match and F1 over the question's gold answers."""
        predicted = prediction(results[0])
        golds = list(row["answers"]["text"]) or [""]
        return {
            "exact_match": max(exact_match(predicted, gold) for gold in golds),
            "f1": max(token_f1(predicted, gold) for gold in golds),
            "answerable": bool(row["answers"]["text"]),
            "predicted": predicted,
            "text": results[0],
            "cluster": row.get("title") or row["context"][:60],
        }

    def shown(self, record: Record, row: dict | None) -> Shown:
        nothing = "(says that there is no answer)"
        if row is None:
            # What a model answers is mostly a piece of the passage.
            gold = "(the passage answers it)" if record["answerable"] else "(unanswerable)"
            return Shown(gold=gold, answer="" if record["predicted"] else nothing)
        golds = list(dict.fromkeys(row["answers"]["text"]))
        return Shown(
            row["question"],
            " / ".join(golds) or "(unanswerable)",
            record["predicted"] or nothing,
            row["context"],
        )

    def summary(self, samples: list[Record]) -> dict:
        answerable = [sample for sample in samples if sample["answerable"]]
        unanswerable = [sample for sample in samples if not sample["answerable"]]
        return {
            "samples": len(samples),
            "f1": mean_of(samples, "f1"),
            "exact_match": mean_of(samples, "exact_match"),
            "answerable_samples": len(answerable),
            "answerable_f1": mean_of(answerable, "f1"),
            "answerable_exact_match": mean_of(answerable, "exact_match"),
            "unanswerable_samples": len(unanswerable),
            "unanswerable_exact_match": mean_of(unanswerable, "exact_match"),
            "no_answer": _no_answer(samples).value,
        }

    def in_words(self, summary: dict) -> str:
        return (
            f"SQuAD F1 {summary['f1']:.3f} EM {summary['exact_match']:.3f}, no answer "
            f"{summary['no_answer']:.3f}"
        )


TASK = SquadV2()

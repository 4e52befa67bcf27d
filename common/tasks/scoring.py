"""Scores of single answers, and summaries of many: pure functions of text and numbers, no model in sight."""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np

from common.tasks.numbers import extract_number, parse_number

TOLERANCE = 1e-6


# --- ARC ---------------------------------------------------------------------------------------------------------

def arc_sample(doc: dict, results: list[tuple[float, bool]]) -> dict:
    """One question: the choice with the highest log-likelihood, plain and divided by its length in characters."""
    scores = np.array([score for score, _ in results])
    lengths = np.array([max(len(text), 1) for text in doc["choices"]["text"]])
    gold = doc["choices"]["label"].index(doc["answerKey"])
    plain, normalised = int(scores.argmax()), int((scores / lengths).argmax())
    # Some questions label their choices 1 to 4: positions are mapped to letters, so that macro F1 has one class each.
    return {"acc": float(plain == gold), "acc_norm": float(normalised == gold), "gold": "ABCDEFGH"[gold],
            "predicted": "ABCDEFGH"[plain], "predicted_norm": "ABCDEFGH"[normalised],
            "scores": [round(float(score), 4) for score in scores]}


def macro_f1(gold: list[str], predicted: list[str]) -> float:
    """Mean over the gold classes of the F1 of each class."""
    scores = []
    for label in sorted(set(gold)):
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        scores.append(2 * hits / (gold.count(label) + predicted.count(label)))
    return float(np.mean(scores))


# --- SQuAD v2 ----------------------------------------------------------------------------------------------------

def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces: the normalisation SQuAD's scores are defined on."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, gold: str) -> float:
    return float(normalise_answer(prediction) == normalise_answer(gold))


def token_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the answers' words; 1 where both are empty, 0 where one is."""
    found, wanted = normalise_answer(prediction).split(), normalise_answer(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def squad_prediction(text: str) -> str:
    """The answer in a model's text: its first line, empty where it says that the question is unanswerable."""
    lines = text.strip().splitlines()
    answer = lines[0].strip() if lines else ""
    return "" if normalise_answer(answer).startswith(("unanswerable", "not answerable", "no answer")) else answer


def squad_sample(doc: dict, results: list[str]) -> dict:
    """One question: best exact match and F1 over its gold answers; an unanswerable question's gold answer is empty."""
    prediction = squad_prediction(results[0])
    golds = list(doc["answers"]["text"]) or [""]
    return {"exact_match": max(exact_match(prediction, gold) for gold in golds),
            "f1": max(token_f1(prediction, gold) for gold in golds), "answerable": bool(doc["answers"]["text"]),
            "predicted": prediction, "text": results[0], "cluster": doc.get("title") or doc["context"][:60]}


# --- OpenMath ----------------------------------------------------------------------------------------------------

def openmath_sample(doc: dict, results: list[str]) -> dict:
    """One problem: distance of the answer from the expected number, None where the text holds no number."""
    expected = parse_number(str(doc["expected_answer"]))
    predicted = extract_number(results[0])
    difference = None if predicted is None else abs(predicted - expected)
    return {"correct": float(difference is not None and difference <= TOLERANCE), "expected": expected,
            "predicted": predicted, "absolute_difference": difference, "text": results[0]}


SAMPLE_SCORES = {"arc": arc_sample, "squad_v2": squad_sample, "openmath": openmath_sample}


# --- Summaries ---------------------------------------------------------------------------------------------------

def summarise(task: str, samples: list[dict]) -> dict:
    """The metrics of a task from its per-sample records alone.

    openmath: mean and median of the absolute difference are over the answers that hold a number; the share of answers
    that hold none is `no_number`.
    """
    def mean(name: str, chosen: list[dict] = samples) -> float | None:
        return float(np.mean([sample[name] for sample in chosen])) if chosen else None

    if task == "arc":
        gold = [sample["gold"] for sample in samples]
        return {"samples": len(samples), "accuracy": mean("acc"), "accuracy_norm": mean("acc_norm"),
                "macro_f1": macro_f1(gold, [sample["predicted"] for sample in samples])}
    if task == "squad_v2":
        answerable = [sample for sample in samples if sample["answerable"]]
        unanswerable = [sample for sample in samples if not sample["answerable"]]
        return {"samples": len(samples), "f1": mean("f1"), "exact_match": mean("exact_match"),
                "answerable_samples": len(answerable), "answerable_f1": mean("f1", answerable),
                "answerable_exact_match": mean("exact_match", answerable),
                "unanswerable_samples": len(unanswerable), "unanswerable_exact_match": mean("exact_match", unanswerable)}
    if task == "openmath":
        differences = [sample["absolute_difference"] for sample in samples if sample["absolute_difference"] is not None]
        return {"samples": len(samples), "within_tolerance": mean("correct"),
                "mean_absolute_difference": float(np.mean(differences)) if differences else None,
                "median_absolute_difference": float(np.median(differences)) if differences else None,
                "no_number": 1 - len(differences) / len(samples)}
    raise ValueError(f"no task {task}")

"""Scores of answers as text, which several tasks can use: pure functions, no model in sight."""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces: the normalisation SQuAD's scores
    are defined on.
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, gold: str) -> float:
    return float(normalise_answer(prediction) == normalise_answer(gold))


def token_f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the answers' words; 1 where both are empty, 0 where
    one is.
    """
    found, wanted = normalise_answer(prediction).split(), normalise_answer(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def mean_of(samples: list[dict], field: str) -> float | None:
    """The mean of a field of records; None of no records."""
    return float(np.mean([sample[field] for sample in samples])) if samples else None

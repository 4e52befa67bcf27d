"""Whether an evaluation text holds passages of a calibration text: remembered in a checkpoint as
hashes of word sequences.

Of the calibration text every eighth sequence of 13 words is hashed (13 words is the length
customary for such checks), of the evaluation text every one: a run of 20 words in common is always
found, and no text has to be kept. Set phrases are in many texts; an overlap is a text of which half
or more is known.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

import numpy as np

WORDS, STRIDE = 13, 8
TOO_MUCH = 0.5


def _hashes(text: str, stride: int) -> Iterable[tuple[int, str]]:
    words = re.findall(r"\w+", text.lower())
    for start in range(0, len(words) - WORDS + 1, stride):
        passage = " ".join(words[start : start + WORDS])
        yield (
            int.from_bytes(hashlib.blake2b(passage.encode(), digest_size=8).digest(), "little"),
            passage,
        )


def encode(texts: Iterable[str]) -> str:
    """The hashes of calibration texts, as base64 of 64-bit numbers in ascending order."""
    found = sorted({number for text in texts for number, _ in _hashes(text, STRIDE)})
    return base64.b64encode(np.array(found, "<u8").tobytes()).decode()


def decode(encoded: str) -> set[int]:
    """The hashes that `encode` wrote."""
    return set(np.frombuffer(base64.b64decode(encoded), "<u8").tolist())


def largest_share(known: set[int], texts: Iterable[str]) -> tuple[float, str]:
    """The largest share of any of `texts` that is known, between 0 and 1, and a passage of it."""
    largest = 0.0, ""
    for text in texts:
        passages = list(_hashes(text, 1))
        shared = [passage for number, passage in passages if number in known]
        if shared:
            # One in STRIDE of a copied text's passages was kept.
            largest = max(largest, (min(1.0, STRIDE * len(shared) / len(passages)), shared[0]))
    return largest

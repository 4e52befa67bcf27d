"""Which prompts are read together, and what they share."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def row_length(row) -> int:
    return len(row[0]) + sum(map(len, row[1]))


def batches(rows: list, tokens: int) -> list[list]:
    """Cut rows, longest first, into batches of at most about `tokens` padded tokens."""
    batches, start = [], 0
    while start < len(rows):
        size = max(1, tokens // row_length(rows[start]))
        batches.append(rows[start : start + size])
        start += size
    return batches


def tree_mask(branch: Tensor) -> Tensor:
    """Attention mask [batch, 1, length, length] (True: may see) of rows with a question (0) and
    branches (1, 2, ...).
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = branch.unsqueeze(2) == branch.unsqueeze(1)
    question = (branch == 0).unsqueeze(1)
    return (causal & (same | question)).unsqueeze(1)


def common_prefix(prompts: list[list[int]]) -> int:
    """Tokens that all prompts start with; at least one token of each prompt is left over."""
    first = os.path.commonprefix(prompts)
    return min(len(first), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0


def cut_at_stops(text: str, until: list[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text

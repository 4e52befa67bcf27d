"""How far next-token distributions are from the original model's, on the same tokens.

Reported as llama.cpp's tool does: Kullback-Leibler divergence in nats, mean, median and the rare
large ones, and how often both models' most likely token is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = {"kl_median": 0.5, "kl_99": 0.99, "kl_999": 0.999}


def divergence_terms(expected: Tensor, found: Tensor) -> Tensor:
    """What each entry of the vocabulary adds to the Kullback-Leibler divergence of `found` from
    `expected`, both log-probabilities [tokens, vocabulary]: [tokens, vocabulary], in nats.
    """
    return (expected - found).mul_(expected.exp())


def token_divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence of `found` from `expected`, both log-probabilities [tokens,
    vocabulary], and whether the most likely token is the same: two tensors [tokens].
    """
    divergence = divergence_terms(expected, found).sum(-1)
    # Rounding can take the divergence of equal distributions a hair below zero.
    return divergence.clamp(min=0.0), expected.argmax(-1) == found.argmax(-1)


def mean_divergence(expected: Tensor, found: Tensor) -> float:
    """Mean over tokens of the divergence of `found` from `expected`, both log-probabilities
    [tokens, vocabulary].
    """
    return (divergence_terms(expected, found).sum() / len(expected)).item()


def summarise_divergence(samples: list[dict]) -> dict:
    """Divergence over all tokens of the windows' records: mean, quantiles, share of tokens with the
    same most likely one.
    """
    values = torch.tensor(
        [value for sample in samples for value in sample["kl"]], dtype=torch.float64
    )
    same = sum(sample["same_top"] for sample in samples)
    return {
        "tokens": len(values),
        "kl_mean": values.mean().item(),
        "same_top": same / len(values),
        **{name: torch.quantile(values, share).item() for name, share in QUANTILES.items()},
    }

"""How far next-token distributions are from the original model's, on the same tokens.

Reported as llama.cpp's tool does: Kullback-Leibler divergence in nats, mean, median and the rare
large ones, and how often both models' most likely token is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How many positions, and entries of the vocabulary, have their logits recorded.
POSITIONS, ENTRIES = 4, 256

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


def perplexity_of_logits(logits: Tensor, tokens: Tensor) -> float:
    """Perplexity of tokens [1, length] under their logits [length, vocabulary]."""
    return torch.exp(
        torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[0, 1:].to(logits.device))
    ).item()


def divergence_of_logits(reference: Tensor, logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence in nats of `logits` from `reference`, both [length,
    vocabulary].
    """
    expected = torch.log_softmax(reference.float(), -1)
    found = torch.log_softmax(logits.float(), -1)
    return mean_divergence(expected, found)


def sample_logits(logits: Tensor) -> dict:
    """A small sample of logits [length, vocabulary] to keep in the metadata: positions, every
    stride-th entry, values.
    """
    length, vocabulary = logits.shape
    positions = torch.linspace(length // 4, length - 1, POSITIONS).long().tolist()
    stride = max(1, vocabulary // ENTRIES)
    values = [[round(v, 5) for v in logits[p, ::stride].tolist()] for p in positions]
    return {"positions": positions, "vocabulary_stride": stride, "logits": values}


def sample_difference(logits: Tensor, recorded: dict) -> float:
    """Root mean square difference between logits and a record of `sample_logits`, relative to the
    record's spread.
    """
    found = logits[recorded["positions"], :: recorded["vocabulary_stride"]].float().cpu()
    expected = torch.tensor(recorded["logits"])
    return ((found - expected).square().mean().sqrt() / expected.std()).item()

"""Made-up layers to round: weights, correlated inputs and their Gram matrix."""

import torch

from common.kernels.rounding import search_range


def correlated_inputs(tokens, channels, generator):
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    return (
        torch.randn(tokens, channels, generator=generator)
        @ (mixing + 0.3 * torch.eye(channels))
        * torch.exp(torch.randn(channels, generator=generator))
    )


def problem(rows, channels, grid, generator):
    weight = torch.randn(rows, channels, generator=generator) * 0.05
    x = correlated_inputs(1024, channels, generator)
    gram = x.T @ x / len(x)
    return weight, x, gram, *search_range(weight, grid, gram.diagonal())

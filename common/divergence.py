"""How far a quantized model's next-token distributions are from the original model's, on the same tokens.

The original is walked through layer by layer, so it is never in memory whole beside the other; only its last hidden states are
kept, and logits are made from them a slice at a time. Reported as llama.cpp's tool does: Kullback-Leibler divergence in nats,
mean, median and the rare large ones, and how often both models' most likely token is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.layerwise import CHUNK_TOKENS
from common.models import SourceModel
from common.progress import track

QUANTILES = {"kl_median": 0.5, "kl_99": 0.99, "kl_999": 0.999}


@torch.no_grad()
def last_hidden_states(source: SourceModel, windows: Tensor) -> list[Tensor]:
    """Hidden states [length, hidden] after the last decoder layer, on the host, of each window of token ids [samples, length]."""
    arguments = source.layer_arguments(windows.shape[1])
    rows = max(1, CHUNK_TOKENS[source.device.type] // windows.shape[1])
    chunks = [source.embed(chunk).cpu() for chunk in windows.split(rows)]
    for index in track(range(source.num_layers), "original model", unit="layers"):
        layer = source.load_layer(index)
        for i, chunk in enumerate(chunks):
            output = layer(chunk.to(source.device), **arguments[index])
            chunks[i] = (output[0] if isinstance(output, tuple) else output).cpu()
        source.release_layer(index)
    return list(torch.cat(chunks))


def compare_logits(original: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence of `logits` from `original`, both [tokens, vocabulary], and whether the most likely token is
    the same: two tensors [tokens].
    """
    expected, found = torch.log_softmax(original.float(), -1), torch.log_softmax(logits.float(), -1)
    divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
    # Rounding can take the divergence of equal distributions a hair below zero.
    return divergence.clamp(min=0.0), expected.argmax(-1) == found.argmax(-1)


def summarise(samples: list[dict]) -> dict:
    """Divergence over all tokens of the windows' records: mean, quantiles, share of tokens with the same most likely one."""
    values = torch.tensor([value for sample in samples for value in sample["kl"]], dtype=torch.float64)
    same = sum(sample["same_top"] for sample in samples)
    return {"tokens": len(values), "kl_mean": values.mean().item(), "same_top": same / len(values),
            **{name: torch.quantile(values, share).item() for name, share in QUANTILES.items()}}

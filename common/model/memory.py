"""How much memory a model's parts take as it runs, and how much work fits into what is left."""

from __future__ import annotations

import torch

from common.base.device_memory import available, halved_to_fit

# Share of what is left that one piece of work is sized for: a batch of tokens that passes through a
# layer, or a slice of logits.
TOKENS_SHARE, LOGITS_SHARE = 0.5, 0.25
# Of a position and an entry of the vocabulary: up to four numbers in float32 and two of 16 bits.
LOGIT_BYTES = 20


def token_bytes(config, element: int) -> int:
    """About what a token takes while it passes through a decoder layer, all tensors on the way
    included.

    Args:
        config: the model's configuration; element: bytes of a number.
    """
    return (8 * config.intermediate_size + 16 * config.hidden_size) * element


def cache_bytes(model, element: int) -> int:
    """What a token takes in the key-value cache."""
    config, attention = model.config, model.model.layers[0].self_attn
    return 2 * config.num_hidden_layers * config.num_key_value_heads * attention.head_dim * element


def working_bytes(model, element: int) -> int:
    """What running a model takes beside its weights, at the least at which it runs well: four
    answers of 1,024 tokens, 2,048 tokens in a layer, logits of 256 positions.
    """
    logits = 256 * LOGIT_BYTES * model.config.vocab_size
    return 4096 * cache_bytes(model, element) + 2048 * token_bytes(model.config, element) + logits


def tokens_at_once(most: int, config, element: int, device: torch.device) -> int:
    """How many tokens pass through a layer at once: `most`, halved until the device has room."""
    return halved_to_fit(most, token_bytes(config, element), TOKENS_SHARE * available(device))


def logits_at_once(most: int, vocabulary: int, device: torch.device) -> int:
    """How many positions have logits computed at once: `most`, halved until the device has room."""
    return halved_to_fit(most, LOGIT_BYTES * vocabulary, LOGITS_SHARE * available(device))

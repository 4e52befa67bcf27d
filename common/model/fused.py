"""Let transformers' decoder layers run with fewer kernels on a card: norms, rotary embedding and
gate in one each.

Without them a third of a forward pass goes into reading and writing intermediate tensors
(docs/performance.md). Wherever there is no kernel for what is asked, a layer runs as transformers
wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from common.base.gpu import FLASH_ATTENTION, supports
from common.kernels import gradients
from common.kernels.inference import add_rms_norm, rotate_heads, silu_mul
from common.model.architecture import is_fused


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward passes of a causal LM's norms, attention and MLPs; gradients go through
    them, too. Families whose layers compute something else than Llama's are left as they are.
    """
    if not is_fused(model.config):
        return
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = partial(_norm, module, module.forward)
        elif kind.endswith("MLP") and module.config.hidden_act == "silu":
            module.forward = partial(_mlp, module, module.forward)
        elif kind.endswith("Attention"):
            module.forward = partial(_attention, module, module.forward)


def _has_kernels(hidden: Tensor) -> bool:
    return hidden.is_cuda


def _norm(norm: nn.Module, original: Callable, hidden: Tensor) -> Tensor:
    if not _has_kernels(hidden):
        return original(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_grad_enabled():
        found = gradients.rms_norm(rows, norm.weight, norm.variance_epsilon)
    else:
        found = cast(Tensor, add_rms_norm(rows, None, norm.weight, norm.variance_epsilon))
    return found.view(hidden.shape)


def _mlp(mlp: nn.Module, original: Callable, hidden: Tensor) -> Tensor:
    if not _has_kernels(hidden):
        return original(hidden)
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    product = gradients.silu_mul if torch.is_grad_enabled() else silu_mul
    found = cast(Tensor, product(gate.flatten(0, -2), up.flatten(0, -2)))
    return mlp.down_proj(found.view(gate.shape))


def _attention(
    attention: nn.Module,
    original: Callable,
    hidden_states: Tensor,
    position_embeddings=None,
    attention_mask=None,
    past_key_values=None,
    **arguments,
) -> tuple[Tensor, None]:
    """Causal attention over whole windows; with a cache, a mask or online transforms as
    transformers does it.
    """
    plain = (
        attention_mask is None
        and past_key_values is None
        and attention.config._attn_implementation == "sdpa"
    )
    size = attention.head_dim
    if not (plain and _has_kernels(hidden_states) and size & (size - 1) == 0):
        return original(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **arguments,
        )
    shape = *hidden_states.shape[:2], -1, size
    query, key, value = (
        linear(hidden_states).view(shape)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if torch.is_grad_enabled():
        query, key = (gradients.rotated_heads(part, *position_embeddings) for part in (query, key))
    else:
        for part in (query, key):
            rotate_heads(part, *position_embeddings)
    output = attend_causally(query, key, value, attention.scaling)
    return attention.o_proj(output), None


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention from queries, keys and values [batch, length, heads or key-value heads,
    size] to [batch, length, heads * size]: of whole windows, or of the last tokens alone, where
    there are more keys and values than queries.
    """
    # Flash attention alone lets several queries share a key; the other kernels would make way for
    # one that keeps all scores in memory.
    shared = supports(FLASH_ATTENTION) and query.element_size() == 2
    if not shared:
        queries = query.shape[2] // key.shape[2]
        key, value = (part.repeat_interleave(queries, dim=2) for part in (key, value))
    lengths = query.shape[1], key.shape[1]
    whole = lengths[0] == lengths[1]
    output = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if whole else causal_lower_right(*lengths),
        is_causal=whole,
        scale=scaling,
        enable_gqa=shared,
    )
    return output.transpose(1, 2).flatten(2)

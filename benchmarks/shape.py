"""A model of the Llama-3.2-1B shape with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
             num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192)


def random_model(device: torch.device, dtype: torch.dtype, eos_token_id: int = 2, **changes) -> LlamaForCausalLM:
    """The model on `device`; `changes` replace entries of SHAPE."""
    config = LlamaConfig(**{**SHAPE, **changes}, eos_token_id=eos_token_id)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def write_random_model(folder: Path, tokenizer, device: torch.device, **changes) -> Path:
    """The same as a folder with safetensors and a tokenizer."""
    random_model(device, torch.bfloat16, tokenizer.eos_token_id, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

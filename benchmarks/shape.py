"""A model of the Llama-3.2-1B shape with random weights: speed does not depend on what the weights
are.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
)


def random_model(
    device: torch.device, dtype: torch.dtype, eos_token_id: int = 2, **changes
) -> LlamaForCausalLM:
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


def write_random_shards(folder: Path, tokenizer, shape: dict) -> None:
    """A model of random weights as a folder, a shard for each decoder layer, never whole in memory.

    All layers are the same one. shape: entries of a LlamaConfig.
    """
    config = LlamaConfig(
        **shape,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()
        }
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()

    torch.manual_seed(0)
    first = "model.layers.0."
    layer = {name.removeprefix(first): random(name) for name in shapes if name.startswith(first)}
    shards = [
        {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
        for i in range(config.num_hidden_layers)
    ]
    ends = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        *([] if config.tie_word_embeddings else ["lm_head.weight"]),
    ]
    shards.append({name: random(name) for name in ends})
    folder.mkdir()
    names = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

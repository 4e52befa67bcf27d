"""What GGUF says of a model beside tensors and vocabulary: sizes, rotary embedding, context; and
whether it can be said.
"""

from __future__ import annotations

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.base.errors import UserError, first_line
from common.checkpoint.format import WeightFormat
from common.exporting.blocks import BLOCK, has_blocks
from common.model.architecture import FAMILIES, GGUFForm
from common.numerics.grid import Grid

# What a rotary embedding may say without asking for more than its scaling's type does here.
_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
}
# "type": an older name of rope_type.
_ALWAYS = {"rope_theta", "type"}
# YaRN's, which llama.cpp has by default too.
_BETAS = {"beta_fast": 32, "beta_slow": 1}


def plain_config(content: dict):
    """transformers' configuration, of the content of a config.json without online transforms.

    Raises:
        UserError: it is none.
    """
    plain = {key: value for key, value in content.items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**plain)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json is damaged ({first_line(error)})") from None


def gguf_form(config) -> GGUFForm:
    """How llama.cpp runs a model of this transformers configuration.

    Raises:
        UserError: it does not, or computes something else.
    """
    exported = {name: family.gguf for name, family in FAMILIES.items() if family.gguf}
    form = exported.get(config.model_type)
    if form is None:
        raise UserError(
            f"architecture {config.model_type} is not exported to GGUF; exported are "
            f"{', '.join(exported)}"
        )
    if config.hidden_act != "silu":
        raise UserError(f"GGUF cannot tell that the MLP's activation is {config.hidden_act}")
    if getattr(config, "attention_bias", False) and not form.qkv_bias:
        raise UserError(
            f"GGUF has no biases for q_proj, k_proj and v_proj of a {config.model_type} model"
        )
    _check_rope(config, form)
    return form


def check_form(config, form: WeightFormat, online: bool) -> None:
    """Refuse what GGUF cannot tell.

    Args:
        config: the model's, transformers'.
        form: how the checkpoint stores its weights.
        online: the model rotates or rounds what it computes as it runs.
    Raises:
        UserError: naming it, and the way out where there is one.
    """
    gguf_form(config)
    if online:
        raise UserError(
            "GGUF cannot tell what --act-bits and --kv-bits do as the model runs; export a "
            "checkpoint made without them"
        )
    if form.activation_bits:
        raise UserError(
            f"GGUF cannot tell that activations are rounded to {form.activation_bits} bits (W8A8); "
            "export a checkpoint of another method, whose weights alone are rounded"
        )
    sizes = {config.hidden_size, config.intermediate_size}
    sizes.add(config.num_attention_heads * head_size(config))
    _check_grid("linears", form.grid, sizes)
    for name, grid in form.vocabulary.items():
        _check_grid(name.split(".")[-1], grid, {config.hidden_size})


def _check_grid(what: str, grid: Grid, sizes: set[int]) -> None:
    """Refuse a grid that no blocks hold; sizes: input channels of what is rounded to it."""
    if grid.bits == 8 and not grid.symmetric:
        raise UserError(
            f"GGUF has no 8-bit blocks with zero-points ({what}); quantize without --asymmetric"
        )
    if grid.bits not in (4, 8):
        raise UserError(
            f"GGUF has no blocks that hold {grid.bits}-bit codes as they are ({what}); quantize "
            "with --bits 4 or 8"
        )
    if not has_blocks(grid):
        raise UserError(
            f"groups of {grid.group_size} do not fill GGUF's blocks of {BLOCK} ({what}); quantize "
            f"with a --group-size that is a multiple of {BLOCK}"
        )
    if odd := [size for size in sorted(sizes) if size % BLOCK]:
        raise UserError(
            f"rows of {odd[0]} weights do not fill GGUF's blocks of {BLOCK} ({what}): this model "
            "has no such file"
        )


def _check_rope(config, form: GGUFForm) -> None:
    rope = {key: value for key, value in config.rope_parameters.items() if value is not None}
    kind = rope.pop("rope_type", "default")
    known = _ROPE_FIELDS.get(kind)
    odd = {} if known is None else {key: rope[key] for key in rope.keys() - known - _ALWAYS}
    if odd.get("partial_rotary_factor") == 1:
        del odd["partial_rotary_factor"]
    odd.update({key: rope[key] for key, usual in _BETAS.items() if rope.get(key, usual) != usual})
    untold = kind == "llama3" and not form.own_frequencies
    if known is None or odd or untold:
        details = "".join(f", {key} {value}" for key, value in sorted(odd.items()))
        raise UserError(
            f"GGUF cannot tell the rotary embedding of this {config.model_type} model: {kind}"
            f"{details}"
        )


def head_size(config) -> int:
    """Channels of an attention head."""
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def sliding_window(config) -> int | None:
    """Tokens that attention looks back at, where that is fewer than the context; else None."""
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return window if window and window < config.max_position_embeddings else None


def frequency_factors(config) -> Tensor | None:
    """By what llama.cpp divides each rotary frequency, [head size / 2] float32; None where the
    settings alone say it.
    """
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size, theta = head_size(config), config.rope_parameters["rope_theta"]
    unscaled = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (unscaled / scaled.double()).float()


def write_settings(writer: GGUFWriter, config, vocabulary_size: int) -> None:
    """Sizes and the rotary embedding; `vocabulary_size` counts the embedding's rows."""
    writer.add_block_count(config.num_hidden_layers)
    # Attention in llama.cpp looks back at everything: as the model's does within its window.
    writer.add_context_length(sliding_window(config) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary_size)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(original or config.max_position_embeddings)

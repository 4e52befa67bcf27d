"""How the models of each family are built: what quantization has to know of them, said once.

A family is one entry of `FAMILIES`, data alone. All are decoders whose layers are attention and a
gated MLP, one after the other, each between an RMSNorm that reads the residual stream and the sum
that writes it. What a family does beside that (rotary embedding or none, sliding windows, norms of
queries and keys) happens inside transformers' layers, which run as they are, so nothing here has to
say it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a decoder layer that read the same tensor. All names are those inside the layer.

    linears: those that share rows in one (qkv_proj) have them in the order q, k, v or gate, up.
    fed_by: the module whose output, scaled by its gain or rows, is read: a norm, or a linear, of
        which the last rows count (v of qkv_proj, up of gate_up_proj).
    reads_residual: fed_by is a norm, which reads the residual stream.
    by_head: what is read are attention's averages of fed_by's rows, each key-value head's for all
        query heads that share it.
    writes_residual: the output is added to the residual stream.
    output_norm: the norm that the output goes through before that, if there is one.
    """

    linears: tuple[str, ...]
    fed_by: str
    reads_residual: bool = False
    by_head: bool = False
    writes_residual: bool = False
    output_norm: str | None = None

    def in_features(self, layer: nn.Module) -> int:
        """Input channels of the group's linears."""
        return layer.get_submodule(self.linears[0]).in_features

    def heads(self, in_features: int, config) -> tuple[int, int, int]:
        """How the input channels follow from the rows or gains of `fed_by`: [key-value heads, query
        heads that share each, size]; (1, 1, n) where they are the same.
        """
        if not self.by_head:
            return 1, 1, in_features
        count, queries = config.num_key_value_heads, config.num_attention_heads
        return count, queries // count, in_features // queries


@dataclass(frozen=True)
class GGUFForm:
    """How llama.cpp runs a family.

    name: the architecture's in a GGUF file.
    pairs: rotary embedding turns neighbouring channels of a head, where transformers turns those
        half a head apart, so rows of q_proj and k_proj change places.
    own_frequencies: a tensor with a factor for each rotary frequency is read.
    qkv_bias: biases of q_proj, k_proj and v_proj are read.
    """

    name: str
    pairs: bool = False
    own_frequencies: bool = False
    qkv_bias: bool = True


@dataclass(frozen=True)
class Family:
    """The models of one transformers model type.

    groups: of a decoder layer's linears, in the order in which they run; they are all its linears.
    gain_offset: what a norm adds to its stored weight to get its gain. embedding_scale,
    residual_scale, logits_divisor, logits_cap: fields of the configuration with
        what the embedding's output and the output of attention and MLP are multiplied by, the
        logits divided by, and then softly capped at (c · tanh(x / c)); None where that is not
        done, or where the module itself does it.
    fused: the layers compute just what Llama's do, so `fused` and `decoding` can run in their
        place.
    gguf: None where models of the family are not exported to GGUF.
    """

    model_type: str
    groups: tuple[LinearGroup, ...]
    gain_offset: float = 0.0
    embedding_scale: str | None = None
    residual_scale: str | None = None
    logits_divisor: str | None = None
    logits_cap: str | None = None
    fused: bool = False
    gguf: GGUFForm | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of all linears of a decoder layer."""
        return tuple(name for group in self.groups for name in group.linears)

    @property
    def reading(self) -> tuple[LinearGroup, LinearGroup]:
        """The groups that read the residual stream: attention's and the MLP's."""
        attention, mlp = (group for group in self.groups if group.reads_residual)
        return attention, mlp

    @property
    def writing(self) -> tuple[LinearGroup, LinearGroup]:
        """The groups of one linear each that write it: attention's and the MLP's."""
        attention, mlp = (group for group in self.groups if group.writes_residual)
        return attention, mlp

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of a decoder layer's norms of hidden states."""
        after = [group.output_norm for group in self.writing if group.output_norm]
        return (*(group.fed_by for group in self.reading), *after)

    @property
    def normalises_output(self) -> bool:
        """Whether a norm stands between linears and the residual stream that they write. Its gains
        scale the stream's channels, so a rotation of the stream does not fold into weights: what is
        turned has no such channels. And what the stream lacks is not what the linears should add.
        """
        return any(group.output_norm for group in self.writing)

    def gain(self, norm: nn.Module) -> Tensor:
        """What a norm multiplies its normalised input by, [size], in float32 or wider: 16 bits do
        not hold the sum.
        """
        weight = norm.weight.to(torch.promote_types(norm.weight.dtype, torch.float32))
        return weight + self.gain_offset

    def set_gain(self, norm: nn.Module, gain: Tensor) -> None:
        """Let a norm have this gain [size], in the type of its weight."""
        stored = gain - self.gain_offset if self.gain_offset else gain
        norm.weight.data = stored.to(norm.weight.dtype)

    def scale_embedding(self, hidden: Tensor, config) -> Tensor:
        """The residual stream before the first layer, of what the embedding puts out."""
        scale = self._value(config, self.embedding_scale)
        return hidden if scale is None else hidden * scale

    def lag_of_output(self, lag: Tensor, config) -> Tensor:
        """By how much outputs of attention or MLP fall short if the stream does by `lag`."""
        scale = self._value(config, self.residual_scale)
        return lag if scale is None else lag / scale

    def finish_logits(self, logits: Tensor, config) -> Tensor:
        """The model's logits, of what the head's matrix puts out."""
        divisor = self._value(config, self.logits_divisor)
        cap = self._value(config, self.logits_cap)
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @staticmethod
    def _value(config, name: str | None) -> float | None:
        return None if name is None else getattr(config, name)


def _wired(
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj"),
    mlp_norm: str = "post_attention_layernorm",
    output_norms: tuple[str | None, str | None] = (None, None),
) -> tuple[LinearGroup, ...]:
    """The groups of a layer with these linears and norms; v is last in `qkv`, up in `gate_up`."""
    attention = tuple(f"self_attn.{name}" for name in qkv)
    mlp = tuple(f"mlp.{name}" for name in gate_up)
    return (
        LinearGroup(attention, "input_layernorm", reads_residual=True),
        LinearGroup(
            ("self_attn.o_proj",),
            attention[-1],
            by_head=True,
            writes_residual=True,
            output_norm=output_norms[0],
        ),
        LinearGroup(mlp, mlp_norm, reads_residual=True),
        LinearGroup(("mlp.down_proj",), mlp[-1], writes_residual=True, output_norm=output_norms[1]),
    )


# llama.cpp has no architecture of Mistral's own: it is Llama's.
_LLAMA_CPP = GGUFForm("llama", pairs=True, own_frequencies=True)
# By transformers' model type.
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", _wired(), fused=True, gguf=_LLAMA_CPP),
        Family("mistral", _wired(), fused=True, gguf=_LLAMA_CPP),
        Family("qwen2", _wired(), fused=True, gguf=GGUFForm("qwen2")),
        Family("qwen3", _wired(), fused=True, gguf=GGUFForm("qwen3", qkv_bias=False)),
        # Its norms multiply by 1 + weight, its embedding multiplies by √hidden itself.
        Family(
            "gemma3_text",
            _wired(
                mlp_norm="pre_feedforward_layernorm",
                output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            ),
            gain_offset=1.0,
            logits_cap="final_logit_softcapping",
        ),
        Family(
            "granite",
            _wired(),
            embedding_scale="embedding_multiplier",
            residual_scale="residual_multiplier",
            logits_divisor="logits_scaling",
        ),
        Family("phi3", _wired(qkv=("qkv_proj",), gate_up=("gate_up_proj",))),
        # Layers without rotary embedding every now and then.
        Family("smollm3", _wired()),
    )
}


def family_of(layer: nn.Module) -> Family:
    """The family that a decoder layer of transformers is of."""
    return FAMILIES[layer.self_attn.config.model_type]


def is_fused(config) -> bool:
    """Whether a configuration's model is of a family whose layers compute what Llama's do."""
    family = FAMILIES.get(config.model_type)
    return family is not None and family.fused


def let_head_finish_logits(model: nn.Module) -> None:
    """From now on `model.lm_head` puts out the model's logits, and the model's own forward pass
    leaves them as they are: whoever applies the head to hidden states has to know no family.
    """
    config, family = model.config, FAMILIES.get(model.config.model_type)
    if family is None or not (family.logits_divisor or family.logits_cap):
        return
    neutral = {family.logits_divisor: 1.0, family.logits_cap: None}
    as_it_was = copy.copy(config)
    model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: family.finish_logits(logits, as_it_was)
    )
    for name, value in neutral.items():
        if name is not None:
            setattr(config, name, value)


# A buffer that transformers fills, and yet reports as missing where the embedding is quantized.
FILLED_BY_CODE = ("model.embed_tokens.embed_scale",)


def fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Give a causal LM that was built without memory the buffers that no file holds."""
    decoder, config = model.model, model.config
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    embedding = decoder.embed_tokens
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)

"""What QuaRot does while the model runs: rotations that do not fold into weights, and rounding of
activations and cache.

R3 turns queries and keys after the rotary embedding, R4 turns down_proj's input (Ashkboos et al.
2024, arXiv 2404.00456, figure 3), and where inputs are rounded what the norms put out is turned
too: their gains can then even out the channels before, which a rotation folded into the weights
does not let them. Inputs of the linears are rounded per token, keys and values per token and head:
as every vector of the cache is rounded by itself, rounding what attention reads is the same as
storing it rounded.

A model whose weights expect this is wrong without it, so such a checkpoint has a model type that
transformers does not
know: a plain load fails at once. `runtime.load_model` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.model.architecture import family_of
from common.numerics.grid import round_clipped, round_per_vector
from common.numerics.hadamard import factors, rotate

# The key of config.json that holds what is to be done, and the suffix of a model type that has to
# have it.
CONFIG_KEY, MODEL_TYPE_SUFFIX = "online_transforms", "_with_online_transforms"
ATTENTION = "sdpa_with_online_transforms"
# What a checkpoint says of its keys beside its weights.
KEYS_FILE = "online_transforms.safetensors"


@dataclass(frozen=True)
class KeyForm:
    """How a layer's keys are put before they are rounded, so that few bits hold what tells them
    apart.

    mean, scale [key-value heads, head size]: keys become (key - mean) * scale, queries query /
    scale. Scores only lose query . mean, the same for all keys, which softmax does not see.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fitted(cls, mean: Tensor, key_square: Tensor, query_square: Tensor) -> KeyForm:
        """The form that suits keys of such a mean and mean square, and queries of such a mean
        square, averaged over the heads that share the keys; all [key-value heads, head size].

        After R3 an error is spread evenly, in steps that follow a key's length, so what it does to
        scores is E|key * scale|^2 E|query / scale|^2 up to a factor, and scale^4 = E query^2 / Var
        key makes that smallest.
        """
        scale = (query_square / (key_square - mean.square()).clamp(min=0)).pow(0.25)
        # A channel that is always the same, or that no query reads, has no scale.
        scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
        return cls(mean.float(), scale.float())

    def apply(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [batch, heads, length, head size] and keys [batch, key-value heads, ...]."""
        mean, scale = (part.to(key).unsqueeze(1) for part in (self.mean, self.scale))
        by_query = scale.repeat_interleave(query.shape[1] // key.shape[1], 0)
        return query / by_query, (key - mean) * scale


@dataclass
class OnlineTransforms:
    """Bits of activations and of the key-value cache, None: left as they are.

    activation_clips: shares of its range among which each token's best is taken; kv_clip: the share
    of a cached vector's.
    hidden: whether the inputs of q/k/v and of gate and up are rotated as well.
    keys: by layer, how its keys are put before they are rounded; not a field, as a checkpoint holds
        them in a file of its own.
    """

    activation_bits: int | None
    kv_bits: int | None
    activation_clips: tuple[float, ...]
    kv_clip: float
    hidden: bool = False
    _active = True  # not a field: nothing that is stored

    def __post_init__(self):
        self.keys: dict[int, KeyForm] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open nothing is rounded; rotations go on."""
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def round_inputs(self, inputs: Tensor) -> Tensor:
        """Inputs [..., in] of a quantized linear as they are rounded."""
        if self.activation_bits is None or not self._active:
            return inputs
        return round_clipped(inputs, self.activation_bits, self.activation_clips)

    def round_cache(self, values: Tensor) -> Tensor:
        """Keys or values [..., head size] as the cache holds them."""
        return (
            values
            if self.kv_bits is None or not self._active
            else round_per_vector(values, self.kv_bits, self.kv_clip)
        )


def enable_attention(model: nn.Module) -> None:
    """Let the model's attention do what `attach` asks of each layer."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


@contextmanager
def attention_inputs(layer: nn.Module, receive: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """While open, call `receive` with the queries and keys [batch, heads, length, head size] that a
    decoder layer's attention compares, the rotary embedding applied. Needs `enable_attention`.
    """
    layer.self_attn.receive = receive
    try:
        yield
    finally:
        del layer.self_attn.receive


def attach(layer: nn.Module, transforms: OnlineTransforms, keys: KeyForm | None = None) -> None:
    """Rotate a decoder layer's queries and keys (R3), put as `keys` says, down_proj's input (R4)
    and, if asked for, what its norms put out, as they come; round inputs and cache.
    """
    attention, family = layer.self_attn, family_of(layer)
    down = layer.get_submodule(family.writing[1].linears[0])
    weight = down.weight
    attention.online = (
        transforms,
        [factor.to(weight) for factor in factors(attention.head_dim)],
        keys,
    )
    left, right = [factor.to(weight) for factor in factors(weight.shape[1])]
    down.register_forward_pre_hook(lambda _, arguments: rotate(arguments[0], left, right))
    if transforms.hidden:
        sides = [factor.to(weight) for factor in factors(family.reading[0].in_features(layer))]
        for group in family.reading:
            norm = layer.get_submodule(group.fed_by)
            norm.register_forward_hook(lambda *call: rotate(call[-1], *sides))
    for name in family.linears:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments: transforms.round_inputs(arguments[0])
        )


def attach_all(model: nn.Module, transforms: OnlineTransforms) -> None:
    """Make a model whose weights were rotated for them run with the transforms."""
    enable_attention(model)
    for index, layer in enumerate(model.model.layers):
        attach(layer, transforms, transforms.keys.get(index))


def write_keys(folder: Path, keys: dict[int, KeyForm]) -> None:
    """Write the forms of all layers' keys, if there are any, beside a checkpoint's weights."""
    tensors = {
        f"{index}.{part}": getattr(form, part).cpu().contiguous()
        for index, form in keys.items()
        for part in ("mean", "scale")
    }
    if tensors:
        save_file(tensors, folder / KEYS_FILE)


def read_keys(folder: Path) -> dict[int, KeyForm]:
    """What `write_keys` wrote; nothing where keys are rounded as they come."""
    if not (folder / KEYS_FILE).is_file():
        return {}
    tensors = load_file(folder / KEYS_FILE)
    indices = {int(name.partition(".")[0]) for name in tensors}
    return {
        index: KeyForm(tensors[f"{index}.mean"], tensors[f"{index}.scale"]) for index in indices
    }


def mark_config(config: dict, transforms: OnlineTransforms) -> None:
    """Turn the content of a config.json into one that only `take_from_config` understands."""
    config[CONFIG_KEY] = asdict(transforms)
    config["model_type"] += MODEL_TYPE_SUFFIX
    config["architectures"] = [name + "WithOnlineTransforms" for name in config["architectures"]]


def take_from_config(config: dict) -> OnlineTransforms | None:
    """Undo `mark_config`: the transforms a checkpoint needs, or None when it is a plain one."""
    if CONFIG_KEY not in config:
        return None
    transforms = OnlineTransforms(**config.pop(CONFIG_KEY))
    config["model_type"] = config["model_type"].removesuffix(MODEL_TYPE_SUFFIX)
    config["architectures"] = [
        name.removesuffix("WithOnlineTransforms") for name in config["architectures"]
    ]
    return transforms


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments,
):
    """Scaled dot-product attention [batch, heads, length, head size] over rotated and rounded keys
    and rounded values.
    """
    if hasattr(module, "receive"):
        module.receive(query, key)
    if hasattr(module, "online"):
        transforms, (left, right), keys = module.online
        if keys:
            query, key = keys.apply(query, key)
        query, key = rotate(query, left, right), transforms.round_cache(rotate(key, left, right))
        value = transforms.round_cache(value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)

"""Which compressed-tensors checkpoints this project's own code reads: those that it writes, and the same from elsewhere.

The format says far more than that (float8, activation order, static activations, tensors left out one by one ...). What is not
listed here as known is left to transformers.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.models import LINEARS, SUPPORTED_ARCHITECTURES
from common.online import MODEL_TYPE_SUFFIX

# What a configuration may say without changing what the codes stand for.
_HARMLESS = {"version", "global_compression_ratio", "quant_method", "quantization_status", "config_groups", "ignore", "format",
             "targets", "weights", "input_activations", "num_bits", "type", "symmetric", "strategy", "group_size", "dynamic",
             "observer", "observer_kwargs", "zp_dtype"}
_DECODER_TARGETS = (["re:.*_proj$"], ["Linear"])
_END_TARGETS = {("re:.*lm_head$",): ["lm_head"], ("re:.*embed_tokens$",): ["model.embed_tokens"],
                ("re:.*embed_tokens$", "re:.*lm_head$"): ["model.embed_tokens", "lm_head"]}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_PARTS = {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias"}


def unknown_form(config: dict, names: Iterable[str] | None = None) -> str | None:
    """What of a checkpoint's form is not known here, in a few words; None if all of it is.

    Args:
        config: the content of its config.json.
        names: of all tensors in its files; None leaves them out.
    """
    try:
        return _unknown(config, None if names is None else set(names))
    except (KeyError, TypeError, AttributeError, IndexError):
        return "a quantization_config that lacks parts or is damaged"


def _unknown(config: dict, names: set[str] | None) -> str | None:
    quantization = config["quantization_config"]
    groups = list(quantization["config_groups"].values())
    if config["model_type"].removesuffix(MODEL_TYPE_SUFFIX) not in SUPPORTED_ARCHITECTURES:
        return f"architecture {config['model_type']}"
    if quantization["quant_method"] != "compressed-tensors" or quantization["quantization_status"] != "compressed":
        return f"{quantization['quant_method']}, {quantization['quantization_status']}"
    if groups[0]["targets"] not in _DECODER_TARGETS:
        return f"targets {groups[0]['targets']}"
    ends = [_END_TARGETS.get(tuple(group["targets"])) for group in groups[1:]]
    if None in ends:
        return f"targets {groups[ends.index(None) + 1]['targets']}"
    rounded = [name for end in ends for name in end]
    ignored = quantization.get("ignore") or []
    if ignored not in ([], ["lm_head"]) or (not ignored) != ("lm_head" in rounded) and groups[0]["targets"] == ["Linear"]:
        return f"a list of ignored modules, {ignored}"
    for form in (quantization, *groups):
        if found := _unknown_keys(form):
            return found
    for group in groups:
        if found := _unknown_group(group, quantization.get("format")):
            return found
    return None if names is None else _unknown_tensors(config, names, rounded)


def _unknown_keys(form: dict) -> str | None:
    """The first key that could mean something and is not known."""
    return next((f"{key} {value}" for key, value in form.items() if key not in _HARMLESS and value not in (None, {}, [])), None)


def _unknown_group(group: dict, form: str | None) -> str | None:
    weights, activations = group["weights"], group.get("input_activations")
    form = group.get("format") or form
    kind = {"type": "int", "dynamic": False, **{key: value for key, value in weights.items() if value is not None}}
    # A sequence of rounding that leaves the groups as they are.
    if kind.get("actorder") in ("weight", "static"):
        del kind["actorder"]
    if found := _unknown_keys(kind):
        return found
    if kind["type"] != "int" or kind["dynamic"] or kind["num_bits"] not in (2, 3, 4, 8):
        return f"{kind['num_bits']}-bit {kind['type']} weights"
    if kind["strategy"] not in ("group", "channel") or (kind["strategy"] == "group") != (kind.get("group_size", -1) > 0):
        return f"weights by {kind['strategy']}, group size {kind.get('group_size')}"
    if form not in ("pack-quantized", "int-quantized"):
        return f"format {form}"
    plain_bytes = kind["num_bits"] == 8 and kind["symmetric"]
    if form == "int-quantized" and not plain_bytes:
        return "int-quantized weights that are not symmetric, of 8 bits"
    if activations:
        given = {key: value for key, value in activations.items() if key not in ("observer", "observer_kwargs", "zp_dtype")}
        if {key: value for key, value in given.items() if value is not None} != _ACTIVATIONS:
            return f"input_activations {given}"
        if not (plain_bytes and kind["strategy"] == "channel"):
            return "rounded activations with weights that are not symmetric, by channel, of 8 bits"
    return None


def _unknown_tensors(config: dict, names: set[str], ends: list[str]) -> str | None:
    """A tensor of a kind that is not known, or a linear that is quantized, or is not, against expectation."""
    odd = sorted(name for name in names if name.rpartition(".")[2] not in _PARTS)
    if odd:
        return f"tensor {odd[0]}"
    expected = {f"model.layers.{i}.{linear}" for i in range(config["num_hidden_layers"]) for linear in LINEARS} | set(ends)
    found = {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
    different = sorted(expected ^ found)
    return f"{different[0]}, {'not ' if different[0] in expected else ''}quantized" if different else None

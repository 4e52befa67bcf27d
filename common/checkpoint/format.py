"""The checkpoint format, compressed-tensors: what a config.json says of it, and the tensors that
stand for a linear.

Nothing else in the project knows the format. It says far more than is written here (float8,
activation order, static activations, tensors left out one by one ...): what `unknown_form` does not
list as known is left to transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compressed_tensors import __version__ as compressed_tensors_version
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from common.base.errors import UserError
from common.base.files import load_json
from common.model.architecture import FAMILIES, Family
from common.model.online import MODEL_TYPE_SUFFIX
from common.model.tensors import TensorReader
from common.numerics.grid import SUPPORTED_BITS, Grid

# Weights alone are packed; 8-bit weights with 8-bit activations stay int8, as the integer kernels
# want them.
PACKED, INTEGER = "pack-quantized", "int-quantized"
# The tensors of a linear, and those that each form cannot do without.
PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
# What a config group is about: the decoder layers' linears, or embedding and head.
_DECODER_TARGET = "re:.*_proj$"
_VOCABULARY_TARGETS = {"model.embed_tokens": "re:.*embed_tokens$", "lm_head": "re:.*lm_head$"}
VOCABULARY = EMBEDDING, HEAD = tuple(_VOCABULARY_TARGETS)
# What a configuration may say without changing what the codes stand for.
_HARMLESS = {
    "version",
    "global_compression_ratio",
    "quant_method",
    "quantization_status",
    "config_groups",
    "ignore",
    "format",
    "targets",
    "weights",
    "input_activations",
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "dynamic",
    "observer",
    "observer_kwargs",
    "zp_dtype",
}
_ACTIVATIONS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}


@dataclass(frozen=True)
class WeightFormat:
    """How a checkpoint stores its weights.

    grid, form, activation_bits: of the decoder layers' linears; form PACKED or INTEGER, bits None
    where inputs are not rounded.
    vocabulary: the grids of embedding and head where they are rounded, by name.
    vocabulary_forms: of the same, by name.
    """

    grid: Grid
    form: str
    activation_bits: int | None
    vocabulary: dict[str, Grid]
    vocabulary_forms: dict[str, str]


def weight_format(config: dict) -> WeightFormat:
    """What a config.json, of a form that is known (`unknown_form`), says."""
    quantization = config["quantization_config"]
    linears, *vocabulary = quantization["config_groups"].values()
    activations = linears.get("input_activations")
    by_name = {name: group for group in vocabulary for name in _vocabulary_of(group)}
    forms = {name: _form_of(group, quantization) for name, group in by_name.items()}
    return WeightFormat(
        grid_of(linears),
        _form_of(linears, quantization),
        activations["num_bits"] if activations else None,
        {name: grid_of(group) for name, group in by_name.items()},
        forms,
    )


def _form_of(group: dict, quantization: dict) -> str:
    return group.get("format") or quantization.get("format") or "unknown"


def quantization_config(
    grid: Grid, activation_bits: int | None, vocabulary: dict[str, Grid], tied: bool
) -> dict:
    """What a config.json says of a checkpoint that is written; `vocabulary` as in `WeightFormat`,
    `tied`: they share a matrix.
    """
    groups = {
        "group_0": _config_group(
            [_DECODER_TARGET], scheme_of(grid, activation_bits), form_of_linears(activation_bits)
        )
    }
    for name, rounded_grid in vocabulary.items():
        rounded = VOCABULARY if tied else (name,)
        groups[f"group_{len(groups)}"] = _config_group(
            [_VOCABULARY_TARGETS[module] for module in rounded],
            scheme_of(rounded_grid),
            form_of_vocabulary(name),
        )
    forms = {group["format"] for group in groups.values()}
    quantized_head = "lm_head" in vocabulary or (tied and vocabulary)
    return {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors_version,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if quantized_head else ["lm_head"],
    }


def form_of_linears(activation_bits: int | None) -> str:
    """How the decoder layers' linears are stored."""
    return INTEGER if activation_bits else PACKED


def form_of_vocabulary(name: str) -> str:
    """How embedding or head is stored. An embedding, and with it a head that shares its matrix, as
    int8, the one form that transformers takes for it; a head of its own packed like any linear,
    since vLLM refuses int8 weights where activations are not rounded.
    """
    return INTEGER if name == EMBEDDING else PACKED


def _config_group(targets: list[str], scheme: QuantizationScheme, form: str) -> dict:
    scheme.targets, scheme.format = targets, form
    return scheme.model_dump(mode="json", exclude_none=True)


def _vocabulary_of(group: dict) -> list[str]:
    """Which of embedding and head a config group is about, by name; none if it is about something
    else.
    """
    names = [name for name, target in _VOCABULARY_TARGETS.items() if target in group["targets"]]
    return names if group["targets"] == [_VOCABULARY_TARGETS[name] for name in names] else []


def scheme_of(grid: Grid, activation_bits: int | None = None) -> QuantizationScheme:
    """The library's description of a grid for weights and, if given, of activations rounded per
    token as they come.
    """
    strategy = (
        {"strategy": "channel"}
        if grid.group_size is None
        else {"strategy": "group", "group_size": grid.group_size}
    )
    weights = QuantizationArgs(num_bits=grid.bits, type="int", symmetric=grid.symmetric, **strategy)
    activations = None
    if activation_bits:
        activations = QuantizationArgs(
            num_bits=activation_bits, type="int", symmetric=True, strategy="token", dynamic=True
        )
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)


def grid_of(scheme: dict) -> Grid:
    """The grid that a config group of a checkpoint's config.json describes."""
    weights = scheme["weights"]
    group_size = weights.get("group_size") if weights["strategy"] == "group" else None
    return Grid(weights["num_bits"], group_size, weights["symmetric"])


def family_of_config(config: dict) -> Family:
    """The family of a checkpoint of a form that is known (`unknown_form`), by its config.json's
    content.
    """
    return FAMILIES[_family_name(config)]


def _family_name(config: dict) -> str:
    return config["model_type"].removesuffix(MODEL_TYPE_SUFFIX)


def open_checkpoint(folder: Path) -> tuple[dict, TensorReader]:
    """A checkpoint's configuration (config.json as a dict) and its tensors, for looking into the
    codes.

    Raises:
        UserError: not a folder with a readable checkpoint of this format.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the --output of a quantize script")
    try:
        config = load_json(folder / "config.json")
    except OSError:
        raise UserError(f"{folder} is not a model: it has no config.json") from None
    except ValueError:
        raise UserError(f"{folder}: config.json is damaged") from None
    try:
        quantization = config["quantization_config"]
        ours = (
            quantization["quant_method"] == "compressed-tensors"
            and "group_0" in quantization["config_groups"]
        )
    except (KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{folder} is not a checkpoint of the quantize scripts (no compressed-tensors "
            f"configuration)"
        )
    try:
        grids = [grid_of(group) for group in quantization["config_groups"].values()]
        whole = all(
            isinstance(grid.bits, int) and isinstance(grid.symmetric, bool) for grid in grids
        )
        if not whole or not 0 < config["num_hidden_layers"] < 10_000:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{folder}: config.json is damaged") from None
    return config, TensorReader(folder)


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
    if _family_name(config) not in FAMILIES:
        return f"architecture {config['model_type']}"
    if (
        quantization["quant_method"] != "compressed-tensors"
        or quantization["quantization_status"] != "compressed"
    ):
        return f"{quantization['quant_method']}, {quantization['quantization_status']}"
    if groups[0]["targets"] not in ([_DECODER_TARGET], ["Linear"]):
        return f"targets {groups[0]['targets']}"
    vocabulary = [_vocabulary_of(group) for group in groups[1:]]
    if [] in vocabulary:
        return f"targets {groups[vocabulary.index([]) + 1]['targets']}"
    rounded = [name for group in vocabulary for name in group]
    ignored = quantization.get("ignore") or []
    if (
        ignored not in ([], ["lm_head"])
        or (not ignored) != ("lm_head" in rounded)
        and groups[0]["targets"] == ["Linear"]
    ):
        return f"a list of ignored modules, {ignored}"
    for form in (quantization, *groups):
        if found := _unknown_keys(form):
            return found
    for group in groups:
        if found := _unknown_group(group, _form_of(group, quantization)):
            return found
    return None if names is None else _unknown_tensors(config, names, rounded)


def _unknown_keys(form: dict) -> str | None:
    """The first key that could mean something and is not known."""
    return next(
        (
            f"{key} {value}"
            for key, value in form.items()
            if key not in _HARMLESS and value not in (None, {}, [])
        ),
        None,
    )


def _unknown_group(group: dict, form: str) -> str | None:
    weights, activations = group["weights"], group.get("input_activations")
    kind = {
        "type": "int",
        "dynamic": False,
        **{key: value for key, value in weights.items() if value is not None},
    }
    # A sequence of rounding that leaves the groups as they are.
    if kind.get("actorder") in ("weight", "static"):
        del kind["actorder"]
    if found := _unknown_keys(kind):
        return found
    if kind["type"] != "int" or kind["dynamic"] or kind["num_bits"] not in SUPPORTED_BITS:
        return f"{kind['num_bits']}-bit {kind['type']} weights"
    if kind["strategy"] not in ("group", "channel") or (kind["strategy"] == "group") != (
        kind.get("group_size", -1) > 0
    ):
        return f"weights by {kind['strategy']}, group size {kind.get('group_size')}"
    if form not in (PACKED, INTEGER):
        return f"format {form}"
    plain_bytes = kind["num_bits"] == 8 and kind["symmetric"]
    if form == INTEGER and not plain_bytes:
        return "int-quantized weights that are not symmetric, of 8 bits"
    if activations:
        given = {
            key: value
            for key, value in activations.items()
            if key not in ("observer", "observer_kwargs", "zp_dtype")
        }
        if {key: value for key, value in given.items() if value is not None} != _ACTIVATIONS:
            return f"input_activations {given}"
        if not (plain_bytes and kind["strategy"] == "channel"):
            return "rounded activations with weights that are not symmetric, by channel, of 8 bits"
    return None


def _unknown_tensors(config: dict, names: set[str], vocabulary: list[str]) -> str | None:
    """A tensor of a kind that is not known, or a linear that is quantized, or is not, against
    expectation.
    """
    odd = sorted(name for name in names if name.rpartition(".")[2] not in (*PARTS, "bias"))
    if odd:
        return f"tensor {odd[0]}"
    linears = family_of_config(config).linears
    expected = {
        f"model.layers.{i}.{linear}"
        for i in range(config["num_hidden_layers"])
        for linear in linears
    } | set(vocabulary)
    found = {name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")}
    different = sorted(expected ^ found)
    return (
        f"{different[0]}, {'not ' if different[0] in expected else ''}quantized"
        if different
        else None
    )

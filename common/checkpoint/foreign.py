"""What a checkpoint that was not written here says of itself: whose it is, bits and groups, which
packages loading it takes; and how many bits it takes for each weight, counted from its tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from common.base.errors import UserError
from common.base.libraries import how_to_install
from common.checkpoint.sizes import code_bits, rounded, weights_of
from common.checkpoint.writer import is_quantized
from common.model.located import gguf_content, is_gguf
from common.model.source import read_config
from common.model.tensors import TensorReader

OURS = "compressed-tensors"
# By `quant_method`: the modules that transformers imports to load it, by the package to install.
_PACKAGES = {
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "hqq": {"hqq": "hqq"},
    "torchao": {"torchao": "torchao"},
    "auto-round": {"auto_round": "auto-round"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "aqlm": {"aqlm": "aqlm"},
    "vptq": {"vptq": "vptq"},
    "eetq": {"eetq": "eetq"},
    "quark": {"quark": "amd-quark"},
}
# The methods that never read text.
_WITHOUT_TEXT = ("bitsandbytes", "hqq", "quanto", "eetq")
# Bits that a method's name says.
_FIXED_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp8": 8, "eetq": 8, "mxfp4": 4, "nvfp4": 4}
# Where the others' configurations say the type of a weight, and how: int4, Int4WeightOnlyConfig,
# int8_dynamic_activation_int4_weight, mxfp4.
_TYPES = ("weights", "quant_type", "_type", "forward_dtype")
_TYPE_BITS = re.compile(r"(?:int|float|fp)(\d+)(?:_?weight|$)", re.IGNORECASE)
# Where each method's configuration keeps bits, group size and whether there are no zero-points.
_BITS = ("bits", "nbits", "num_bits", "w_bit")
_GROUP = ("group_size", "q_group_size")
# bitsandbytes does not say the size of its blocks, which is this unless told otherwise.
_NF4_BLOCK = 64


def quantization_of(folder: Path) -> dict:
    """The quantization_config of a folder's config.json, empty where there is none."""
    config = read_config(folder)
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) else {}


def method_of(folder: Path) -> str:
    """The name of the format that a folder's weights are in; that of unnamed ones is empty."""
    found = quantization_of(folder)
    if found.get("quant_method"):
        return str(found["quant_method"])
    return "bitsandbytes" if "load_in_4bit" in found else ""


def could_be_ours(path: Path) -> bool:
    """Whether a model without metadata is of the format that is written here, by no library that
    tells.
    """
    return not is_gguf(path) and method_of(path) == OURS and _library(path, OURS) == OURS


def check_readable(path: Path) -> None:
    """Refuse a model that transformers cannot read as what it is: quantized by a method that it
    does not know, which it would take for plain 16-bit weights, or one that needs a package which
    is not installed.

    Raises:
        UserError: naming the method, or the package and the command that installs it.
    """
    if is_gguf(path):
        return
    method = method_of(path)
    if is_quantized(path) and not _is_known(method):
        raise UserError(
            f"{path} is quantized with {method or 'a method that its config.json does not name'}, "
            f"which transformers {version('transformers')} does not know and would take for plain "
            "weights: convert it to a format that it reads, such as compressed-tensors, or remove "
            "quantization_config from config.json if its weights are plain"
        )
    missing = [
        package for module, package in _PACKAGES.get(method, {}).items() if not _installed(module)
    ]
    if missing:
        raise UserError(
            f"{path} is quantized with {method}, which needs {' and '.join(missing)}: "
            f"{how_to_install(missing)}"
        )


def _is_known(method: str) -> bool:
    """Whether transformers has a reader for a `quant_method`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known

    # It has one for each width of bitsandbytes.
    return method in {*known, "bitsandbytes"}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def runs_as_is(folder: Path) -> bool:
    """Whether a model runs on the modules of the library that quantized it, which have their own
    device and types, rather than on plain linears.
    """
    return method_of(folder) in _PACKAGES


def foreign_facts(path: Path, original: TensorReader | None) -> dict:
    """What the tables say of a quantized model without our metadata.

    Args:
        path: its folder or GGUF file.
        original: the tensors of the 16-bit model, without which bits of a weight are not known.
    """
    if is_gguf(path):
        return _gguf_facts(path, original)
    tensors, method = TensorReader(path), method_of(path)
    size = tensors.total_bytes()
    coded = code_bits(tensors) if method == OURS else None
    if coded is None and original:
        coded = _coded_bits(tensors, original)
    facts = {
        "weights_bytes": size,
        "bits_per_weight": {"coded": rounded(coded), "all": _of_all(size, original)},
        "library": {"name": _library(path, method), "format": method},
    }
    if grid := _grid(quantization_of(path), method):
        facts["grid"] = grid
    if method in _WITHOUT_TEXT:
        facts["calibration"] = None
    return facts


def _of_all(size: int, original: TensorReader | None) -> float | None:
    return rounded(8 * size / weights_of(original)) if original else None


def _gguf_facts(path: Path, original: TensorReader | None) -> dict:
    content = gguf_content(path)
    coded = 8 * content.coded_bytes / content.coded_weights if content.coded_weights else None
    maker = content.fields.get("general.quantized_by")
    return {
        "weights_bytes": content.total_bytes,
        "bits_per_weight": {
            "coded": rounded(coded),
            "all": _of_all(content.total_bytes, original),
        },
        "library": {
            "name": f"GGUF {'/'.join(content.types[:2]) or '16-bit'}"
            + (f" of {maker}" if isinstance(maker, str) else ""),
            "format": "gguf",
        },
    }


def _coded_bits(tensors: TensorReader, original: TensorReader) -> float | None:
    """Bits of a weight that has a code, with all that is needed to read it, whatever the format:
    everything that stands in place of a matrix of the 16-bit model. None where no matrix has codes.
    """
    forms = {name: (shape, size) for name, shape, size in tensors.forms()}
    parts: dict[str, int] = {}
    for matrix, shape in _matrices(original):
        found = {name: forms[name] for name in _parts_of(matrix, forms) if name in forms}
        whole = forms.get(f"{matrix}.weight")
        # A plain matrix, in 16 or 32 bits, has no codes.
        if not found or (whole and whole[0] == shape and whole[1] >= 2 * math.prod(shape)):
            continue
        parts[matrix] = sum(size for _, size in found.values())
    weights = sum(math.prod(shape) for matrix, shape in _matrices(original) if matrix in parts)
    return 8 * sum(parts.values()) / weights if weights else None


def _matrices(original: TensorReader) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, without .weight, and shape of every matrix of a 16-bit model."""
    for name, shape, _ in original.forms():
        if len(shape) == 2 and name.endswith(".weight"):
            yield name.removesuffix(".weight"), shape


def _parts_of(matrix: str, forms: dict) -> list[str]:
    """The tensors that stand in a matrix's place: all of its module but the bias."""
    return [name for name in forms if name.startswith(f"{matrix}.") and name != f"{matrix}.bias"]


def _grid(quantization: dict, method: str) -> dict | None:
    """Bits, group size (None: by channel) and whether there are no zero-points; without what is not
    said, None where that is the bits.
    """
    if method == "bitsandbytes":
        four = bool(quantization.get("load_in_4bit"))
        return {"bits": 4 if four else 8, "group_size": _NF4_BLOCK if four else None}
    bits = _first(quantization, _BITS)
    if not isinstance(bits, int):
        bits = _FIXED_BITS.get(method) or _bits_of_type(quantization)
    if bits is None:
        return None
    grid, group = {"bits": bits}, _first(quantization, _GROUP)
    if isinstance(group, int):
        grid["group_size"] = group if group > 0 else None
    symmetric = _first(quantization, ("sym", "symmetric"))
    zero_point = _first(quantization, ("zero_point",))
    if isinstance(symmetric, bool):
        grid["symmetric"] = symmetric
    elif isinstance(zero_point, bool):
        grid["symmetric"] = not zero_point
    return grid


def _bits_of_type(quantization: dict) -> int | None:
    """Bits of the type of a weight, as its name says them; None where none is named."""
    for key in _TYPES:
        named = _first(quantization, (key,))
        if isinstance(named, str) and (found := _TYPE_BITS.search(named.removesuffix("Config"))):
            return int(found[1])
    return None


def _first(content, keys: tuple[str, ...]):
    """The first value, not None, under one of these keys, in nested dictionaries."""
    if not isinstance(content, dict):
        return None
    for key in keys:
        if content.get(key) is not None:
            return content[key]
    return next(
        (found for one in content.values() if (found := _first(one, keys)) is not None), None
    )


def _library(folder: Path, method: str) -> str:
    """Which library wrote a checkpoint, with its version where it says so; else the format."""
    quantization = quantization_of(folder)
    if version := quantization.get("autoround_version"):
        return f"auto-round {version}"
    meta = quantization.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    makers = [quantizer] if isinstance(quantizer, str) else quantizer
    if isinstance(makers, list) and makers:
        return " + ".join(str(one).replace(":", " ") for one in makers)
    if method == OURS and (folder / "recipe.yaml").is_file():
        return "llm-compressor"
    return method or "unknown"

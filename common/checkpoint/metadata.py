"""What was run, with what, on what, how long, how large: `quantization_metadata.json` inside a
checkpoint.
"""

from __future__ import annotations

import platform
import resource
from contextlib import suppress
from functools import cache
from importlib import metadata as installed
from pathlib import Path

import torch

from common.base.errors import UserError
from common.base.files import lacking, read_json
from common.checkpoint.foreign import foreign_facts
from common.checkpoint.sizes import rounded, weights_of
from common.checkpoint.writer import METADATA_FILE, folder_bytes, is_quantized
from common.model.located import is_gguf
from common.model.tensors import TensorReader

VERSION = 1
# What verification, evaluation with its tables and the batch rely on, and what README says that
# metadata holds.
NEEDS = (
    "method",
    "bits",
    "grid.bits",
    "grid.group_size",
    "model.source",
    "options",
    "calibration",
    "versions",
    "device",
    "compute_dtype",
    "seconds.total",
    "memory",
    "probe.tokens",
    "probe.baseline_perplexity",
    "probe.perplexity",
    "probe.divergence",
    "linears",
    "bytes.quantized_weights",
    "bytes.quantized_folder",
    "compression_ratio",
)
# What of this the record of another library's checkpoint holds (benchmarks/quantize_peer.py).
_LIBRARY_NEEDS = (
    "library.name",
    "library.version",
    "method",
    "model.source",
    "options",
    "calibration",
    "device",
    "seconds.total",
    "memory",
    "bytes.quantized_weights",
    "bytes.quantized_folder",
    "compression_ratio",
    "bits_per_weight",
    "made_from",
)
_REMEDY = "quantize again with --overwrite, or delete it and name the 16-bit model with --baseline"
_PACKAGES = (
    "torch",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "lm-eval",
    "datasets",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **_installed()}


@cache  # a search through the environment for each
def _installed() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(installed.PackageNotFoundError):
            found[package] = installed.version(package)
    return found


def describe_device(device: torch.device) -> dict:
    """Type and name of a device, and the number of CPU threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "threads": torch.get_num_threads(),
        }
    return {"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest memory this process has held, in bytes: on the host (resident set) and on the
    device."""
    # Linux counts ru_maxrss in KiB.
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"peak_host_bytes": host, "peak_device_bytes": on_device}


def read(folder: Path) -> dict | None:
    """A checkpoint's metadata, or None when it was saved without. Raises UserError for a file that
    is damaged or lacks some.
    """
    file = folder / METADATA_FILE
    if not file.is_file():
        return None
    record = read_json(file, _REMEDY)
    if missing := lacking(record, _LIBRARY_NEEDS if "library" in record else NEEDS):
        raise UserError(f"{file} is damaged (it lacks {', '.join(missing)}); {_REMEDY}")
    return record


def quantization_facts(folder: Path, original: TensorReader | None = None) -> dict:
    """What the tables say about how a checkpoint came about; without metadata its sizes, and what
    its own configuration says.

    Args:
        folder: of a model, or its GGUF file.
        original: the tensors of the 16-bit model, for bits of a weight without metadata.
    Raises:
        UserError: metadata with values of another kind.
    """
    record = read(folder)
    if record is None:
        return _measured_facts(folder, original)
    try:
        return _library_facts(record) if "library" in record else _recorded_facts(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / METADATA_FILE} is damaged ({type(error).__name__}: {error}); {_REMEDY}"
        ) from None


def _measured_facts(folder: Path, original: TensorReader | None) -> dict:
    if is_gguf(folder):
        return {**foreign_facts(folder, original), "folder_bytes": folder.stat().st_size}
    if is_quantized(folder):
        return {**foreign_facts(folder, original), "folder_bytes": folder_bytes(folder)}
    tensors = TensorReader(folder)
    size = tensors.total_bytes()
    return {
        "weights_bytes": size,
        "folder_bytes": folder_bytes(folder),
        "bits_per_weight": {"coded": None, "all": rounded(8 * size / weights_of(tensors))},
    }


def _library_facts(record: dict) -> dict:
    """Of another library's checkpoint."""
    return {
        **_shared_facts(record),
        "library": record["library"],
        **({"grid": record["grid"]} if record.get("grid") else {}),
    }


def _shared_facts(record: dict) -> dict:
    calibration = record["calibration"]
    return {
        "weights_bytes": record["bytes"]["quantized_weights"],
        "folder_bytes": record["bytes"]["quantized_folder"],
        "compression_ratio": record["compression_ratio"],
        # Checkpoints of earlier versions lack it.
        "bits_per_weight": record.get("bits_per_weight"),
        "seconds": record["seconds"],
        "memory": record["memory"],
        "device": record["device"],
        "calibration": calibration
        and {key: value for key, value in calibration.items() if key != "passages"},
    }


def _recorded_facts(record: dict) -> dict:
    probe = record["probe"]
    return {
        **_shared_facts(record),
        "grid": record["grid"],
        "probe": {key: probe[key] for key in ("baseline_perplexity", "perplexity", "divergence")},
        "relative_output_error": {
            name: round(linear["relative_output_error"], 6)
            for name, linear in record["linears"].items()
        },
    }

"""How large a checkpoint is, and how many bits it takes for each weight."""

from __future__ import annotations

import math
from pathlib import Path

from common.checkpoint.format import PARTS
from common.checkpoint.writer import folder_bytes
from common.model.tensors import TensorReader


def sizes(before: TensorReader, source: Path, folder: Path) -> dict:
    """What metadata says of sizes: `bytes`, `compression_ratio` and `bits_per_weight`.

    Args:
        before: the tensors of the 16-bit model, which lies in the folder `source`.
        folder: the checkpoint.
    """
    after = TensorReader(folder)
    was, now = before.total_bytes(), after.total_bytes()
    return {
        "bytes": {
            "baseline_weights": was,
            "baseline_folder": folder_bytes(source),
            "quantized_weights": now,
            "quantized_folder": folder_bytes(folder),
        },
        "compression_ratio": round(was / now, 4),
        "bits_per_weight": {
            "coded": rounded(code_bits(after)),
            "all": rounded(8 * now / weights_of(before)),
        },
    }


def code_bits(tensors: TensorReader) -> float | None:
    """Bits of a weight that has a code, with what is needed to read it: scale and zero-point. None
    where no weight has one.
    """
    forms = {name: (shape, size) for name, shape, size in tensors.forms()}
    weights = size = 0
    for name in forms:
        matrix, _, part = name.rpartition(".")
        if part != "weight_scale":
            continue
        size += sum(forms[f"{matrix}.{one}"][1] for one in PARTS if f"{matrix}.{one}" in forms)
        if f"{matrix}.weight_shape" in forms:
            weights += math.prod(tensors.read(f"{matrix}.weight_shape").tolist())
        elif f"{matrix}.weight" in forms:  # else a head that shares the embedding's codes
            weights += math.prod(forms[f"{matrix}.weight"][0])
    return 8 * size / weights if weights else None


def weights_of(tensors: TensorReader) -> int:
    """How many numbers a model that is not quantized consists of."""
    return sum(math.prod(shape) for _, shape, _ in tensors.forms())


def rounded(bits: float | None) -> float | None:
    """Bits of a weight, as they are kept."""
    return None if bits is None else round(bits, 4)

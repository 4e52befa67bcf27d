"""Which engines run a checkpoint as it is written, and why others do not.

Seen with transformers 5.17, vLLM 0.32 and SGLang 0.5.23, some of it in their sources alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.base.errors import UserError
from common.checkpoint.format import (
    EMBEDDING,
    INTEGER,
    WeightFormat,
    family_of_config,
    weight_format,
)
from common.exporting.settings import check_form, plain_config
from common.model.online import CONFIG_KEY
from common.model.tensors import TensorReader
from common.numerics.grid import Grid

TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP = "transformers", "vLLM", "SGLang", "llama.cpp"
ENGINES = (TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP)
# Said when --embedding-bits is chosen, too.
INT8_EMBEDDING = (
    "an int8 embedding runs in this project's runtime and transformers only; vLLM and SGLang do "
    "not load it"
)
# Channels of a group that the kernels of vLLM and SGLang for packed weights know; None is a row's.
_MARLIN_GROUPS = (None, 32, 64, 128)
# What SGLang's kernel for packed weights asks of input and output channels.
_SGLANG_IN, _SGLANG_OUT = 128, 64


@dataclass(frozen=True)
class Support:
    """Whether an engine runs a checkpoint, None where nobody has tried, and a few words: the reason
    against it or the conditions; empty where there is nothing to say.
    """

    runs: bool | None
    words: str = ""


def support(config: dict, tensors: TensorReader) -> dict[str, Support]:
    """What each engine of ENGINES makes of a checkpoint, by its name.

    Args:
        config: the content of its config.json, of a known form.
        tensors: its tensors.
    """
    if CONFIG_KEY in config:
        refused = Support(False, "it rotates activations as they come, as this project alone does")
        return dict.fromkeys(ENGINES, refused)
    stored = weight_format(config)
    return {
        TRANSFORMERS: Support(True),
        VLLM: _vllm(stored),
        SGLANG: _sglang(stored, config, tensors),
        LLAMA_CPP: _llama_cpp(stored, config),
    }


def _weights_alone(stored: WeightFormat) -> list[Grid]:
    """The grids of what is multiplied by inputs that are not rounded."""
    return [*([] if stored.activation_bits else [stored.grid]), *stored.vocabulary.values()]


def _vllm(stored: WeightFormat) -> Support:
    if EMBEDDING in stored.vocabulary:
        return Support(False, INT8_EMBEDDING)
    if INTEGER in stored.vocabulary_forms.values():
        return Support(False, "its int8 lm_head is of an earlier version; quantize again")
    grids = _weights_alone(stored)
    for grid in grids:
        if grid.bits < 4:
            return Support(False, f"no kernel for {grid.bits} bits")
        if grid.group_size not in _MARLIN_GROUPS:
            return Support(False, f"no kernel for groups of {grid.group_size}")
    eight = [grid for grid in grids if grid.bits == 8]
    if not all(grid.symmetric for grid in eight):
        return Support(True, "on NVIDIA Hopper only; made with --symmetric on any GPU")
    if eight:
        return Support(True, "on a GPU")
    units = "VNNI" if stored.activation_bits else "AVX-512"
    return Support(True, f"on a GPU, or on a CPU with {units}")


def _sglang(stored: WeightFormat, config: dict, tensors: TensorReader) -> Support:
    if EMBEDDING in stored.vocabulary:
        return Support(False, INT8_EMBEDDING)
    if not all(grid.symmetric for grid in _weights_alone(stored) if grid.bits == 8):
        return Support(False, "8 bits have to be symmetric")
    grid = stored.grid
    if stored.activation_bits or stored.vocabulary or grid.bits < 4:
        return Support(None)
    if grid.group_size not in _MARLIN_GROUPS:
        return Support(False, f"no kernel for groups of {grid.group_size}")
    for linear in family_of_config(config).linears:
        rows, columns = tensors.read(f"model.layers.0.{linear}.weight_shape").tolist()
        if columns % _SGLANG_IN or rows % _SGLANG_OUT:
            return Support(
                False,
                f"{linear} is {columns} x {rows}: its kernel wants multiples of {_SGLANG_IN} "
                f"input and {_SGLANG_OUT} output channels",
            )
    return Support(True)


def _llama_cpp(stored: WeightFormat, config: dict) -> Support:
    try:
        check_form(plain_config(config), stored, online=False)
    except UserError as refusal:
        return Support(False, str(refusal))
    return Support(
        True,
        "as the file that common/gguf_export.py writes, unless the tokenizer is one that llama.cpp "
        "has no rules for",
    )

"""Which tensors a GGUF file has, and their bytes, made from a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, TensorNameMap, get_tensor_name_map
from torch import Tensor

from common.base.errors import UserError
from common.checkpoint.format import EMBEDDING, HEAD, WeightFormat
from common.checkpoint.tensors import stored_codes, stored_parts
from common.exporting.blocks import block_type, interleaved, minimum, pack, row_bytes
from common.exporting.settings import frequency_factors, gguf_form
from common.model.tensors import TensorReader
from common.numerics.grid import Grid, float16_holds

# By safetensors' names.
_STORED = {
    "BF16": GGMLQuantizationType.BF16,
    "F16": GGMLQuantizationType.F16,
    "F32": GGMLQuantizationType.F32,
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    name, kind, shape: as the file says them; the last dimension is the input channels'.
    codes: whether it is made of a grid's codes.
    read: gives its bytes, `byte_shape` uint8.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    codes: bool
    read: Callable[[], Tensor]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Rows as they are, and the bytes of one."""
        return (*self.shape[:-1], row_bytes(self.kind, self.shape[-1]))


def entries(config, form: WeightFormat, tensors: TensorReader) -> Iterator[Entry]:
    """The tensors of a checkpoint's file, the embedding first.

    Args:
        config: the model's, transformers'.
        form: one that passed `settings.check_form`.
        tensors: the checkpoint's.
    Raises:
        UserError: a tensor that has no place in the file.
    """
    pairs, names = gguf_form(config).pairs, tensor_names(config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    modules = dict.fromkeys([EMBEDDING, *(name.rpartition(".")[0] for name in tensors)])
    if config.tie_word_embeddings:
        modules.pop(HEAD, None)  # llama.cpp takes the embedding
    for module in modules:
        turned = heads.get(module.rpartition(".")[2]) if pairs else None
        for part in ("weight", "bias"):
            full = f"{module}.{part}"
            coded = part == "weight" and f"{module}.weight_scale" in tensors
            if not (coded or full in tensors):
                continue
            name = names.get_name(full, (".weight", ".bias"))
            if name is None:
                raise UserError(f"GGUF has no place for tensor {full}")
            if coded:
                grid = form.vocabulary.get(module, form.grid)
                yield _coded(name, module, grid, turned, tensors)
            else:
                yield _stored(name, full, turned, tensors)
    factors = frequency_factors(config)
    if factors is not None:
        kind, shape = GGMLQuantizationType.F32, tuple(factors.shape)
        yield Entry("rope_freqs.weight", kind, shape, False, lambda: factors.view(torch.uint8))


def tensor_names(config) -> TensorNameMap:
    """What a file calls transformers' tensors."""
    told = gguf_form(config).name
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == told)
    return get_tensor_name_map(architecture, config.num_hidden_layers)


def _coded(name: str, module: str, grid: Grid, turned: int | None, tensors: TensorReader) -> Entry:
    """The codes of a linear, embedding or head; turned: heads whose rows change places, None where
    they stay.
    """
    if f"{module}.weight_shape" in tensors:
        shape = tuple(tensors.read(f"{module}.weight_shape").tolist())
    else:
        shape = tensors.form(f"{module}.weight")[0]

    def read() -> Tensor:
        state = stored_parts(tensors.read, tensors, module)
        scale = state["weight_scale"]
        parts = [scale, *stored_codes(state, grid)]
        if turned is not None:
            parts = [part if part is None else interleaved(part, turned) for part in parts]
        scale, codes, zero_point = parts
        lowest = scale if zero_point is None else minimum(scale, zero_point, grid)
        if not (float16_holds(scale) and torch.isfinite(lowest.to(torch.float16)).all()):
            raise UserError(
                f"GGUF stores scales in float16, which does not hold those of {module}; its "
                "weights are too small or too large"
            )
        return pack(codes, scale, zero_point, grid)

    return Entry(name, block_type(grid), shape, True, read)


def _stored(name: str, full: str, turned: int | None, tensors: TensorReader) -> Entry:
    """A tensor that is not rounded, in its own type; a vector in float32, as llama.cpp has it."""
    shape, stored = tensors.form(full)
    kind = GGMLQuantizationType.F32 if len(shape) == 1 else _STORED.get(stored)
    if kind is None:
        raise UserError(f"tensor {full} is of type {stored}, which is not exported to GGUF")

    def read() -> Tensor:
        values = tensors.read(full)
        values = values if turned is None else interleaved(values, turned)
        values = values.float() if len(shape) == 1 else values
        return values.contiguous().view(torch.uint8)

    return Entry(name, kind, shape, False, read)

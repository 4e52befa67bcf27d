"""A checkpoint written as one GGUF file: its own codes in blocks, everything else as it is stored.

Tensors are read, packed and written one by one, so that memory holds one of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

from common.base.errors import UserError
from common.base.files import json_or_none, replacing, why_not_writable
from common.checkpoint.format import WeightFormat, open_checkpoint, unknown_form, weight_format
from common.exporting.blocks import block_type
from common.exporting.settings import (
    check_form,
    gguf_form,
    plain_config,
    sliding_window,
    write_settings,
)
from common.exporting.tensors import Entry, entries
from common.exporting.vocabulary import vocabulary_of
from common.model.online import take_from_config
from common.model.source import SourceModel, load_tokenizer

SUFFIX = ".gguf"
# What the file says that most of its tensors are.
_FILE_TYPES = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    kinds: number of tensors by the name of their type.
    weights: numbers in all of them.
    code_bits: bits for each weight that has a code, scales included.
    notes: what llama.cpp does otherwise than transformers with this model.
    """

    file: Path
    kinds: dict[str, int]
    weights: int
    code_bits: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        size = self.file.stat().st_size
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        text = (
            f"{self.file}: {size / 1e6:.1f} MB, {self.code_bits:.2f} bits for each weight with a "
            f"code, {size * 8 / self.weights:.2f} for each of all; tensors: {kinds}"
        )
        return "; ".join([text, *self.notes])


def file_beside(folder: Path) -> Path:
    """Where a checkpoint's file goes unless told otherwise: beside the folder, not in it."""
    return folder.with_name(folder.name + SUFFIX)


def check_file(file: Path, overwrite: bool) -> None:
    """Refuse a file that exists, unless told to overwrite it, or that cannot be written.

    Raises:
        UserError: naming the way out.
    """
    if file.is_dir():
        raise UserError(f"output {file} is a folder; give the name of a file")
    if file.exists() and not overwrite:
        raise UserError(
            f"output {file} exists already; use --overwrite to replace it, or move it away first"
        )
    if reason := why_not_writable(file.parent):
        raise UserError(f"output {file} cannot be written ({reason}); choose another")


def check_source(source: SourceModel, form: WeightFormat, online: bool) -> None:
    """Refuse now what `export` would refuse of a checkpoint that is yet to be made of `source`.

    Args:
        form, online: as of `check_form`.
    Raises:
        UserError: as `check_form` and `vocabulary_of`.
    """
    check_form(source.config, form, online)
    rows = source.model.model.embed_tokens.weight.shape[0]
    vocabulary_of(source.tokenizer, _stop_ids(source.folder, source.config), rows)


def export(folder: Path, file: Path) -> Exported:
    """Write the checkpoint in `folder` as `file`, which gets its name when it is whole.

    Raises:
        UserError: not a checkpoint of the quantize scripts, a damaged one, or one that GGUF cannot
            tell.
    """
    content, tensors = open_checkpoint(folder)
    online = take_from_config(content) is not None
    if reason := unknown_form(content, tensors):
        raise UserError(
            f"{folder} is not a checkpoint of the quantize scripts, but of a form that they do not "
            f"write: {reason}"
        )
    form, config = weight_format(content), plain_config(content)
    check_form(config, form, online)
    listed = list(entries(config, form, tensors))
    rows = listed[0].shape[0]
    vocabulary = vocabulary_of(load_tokenizer(folder), _stop_ids(folder, config), rows)
    with replacing(file) as unfinished:
        try:
            writer = GGUFWriter(unfinished, gguf_form(config).name)
            whole = folder.resolve()
            writer.add_name(f"{whole.parent.name} {whole.name}".strip())
            writer.add_file_type(_FILE_TYPES[block_type(form.grid)])
            writer.add_quantization_version(GGML_QUANT_VERSION)
            write_settings(writer, config, rows)
            vocabulary.write(writer)
            _write_tensors(writer, listed)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
    coded = [entry for entry in listed if entry.codes]
    code_bytes = sum(math.prod(entry.byte_shape) for entry in coded)
    return Exported(
        file,
        dict(Counter(entry.kind.name for entry in listed).most_common()),
        sum(math.prod(entry.shape) for entry in listed),
        8 * code_bytes / sum(math.prod(entry.shape) for entry in coded),
        (*vocabulary.notes, *_window_notes(config)),
    )


def export_beside(folder: Path, wanted: bool) -> str:
    """Write the file of a checkpoint beside it, if it is wanted. Returns what there is to say; a
    file that is there although none is wanted is of an earlier checkpoint.

    Raises:
        UserError: as `export`.
    """
    file = file_beside(folder)
    if wanted:
        return str(export(folder, file))
    if file.exists():
        return f"warning: {file} is of an earlier checkpoint; --gguf writes it anew"
    return ""


def _window_notes(config) -> Iterator[str]:
    if window := sliding_window(config):
        yield f"the context ends after {window} tokens, where llama.cpp would not slide the window"


def _stop_ids(folder: Path, config) -> list[int]:
    """The tokens at which transformers' generate stops."""
    generation = json_or_none(folder / "generation_config.json") or {}
    found = generation.get("eos_token_id", config.eos_token_id)
    return found if isinstance(found, list) else [] if found is None else [found]


def _write_tensors(writer: GGUFWriter, listed: list[Entry]) -> None:
    """Write the file: what was added to the writer, then the tensors."""
    for entry in listed:
        size = math.prod(entry.byte_shape)
        writer.add_tensor_info(entry.name, entry.byte_shape, np.dtype("uint8"), size, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in listed:
        writer.write_tensor_data(np.ascontiguousarray(entry.read().numpy()))
    writer.close()

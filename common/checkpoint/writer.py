"""Writing a checkpoint (`format` knows the format), and what is asked of a folder that
may be one.

A checkpoint is written into `<output>.unfinished`, a shard for each decoder layer as it is
finished, and gets its real name in one step when it is whole: a folder at the output's name is
complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.base.device import dtype_name
from common.base.errors import UserError
from common.base.files import json_or_none, replace_folder, sha256_of, why_not_writable
from common.checkpoint.format import (
    VOCABULARY,
    form_of_linears,
    form_of_vocabulary,
    quantization_config,
)
from common.checkpoint.older import name_tokenizer_as_before, old_rope
from common.checkpoint.tensors import (
    compress,
    compress_rows,
    decompress,
    stored_linear,
    stored_parts,
)
from common.checkpoint.unfinished import UnfinishedFolder
from common.model.online import OnlineTransforms, mark_config, write_keys
from common.model.source import MODEL_FILES, SourceModel, read_config
from common.model.tensors import INDEX_FILE, TensorReader
from common.numerics.grid import Grid, QuantizedLinear

METADATA_FILE = "quantization_metadata.json"
# What the name of a shard with tuned scales ends in, until all have been written.
TUNED = ".tuned"


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless told to overwrite it, or that cannot be written.

    Raises:
        UserError: naming the way out.
    """
    if output.exists() and not overwrite:
        raise UserError(
            f"output {output} exists already; use --overwrite to replace it or choose another "
            f"--output"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file, not a folder")
    if output.is_dir() and any(output.iterdir()):
        config = json_or_none(output / "config.json")
        if config is None:
            raise UserError(
                f"output {output} holds something that is not a checkpoint; it is not replaced"
            )
        if "quantization_config" not in config:
            raise UserError(
                f"output {output} holds a model that is not quantized; it is not replaced, "
                "choose another --output"
            )
    if reason := why_not_writable(output.parent):
        raise UserError(f"output {output} cannot be written ({reason}); choose another")


class CheckpointWriter:
    """Writes a quantized checkpoint layer by layer. Use as a context manager; without `finish`
    there is no output, and what is left, if any layer was finished, is a folder that `fingerprint`
    and `resume` decide on (`unfinished`).
    """

    def __init__(
        self,
        output: Path,
        source: SourceModel,
        grid: Grid,
        activation_bits: int | None = None,
        online: OnlineTransforms | None = None,
        fingerprint: dict | None = None,
        resume: bool = False,
    ):
        self.output, self.source, self.grid, self.activation_bits = (
            output,
            source,
            grid,
            activation_bits,
        )
        self.online = online
        self.form = form_of_linears(activation_bits)
        self.unfinished = UnfinishedFolder(output, fingerprint or {}, resume)
        self.folder = self.unfinished.path
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        # What a plain load computes in, and so what it rounds scales to.
        self.load_dtype = source.storage_dtype

    def __enter__(self) -> CheckpointWriter:
        self.unfinished.open()
        # Written last, so of no use to a run that goes on, and it would hide the single shards.
        (self.folder / INDEX_FILE).unlink(missing_ok=True)
        for file in self.folder.glob(f"*{TUNED}"):
            file.unlink()
        for index in range(len(self.unfinished.records)):
            try:
                self._enter(self._shard(index), TensorReader(self.folder, self._shard(index)))
            except UserError:
                self.unfinished.drop_after(index)
                break
        return self

    def __exit__(self, *_exception) -> None:
        self.unfinished.close()

    @property
    def records(self) -> list[dict]:
        """Of the layers that are finished, by index: at first those of an earlier run."""
        return self.unfinished.records

    def restore_layer(self, index: int, module: nn.Module) -> dict[str, QuantizedLinear]:
        """Put the weights of a finished layer into a module, exactly as they were in memory when it
        was written. Returns the codes of its linears.
        """
        codes = {}
        prefix = f"model.layers.{index}."
        tensors = TensorReader(self.folder, self._shard(index))
        for name, parameter in module.named_parameters():
            linear = name.removesuffix(".weight")
            if linear in self.source.family.linears:
                state = stored_parts(tensors.read, tensors, prefix + linear)
                state = {part: tensor.to(parameter.device) for part, tensor in state.items()}
                codes[linear] = stored_linear(state, self.grid)
                value = codes[linear].dequantize()
            else:
                value = tensors.read(prefix + name)
            parameter.data = value.to(parameter.device, parameter.dtype)
        return codes

    def write_layer(
        self, index: int, module: nn.Module, codes: dict[str, QuantizedLinear], record: dict
    ) -> None:
        """Write one decoder layer as a shard of its own, read it back and compare; its record is
        kept for a resumption.

        Raises:
            UserError: what was read back is not what was quantized.
        """
        prefix = f"model.layers.{index}."
        quantized_weights = {f"{name}.weight" for name in self.source.family.linears}
        tensors = {
            prefix + name: tensor.to(self.source.storage_dtype)
            for name, tensor in module.state_dict().items()
            if name not in quantized_weights
        }
        for name, linear in codes.items():
            for part, tensor in compress(linear, self.source.storage_dtype, self.form).items():
                tensors[f"{prefix}{name}.{part}"] = tensor
        file = self._save(tensors, self._shard(index))
        self._enter(file, TensorReader(self.folder, file))
        self._check(file, index, codes)
        self.unfinished.finish_layer(record)

    def rescale_layers(self, layers: list[dict[str, QuantizedLinear]], tuned: dict) -> None:
        """Give the linears of all layers, by index, other scales: those of codes that are otherwise
        the ones written. All are written before the first takes its place.

        Args:
            tuned: what the tuning found.
        Raises:
            UserError: what was read back is not what was tuned.
        """
        exchanged = []
        for index, codes in enumerate(layers):
            tensors = load_file(self.folder / self._shard(index))
            for name, linear in codes.items():
                scale = f"model.layers.{index}.{name}.weight_scale"
                old = tensors[scale]
                tensors[scale] = linear.scale.to("cpu", old.dtype).view_as(old)
            file = self._save(tensors, f"{self._shard(index)}{TUNED}")
            self._check(file, index, codes)
            exchanged.append((self.folder / file, self.folder / self._shard(index)))
        self.unfinished.exchange(exchanged, tuned)

    def _check(self, file: str, index: int, codes: dict[str, QuantizedLinear]) -> None:
        """Read the linears of a layer back and compare."""
        written = load_file(self.folder / file)
        for name, linear in codes.items():
            whole = f"model.layers.{index}.{name}"
            state = stored_parts(written.__getitem__, written, whole)
            state = {part: tensor.to(linear.codes.device) for part, tensor in state.items()}
            if not torch.equal(decompress(state, self.grid), linear.dequantize()):
                raise UserError(
                    f"{whole}: what was written does not read back the same; the disk or "
                    "compressed-tensors is at fault, nothing was saved"
                )

    def _shard(self, index: int) -> str:
        # One for each layer, and the last for the embedding, the final norm and an untied head.
        return f"model-{index + 1:05d}-of-{self.source.num_layers + 1:05d}.safetensors"

    def _enter(self, file: str, tensors: TensorReader) -> None:
        """Count a shard's tensors in."""
        self._weight_map.update(dict.fromkeys(tensors.names(), file))
        self._bytes += tensors.total_bytes()
        if self.load_dtype == torch.float16:
            if any(
                tensors.read(name).dtype == torch.bfloat16
                for name in tensors.names()
                if name.endswith(".weight_scale")
            ):
                self.load_dtype = torch.bfloat16

    def _save(self, tensors: dict[str, Tensor], file: str) -> str:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, self.folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(
                f"cannot write {self.folder / file}: {error}; free some space or choose another "
                f"--output"
            ) from None
        (self.folder / file).chmod(0o644)  # safetensors makes private files
        return file

    def write_rest(self, vocabulary: dict[str, QuantizedLinear]) -> None:
        """Write everything that is not a decoder layer: remaining tensors, index, configuration,
        tokenizer.

        Args:
            vocabulary: the codes of model.embed_tokens and lm_head, where they were quantized too.
        """
        source = self.source
        rest = {"model.norm.weight": source.model.model.norm.weight.to(source.storage_dtype)}
        for name in VOCABULARY[:1] if source.tied else VOCABULARY:
            if name in vocabulary:
                codes = vocabulary[name]
                parts = compress_rows(codes, source.storage_dtype, form_of_vocabulary(name))
                rest.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            else:
                rest[f"{name}.weight"] = source.model.get_submodule(name).weight.to(
                    source.storage_dtype
                )
        if source.tied and vocabulary:
            # The codes are shared on loading, as weights are; the scales are not.
            rest["lm_head.weight_scale"] = rest["model.embed_tokens.weight_scale"].clone()
        file = self._save(rest, self._shard(source.num_layers))
        self._enter(file, TensorReader(self.folder, file))
        index = {
            "metadata": {"total_size": self._bytes},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
        config = source.config.to_diff_dict()
        grids = {name: codes.grid for name, codes in vocabulary.items()}
        quantization = quantization_config(self.grid, self.activation_bits, grids, source.tied)
        config.update(
            architectures=[type(source.model).__name__],
            dtype=dtype_name(self.load_dtype),
            quantization_config=quantization,
            **old_rope(config),
        )
        if self.online:
            mark_config(config, self.online)
            write_keys(self.folder, self.online.keys)
        (self.folder / "config.json").write_text(json.dumps(config, indent=2))
        source.tokenizer.save_pretrained(self.folder)
        name_tokenizer_as_before(self.folder / "tokenizer_config.json")
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            shutil.copy(generation, self.folder)

    def finish(self, metadata: dict | None) -> None:
        """Give the checkpoint its metadata and its real name. An older checkpoint there is replaced
        only now.
        """
        if metadata is not None:
            content = {**metadata, "files": file_hashes(self.folder)}
            (self.folder / METADATA_FILE).write_text(json.dumps(content, indent=1))
        for file in self.folder.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        replace_folder(self.folder, self.output)
        self.unfinished.clean(self.output)


def is_quantized(folder: Path) -> bool:
    """Whether the model in a folder says that it is quantized, in this format or another.

    Raises:
        UserError: no model there, or an unreadable config.json.
    """
    config = read_config(folder)
    return any(config.get(key) for key in ("quantization_config", "compression_config"))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint that decide what it computes, by name."""
    names = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix == ".safetensors"
        or file.name in ("config.json", INDEX_FILE, "tokenizer.json")
    )
    return dict(zip(names, sha256_of(folder / name for name in names), strict=True))


def folder_bytes(folder: Path) -> int:
    """Bytes of a model's files in a folder; not of the same weights in other forms beside."""
    return sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.is_file() and any(map(file.match, MODEL_FILES))
    )

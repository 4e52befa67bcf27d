"""Checkpoints in the compressed-tensors format, out and in. Nothing else in the project knows the format.

A checkpoint is written into `<output>.unfinished`, a shard for each decoder layer as it is finished, and gets its real
name in one step when it is whole: a folder at the output's name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container
from pathlib import Path

import torch
from compressed_tensors import __version__ as compressed_tensors_version
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.device import dtype_name
from common.errors import UserError
from common.files import load_json, replace_folder
from common.grid import Grid, QuantizedLinear
from common.layerwise import Resumption
from common.models import INDEX_FILE, LINEARS, MODEL_FILES, SourceModel, TensorReader, read_config
from common.online import OnlineTransforms, mark_config
from common.unfinished import UnfinishedFolder

METADATA_FILE = "quantization_metadata.json"
# Weights alone are packed; 8-bit weights with 8-bit activations stay int8, as the integer kernels want them.
PACKED, INTEGER = "pack-quantized", "int-quantized"
_ENDS = ("model.embed_tokens", "lm_head")
# Rows of an embedding or head that are compressed at once.
_ROWS_AT_ONCE = 16384
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def scheme_of(grid: Grid, activation_bits: int | None = None) -> QuantizationScheme:
    """The library's description of a grid for weights and, if given, of activations rounded per token as they come."""
    strategy = {"strategy": "channel"} if grid.group_size is None else {"strategy": "group",
                                                                       "group_size": grid.group_size}
    weights = QuantizationArgs(num_bits=grid.bits, type="int", symmetric=grid.symmetric, **strategy)
    activations = None
    if activation_bits:
        activations = QuantizationArgs(num_bits=activation_bits, type="int", symmetric=True, strategy="token", dynamic=True)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)


def grid_of(scheme: dict) -> Grid:
    """The grid that a config group of a checkpoint's config.json describes."""
    weights = scheme["weights"]
    group_size = weights.get("group_size") if weights["strategy"] == "group" else None
    return Grid(weights["num_bits"], group_size, weights["symmetric"])


def compress(quantized: QuantizedLinear, scale_dtype: torch.dtype, form: str = PACKED) -> dict[str, Tensor]:
    """The tensors that stand for one linear in the file, made by the library's own compressor; form PACKED or INTEGER.

    Scales are stored in `scale_dtype`, or in bfloat16 where that does not hold them as they are (`grid.scale_type`).
    """
    scale = quantized.scale.to(scale_dtype)
    if not torch.equal(scale.float(), quantized.scale.float()):
        scale = quantized.scale.to(torch.bfloat16)
    state = {"weight": quantized.dequantize(), "weight_scale": scale}
    if not quantized.grid.symmetric:
        state["weight_zero_point"] = quantized.zero_point.to(torch.int8)
    return BaseCompressor.load_from_registry(form).compress(state, scheme_of(quantized.grid))


def _compress_rows(quantized: QuantizedLinear, scale_dtype: torch.dtype, form: str) -> dict[str, Tensor]:
    """`compress` for a vocabulary's many rows, some at a time: the library works on copies of them in float32."""
    tensors = (quantized.codes, quantized.scale, quantized.zero_point)
    parts = [compress(QuantizedLinear(*rows, quantized.grid), scale_dtype, form)
             for rows in zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in tensors), strict=True)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "weight_shape"}
    if "weight_shape" in parts[0]:
        whole["weight_shape"] = parts[0]["weight_shape"].new_tensor(quantized.codes.shape)
    return whole


def decompress(state: dict[str, Tensor], grid: Grid) -> Tensor:
    """The float32 weights [out, in] of one linear's stored tensors, by the library's own decompressor."""
    state = {**state, "weight_scale": state["weight_scale"].float()}
    form = PACKED if "weight_packed" in state else INTEGER
    return BaseCompressor.load_from_registry(form).decompress(state, scheme_of(grid))["weight"]


def stored_parts(read: Callable[[str], Tensor], names: Container[str], linear: str) -> dict[str, Tensor]:
    """The tensors of one linear (by full name) among `names`, keyed as `compress` made them."""
    return {part: read(f"{linear}.{part}") for part in _PARTS if f"{linear}.{part}" in names}


def unpack(state: dict[str, Tensor], grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Codes [out, in] and zero-points [out, groups] (None if symmetric) of one linear's stored tensors, both int8."""
    if "weight" in state:
        return state["weight"], None
    shape = torch.Size(state["weight_shape"].tolist())
    codes = unpack_from_int32(state["weight_packed"], grid.bits, shape)
    if grid.symmetric:
        return codes, None
    return codes, unpack_from_int32(state["weight_zero_point"], grid.bits, state["weight_scale"].shape, packed_dim=0)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless told to overwrite it, or that cannot be written.

    Raises:
        UserError: naming the way out.
    """
    if output.exists() and not overwrite:
        raise UserError(f"output {output} exists already; use --overwrite to replace it or choose another --output")
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file, not a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise UserError(f"output {output} holds something that is not a checkpoint; it is not replaced")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(f"{output.name}.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output {output} cannot be written ({error.strerror or error})") from None


class CheckpointWriter:
    """Writes a quantized checkpoint layer by layer. Use as a context manager; without `finish` there is no output, and what is
    left, if any layer was finished, is a folder that `fingerprint` and `resume` decide on (`unfinished`).
    """

    def __init__(self, output: Path, source: SourceModel, grid: Grid, activation_bits: int | None = None,
                 online: OnlineTransforms | None = None, fingerprint: dict | None = None, resume: bool = False):
        self.output, self.source, self.grid, self.activation_bits = output, source, grid, activation_bits
        self.online = online
        self.form = INTEGER if activation_bits else PACKED
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
        for index in range(len(self.unfinished.records)):
            try:
                self._enter(self._shard(index), TensorReader(self.folder, self._shard(index)))
            except UserError:
                self.unfinished.drop_after(index)
                break
        return self

    def __exit__(self, *_exception) -> None:
        self.unfinished.close()

    def resumption(self) -> Resumption:
        """The layers that an earlier run finished."""
        return Resumption(self.unfinished.records, self._restore)

    def _restore(self, index: int, module: nn.Module) -> None:
        """Put the weights of a finished layer into a module, exactly as they were in memory when it was written."""
        prefix = f"model.layers.{index}."
        tensors = TensorReader(self.folder, self._shard(index))
        for name, parameter in module.named_parameters():
            linear = name.removesuffix(".weight")
            if linear in LINEARS:
                state = stored_parts(tensors.read, tensors, prefix + linear)
                value = decompress({part: tensor.to(parameter.device) for part, tensor in state.items()}, self.grid)
            else:
                value = tensors.read(prefix + name)
            parameter.data = value.to(parameter.device, parameter.dtype)

    def write_layer(self, index: int, module: nn.Module, codes: dict[str, QuantizedLinear], record: dict) -> None:
        """Write one decoder layer as a shard of its own, read it back and compare; its record is kept for a resumption.

        Raises:
            UserError: what was read back is not what was quantized.
        """
        prefix = f"model.layers.{index}."
        quantized_weights = {f"{name}.weight" for name in LINEARS}
        tensors = {prefix + name: tensor.to(self.source.storage_dtype)
                   for name, tensor in module.state_dict().items() if name not in quantized_weights}
        for name, linear in codes.items():
            for part, tensor in compress(linear, self.source.storage_dtype, self.form).items():
                tensors[f"{prefix}{name}.{part}"] = tensor
        file = self._save(tensors, self._shard(index))
        written = load_file(self.folder / file)
        for name, linear in codes.items():
            state = stored_parts(written.__getitem__, written, prefix + name)
            state = {part: tensor.to(linear.codes.device) for part, tensor in state.items()}
            if not torch.equal(decompress(state, self.grid), linear.dequantize()):
                raise UserError(f"{prefix}{name}: what was written does not read back the same; the disk or "
                                "compressed-tensors is at fault, nothing was saved")
        self.unfinished.finish_layer(record)

    def _shard(self, index: int) -> str:
        # One for each layer, and the last for the embedding, the final norm and an untied head.
        return f"model-{index + 1:05d}-of-{self.source.num_layers + 1:05d}.safetensors"

    def _enter(self, file: str, tensors: TensorReader) -> None:
        """Count a shard's tensors in."""
        self._weight_map.update(dict.fromkeys(tensors.names(), file))
        self._bytes += tensors.total_bytes()
        if self.load_dtype == torch.float16:
            if any(tensors.read(name).dtype == torch.bfloat16 for name in tensors.names() if name.endswith(".weight_scale")):
                self.load_dtype = torch.bfloat16

    def _save(self, tensors: dict[str, Tensor], file: str) -> str:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, self.folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {self.folder / file}: {error}; free some space or choose another --output") \
                from None
        (self.folder / file).chmod(0o644)                                       # safetensors makes private files
        self._enter(file, TensorReader(self.folder, file))
        return file

    def write_rest(self, ends: dict[str, QuantizedLinear]) -> int:
        """Write everything that is not a decoder layer: remaining tensors, index, configuration, tokenizer.

        Args:
            ends: the codes of model.embed_tokens and lm_head, where they were quantized too.
        Returns:
            The bytes of all tensors.
        """
        source = self.source
        rest = {"model.norm.weight": source.model.model.norm.weight.to(source.storage_dtype)}
        for name in _ENDS[:1] if source.tied else _ENDS:
            if name in ends:
                parts = _compress_rows(ends[name], source.storage_dtype, _form_of_end(ends[name]))
                rest.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            else:
                rest[f"{name}.weight"] = source.model.get_submodule(name).weight.to(source.storage_dtype)
        if source.tied and ends:
            # The codes are shared on loading, as weights are; the scales are not.
            rest["lm_head.weight_scale"] = rest["model.embed_tokens.weight_scale"].clone()
        self._save(rest, self._shard(source.num_layers))
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
        config = source.config.to_diff_dict()
        config.update(architectures=[type(source.model).__name__], dtype=dtype_name(self.load_dtype),
                      quantization_config=self._quantization_config(ends), **_old_rope(config))
        if self.online:
            mark_config(config, self.online)
        (self.folder / "config.json").write_text(json.dumps(config, indent=2))
        source.tokenizer.save_pretrained(self.folder)
        _name_tokenizer_as_before(self.folder / "tokenizer_config.json")
        generation = source.folder / "generation_config.json"
        if generation.is_file():
            shutil.copy(generation, self.folder)
        return self._bytes

    def _quantization_config(self, ends: dict[str, QuantizedLinear]) -> dict:
        groups = {"group_0": _config_group(["re:.*_proj$"], scheme_of(self.grid, self.activation_bits), self.form)}
        for name, end in ends.items():
            rounded = _ENDS if self.source.tied else [name]
            groups[f"group_{len(groups)}"] = _config_group([f"re:.*{module.split('.')[-1]}$" for module in rounded],
                                                           scheme_of(end.grid), _form_of_end(end))
        forms = {group["format"] for group in groups.values()}
        quantized_head = "lm_head" in ends or (self.source.tied and ends)
        return {"quant_method": "compressed-tensors", "version": compressed_tensors_version,
                "format": self.form if len(forms) == 1 else "mixed-precision", "quantization_status": "compressed",
                "config_groups": groups, "ignore": [] if quantized_head else ["lm_head"]}

    def finish(self, metadata: dict | None) -> None:
        """Give the checkpoint its metadata and its real name. An older checkpoint there is replaced only now."""
        if metadata is not None:
            content = {**metadata, "files": file_hashes(self.folder)}
            (self.folder / METADATA_FILE).write_text(json.dumps(content, indent=1))
        for file in self.folder.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        replace_folder(self.folder, self.output)
        self.unfinished.clean(self.output)


def _old_rope(config: dict) -> dict:
    """The rotary embedding of a config.json in the form that transformers 4 reads; without it 4.57 takes its defaults and says
    nothing. transformers 5 reads both forms.
    """
    scaling = dict(config["rope_parameters"])
    theta = scaling.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def _name_tokenizer_as_before(file: Path) -> None:
    """Give the class and the special tokens in a tokenizer_config.json the names that transformers 4 and 5 both know."""
    config = load_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False))


def _form_of_end(end: QuantizedLinear) -> str:
    """How embedding and head are stored: 8 bits as int8, which transformers also takes for an embedding."""
    return INTEGER if end.grid.bits == 8 else PACKED


def _config_group(targets: list[str], scheme: QuantizationScheme, form: str) -> dict:
    scheme.targets, scheme.format = targets, form
    return scheme.model_dump(mode="json", exclude_none=True)


def open_checkpoint(folder: Path) -> tuple[dict, TensorReader]:
    """A checkpoint's configuration (config.json as a dict) and its tensors, for looking into the codes.

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
        ours = quantization["quant_method"] == "compressed-tensors" and "group_0" in quantization["config_groups"]
    except (KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{folder} is not a checkpoint of the quantize scripts (no compressed-tensors configuration)")
    try:
        grids = [grid_of(group) for group in quantization["config_groups"].values()]
        whole = all(isinstance(grid.bits, int) and isinstance(grid.symmetric, bool) for grid in grids)
        if not whole or not 0 < config["num_hidden_layers"] < 10_000:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{folder}: config.json is damaged") from None
    return config, TensorReader(folder)


def is_quantized(folder: Path) -> bool:
    """Whether the model in a folder says that it is quantized, in this format or another.

    Raises:
        UserError: no model there, or an unreadable config.json.
    """
    config = read_config(folder)
    return any(config.get(key) for key in ("quantization_config", "compression_config"))


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint that decide what it computes, by name."""
    names = sorted(file.name for file in folder.iterdir()
                   if file.suffix == ".safetensors" or file.name in ("config.json", INDEX_FILE, "tokenizer.json"))
    hashes = {}
    for name in names:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def folder_bytes(folder: Path) -> int:
    """Bytes of a model's files in a folder; not of the same weights in other forms beside."""
    return sum(file.stat().st_size for file in folder.iterdir()
               if file.is_file() and any(map(file.match, MODEL_FILES)))

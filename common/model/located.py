"""Where a model is that others may have quantized: a folder, one GGUF file, or on the hub."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.base.errors import UserError, first_line
from common.model.source import hub_errors, resolve_folder

GGUF = ".gguf"
# Of a GGUF file's types, those that are plain numbers.
_PLAIN = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class GgufContent:
    """What a GGUF file says: fields by name; of all its tensors, and of those with codes, bytes and
    how many numbers they stand for; types: of the latter, by how many numbers, most first.
    """

    fields: dict[str, object]
    total_bytes: int
    coded_bytes: int
    coded_weights: int
    types: tuple[str, ...]


def is_gguf(path: Path) -> bool:
    """Whether a model is one GGUF file."""
    return path.suffix == GGUF


def find_model(model: str | Path) -> Path:
    """The folder of a model, or its GGUF file.

    Args:
        model: a folder; a .gguf file, or a folder with one and no config.json; a hub id; a GGUF
            file on the hub as owner/name/file.gguf.
    Raises:
        UserError: nothing of the kind, or several GGUF files.
    """
    path, name = Path(model), str(model)
    if path.is_file():
        if not is_gguf(path):
            raise UserError(f"{path} is a file; give a model's folder, a .gguf file or a hub id")
        return path
    if path.is_dir():
        files = sorted(path.glob(f"*{GGUF}"))
        if (path / "config.json").is_file() or not files:
            return path
        if len(files) > 1:
            raise UserError(
                f"{path} holds {len(files)} GGUF files; give one of them, such as {files[0]}"
            )
        return files[0]
    if path.parts[:1] and Path(path.parts[0]).is_dir():
        raise UserError(
            f"{model} is not a folder; give the --output of a quantize script, or another model's "
            "folder, .gguf file or hub id"
        )
    if name.endswith(GGUF) and name.count("/") >= 2 and not name.startswith((".", "/", "~")):
        return _download_file(name)
    return resolve_folder(name)


def _download_file(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    owner, repository, file = name.split("/", 2)
    with hub_errors(f"{owner}/{repository}"):
        try:
            return Path(hf_hub_download(f"{owner}/{repository}", file))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise UserError(f"{owner}/{repository} has no file {file} on the hub") from None


def described_by(path: Path, original: str) -> Path:
    """The folder whose config.json and tokenizer go for a model to evaluate. Of a GGUF file it is
    the 16-bit model's: a tokenizer that is made of the file's own fields may cut text otherwise,
    and answers could not be compared.

    Args:
        path: as `find_model` gives it; original: the 16-bit model.
    """
    return resolve_folder(original) if is_gguf(path) else path


@cache
def gguf_content(path: Path) -> GgufContent:
    """What a GGUF file holds. Raises UserError where it cannot be read."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if _small(field)}
        tensors = [
            (one.tensor_type.name, int(one.n_bytes), math.prod(map(int, one.shape)))
            for one in reader.tensors
        ]
    except Exception as error:  # the library raises whatever a damaged file leads to
        raise UserError(f"{path} is no readable GGUF file ({first_line(error)})") from None
    coded = [one for one in tensors if one[0] not in _PLAIN]
    weights: dict[str, int] = {}
    for kind, _, count in coded:
        weights[kind] = weights.get(kind, 0) + count
    return GgufContent(
        fields,
        sum(size for _, size, _ in tensors),
        sum(size for _, size, _ in coded),
        sum(weights.values()),
        tuple(sorted(weights, key=lambda kind: -weights[kind])),
    )


def _small(field) -> bool:
    """Whether a field is one value; the vocabulary is none."""
    return len(field.data) == 1

"""Tensors of a checkpoint's safetensors files, read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.base.errors import UserError, first_line
from common.base.files import load_json

INDEX_FILE = "model.safetensors.index.json"


class TensorReader:
    """Reads single tensors out of a folder's safetensors files, sharded or not."""

    def __init__(self, folder: Path, single: str = "model.safetensors"):
        """Args: single: the file with all tensors, where there is no index."""
        index = folder / INDEX_FILE
        try:
            if index.is_file():
                weight_map = load_json(index)["weight_map"]
                if not isinstance(weight_map, dict) or not all(
                    isinstance(name, str) for name in weight_map.values()
                ):
                    raise ValueError(f"{INDEX_FILE} is damaged")
            elif (folder / single).is_file():
                with safe_open(folder / single, "pt") as file:
                    weight_map = dict.fromkeys(file.keys(), single)
            else:
                raise UserError(
                    f"{folder} has no model.safetensors (only safetensors weights are read)"
                )
            # Opened again for every tensor: what was read of an open file stays in the process's
            # memory.
            self._files = sorted(set(weight_map.values()))
            for name in self._files:
                with safe_open(folder / name, "pt"):
                    pass
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: weights are incomplete or damaged ({first_line(error)}); copy or "
                "download them again, or make them anew"
            ) from None
        self._weight_map = weight_map
        self._folder = folder

    def __contains__(self, name: object) -> bool:
        return name in self._weight_map

    def __iter__(self):
        return iter(self._weight_map)

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self._weight_map if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        try:
            with safe_open(self._folder / self._weight_map[name], "pt") as file:
                return file.get_tensor(name)
        except (KeyError, SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from None

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape of a tensor and safetensors' name of its type, without reading it."""
        try:
            with safe_open(self._folder / self._weight_map[name], "pt") as file:
                view = file.get_slice(name)
                return tuple(view.get_shape()), view.get_dtype()
        except (KeyError, SafetensorError, OSError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{self._folder}: tensor {name} is missing or damaged ({first_line(error)})"
        )

    def describe(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of last change of every file, to tell whether it is still the same
        model.
        """
        stats = [(name, (self._folder / name).stat()) for name in self._files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def forms(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """Name, shape and bytes of every tensor as stored."""
        for name in self._files:
            with safe_open(self._folder / name, "pt") as file:
                for tensor, where in self._weight_map.items():
                    if where == name:
                        view = file.get_slice(tensor)
                        shape = tuple(view.get_shape())
                        yield tensor, shape, math.prod(shape) * _BYTES[view.get_dtype()]

    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(size for _, _, size in self.forms())


_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}

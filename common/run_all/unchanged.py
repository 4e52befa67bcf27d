"""What of a batch needs no looking into: a configuration that is done, of which nothing it was made
from, and nothing that it left, has changed since; and the tables likewise.

Files are told by size, times and inode, as make and git do, so that a second batch with nothing to
do need not import torch, open a model or hash a weight. Whatever has changed, the scripts
themselves find out what of it matters. This module imports nothing large.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sysconfig
import threading
from collections.abc import Iterable
from pathlib import Path

from common.base.files import json_or_none, write_json
from common.results.documents import DOCUMENTED_FOLDER, STATUS_FILE

FILE = "unchanged.json"
_TABLES = "tables"
# Options that decide nothing about one configuration: which others there are, and where it ran.
_BESIDE = ("only", "with_peers", "overwrite", "check", "gpus")
# What the environment says to the libraries: as it was found, since they add to it.
_ENVIRONMENT = dict(os.environ)
_VARIABLES = ("CUDA", "HF_", "MKL_", "NVIDIA", "OMP_", "TORCH", "TRITON")
_CODE = ("*.py", "*.sh", "requirements.txt", "common/**/*", "benchmarks/*")
# Where a GPU and its driver show themselves, on Linux and under WSL.
_GPU = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/dxg")
_WRITTEN = (
    "README.md",
    "docs/published.md",
    "docs/report.html",
    "docs/figures/**/*",
    "docs/tables/**/*",
)


class Unchanged:
    """What a batch with these options finds as an earlier one left it."""

    def __init__(self, options: argparse.Namespace, passed_on: list[str]):
        """options, passed_on: the batch's own options, and all others as they were given."""
        self._options, self._passed_on = options, passed_on
        self._results: Path = options.results_dir
        self._started: dict[str, str] = {}
        self._lock = threading.Lock()
        self._surroundings = _surroundings()

    def everything(self, configurations: list[str]) -> bool:
        """Whether these, at least one, and the tables are as they were left."""
        known = bool(configurations) and all(map(self.done, configurations))
        return known and self._known(_TABLES).get("state") == self._tables()

    def done(self, configuration: str) -> bool:
        """Whether a configuration is done, and all as it was then."""
        if self._options.overwrite:
            return False
        known = self._known(self._key(configuration))
        return bool(known) and known == self._found(configuration, known["name"], known["folder"])

    def begins(self, configuration: str) -> None:
        """Note what a configuration is made from, before it is."""
        self._started[configuration] = self._inputs()

    def ends(self, configuration: str, name: str, folder: Path | None) -> None:
        """Remember a configuration that is done, unless what it is made from has changed meanwhile.

        Args:
            name: of the model among results.
            folder: with the 16-bit model's files; None where a hub has to be asked for them.
        """
        if folder is None or self._started.get(configuration) != self._inputs():
            return
        found = self._found(configuration, name, str(folder))
        if found is not None:
            self._remember(self._key(configuration), found)

    def tables_are_written(self) -> None:
        """Remember the tables as they are now."""
        self._remember(_TABLES, {"state": self._tables()})

    def _key(self, configuration: str) -> str:
        return f"{self._options.model} {configuration}"

    def _known(self, key: str) -> dict:
        found = (json_or_none(self._results / FILE) or {}).get(key)
        return found if isinstance(found, dict) else {}

    def _remember(self, key: str, found: dict) -> None:
        with self._lock:
            write_json(
                self._results / FILE, {**(json_or_none(self._results / FILE) or {}), key: found}
            )

    def _inputs(self) -> str:
        """Of all that a configuration is made from but the model."""
        own = {name: str(one) for name, one in vars(self._options).items() if name not in _BESIDE}
        # Texts and data sets that are given as files or folders.
        words = [str(self._options.data_root), *self._passed_on]
        named = [Path(word.partition("=")[2] or word) for word in words]
        return _digest([own, self._passed_on, self._surroundings, _code(), *map(_state, named)])

    def _found(self, configuration: str, name: str, folder: str) -> dict | None:
        """All that is to stay the same; None where it is not done or something is missing."""
        results = self._results / name
        own = (json_or_none(results / STATUS_FILE) or {}).get(configuration, {})
        needed = [results / f"{configuration}.json"]
        if configuration != "baseline":
            needed.append(Path("models") / name / configuration / "config.json")
        if own.get("state") != "done" or not all(file.is_file() for file in needed):
            return None
        # The card of a checkpoint shows what it recovered of the baseline.
        left = [results / f"{one}.json" for one in (configuration, "baseline")]
        left += [results / "samples" / f"{configuration}.jsonl.gz", Path(folder)]
        left += [Path("models") / name / configuration]
        return {
            "name": name,
            "folder": folder,
            "state": _digest([self._inputs(), own, *map(_state, left)]),
        }

    def _tables(self) -> str:
        """Of all that the tables are made from, and of what was written of them."""
        root = Path()
        files = [file for pattern in _WRITTEN for file in root.glob(pattern)]
        for folder in (self._results, DOCUMENTED_FOLDER):
            files += [file for file in folder.rglob("*") if file.name != FILE]
        files += root.glob("models/*/*/*")
        given = [str(self._results), str(self._options.data_root)]
        return _digest([given, self._surroundings, _code(), _of_files(files)])


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _of_files(files: Iterable[Path]) -> list:
    found = []
    for file in sorted(files):
        if file.is_file() and "__pycache__" not in file.parts:
            stat = file.stat()
            found.append([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    return found


def _state(path: Path) -> list:
    """Of a file, or of all in a folder; empty where there is neither."""
    return _of_files(path.rglob("*") if path.is_dir() else [path])


def _code() -> list:
    return _of_files(file for pattern in _CODE for file in Path().glob(pattern))


def _surroundings() -> list:
    """What decides results besides files and options: versions, settings, processors."""
    packages = [Path(sysconfig.get_path("purelib")), *Path(".peers").glob("lib/*/site-packages")]
    return [
        platform.python_version(),
        sorted(item.name for folder in packages for item in folder.glob("*.dist-info")),
        sorted(
            item
            for item in _ENVIRONMENT.items()
            if item[0].startswith(_VARIABLES) and "TOKEN" not in item[0]
        ),
        len(os.sched_getaffinity(0)),
        [Path(name).exists() for name in _GPU],
        Path(_GPU[0]).read_text() if Path(_GPU[0]).is_file() else "",
    ]

"""JSON files read, files hashed, and files and folders that change in one step: whoever reads sees
the old one or the new one, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common.base.errors import UserError


def sha256_of(files: Iterable[Path]) -> list[str]:
    """SHA-256 of each file's content, of several at a time: hashing does not hold the
    interpreter. Raises OSError for one that cannot be read.
    """

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, files))


def load_json(path: Path):
    """What a JSON file holds. Raises OSError or ValueError, for callers with words of their own for
    it.
    """
    return json.loads(path.read_text())


def read_json(path: Path, remedy: str) -> dict:
    """A JSON object from a file. Raises UserError, which ends with the remedy, when it is
    damaged."""
    try:
        content = load_json(path)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def json_or_none(path: Path) -> dict | None:
    """A JSON object from a file that may as well not be there, or be damaged: None then."""
    try:
        content = load_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file in one step."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")


def unfinished_of(path: Path) -> Path:
    """The folder beside `path` in which what is to become it is made."""
    return path.with_name(f"{path.name}.unfinished")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, in a folder that is made; at the end of the block the file
    gets the name `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its own for each of several writers.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    yield unfinished
    unfinished.rename(path)


def why_not_writable(folder: Path) -> str | None:
    """Make a folder and try a file in it. Returns what is in the way or what the system says
    against it, None if that goes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        for path in (folder, *folder.parents):
            if os.path.isfile(path):  # which is no error where it cannot be looked at
                return f"{path} is a file"
        return error.strerror or str(error)


def replace_folder(finished: Path, folder: Path) -> None:
    """Give a finished folder its real name. An older one there goes only now."""
    if folder.exists():
        old = folder.with_name(folder.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        finished.rename(folder)
        shutil.rmtree(old)
    else:
        finished.rename(folder)


def lacking(document: dict, needs: tuple[str, ...]) -> list[str]:
    """What a document lacks of the names it needs; with a dot what is inside one."""
    return [name for name in needs if not _has(document, name.split("."))]


def _has(row: dict, path: list[str]) -> bool:
    for name in path:
        if not isinstance(row, dict) or name not in row:
            return False
        row = row[name]
    return True

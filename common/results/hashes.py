"""What results are made from, as SHA-256: a checkpoint's files, the code that evaluates, a task's
rows.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from common.base.errors import UserError
from common.base.files import json_or_none, sha256_of, write_json
from common.checkpoint.writer import METADATA_FILE
from common.model.located import is_gguf
from common.model.source import resolve_folder
from common.model.tensors import TensorReader
from common.results.naming import Subject

HASHES_FILE = "file_hashes.json"
# Besides the weights: configuration, tokenizer, chat template.
_SMALL_FILES = (".json", ".jinja", ".txt", ".model")
# A file may be written twice within a tick of the file system's clock: young ones are hashed again.
_SETTLED_SECONDS = 2.0
PROJECT = Path(__file__).resolve().parents[2]
_ENTRY = "common.evaluation"
# What the evaluation does with results beside finding them.
_BESIDE_RESULTS = ("common.reporting.card",)


def checkpoint_hash(folder: Path, results_dir: Path) -> str:
    """SHA-256 over the contents of all files in a model's folder that decide what it computes, or
    of its GGUF file.

    Args:
        results_dir: hashes of files are remembered there, by path, size, times of change and inode.
    Raises:
        UserError: no readable weights.
    """
    if is_gguf(folder):
        return _hash_of_files(folder.parent, {folder.name}, results_dir)
    weights = [name for name, *_ in TensorReader(folder).describe()]
    small = [
        file.name
        for file in folder.iterdir()
        if file.suffix in _SMALL_FILES and file.name != METADATA_FILE and file.is_file()
    ]
    return _hash_of_files(folder, {*weights, *small}, results_dir)


def source_hash(folder: Path, results_dir: Path) -> str:
    """SHA-256 over a 16-bit model's weights and config.json, which are the same in every copy of
    it. Arguments and errors as of `checkpoint_hash`.
    """
    weights = [name for name, *_ in TensorReader(folder).describe()]
    return _hash_of_files(folder, {*weights, "config.json"}, results_dir)


def _hash_of_files(folder: Path, names: set[str], results_dir: Path) -> str:
    memory = results_dir / HASHES_FILE
    known, now = json_or_none(memory) or {}, time.time_ns()
    files = {name: (folder / name).resolve() for name in sorted(names)}
    states = {file: _state(file) for file in files.values()}
    found = {file: _remembered(known.get(str(file)), state) for file, state in states.items()}
    new = [file for file, digest in found.items() if digest is None]
    hashed = dict(zip(new, sha256_of(new), strict=True))
    # Those that are young are not remembered yet.
    fresh = {
        str(file): [*states[file], digest]
        for file, digest in hashed.items()
        if now - max(states[file][1:3]) > _SETTLED_SECONDS * 1e9
    }
    if fresh:
        with suppress(OSError):  # only ever saves time
            write_json(memory, {**(json_or_none(memory) or {}), **fresh})
    return _digest({name: found[file] or hashed[file] for name, file in files.items()})


def _state(file: Path) -> list[int]:
    """What tells one content of a file from another: size, times of change, inode."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _remembered(entry: object, state: list[int]) -> str | None:
    """A file's SHA-256, if an entry of the memory is of this state of it."""
    return entry[-1] if isinstance(entry, list) and entry[:-1] == state else None


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def rows_fingerprint(rows: list[dict]) -> str:
    """SHA-256 of a task's rows: equal fingerprints mean the same samples in the same order."""
    return _digest(rows)


@cache
def code_hash(
    root: Path = PROJECT, entry: str = _ENTRY, beside: tuple[str, ...] = _BESIDE_RESULTS
) -> str:
    """SHA-256 of the code that decides results: the modules that the evaluation imports, without
    comments and docstrings, and the tasks. An edit of a README or a plot changes nothing.

    Args:
        entry: the module to begin with; the tasks are the evaluation's alone.
        beside: modules that are left out, with what only they import.
    """
    modules, waiting, prompts = {}, [entry], {}
    if entry == _ENTRY:
        # Tasks are found there, not imported by name.
        folder = root / "common" / "tasks"
        waiting += [f"common.tasks.{file.stem}" for file in sorted(folder.glob("*.py"))]
        prompts = {file.name: file.read_text("utf-8") for file in sorted(folder.glob("*.yaml"))}
    while waiting:
        name = waiting.pop()
        file = None if name in beside else _module_file(root, name)
        if name in modules or file is None:
            continue
        imported, modules[name] = _parsed(file.read_text(encoding="utf-8"))
        waiting += imported
    return _digest([modules, prompts])


def _module_file(root: Path, name: str) -> Path | None:
    base = root.joinpath(*name.split("."))
    return next(
        (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None
    )


@cache  # the methods' codes have most modules in common
def _parsed(source: str) -> tuple[list[str], str]:
    """What a module imports, and what it computes: its tree without docstrings."""
    tree = ast.parse(source)
    return list(_imported(tree)), ast.dump(_without_docstrings(tree))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return tree


def original_hash(subject: Subject, results_dir: Path) -> str | None:
    """The hash of the 16-bit model that divergence is from; None where it cannot be had."""
    try:
        return checkpoint_hash(resolve_folder(subject.original), results_dir)
    except UserError:
        return None

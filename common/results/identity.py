"""What results were made from, and whether they answer for what is asked now.

Results are those of a checkpoint (the hash of its files), by this code (the hash of the modules
that the evaluation uses), with these library versions, on this device, and each task's on these
rows. They are used again only when all of it agrees.
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
from common.base.files import json_or_none, write_json
from common.base.progress import say
from common.checkpoint.writer import METADATA_FILE
from common.model.located import is_gguf
from common.model.source import resolve_folder
from common.model.tensors import TensorReader
from common.results.documents import SIZES, has_samples, load_model_results, read_document
from common.results.naming import BASELINE, Subject

# What all tasks of a document share, and how a difference is called.
SHARED = {
    "source": "model",
    "checkpoint": "checkpoint",
    "code": "evaluation code",
    "demo_data": "demo data",
    "compute_dtype": "type",
    "device": "device",
    "versions": "version",
}
# Of these, what may differ between the documents of a checkpoint and its baseline, and with what
# a result was measured.
_OWN = ("source", "checkpoint")
_MEASURED_WITH = ("compute_dtype", "device", "versions")
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
    known = json_or_none(memory) or {}
    found = {name: _file_hash(folder / name, known) for name in sorted(names)}
    fresh = {
        entry[0]: entry[1]
        for entry in found.values()
        if entry[1] is not None and known.get(entry[0]) != entry[1]
    }
    if fresh:
        with suppress(OSError):  # only ever saves time
            write_json(memory, {**(json_or_none(memory) or {}), **fresh})
    return _digest({name: entry[2] for name, entry in found.items()})


def _file_hash(file: Path, known: dict) -> tuple[str, list | None, str]:
    """A file's path, what to remember of it (None while it is too young), and its SHA-256."""
    path, stat = str(file.resolve()), file.stat()
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entry = known.get(path)
    if isinstance(entry, list) and entry[:-1] == state:
        return path, entry, entry[-1]
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    settled = time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS
    return path, [*state, found] if settled else None, found


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


def left_to_do(
    subject: Subject, results_dir: Path, shared: dict, tasks: dict[str, dict], twice: bool
) -> tuple[str, ...]:
    """The tasks without results that answer for them. Says what is used again, and why others not.

    Args:
        shared: by the keys of SHARED, what results have to agree with.
        tasks: by task, what its part of the results has to agree with.
        twice: tasks on rows have to have been run twice.
    Raises:
        UserError: the 16-bit model is another than the one that this same checkpoint was compared
            with, on whatever device that was.
    """
    title = f"{subject.name} {subject.configuration}"
    file = results_dir / subject.name / f"{subject.configuration}.json"
    if not file.is_file() or not has_samples(results_dir, subject.name, subject.configuration):
        return tuple(tasks)
    document = read_document(file)
    original, now = _original_of(document.get("tasks", {})), _original_of(tasks)
    same = document.get("checkpoint") == shared["checkpoint"]
    if same and original and now and original != now:
        raise UserError(
            f"{subject.original} has changed since {subject.folder} was compared with it; quantize "
            "again with --overwrite"
        )
    changes = shared_changes(document, shared)
    if changes:
        say(f"{title}: evaluated again, as its results are of another {'; '.join(changes)}")
        return tuple(tasks)
    left = []
    for task, wanted in tasks.items():
        reason = _task_change(task, document, wanted)
        if not reason and twice and "samples" in wanted and task not in document.get("noise", {}):
            reason = "was run once, not twice"
        if reason:
            left.append(task)
            say(f"{title}: {task} {reason}")
    used = [task for task in tasks if task not in left]
    if used:
        say(
            f"{title}: results of {', '.join(used)} used again: same checkpoint, data, device and "
            "code"
        )
    return tuple(left)


def shared_changes(document: dict, shared: dict) -> list[str]:
    """In what `document` differs from `shared`, in words."""
    return [
        text
        for key, label in SHARED.items()
        if key in shared
        for text in _changes(label, _deciding(document.get(key)), _deciding(shared[key]))
    ]


def _deciding(value):
    """Of what a result was measured with, what decides it: on a GPU not the CPU's threads."""
    if isinstance(value, dict) and value.get("type") == "cuda":
        return {key: one for key, one in value.items() if key != "threads"}
    return value


def _changes(label: str, then, now) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _changes(f"{label} ({key})", then.get(key), now.get(key))
    elif then != now:
        known = then is not None and not (isinstance(now, str) and len(now) == 64)
        yield f"{label} ({then} then, {now} now)" if known else label


def _task_change(task: str, document: dict, wanted: dict) -> str:
    """Why a task's part of a document does not answer for `wanted`; empty if it does."""
    found = document.get("tasks", {}).get(task, document.get(task))
    if found is None:
        return "was not evaluated yet"
    for key, now in wanted.items():
        then = found.get(key)
        # A 16-bit model that cannot be had now says nothing about the one that could be had then.
        if then != now and (now is not None or key != "original"):
            known = key in ("data", *SIZES)
            return f"was evaluated with {f'{key} {then}, not {now}' if known else f'another {key}'}"
    return ""


def _original_of(tasks: dict[str, dict]) -> str | None:
    """The hash of the 16-bit model that a task's results depend on; None where none's do."""
    return next((task["original"] for task in tasks.values() if task.get("original")), None)


def incomparable(baseline: dict, quantized: dict) -> list[str]:
    """Why nothing of two documents may be compared, in words; empty if what all tasks share
    agrees."""
    shared = {key: quantized.get(key) for key in SHARED if key not in _OWN}
    found = [f"another {change}" for change in shared_changes(baseline, shared)]
    original = _original_of(quantized["tasks"])
    if original and baseline.get("checkpoint") and original != baseline["checkpoint"]:
        found.append("another 16-bit model")
    return found


def measured_apart(document: dict, other: dict) -> str | None:
    """What of a document is not to be shown beside another, as it was measured with another device,
    type or versions, or on other data: in brackets the tasks, empty for all of it; None for
    nothing.
    """
    if shared_changes(other, {key: document.get(key) for key in _MEASURED_WITH}):
        return ""
    tasks = other_data(other, document)
    return f" ({', '.join(task for task in document['tasks'] if task in tasks)})" if tasks else None


def other_data(baseline: dict, quantized: dict) -> list[str]:
    """The tasks of two documents that were evaluated on different data."""
    return [
        task
        for task in sorted({*baseline["tasks"]} & {*quantized["tasks"]})
        if any(
            baseline["tasks"][task].get(key) != quantized["tasks"][task].get(key)
            for key in ("data", "fingerprint")
        )
    ]


def spare(
    subject: Subject,
    results_dir: Path,
    tasks: dict[str, dict],
    compared: str | None,
    refuse: bool,
) -> None:
    """Refuse to evaluate a baseline on other data while other configurations are compared with it,
    or say which will have none.

    Args:
        tasks: by task to be evaluated, what its results have to agree with.
        compared: the configuration that it is evaluated for, if for one.
    """
    results = load_model_results(results_dir / subject.name)
    known = results.documents.get(BASELINE, {"tasks": {}})
    changes = {
        task: change
        for task, wanted in tasks.items()
        if task in known["tasks"] and (change := _task_change(task, known, wanted))
    }
    resting = [
        name
        for name, one in results.documents.items()
        if name not in (BASELINE, compared)
        and not incomparable(known, one)
        and {*changes} & {*one["tasks"]} - {*other_data(known, one)}
    ]
    if not resting:
        return
    names = ", ".join(resting)
    differences = "; ".join(f"{task} {change}" for task, change in changes.items())
    if not refuse:
        say(f"{names} will have no baseline until evaluated again as well: there {differences}")
        return
    raise UserError(
        f"{names} would have no baseline any more: there {differences}; leave the "
        "difference out, give a --results-dir of its own, or --overwrite both"
    )

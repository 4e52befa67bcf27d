"""Results on disk: one document per evaluated configuration, and what state each configuration of a
batch is in.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from common.base.errors import UserError
from common.base.files import read_json, replacing, why_not_writable
from common.results.peers import PEERS

# Those of this machine, and those of the documented run, which come with the project.
RESULTS_FOLDER, DOCUMENTED_FOLDER = Path("results"), Path("docs/results")
STATUS_FILE = "status.json"
# Of a task's results: on how much it was evaluated.
SIZES = ("samples", "windows", "length")
# The configurations of the comparison, in the order of the tables: method and bits.
CONFIGURATIONS: dict[str, tuple[str, int] | None] = {
    "baseline": None,
    "gptq-4bit": ("gptq", 4),
    "gptq-8bit": ("gptq", 8),
    "awq-4bit": ("awq", 4),
    "hqq-4bit": ("hqq", 4),
    "hqq-8bit": ("hqq", 8),
    "smoothquant-8bit": ("smoothquant", 8),
    "adaround-4bit": ("adaround", 4),
    "adaround-8bit": ("adaround", 8),
    "quarot-4bit": ("quarot", 4),
}


@dataclass
class ModelResults:
    """All results of one model. documents: by configuration; status: by configuration, {"state",
    "reason"}; documented: they are not of this machine but come with the project; left_out: by
    configuration, tasks that `of_one_size` took out; other_cards: by configuration, the GPU of
    those of which `identity.of_one_card` took times out.
    """

    name: str
    documents: dict[str, dict]
    status: dict[str, dict] = field(default_factory=dict)
    documented: bool = False
    left_out: dict[str, list[str]] = field(default_factory=dict)
    other_cards: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model's name and whose run it is."""
        return f"{self.name} ({'documented' if self.documented else 'local'} run)"

    def evaluated(self) -> list[tuple[str, dict]]:
        """Names and documents of those that were evaluated, in the order of the tables."""
        return [
            (name, self.documents[name]) for name in self.configurations() if name in self.documents
        ]

    def configurations(self) -> list[str]:
        """Names in the order of the tables: those of the comparison, then other libraries', then
        any others that were evaluated or are in a state.
        """
        others = {*self.documents, *self.status} - {*CONFIGURATIONS}
        return [
            *CONFIGURATIONS,
            *(name for name in PEERS if name in others),
            *sorted(others - {*PEERS}),
        ]


def check_folder(folder: Path, model: str) -> None:
    """Refuse a folder where results of a model cannot be written. Raises UserError."""
    for place in (folder, folder / model, folder / model / "samples"):
        if reason := why_not_writable(place):
            raise UserError(
                f"results cannot be written to {place} ({reason}); choose another --results-dir"
            )


def read_document(path: Path) -> dict:
    """A result or status, from its file. Raises UserError when it is damaged."""
    return read_json(path, "delete it and evaluate again")


def stored_document(results_dir: Path, model: str, configuration: str) -> dict | None:
    """A configuration's result, where it is there with its records. Raises UserError when it is
    damaged.
    """
    path = results_dir / model / f"{configuration}.json"
    found = path.is_file() and has_samples(results_dir, model, configuration)
    return read_document(path) if found else None


def load_model_results(folder: Path, documented: bool = False) -> ModelResults:
    """Results of the model whose folder this is. Raises UserError for a damaged file."""
    documents = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != STATUS_FILE:
            document = read_document(path)
            if "tasks" not in document or "model" not in document:
                raise UserError(f"{path} is not a result of the evaluation; move it elsewhere")
            documents[path.stem] = document
    status = read_document(folder / STATUS_FILE) if (folder / STATUS_FILE).is_file() else {}
    return ModelResults(folder.name, documents, status, documented)


def load_all(results_dir: Path, documented: bool = False) -> list[ModelResults]:
    """Results of every model, by name."""
    folders = (
        sorted(path for path in results_dir.iterdir() if path.is_dir())
        if results_dir.is_dir()
        else []
    )
    found = [load_model_results(folder, documented) for folder in folders]
    return [results for results in found if results.documents or results.status]


def of_one_size(results: ModelResults) -> ModelResults:
    """Results without tasks that were evaluated on more or fewer samples than the baseline's (else
    the first configuration's), for which tables say how many they are of."""
    evaluated = {
        name: results.documents[name]
        for name in results.configurations()
        if name in results.documents
    }
    first: dict = next(iter(evaluated.values()), {"tasks": {}})["tasks"]
    left_out = {
        name: [
            task
            for task, found in document["tasks"].items()
            if task in first and any(found.get(size) != first[task].get(size) for size in SIZES)
        ]
        for name, document in evaluated.items()
    }
    documents = {
        name: {
            **document,
            "tasks": {
                task: found
                for task, found in document["tasks"].items()
                if task not in left_out[name]
            },
        }
        for name, document in evaluated.items()
    }
    return replace(
        results,
        documents=documents,
        left_out={name: tasks for name, tasks in left_out.items() if tasks},
    )


def size_in_words(summary: dict) -> str:
    """On how much a task was evaluated."""
    if "windows" in summary:
        return f"{summary['windows']} windows of {summary['length']} tokens"
    return f"{summary['samples']} samples"


def _samples_file(results_dir: Path, model: str, configuration: str) -> Path:
    return results_dir / model / "samples" / f"{configuration}.jsonl.gz"


def load_samples(results_dir: Path, model: str, configuration: str) -> list[dict]:
    """The record of every evaluated sample of a configuration; each names its task. They are kept
    while the file is the same, as a report reads them several times: nobody may change them.
    """
    path = _samples_file(results_dir, model, configuration)
    try:
        written = path.stat()
        return _read_samples(path.resolve(), written.st_mtime_ns, written.st_size)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); evaluate again") from None


@lru_cache(maxsize=48)
def _read_samples(path: Path, *_written: int) -> list[dict]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def samples_by_task(results_dir: Path, model: str, configuration: str) -> dict[str, list[dict]]:
    """The per-sample records of a configuration, by task."""
    found: dict[str, list[dict]] = {}
    for sample in load_samples(results_dir, model, configuration):
        found.setdefault(sample["task"], []).append(sample)
    return found


def has_samples(results_dir: Path, model: str, configuration: str) -> bool:
    """Whether the records of a configuration's samples are there."""
    return _samples_file(results_dir, model, configuration).is_file()


def samples_digest(results_dir: Path, model: str, configuration: str) -> str:
    """SHA-256 of the file with the records of a configuration's samples. Raises UserError if it
    cannot be read."""
    path = _samples_file(results_dir, model, configuration)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); evaluate again") from None


def write_samples(
    results_dir: Path,
    model: str,
    configuration: str,
    samples: dict[str, list[dict]],
    before: Callable[[], object] = lambda: None,
) -> None:
    """Write per-sample records as compressed JSON lines, byte for byte reproducible.

    Args:
        before: called just before they take the place of those that are there.
    """
    lines = [
        json.dumps({"task": task, **sample}) for task, rows in samples.items() for sample in rows
    ]
    # The usual 9 saves 6% of the bytes in up to 18 times the time.
    content = gzip.compress("\n".join([*lines, ""]).encode(), compresslevel=6, mtime=0)
    with replacing(_samples_file(results_dir, model, configuration)) as unfinished:
        unfinished.write_bytes(content)
        before()

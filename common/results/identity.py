"""What results were made from, and whether they answer for what is asked now.

Results are those of a checkpoint, by this code (both by their `hashes`), with these library
versions, on this device, and each task's on these rows. They are used again only when all of it
agrees; answers are compared when what decides them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from common.base.errors import UserError
from common.base.progress import say
from common.results.documents import (
    SIZES,
    ModelResults,
    load_model_results,
    stored_document,
)
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
# Cards of one chip with equally many multiprocessors: they answer alike (all 6,753 answers of three
# checkpoints of the demo and the losses of 444 windows were the same on both), at other speeds.
_ANSWER_ALIKE = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")


def _deciding(value):
    """Of what a result was measured with, what decides it: on a GPU not the CPU's threads."""
    if isinstance(value, dict) and value.get("type") == "cuda":
        return {key: one for key, one in value.items() if key != "threads"}
    return value


def _deciding_answers(value):
    """The same for what does not depend on speed."""
    if isinstance(value, dict) and value.get("name") in _ANSWER_ALIKE:
        return {"type": value["type"], "name": _ANSWER_ALIKE}
    return _deciding(value)


def left_to_do(
    subject: Subject, results_dir: Path, shared: dict, tasks: dict[str, dict], twice: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks without results that answer for them, and those with such results that have still
    to be run a second time. Says what is used again, and why others not.

    Args:
        shared: by the keys of SHARED, what results have to agree with.
        tasks: by task, what its part of the results has to agree with.
        twice: tasks on rows have to have been run twice.
    Raises:
        UserError: the 16-bit model is another than the one that this same checkpoint was compared
            with, on whatever device that was.
    """
    title = f"{subject.name} {subject.configuration}"
    document = stored_document(results_dir, subject.name, subject.configuration)
    if document is None:
        return tuple(tasks), ()
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
        return tuple(tasks), ()
    left, once = [], []
    for task, wanted in tasks.items():
        reason = _task_change(task, document, wanted)
        if reason:
            left.append(task)
            say(f"{title}: {task} {reason}")
        elif twice and "samples" in wanted and task not in document.get("noise", {}):
            once.append(task)
            say(f"{title}: {task} was run once, not twice")
    used = [task for task in tasks if task not in left]
    if used:
        say(
            f"{title}: results of {', '.join(used)} used again: same checkpoint, data, device and "
            "code"
        )
    return tuple(left), tuple(once)


def shared_changes(
    document: dict, shared: dict, deciding: Callable[[object], object] = _deciding
) -> list[str]:
    """In what `document` differs from `shared`, in words, by what of each value is `deciding`."""
    return [
        text
        for key, label in SHARED.items()
        if key in shared
        for text in _changes(label, deciding(document.get(key)), deciding(shared[key]))
    ]


def may_be_in_parts(
    subject: Subject, results_dir: Path, shared: dict, tasks: dict[str, dict]
) -> bool:
    """Whether new results may be written task by task: those that are there, if any, would not be
    replaced by a part that is of something else.
    """
    document = stored_document(results_dir, subject.name, subject.configuration)
    return (
        document is None
        or not shared_changes(document, shared)
        and not any(
            _task_change(task, document, wanted)
            for task, wanted in tasks.items()
            if task in document.get("tasks", {})
        )
    )


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
    """Why no answers of two documents may be compared, in words; empty if what all tasks share
    agrees."""
    shared = {key: quantized.get(key) for key in SHARED if key not in _OWN}
    changes = shared_changes(baseline, shared, _deciding_answers)
    found = [f"another {change}" for change in changes]
    original = _original_of(quantized["tasks"])
    if original and baseline.get("checkpoint") and original != baseline["checkpoint"]:
        found.append("another 16-bit model")
    return found


def measured_apart(document: dict, other: dict) -> str | None:
    """What of a document is not to be shown beside another, as it was measured with another device,
    type or versions, or on other data: in brackets the tasks, empty for all of it; None for
    nothing.
    """
    shared = {key: document.get(key) for key in _MEASURED_WITH}
    if shared_changes(other, shared, _deciding_answers):
        return ""
    tasks = other_data(other, document)
    return f" ({', '.join(task for task in document['tasks'] if task in tasks)})" if tasks else None


def of_one_card(results: ModelResults) -> ModelResults:
    """Results without the speeds of another card than the first configuration's, where that card
    answers alike, so that all else may be shown beside it; and without the seconds of what was
    quantized on another card than the first that says on which.
    """
    shown = results.evaluated()
    cards = {
        name: document["device"]["name"]
        for name, document in shown
        if measured_apart(document, shown[0][1]) != ""
        and shared_changes(shown[0][1], {"device": document.get("device")})
    }
    made_on = {
        name: device["name"]
        for name, document in shown
        if (device := document["quantization"].get("device")) and device["type"] == "cuda"
    }
    first = next(iter(made_on.values()), None)
    documents = {
        name: _without_times(document, name in cards, made_on.get(name, first) != first)
        for name, document in results.documents.items()
    }
    others = {name: card for name, card in made_on.items() if card != first}
    return replace(results, documents=documents, other_cards={**others, **cards})


def _without_times(document: dict, evaluated_apart: bool, made_apart: bool) -> dict:
    def timeless(found: dict, *more: str) -> dict:
        return {key: value for key, value in found.items() if key not in ("seconds", *more)}

    if made_apart:
        document = {**document, "quantization": timeless(document["quantization"])}
    if not evaluated_apart:
        return document
    speed = document.get("speed", {})
    return {
        **timeless(document, "load_seconds"),
        "speed": {key: speed[key] for key in ("memory_bytes", "kernels") if key in speed},
        "tasks": {task: timeless(found) for task, found in document["tasks"].items()},
    }


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

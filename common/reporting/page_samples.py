"""The page's samples: the questions that a quantized model answers right and the baseline wrong, or
the reverse.

Texts of a data set are its owners': they are put in on asking alone, those of the demo's own tasks
always.
"""

from __future__ import annotations

from pathlib import Path

from common.base.errors import UserError
from common.base.progress import say
from common.reporting.tables import Comparisons
from common.results.documents import ModelResults, samples_by_task
from common.tasks.harness import HarnessTask, Shown
from common.tasks.task import Record, all_tasks


def flipped(
    results: ModelResults,
    comparisons: Comparisons,
    results_dir: Path,
    texts: bool,
    data_root: Path | None = None,
) -> dict:
    """The samples of which any compared configuration's answer is right where the baseline's is
    wrong, or the reverse.

    Args:
        results_dir: where the records of `results` are.
        texts: look the questions up, as the evaluation did; a task of which they are not found
            goes without, and a line says why.
    Returns:
        {configurations, tasks}: the baseline first; a task is {title, total, texts, samples}, of a
        `total` of samples, and a sample {id, question, passage, gold, texts, answers}. `answers`
        holds for each configuration [1 if right else 0, which of the sample's texts it answered or
        -1], or None where it was not compared on this task.
    """
    names = ["baseline", *comparisons]
    records = {name: samples_by_task(results_dir, results.name, name) for name in names[1:]}
    records["baseline"] = (
        samples_by_task(results_dir, results.name, "baseline") if comparisons else {}
    )
    compared = {name: {one.kind.task for one in found} for name, found in comparisons.items()}
    tasks = []
    for task in all_tasks():
        right = next((kind.binary for kind in task.metrics if kind.binary), None)
        mine = {
            name: records[name][task.name]
            for name in names
            if (name == "baseline" or task.name in compared[name]) and task.name in records[name]
        }
        if isinstance(task, HarnessTask) and right and len(mine) > 1:
            summary = task.of(results.documents["baseline"])
            rows = _rows(task, summary, texts, data_root)
            found = []
            for place in range(len(mine["baseline"])):
                one = {name: samples[place] for name, samples in mine.items()}
                if len({record[right] for record in one.values()}) > 1:
                    found.append(_sample(task, rows[place] if rows else None, one, names, right))
            tasks.append(
                {
                    "title": task.title,
                    "total": len(mine["baseline"]),
                    "texts": rows is not None,
                    "samples": found,
                }
            )
    return {"configurations": names, "tasks": tasks}


def _rows(
    task: HarnessTask, summary: dict, texts: bool, data_root: Path | None
) -> list[dict] | None:
    if not texts and summary["data"] != "demo":
        return None
    try:
        return task.rows_again(summary, data_root)
    except UserError as error:
        say(f"The page goes without the texts of {task.title}: {error}")
        return None


def _sample(
    task: HarnessTask,
    row: dict | None,
    records: dict[str, Record],
    names: list[str],
    right: str,
) -> dict:
    shown = {name: task.shown(record, row) for name, record in records.items()}
    first: Shown = shown["baseline"]
    answered = dict.fromkeys(one.answer for one in shown.values() if one.answer)
    place = {text: i for i, text in enumerate(answered)}
    return {
        "id": str(records["baseline"]["id"]),
        "question": first.question,
        "passage": first.passage,
        "gold": first.gold,
        "texts": list(answered),
        "answers": [
            [int(records[name][right] > 0.5), place.get(shown[name].answer, -1)]
            if name in records
            else None
            for name in names
        ],
    }

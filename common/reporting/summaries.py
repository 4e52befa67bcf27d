"""Results of earlier versions, completed by figures that have come to the summaries since."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.base.errors import UserError
from common.base.progress import say
from common.results.documents import ModelResults, has_samples, samples_by_task
from common.tasks.task import all_tasks


def completed(results_dir: Path, results: ModelResults) -> ModelResults:
    """Results whose summaries hold what `Task.summary` makes of the samples' records today; what
    they hold already stays as it was written. Records that are of too old a form add nothing.
    """
    documents = {}
    for name, document in results.documents.items():
        documents[name] = document
        if not has_samples(results_dir, results.name, name):
            continue
        try:
            samples = samples_by_task(results_dir, results.name, name)
        except UserError as error:
            say(f"{results.name} {name}: {error}")
            continue
        tasks = dict(document["tasks"])
        for task in all_tasks():
            if task.name in tasks and task.name in samples:
                try:
                    tasks[task.name] = {**task.summary(samples[task.name]), **tasks[task.name]}
                except KeyError:
                    pass
        documents[name] = {**document, "tasks": tasks}
    return replace(results, documents=documents)

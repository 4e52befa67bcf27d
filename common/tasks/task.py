"""What a task is: its data, how a model is run on it, its results in words, its metrics.

A module of this package that holds a `TASK` is a task, and the only place that knows it: flags, the
check of data, evaluation, comparison, tables and plots ask it.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common.results.naming import Subject
from common.tasks import metrics
from common.tasks.metrics import Metric

# The record of one sample: what the model answered and its scores.
Record = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A model to be evaluated, and how. options: the command's. demo: on the demo's own data.
    described_by: the folder with its config.json and tokenizer.
    """

    subject: Subject
    described_by: Path
    options: argparse.Namespace
    demo: bool
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any


@dataclass(frozen=True)
class MetricKind:
    """A metric of a task that is compared.

    metric: from the task's per-sample records. binary: the records' field that says right or wrong,
    where there is one: flips are counted and judged by McNemar's test. cluster: the field by which
    samples belong together. only: which records it is about; a question is left out for both
    models unless both their records are. margin: a loss below this is no matter. share: the metric
    lies between 0 and 1. logarithmic: the metric is a mean of logarithms over a long text, shown as
    its exponential, the difference as a ratio, and judged by Student's t; all others by swaps.

    silence: it is the share of samples that the model gives no answer to. rewards_silence: to give
    none scores, so that this is not called a gain where that share rises. words: what less and what
    more of it are called, where neither is a loss. recovered: it stands for its task in the mean
    recovery, unless the baseline is at `chance`. f1: it is one of the F1s whose mean is shown.
    interval: the names of its interval's ends in the summary, where that has one.

    column: its heading in the table of scores, None where it has no column there. judged: it has
    one in the table of verdicts. plotted: against size.
    """

    task: str
    key: str
    name: str
    metric: Callable[[list[Record]], Metric]
    larger_is_better: bool = True
    margin: float = 0.02
    binary: str | None = None
    cluster: str | None = None
    only: Callable[[Record], bool] | None = None
    share: bool = True
    logarithmic: bool = False
    silence: bool = False
    rewards_silence: bool = False
    words: tuple[str, str] | None = None
    recovered: bool = False
    chance: float = 0.0
    f1: bool = False
    interval: tuple[str, str] | None = None
    column: str | None = None
    judged: bool = False
    plotted: bool = False

    @property
    def heading(self) -> str:
        """Its name in tables."""
        return self.column or self.name


def of_field(name: str, metric: Callable = metrics.mean) -> Callable[[list[Record]], Metric]:
    """A metric of one field of the records."""
    return lambda samples: metric([sample[name] for sample in samples])


class Task:
    """A task as evaluation, comparison and tables see it.

    name: in --tasks and the results. title: in texts. place: among the tasks, in the order of which
    they are run and shown. limit: samples that are evaluated unless told. note: what the table of
    scores says of its columns. clustered: what samples share that are not independent, in words.
    per_sample: it has a record for each sample; one that has none is measured before the others,
    while the model is alone on its device, and stands beside `tasks` in the results. varies: its
    records may change when it is run again in other batches.
    """

    name: str
    title: str
    place: int
    limit: int | None = None
    note: str = ""
    clustered: str | None = None
    per_sample: bool = True
    varies: bool = False
    metrics: tuple[MetricKind, ...] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Flags of its own, such as another data set."""

    def reads(self, limit: int | None, data_root: Path | None) -> tuple | None:
        """The rows that it reads at a --limit and a --data-root: an address and the other arguments
        of `data.locate_rows` up to budget. None where it reads none.
        """
        return None

    def load(self, evaluation: Evaluation) -> Any:
        """What it is evaluated on, the same for every model. Raises UserError without data."""
        return None

    def conditions(self, loaded: Any, evaluation: Evaluation) -> dict:
        """What its results depend on besides what all tasks share: `data`, a `fingerprint`, sizes
        (`documents.SIZES`). Raises UserError where they could not answer for the subject.
        """
        return {}

    def texts(self, loaded: Any, evaluation: Evaluation) -> Iterable[str]:
        """The texts that no model may have been calibrated on."""
        return ()

    def prepare(self, loaded: Any, evaluation: Evaluation) -> Any:
        """What `run` takes, made of what was loaded before the model takes its room."""
        return loaded

    def run(self, model, prepared: Any, evaluation: Evaluation) -> tuple[dict, list[Record]]:
        """Evaluate a model. Returns the summary for the results, and a record of each sample."""
        raise NotImplementedError

    def summary(self, samples: list[Record]) -> dict:
        """Its metrics for the results, from the records alone; empty where they tell nothing."""
        return {}

    def noise(self, model, prepared: Any, evaluation: Evaluation, samples: list[Record]) -> dict:
        """How much of the records changes when it is run again in other batches."""
        raise NotImplementedError

    def of(self, document: dict) -> dict:
        """Its part of a document of results; empty where it was not evaluated."""
        place = document.get("tasks", {}) if self.per_sample else document
        return place.get(self.name, {})

    def in_words(self, summary: dict) -> str:
        """The summary in a few words."""
        raise NotImplementedError


@cache
def all_tasks() -> tuple[Task, ...]:
    """The tasks of this package, by their place."""
    package = importlib.import_module(__package__)
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    tasks = [module.TASK for module in modules if hasattr(module, "TASK")]
    return tuple(sorted(tasks, key=lambda task: task.place))


def task_names() -> tuple[str, ...]:
    return tuple(task.name for task in all_tasks())


def titles_of(names: Iterable[str]) -> list[str]:
    """The titles of some tasks, in the order of all."""
    return [task.title for task in all_tasks() if task.name in {*names}]


def all_metrics() -> tuple[MetricKind, ...]:
    """The metrics of every task, in the order of the tables."""
    return tuple(kind for task in all_tasks() for kind in task.metrics)

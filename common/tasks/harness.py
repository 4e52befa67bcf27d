"""Tasks of questions that lm-eval asks: on rows of a data set, by the prompts of a task file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from common.base.errors import UserError
from common.results import hashes
from common.tasks.task import Evaluation, Record, Task
from common.text.chat import template_date
from common.text.data import Rows, check_columns, demo_rows, is_under, load_rows

SAMPLE_SEED = 1234
# Bytes to fetch for one task's sample of a split too large to be fetched whole, unless one row
# group is larger.
TRAFFIC = 40_000_000


@dataclass(frozen=True)
class Shown:
    """A question and a model's answer as a reader sees them; empty where the texts are not at hand,
    as records do without those of the data set. passage: what the question is on.
    """

    question: str = ""
    gold: str = ""
    answer: str = ""
    passage: str = ""


class HarnessTask(Task):
    """A task of questions that lm-eval asks.

    address: of its data set. flag: to give another one. demo: the file of the demo's own rows, None
    where it has none. needs: the columns that a row must have, with a dot what is inside one.
    prompts: the file with its prompts, where that is not named as it is. stand_in: the address that
    serves where a mirror under --data-root has it and not `address`.
    columns: those that are read, where that is less than all. fetch: rows of a seeded sample that
    are looked through, where not all can be asked about. chat: questions go through the model's
    chat template. answer_score: the records' field that says how good an answer is.
    """

    address: str
    flag: str
    limit: int
    demo: str | None = None
    prompts: str | None = None
    stand_in: str | None = None
    needs: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    fetch: int | None = None
    chat: bool = True
    varies = True
    answer_score: str

    def prompt(self) -> dict:
        """The task as lm-eval's task files describe one: prompts, worked examples, how an answer
        ends. What the demo model is asked otherwise is under metadata, demo.
        """
        file = Path(__file__).parent / f"{self.prompts or self.name}.yaml"
        return {**yaml.safe_load(file.read_text()), "task": self.name}

    def usable(self, loaded: Rows) -> list[dict]:
        """Those of the rows that can be asked about. Raises UserError for rows that are wrong."""
        return loaded.rows

    def score(self, row: dict, results: list) -> Record:
        """The record of a question, from its row and what lm-eval gives for it: the answer's text,
        or for each choice its log-likelihood and whether it is the most likely text.
        """
        raise NotImplementedError

    def summary(self, samples: list[Record]) -> dict:
        raise NotImplementedError

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            self.flag,
            dest=f"{self.name}_data",
            metavar="DATA",
            help=f"another data set (default: {self.address})",
        )

    def sample(self, limit: int | None) -> tuple:
        """Of the rows of its data set, for `data.load_rows`: limit, seed, columns, budget."""
        limit = limit or self.limit
        # At least the usual number is drawn, so that a smaller --limit finds them in the cache.
        wanted = max(self.limit, limit) if self.fetch is None else max(self.fetch, 2 * limit)
        return wanted, SAMPLE_SEED, self.columns, TRAFFIC

    def reads(self, limit: int | None, data_root: Path | None) -> tuple:
        return self.usual_data(data_root), *self.sample(limit)

    def usual_data(self, data_root: Path | None) -> str:
        """The address of its rows unless another one is given."""
        for address in filter(None, (self.address, self.stand_in)):
            if data_root and data_root.is_dir() and is_under(data_root, address):
                return address
        return self.address

    def rows(self, options: argparse.Namespace, demo: bool) -> Rows:
        """The rows that it is evaluated on: the same for every model.

        Raises:
            UserError: no data, or rows without what the task needs.
        """
        address = getattr(options, f"{self.name}_data", None)
        if demo and self.demo and not address:
            loaded = demo_rows(self.demo)
            return Rows(loaded.rows[: options.limit], loaded.source)
        address = address or self.usual_data(options.data_root)
        loaded = load_rows(address, options.data_root, *self.sample(options.limit))
        check_columns(loaded, self.needs, f"{self.name}, whose data are like {self.address}")
        return Rows(self.usable(loaded)[: options.limit or self.limit], loaded.source)

    def rows_again(self, summary: dict, data_root: Path | None) -> list[dict]:
        """The rows that a summary is of, to the letter.

        Raises:
            UserError: they are not to be found, or others by now.
        """
        source, samples = summary["data"], summary["samples"]
        if source == "demo" and self.demo:
            found = demo_rows(self.demo).rows[:samples]
        else:
            # Without the commit, or the mark of an incomplete split.
            address = source.removesuffix(" (sample)").split("@")[0]
            loaded = load_rows(address, data_root, *self.sample(samples))
            check_columns(loaded, self.needs, self.name)
            found = self.usable(loaded)[:samples]
        if hashes.rows_fingerprint(found) != summary.get("fingerprint"):
            raise UserError(f"{source} has other rows than those that were evaluated")
        return found

    def shown(self, record: Record, row: dict | None) -> Shown:
        """A record for readers; without its row only what is not text of the data set."""
        return Shown()

    def load(self, evaluation: Evaluation) -> Rows:
        return self.rows(evaluation.options, evaluation.demo)

    def conditions(self, loaded: Rows, evaluation: Evaluation) -> dict:
        return {
            "data": loaded.source,
            "samples": len(loaded.rows),
            "fingerprint": hashes.rows_fingerprint(loaded.rows),
        }

    def texts(self, loaded: Rows, evaluation: Evaluation) -> list[str]:
        return [" ".join(_strings(row)) for row in loaded.rows]

    def run(self, model, prepared: Rows, evaluation: Evaluation) -> tuple[dict, list[Record]]:
        return run_task(self, model, evaluation.tokenizer, prepared, evaluation.demo)

    def noise(self, model, prepared: Rows, evaluation: Evaluation, samples: list[Record]) -> dict:
        """Once more in other batches: how many answers' scores change, and by how much at most,
        though nothing has changed.
        """
        _, again = run_task(
            self, model, evaluation.tokenizer, prepared, evaluation.demo, batch_share=0.5
        )
        changes = [
            abs(one[self.answer_score] - other[self.answer_score])
            for one, other in zip(samples, again, strict=True)
        ]
        return {
            "changed": sum(change > 0 for change in changes),
            "largest": max(changes),
            "samples": len(changes),
        }


def run_task(
    task: HarnessTask, model, tokenizer, rows: Rows, demo: bool, batch_share: float = 1.0
) -> tuple[dict, list[Record]]:
    """Run a task by lm-eval, in batches of a share of the usual size. Returns its summary and the
    record of every sample.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils
    from lm_eval.evaluator import evaluate

    from common.tasks.language_model import HarnessModel

    lm_eval.api.task.tqdm = lambda items, **_: items  # its bar has no switch
    lm_eval.utils.apply_template = filled_in  # theirs compiles it anew for every row
    config = task.prompt()
    config.update(
        custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(rows.rows)},
        process_results=lambda doc, results: {"record": task.score(doc, results)},
        metric_list=[{"metric": "record", "aggregation": len, "higher_is_better": True}],
    )
    if demo:
        config.update(config.get("metadata", {}).get("demo", {}))
    chat = task.chat and not demo and bool(tokenizer.chat_template)
    start = time.perf_counter()
    outcome = evaluate(
        HarnessModel(model, tokenizer, batch_share),
        {"tasks": {task.name: lm_eval.api.task.ConfigurableTask(config=config)}, "groups": {}},
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    seconds = time.perf_counter() - start
    logged = sorted(outcome["samples"][task.name], key=lambda sample: sample["doc_id"])
    samples = [
        {"id": sample["doc"].get("id") or f"{task.name}-{sample['doc_id']}", **sample["record"]}
        for sample in logged
    ]
    summary = {
        **task.summary(samples),
        "data": rows.source,
        "chat_template": chat,
        "template_date": template_date(tokenizer) if chat else None,
        "seconds": round(seconds, 2),
        "first_prompt": logged[0]["arguments"][0][0],
    }
    return summary, samples


@cache
def _compiled(template: str):
    from lm_eval.utils import env

    return env.from_string(template)


def filled_in(template: str, row: dict) -> str:
    """A task file's template with a row's columns, as lm-eval's `apply_template` gives it."""
    return _compiled(template).render(**row)


def _strings(value) -> Iterator[str]:
    """All text in a row of a data set."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)

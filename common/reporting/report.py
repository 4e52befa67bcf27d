"""README's sections and CSV files, made from results alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from common.base.errors import UserError
from common.reporting import tracker
from common.reporting.choice import choice_table
from common.reporting.comparison import adjusted_p_values
from common.reporting.overview import overview_table, rows_of
from common.reporting.tables import (
    Comparisons,
    Table,
    divergence_table,
    efficiency_table,
    score_table,
    size_table,
    verdict_table,
)
from common.reporting.tracker import status_table
from common.results.documents import CONFIGURATIONS, DOCUMENTED_FOLDER, ModelResults, size_in_words
from common.results.identity import measured_apart
from common.tasks import perplexity, speed

_FOLDED = (
    "What it was measured on, every score with its interval, verdicts, divergence, times, plots"
)
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

# Of a task; with fewer, scores that differ by ten points may be equal.
FEW_SAMPLES = 100


def short_revision(source: str) -> str:
    """A source of data with the first 7 digits of its commit; the results have all 40."""
    return re.sub(r"@([0-9a-f]{7})[0-9a-f]{33}$", r"@\1", source)


def conditions(results: ModelResults) -> str:
    """What the numbers were measured on, in a few sentences."""
    evaluated = results.evaluated()
    _, first = evaluated[0]
    device, versions = first["device"], first["versions"]
    sentences = [
        f"Evaluated on {device['name']} ({device['type']}, {device['threads']} threads) in "
        f"{first['compute_dtype']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, Python {versions['python']}."
    ]
    if results.other_cards:
        sentences.append(f"On another card: {_other_cards(results)}.")
    parts = [
        f"{task} {size_in_words(summary)} ({short_revision(summary['data'])})"
        for task, summary in first["tasks"].items()
    ]
    if parts:
        sentences.append(f"Data: {'; '.join(parts)}.")
    calibrations = {
        name: document["quantization"].get("calibration") for name, document in evaluated
    }
    texts = sorted(
        {
            f"{c['samples']} x {c['length']} tokens of {short_revision(c['data'])}, seed "
            f"{c['seed']}"
            for c in calibrations.values()
            if c
        }
    )
    if texts:
        sentences.append(f"Calibration: {'; '.join(texts)}.")
    if timed := speed.TASK.of(first):
        sentences.append(speed.method_in_words(timed, device["type"]))
    noise = results.documents.get("baseline", {}).get("noise")
    if noise:
        changes = "; ".join(
            f"{task} {found['changed']} of {found['samples']}" for task, found in noise.items()
        )
        sentences.append(
            f"Noise floor: the baseline evaluated twice, in other batches, scored differently on "
            f"{changes} samples."
        )
    return " ".join(sentences)


def _other_cards(results: ModelResults) -> str:
    return ", ".join(f"{name} ({card})" for name, card in results.other_cards.items())


def warnings(results: ModelResults) -> list[str]:
    """What of a model's results is not of the same kind as the first configuration's."""
    sentences = []
    evaluated = results.evaluated()
    odd = [
        f"{name}{apart}"
        for name, document in evaluated
        if (apart := measured_apart(document, evaluated[0][1])) is not None
    ]
    if odd:
        sentences.append(
            f"⚠️ Measured on another device, type, version or data than {evaluated[0][0]}, so not "
            f"to be compared with it: {', '.join(odd)}."
        )
    if results.other_cards:
        sentences.append(
            "⚠️ Evaluated or quantized on another card than the rest, so without the times that are "
            f"of it: {_other_cards(results)}."
        )
    if results.left_out:
        tasks = ", ".join(
            f"{name} ({', '.join(tasks)})" for name, tasks in results.left_out.items()
        )
        sentences.append(f"⚠️ Left out, as evaluated on more or fewer samples than these: {tasks}.")
    counts = [
        task["samples"]
        for document in results.documents.values()
        for task in document["tasks"].values()
        if "samples" in task
    ]
    if counts and max(counts) < FEW_SAMPLES:
        sentences.append(
            f"⚠️ {max(counts)} questions a task at most: too few to tell small losses from chance, "
            "and what is said to take below rests on little."
        )
    return sentences


def introduction(results: ModelResults) -> list[str]:
    """The sentences before a model's tables."""
    dates = sorted(
        {document["date"] for document in results.documents.values() if "date" in document}
    )
    when = f" of {dates[0]}" if dates else ""
    when += f" to {dates[-1]}" if len(dates) > 1 else ""
    parts = [
        f"The documented run{when}: its results come with the project, in `{DOCUMENTED_FOLDER}`, "
        "and are not of this machine."
        if results.documented
        else f"A local run{when}.",
        *([] if results.documents else ["Nothing has been evaluated yet."]),
        *warnings(results),
    ]
    if any(document["demo_data"] for document in results.documents.values()):
        parts.append(
            "Scores on the demo's own tasks compare methods with each other, not models with the "
            "literature."
        )
    return parts


def first_tables(results: ModelResults, comparisons: Comparisons) -> list[Table]:
    """The tables for a reader in a hurry."""
    if not results.documents:
        return [status_table(results)]
    rows = rows_of(results, comparisons)
    chosen = choice_table(rows)
    return [
        overview_table(rows),
        *([chosen] if chosen else []),
        status_table(results),
        tracker.size_table(results, rows),
        tracker.accuracy_table(results, comparisons, rows),
    ]


def more_tables(results: ModelResults, comparisons: Comparisons) -> list[Table]:
    """Everything that was measured."""
    if not results.documents:
        return []
    found = [size_table(results), score_table(results, comparisons)]
    if comparisons:
        found.append(verdict_table(comparisons))
    if any(map(perplexity.TASK.of, results.documents.values())):
        found.append(divergence_table(results, comparisons))
    return [*found, efficiency_table(results)]


def section(results: ModelResults, comparisons: Comparisons, figures: list[tuple[str, str]]) -> str:
    """Everything README shows of one model, most of it folded. figures: (caption, path as README
    links it).
    """
    folded = [
        f"<details><summary>{_FOLDED}</summary>",
        conditions(results),
        *[table.markdown() for table in more_tables(results, comparisons)],
        *[f"![{caption}]({path})" for caption, path in figures],
        "</details>",
    ]
    return "\n\n".join(
        [
            f"### {results.title}",
            *introduction(results),
            *[table.markdown() for table in first_tables(results, comparisons)],
            *(folded if results.documents else []),
        ]
    )


def write_csv(results: ModelResults, comparisons: Comparisons, folder: Path) -> None:
    """Everything as CSV: measurements.csv, a line for each configuration and number;
    comparisons.csv, for each difference, to eight significant digits, as machines differ in the
    last ones of sums."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"configuration": name, "quantity": quantity, "value": value}
        for name, document in results.evaluated()
        for quantity, value in _numbers(document)
        if not quantity.startswith("quantization.relative_output_error")
    ]
    pd.DataFrame(lines, columns=["configuration", "quantity", "value"]).to_csv(
        folder / "measurements.csv", index=False
    )
    errors = [
        {"configuration": name, "linear": linear, "relative_output_error": error}
        for name, document in results.evaluated()
        for linear, error in document["quantization"].get("relative_output_error", {}).items()
    ]
    pd.DataFrame(errors, columns=["configuration", "linear", "relative_output_error"]).to_csv(
        folder / "error_by_layer.csv", index=False
    )
    adjusted = adjusted_p_values(comparisons)
    rows = []
    for name, compared in comparisons.items():
        for one in compared:
            p_loss, p_gain = adjusted[name, one.kind.task, one.kind.key]
            rows.append(
                {
                    "configuration": name,
                    **one.as_dict(),
                    "p_value_holm": p_loss,
                    "p_value_gain_holm": p_gain,
                    "verdict": one.verdict(p_loss, p_gain),
                }
            )
    pd.DataFrame(rows).to_csv(folder / "comparisons.csv", index=False, float_format="%.8g")


def _numbers(value, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested dictionaries, with the dotted path to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, value


def replace_between_markers(readme: Path, content: str) -> None:
    """Put `content` between README's markers. Raises UserError when they are missing."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(
            f"{readme} needs the lines {BEGIN} and {END} once each, for the tables to go between "
            f"them"
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"
    if new != text:
        readme.write_text(new, encoding="utf-8")


def in_table_order(all_results: list[ModelResults]) -> list[ModelResults]:
    """Local runs first; models by name, those with most configurations evaluated first."""
    return sorted(
        all_results,
        key=lambda r: (r.documented, -len(set(r.documents) & set(CONFIGURATIONS)), r.name),
    )

"""The tables of a model's results, as README and the HTML report show them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.reporting.comparison import Comparison, adjusted_p_values, by_metric
from common.reporting.significance import GAIN, NO_LOSS
from common.results.documents import ModelResults
from common.tasks import perplexity, speed
from common.tasks.task import MetricKind, all_metrics, all_tasks

# By configuration, its differences to the baseline.
Comparisons = dict[str, list[Comparison]]

STATES = {
    "not started": "⬜ Not started",
    "running": "🔄 Running",
    "done": "✅ Done",
    "failed": "❌ Failed",
    "warning": "⚠️ Check",
}
NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of strings. numbers: all columns but the first are aligned right. note: a paragraph
    before it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: bool = True
    note: str = ""

    def markdown(self) -> str:
        rule = "---:" if self.numbers else "---"
        lines = [self.header, ["---", *[rule] * (len(self.header) - 1)], *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"#### {self.title}", self.note, text) if part)


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float | None) -> str:
    """Three or four significant digits, no exponent below a million."""
    if value is None:
        return NONE
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.2e}"


def gib(size: float | None) -> str:
    return NONE if not size else f"{size / 2**30:.2f}"


def tables(results: ModelResults, comparisons: Comparisons) -> list[Table]:
    """All tables of one model."""
    found = [status_table(results)]
    if results.documents:
        found += [size_table(results), accuracy_table(results, comparisons)]
        if comparisons:
            found.append(verdict_table(comparisons))
        if any(map(perplexity.TASK.of, results.documents.values())):
            found.append(divergence_table(results, comparisons))
        found.append(efficiency_table(results))
    return found


def status_of(results: ModelResults, configuration: str) -> tuple[str, str]:
    """State of a configuration ("done", "failed", ...) and the reason beside it."""
    known = results.status.get(configuration)
    if known:
        return known["state"], known.get("reason", "")
    return ("done", "") if configuration in results.documents else ("not started", "")


def status_table(results: ModelResults) -> Table:
    rows = []
    for name in results.configurations():
        state, reason = status_of(results, name)
        rows.append([name, STATES[state], reason.replace("|", "/") or NONE])
    return Table("Status", ["Configuration", "Status", "Note"], rows, numbers=False)


def size_table(results: ModelResults) -> Table:
    baseline = results.documents.get("baseline")
    rows = []
    for name, document in results.evaluated():
        facts = document["quantization"]
        grid = facts.get("grid")
        ratio = facts.get("compression_ratio")
        if ratio is None and baseline:
            ratio = baseline["quantization"]["weights_bytes"] / facts["weights_bytes"]
        group = NONE if grid is None else str(grid["group_size"] or "channel")
        rows.append(
            [
                name,
                "16" if grid is None else str(grid["bits"]),
                group,
                f"{facts['weights_bytes'] / 1e6:.1f}",
                f"{ratio:.2f}" if ratio else NONE,
                f"{facts['folder_bytes'] / 1e6:.1f}",
            ]
        )
    header = ["Configuration", "Bits", "Group", "Weights, MB", "Times smaller", "Folder, MB"]
    return Table("Size", header, rows)


def accuracy_table(results: ModelResults, comparisons: Comparisons) -> Table:
    columns = [kind for kind in all_metrics() if kind.column]
    rows = []
    for name, document in results.evaluated():
        compared = by_metric(comparisons.get(name, []))
        row = [name]
        for kind in columns:
            value = document["tasks"].get(kind.task, {}).get(kind.key)
            shown = number(value) if kind.share else significant(value)
            one = compared.get((kind.task, kind.key))
            row.append(
                shown if one is None or value is None else f"{shown} ({one.shown_difference()})"
            )
        rows.append(row)
    clusters = "".join(
        f", {task.title} by {task.clustered}" for task in all_tasks() if task.clustered
    )
    note = (
        "In brackets: the difference to the baseline on the same questions with its 95% "
        f"interval (Student's t on a jackknife{clusters}; of the median a bootstrap's)."
    )
    return Table(
        "Accuracy",
        ["Configuration", *[kind.heading for kind in columns]],
        rows,
        note=" ".join([note, *[task.note for task in all_tasks() if task.note]]),
    )


def verdict_table(comparisons: Comparisons) -> Table:
    """A word for each difference, with flips to wrong / to right and the p-value after Holm: of a
    gain where it is one, else of a loss.
    """
    adjusted = adjusted_p_values(comparisons)
    judged = [kind for kind in all_metrics() if kind.judged]
    rows: list[list[str]] = []
    detectable: dict = {}
    for name, compared in comparisons.items():
        found = by_metric(compared)
        row = [name]
        for kind in judged:
            one = found.get((kind.task, kind.key))
            if one is None:
                row.append(NONE)
                continue
            size = one.difference.detectable
            detectable.setdefault(kind.heading, []).append(
                math.expm1(size) if kind.logarithmic else size
            )
            p_loss, p_gain = adjusted[name, kind.task, kind.key]
            word = one.verdict(p_loss, p_gain)
            flips = "" if one.flips is None else f"{one.flips.to_wrong}/{one.flips.to_right}, "
            row.append(f"{word} ({flips}p {p_gain if word == GAIN else p_loss:.2g})")
        rows.append(row)
    return Table(
        "What the differences mean",
        ["Configuration", *[kind.heading for kind in judged]],
        rows,
        numbers=False,
        note=_verdict_note(judged, detectable),
    )


def _verdict_note(judged: list[MetricKind], detectable: dict[str, list[float]]) -> str:
    """What the words in the table of verdicts mean, and how small differences can be seen."""
    ratios = [kind for kind in judged if kind.logarithmic]
    margins = "; ".join(f"{kind.name.lower()}: {100 * kind.margin:g}%" for kind in ratios)
    swaps = "".join(
        f"; for {task.title} the two models' answers are swapped at random, {task.clustered} by "
        f"{task.clustered}, because answers to one {task.clustered} are not independent"
        for task in all_tasks()
        if task.clustered
    )
    sizes = "; ".join(
        f"{heading} {max(values):.2g}"
        for heading, values in detectable.items()
        if np.isfinite(max(values))
    )
    return (
        f"A loss is an interval wholly below zero with p at most 0.05, a gain the reverse; "
        f'"{NO_LOSS}" an interval that excludes a loss of {MetricKind.margin} ({margins}). '
        "In brackets: answers that went wrong / came right, and the one-sided p of a loss, or "
        "of a gain where it is called one, after Holm over all configurations: McNemar's exact "
        "test where answers are right or wrong, Student's t for "
        f"{', '.join(kind.name.lower() for kind in ratios)}{swaps}. Smallest differences that "
        f"samples of this size detect four times in five: {sizes}."
    )


def divergence_table(results: ModelResults, comparisons: Comparisons) -> Table:
    (kind,) = perplexity.TASK.metrics
    rows = []
    for name, document in results.evaluated():
        text, apart = perplexity.TASK.of(document), perplexity.divergence_of(document) or {}
        one = by_metric(comparisons.get(name, [])).get((kind.task, kind.key))
        value, error = text.get("perplexity"), text.get("standard_error")
        shown = number(value, 2)
        if error is not None and math.isfinite(error):
            shown = f"{shown} ± {error:.2f}"
        rows.append(
            [
                name,
                shown,
                NONE if one is None else one.shown_difference(),
                *[
                    significant(apart.get(key))
                    for key in ("kl_mean", "kl_median", "kl_99", "kl_999")
                ],
                NONE if not apart else f"{100 * apart['same_top']:.2f}",
            ]
        )
    return Table(
        "Perplexity and divergence from the baseline",
        [
            "Configuration",
            "Perplexity ± standard error",
            "Ratio [95%]",
            "KL mean",
            "KL median",
            "KL 99%",
            "KL 99.9%",
            "Same top token, %",
        ],
        rows,
        note="Kullback-Leibler divergence in nats per token, on the same tokens. The "
        "baseline's own row is the noise floor: the same model computed in other "
        "batches.",
    )


def efficiency_table(results: ModelResults) -> Table:
    rows = []
    for name, document in results.evaluated():
        timed, facts = speed.TASK.of(document), document["quantization"]
        seconds, quantizing = facts.get("seconds", {}).get("total"), facts.get("memory", {})
        peak = quantizing.get("peak_device_bytes") or quantizing.get("peak_host_bytes")
        rows.append(
            [
                name,
                number(timed.get("latency_seconds"), 2),
                number(timed.get("tokens_per_second"), 1),
                timed.get("kernels", NONE),
                gib(document["memory"]["weights_bytes"]),
                gib(timed.get("memory_bytes")),
                number(seconds, 1),
                gib(peak),
            ]
        )
    return Table(
        "Efficiency",
        [
            "Configuration",
            "Latency, s",
            "Tokens/s",
            "Kernels",
            "Weights in memory, GiB",
            "Memory to run, GiB",
            "Quantization, s",
            "Quantization peak, GiB",
        ],
        rows,
        note=" ".join(
            text for word, text in speed.KERNELS.items() if any(word in row[3] for row in rows)
        ),
    )

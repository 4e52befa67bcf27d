"""A table, and those that hold a model's results in full."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.numerics.grid import Grid
from common.reporting.comparison import SILENT, Comparison, adjusted_p_values, by_metric
from common.reporting.significance import GAIN, NO_LOSS
from common.results.documents import CONFIGURATIONS, ModelResults
from common.results.naming import BASELINE
from common.tasks import perplexity, speed
from common.tasks.metrics import readable
from common.tasks.task import MetricKind, all_metrics, all_tasks

# By configuration, its differences to the baseline.
Comparisons = dict[str, list[Comparison]]

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of strings. numbers: all columns but the first and the last `words` are aligned
    right. note: a paragraph after it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: bool = True
    note: str = ""
    words: int = 0

    def markdown(self) -> str:
        right = len(self.header) - 1 - self.words if self.numbers else 0
        rules = ["---", *["---:"] * right, *["---"] * (len(self.header) - 1 - right)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in [self.header, rules, *self.rows])
        return "\n\n".join(part for part in (f"#### {self.title}", text, self.note) if part)


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 4) -> str:
    """So many significant digits, as `readable`."""
    return NONE if value is None else readable(value, digits)


def gib(size: float | None) -> str:
    return NONE if not size else f"{size / 2**30:.2f}"


def bits_of(results: ModelResults, name: str) -> tuple[float | None, float | None]:
    """Bits of a weight with a code, scale and zero-point included, and bytes of all weights in bits
    for each weight of the 16-bit model: as they were counted, else from what the results tell.
    """
    facts = results.documents[name]["quantization"]
    found = facts.get("bits_per_weight") or {}
    coded, whole = found.get("coded"), found.get("all")
    grid = facts.get("grid")
    ours = "library" not in facts or name in CONFIGURATIONS
    if coded is None and ours and grid and grid.get("group_size") and "symmetric" in grid:
        coded = Grid(grid["bits"], grid["group_size"], grid["symmetric"]).stored_bits
    if whole is None and BASELINE in results.documents:
        baseline = results.documents[BASELINE]["quantization"]
        each = (baseline.get("bits_per_weight") or {}).get("all") or 16.0
        whole = each * facts["weights_bytes"] / baseline["weights_bytes"]
    return coded, whole


def whose(results: ModelResults, name: str) -> str | None:
    """The library that a configuration which is not ours was quantized by, with its version where
    that is known.
    """
    facts = results.documents[name]["quantization"]
    if name in CONFIGURATIONS or ("library" not in facts and "seconds" in facts):
        return None
    library = facts.get("library", {})
    return " ".join(filter(None, (library.get("name"), library.get("version")))) or "not said"


def compression_of(results: ModelResults, name: str) -> float | None:
    """How many times smaller than the original's the weights are."""
    facts, baseline = results.documents[name]["quantization"], results.documents.get(BASELINE)
    ratio = facts.get("compression_ratio")
    if ratio is None and baseline:
        return baseline["quantization"]["weights_bytes"] / facts["weights_bytes"]
    return ratio


def size_table(results: ModelResults) -> Table:
    rows = []
    for name, document in results.evaluated():
        facts = document["quantization"]
        grid, (coded, whole) = facts.get("grid"), bits_of(results, name)
        rows.append(
            [
                name,
                str(grid["bits"]) if grid else number(whole, 0) if name == BASELINE else NONE,
                str(grid["group_size"] or "channel") if grid and "group_size" in grid else NONE,
                number(coded, 2),
                number(whole, 2),
                f"{facts['weights_bytes'] / 1e6:.1f}",
                number(compression_of(results, name), 2),
                f"{facts['folder_bytes'] / 1e6:.1f}",
            ]
        )
    header = [
        "Configuration",
        "Bits",
        "Group",
        "Bits per weight with a code",
        "Bits per weight, all",
        "Weights, MB",
        "Times smaller",
        "Folder, MB",
    ]
    return Table(
        "Size and bits",
        header,
        rows,
        note="With a code: scale and zero-point included. All: the file's weights, embedding, head "
        "and norms included, for each weight of the original.",
    )


def evaluated_tasks(results: ModelResults) -> set[str]:
    """The tasks that some configuration was evaluated on."""
    return {task for _, document in results.evaluated() for task in document["tasks"]}


def score_table(results: ModelResults, comparisons: Comparisons) -> Table:
    """Every score of the tasks that some configuration was evaluated on."""
    evaluated = evaluated_tasks(results)
    columns = [kind for kind in all_metrics() if kind.column and kind.task in evaluated]
    rows = []
    for name, document in results.evaluated():
        compared = by_metric(comparisons.get(name, []))
        rows.append(
            [
                name,
                *[
                    _score(
                        kind,
                        document["tasks"].get(kind.task, {}),
                        compared.get((kind.task, kind.key)),
                    )
                    for kind in columns
                ],
            ]
        )
    tasks = [task for task in all_tasks() if task.name in evaluated]
    clusters = "".join(f", {task.title} by {task.clustered}" for task in tasks if task.clustered)
    note = (
        "In brackets: the difference to the baseline on the same questions with its 95% "
        f"interval (Student's t on a jackknife{clusters}; of the median a bootstrap's)."
    )
    return Table(
        "Scores",
        ["Configuration", *[kind.heading for kind in columns]],
        rows,
        note=" ".join([note, *[task.note for task in tasks if task.note]]),
    )


def _score(kind: MetricKind, summary: dict, one: Comparison | None) -> str:
    """A score with its own interval, where the summary has one, and its difference."""
    value, show = summary.get(kind.key), number if kind.share else significant
    if value is None:
        return NONE
    shown = show(value)
    ends = [summary.get(end) for end in kind.interval or ()]
    if ends and None not in ends:
        shown += f" [{show(ends[0])}, {show(ends[1])}]"
    return shown if one is None else f"{shown} ({one.shown_difference()})"


def verdict_table(comparisons: Comparisons) -> Table:
    """A word for each difference, with flips to wrong / to right and the p-value after Holm: of a
    gain where it is one, else of a loss.
    """
    adjusted = adjusted_p_values(comparisons)
    compared_kinds = {one.kind for compared in comparisons.values() for one in compared}
    judged = [kind for kind in all_metrics() if kind.judged and kind in compared_kinds]
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
            gain = one.word(p_loss, p_gain) == GAIN
            flips = "" if one.flips is None else f"{one.flips.to_wrong}/{one.flips.to_right}, "
            words = one.verdict(p_loss, p_gain)
            row.append(f"{words} ({flips}p {p_gain if gain else p_loss:.2g})")
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
    margins = "".join(f" ({kind.name.lower()}: {100 * kind.margin:g}%)" for kind in ratios)
    students = "".join(f", Student's t for {kind.name.lower()}" for kind in ratios)
    swaps = "".join(
        f"; for {task.title} the two models' answers are swapped at random, {task.clustered} by "
        f"{task.clustered}, because answers to one {task.clustered} are not independent"
        for task in all_tasks()
        if task.clustered and any(kind.task == task.name for kind in judged)
    )
    sizes = "; ".join(
        f"{heading} {max(values):.2g}"
        for heading, values in detectable.items()
        if np.isfinite(max(values))
    )
    return (
        f"A loss is an interval wholly below zero with p at most 0.05, a gain the reverse; "
        f'"{NO_LOSS}" an interval that excludes a loss of {MetricKind.margin}{margins}. '
        "In brackets: answers that went wrong / came right, and the one-sided p of a loss, or "
        "of a gain where it is called one, after Holm over all configurations: McNemar's exact "
        f"test where answers are right or wrong{students}{swaps}. "
        '"No gain" is said of higher scores where perplexity is higher, too, by more than its '
        f"margin, or where the model {SILENT} and silence scores. Smallest differences "
        f"that samples of this size detect four times in five: {sizes}."
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


def _of_runs(timed: dict, key: str, digits: int) -> str:
    """The median of several runs, and their range where it was recorded."""
    ends = [timed.get(f"{key}_{end}") for end in ("low", "high")]
    shown, *rest = (significant(one, digits) for one in (timed.get(key), *ends))
    return shown if None in ends else f"{shown} [{', '.join(rest)}]"


def efficiency_table(results: ModelResults) -> Table:
    rows = []
    for name, document in results.evaluated():
        timed, facts = speed.TASK.of(document), document["quantization"]
        seconds, quantizing = facts.get("seconds", {}).get("total"), facts.get("memory", {})
        peak = quantizing.get("peak_device_bytes") or quantizing.get("peak_host_bytes")
        rows.append(
            [
                name,
                _of_runs(timed, "latency_seconds", 3),
                _of_runs(timed, "tokens_per_second", 4),
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

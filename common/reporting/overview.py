"""A model's configurations in one row each: what the first table of README shows, and what
`choice` chooses from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from common.reporting.comparison import (
    SILENT,
    Comparison,
    adjusted_p_values,
    beyond_margin,
)
from common.reporting.significance import GAIN, LOSS, NO_LOSS, Estimate, mean_of_tasks
from common.reporting.tables import NONE, Comparisons, Table, bits_of, number, significant, whose
from common.results.documents import ModelResults
from common.results.identity import measured_apart
from common.results.naming import BASELINE
from common.tasks import perplexity, speed
from common.tasks.task import all_tasks, titles_of

# A loss below this many nats per token is no matter: perplexity's margin, and of the divergence,
# which is what the baseline's own text costs the model more than the baseline.
KL_MARGIN = 0.01
UNKNOWN = "cannot tell"
# Of a perplexity that is significantly up, by less than its margin.
MEASURABLE = "measurable"
# Before a verdict without loss that is not of all tasks.
IN_PART = "in part"


@dataclass(frozen=True)
class Recovery:
    """The mean over tasks of the quantized model's score in percent of the baseline's, None of no
    task; over: the scores' names; at_chance: of those left out.
    """

    percent: Estimate | None
    over: tuple[str, ...]
    at_chance: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What there is to know of a configuration at a glance; None is not known.

    coded_bits: of a weight with a code; bits: of a weight of the 16-bit model, all counted. size:
    bytes of weights. memory: bytes to run. kl: mean, nats per token. ratio: of perplexity. seconds:
    of quantization. calibrated: whether it read text. verdict: in words. lost, measurable: as of a
    `Verdict`. apart: it was measured otherwise than the first row,
    so that figures of both are not to be held against each other. by: the library that quantized
    it, where that is not this project. stored_wide: bytes of its folder, where that holds 16-bit
    weights and not the codes that `size` counts.
    """

    name: str
    size: int
    coded_bits: float | None = None
    bits: float | None = None
    memory: int | None = None
    recovery: Recovery | None = None
    kl: float | None = None
    ratio: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    calibrated: bool | None = None
    verdict: str = NONE
    lost: bool | None = None
    measurable: bool = False
    apart: bool = False
    by: str | None = None
    stored_wide: int | None = None


def rows_of(results: ModelResults, comparisons: Comparisons) -> list[Row]:
    """A row of each configuration that was evaluated, in the order of the tables."""
    adjusted = adjusted_p_values(comparisons)
    evaluated, rows = results.evaluated(), []
    for name, document in evaluated:
        facts, timed = document["quantization"], speed.TASK.of(document)
        compared = comparisons.get(name, [])
        divergence = perplexity.divergence_of(document) or {}
        ratios = [one for one in compared if one.kind.logarithmic]
        coded, bits = bits_of(results, name)
        p_values = {
            (task, key): found for (one, task, key), found in adjusted.items() if one == name
        }
        verdict = verdict_of(compared, p_values, divergence.get("kl_mean"))
        # What one of the two was evaluated on alone, or on other sizes.
        left = {*evaluated[0][1]["tasks"]} ^ {*document["tasks"]}
        verdict = _in_part(verdict, left | {*results.left_out.get(name, ())})
        by, first = whose(results, name), evaluated[0][1]["quantization"]
        rows.append(
            Row(
                name,
                facts["weights_bytes"],
                coded,
                bits,
                timed.get("memory_bytes"),
                recovery_of(compared),
                divergence.get("kl_mean"),
                math.exp(ratios[0].difference.value) if ratios else None,
                timed.get("tokens_per_second"),
                facts.get("seconds", {}).get("total"),
                facts["calibration"] is not None if "calibration" in facts else None,
                *verdict,
                measured_apart(document, evaluated[0][1]) is not None,
                by,
                _stored_wide(facts, first) if by else None,
            )
        )
    return rows


def _stored_wide(facts: dict, first: dict) -> int | None:
    """Bytes of the folder of another library's model where it is as large as the 16-bit model's:
    not every library's form can be loaded packed.
    """
    folder, whole = facts.get("folder_bytes"), first.get("folder_bytes")
    return folder if folder and whole and folder > 0.98 * whole else None


def recovery_of(compared: list[Comparison]) -> Recovery:
    """Over the tasks that both models were evaluated on, without those at which the baseline is no
    better than chance: what is quantized does as well there, whatever it has lost.
    """
    ratios = {one.kind: one.ratio for one in compared if one.ratio is not None}
    over = {kind: one for kind, one in ratios.items() if one.lowest > kind.chance}
    return Recovery(
        mean_of_tasks(list(over.values())).times(100) if over else None,
        tuple(kind.name for kind in over),
        tuple(kind.name for kind in ratios if kind not in over),
    )


class Verdict(NamedTuple):
    """On a configuration. lost: whether something was lost that matters, None where that cannot be
    told. measurable: nothing was, but a loss within the margin is significant.
    """

    words: str
    lost: bool | None
    measurable: bool = False


def verdict_of(
    compared: list[Comparison],
    adjusted: dict[tuple[str, str], tuple[float, float]],
    kl: float | None,
) -> Verdict:
    """All differences to the baseline in a few words.

    A loss is that of a task by the table of verdicts, of perplexity by more than its margin, or,
    where that is none, a divergence above `KL_MARGIN`; a model that answers less where silence
    scores has lost, too. Without any of these a perplexity that the table of verdicts calls a loss
    is up by less than its margin: within it, and measurable.

    Args:
        adjusted: by task and metric, p-values of a loss and a gain (`adjusted_p_values`).
        kl: the mean divergence from the baseline, nats per token; None is not measured.
    """
    if not compared:
        return Verdict(NONE, None)
    titles = {task.name: task.title for task in all_tasks()}
    lost = [one.kind.name.lower() for one in compared if beyond_margin(one)]
    if not lost and kl is not None and kl > KL_MARGIN:
        lost.append("KL")
    words = {
        one.kind: one.word(*adjusted[one.kind.task, one.kind.key])
        for one in compared
        if one.kind.judged and not one.kind.logarithmic
    }
    lost += dict.fromkeys(titles[kind.task] for kind, word in words.items() if word == LOSS)
    silent = any(one.silent for one in compared)
    if lost or silent:
        losses = [f"{LOSS}: {', '.join(lost)}"] if lost else []
        return Verdict("; ".join([*losses, *([SILENT] if silent else [])]), True)
    for one in (one for one in compared if one.kind.logarithmic):
        if one.word(*adjusted[one.kind.task, one.kind.key]) == LOSS:
            within = f"within {100 * one.kind.margin:g}%, {MEASURABLE}"
            return Verdict(f"{within}: {one.kind.name.lower()}", False, True)
    known = kl is not None or any(
        one.kind.logarithmic and one.word() in (NO_LOSS, LOSS, GAIN) for one in compared
    )
    if not known and not {NO_LOSS, GAIN} & set(words.values()):
        return Verdict(UNKNOWN, None)
    return Verdict(NO_LOSS, False)


def _in_part(verdict: Verdict, left: set[str]) -> Verdict:
    """A verdict that says which tasks it is not of, for one as an evaluation was stopped: nothing
    lost so far is no "no loss seen".
    """
    titles = titles_of(left)
    if not titles or verdict.words == NONE:
        return verdict
    words = f"{verdict.words}; not compared: {', '.join(titles)}"
    return Verdict(words if verdict.lost else f"{IN_PART}: {words}", verdict.lost or None)


def overview_table(rows: list[Row]) -> Table:
    """The first table."""
    cells = [
        [
            row.name,
            _bits(row),
            f"{row.size / 1e6:.1f}",
            _recovery(row),
            significant(row.kl, 3),
            number(row.ratio),
            speed_in_words(row.tokens_per_second),
            number(row.seconds, 1),
            row.verdict,
        ]
        for row in rows
    ]
    header = [
        "Configuration",
        "Bits per weight",
        "MB",
        "Recovery, %",
        "KL",
        "PPL ratio",
        "Tokens/s",
        "Quantized in, s",
        "Verdict",
    ]
    return Table("At a glance", header, cells, note=_note(rows), words=1)


def speed_in_words(tokens_per_second: float | None) -> str:
    """With a digit after the point where it is slow."""
    return number(tokens_per_second, 0 if (tokens_per_second or 0) >= 100 else 1)


def _bits(row: Row) -> str:
    whole = number(row.bits, 2)
    return whole if row.name == BASELINE else f"{number(row.coded_bits, 2)} ({whole})"


def _recovery(row: Row) -> str:
    found = row.recovery and row.recovery.percent
    if not found:
        return NONE
    return found.shown(1 if found.high - found.low < 10 else 0)


def _note(rows: list[Row]) -> str:
    """How the first table is to be read."""
    sentences = [
        "Bits of a weight that has a code, with its scale and zero-point; in brackets of all the "
        "model's weights, embedding and head included. MB: of weights. PPL "
        "ratio: perplexity over the baseline's."
    ]
    by_tasks: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.recovery and row.recovery.percent:
            by_tasks.setdefault(row.recovery.over, []).append(row.name)
    if by_tasks:
        over = "; ".join(
            ", ".join(scores) + ("" if len(by_tasks) == 1 else f" ({', '.join(names)})")
            for scores, names in by_tasks.items()
        )
        chance = dict.fromkeys(
            name for row in rows if row.recovery for name in row.recovery.at_chance
        )
        left_out = (
            f" (not {', '.join(chance)}: the baseline is no better there than chance)"
            if chance
            else ""
        )
        sentences.append(
            "Recovery, with its 95% interval: the score as a share of the baseline's, the mean "
            f"over {over}{left_out}."
        )
    others = [f"{row.name} ({row.by})" for row in rows if row.by]
    if others:
        sentences.append(f"Quantized by other libraries: {', '.join(others)}.")
    wide = [f"{row.name} ({row.stored_wide / 1e6:.1f} MB)" for row in rows if row.stored_wide]
    if wide:
        sentences.append(
            f"MB of {', '.join(wide)}: what its codes would take; in brackets its folder, which "
            "holds 16-bit weights. So it is not among what to take below."
        )
    sentences.append(
        "KL: nats per token from the baseline. A loss is named where a task's is significant, "
        f"perplexity is more than 1% up or, where it is not, KL is above {KL_MARGIN}; "
        f'"within 1%, {MEASURABLE}": perplexity is up by less, and significantly.'
    )
    return " ".join(sentences)

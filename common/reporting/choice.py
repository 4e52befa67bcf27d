"""Which configuration to take: rules over the rows of the first table, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.reporting.overview import IN_PART, MEASURABLE, Row, speed_in_words
from common.reporting.significance import NO_LOSS
from common.reporting.tables import NONE, Table, gib, number, significant
from common.results.naming import BASELINE

# Speeds that differ by less count as equal: more than what repeated runs differ by.
SAME_SPEED = 0.02
NOBODY = "none"
# GB, of a card or a phone that has little.
MEMORY = 4


@dataclass(frozen=True)
class Choice:
    """What is wanted, the row to take (None where no row fulfils it), and the rule."""

    wanted: str
    row: Row | None
    rule: str


def choices(rows: list[Row]) -> list[Choice]:
    """The answers that a model's rows give, without those that were measured otherwise or are not
    as small as their codes; none without a row that is quantized.
    """
    rows = [row for row in rows if not row.apart and not row.stored_wide]
    quantized = [row for row in rows if row.name != BASELINE]
    if not quantized:
        return []
    measure = _quality(quantized)
    found = []
    if measure is not None:
        found += [*_in_memory(rows, measure), *_by_budget(rows, measure)]
    found += [*_smallest(quantized), _fastest(rows, measure)]
    if measure is not None:
        found.append(_without_data(quantized, measure))
    return found


@dataclass(frozen=True)
class _Measure:
    """How good a row is, in words and as a number: the smaller the better, None where it is not
    known; baseline: of the baseline by definition.
    """

    words: str
    quantized: Callable[[Row], float | None]
    baseline: float

    def of(self, row: Row) -> float | None:
        return self.baseline if row.name == BASELINE else self.quantized(row)


def _not_recovered(row: Row) -> float | None:
    found = row.recovery and row.recovery.percent
    return 100 - found.value if found else None


# The first that is known of a quantized row decides. KL scatters least between runs that should not
# differ, recovery most.
_MEASURES = (
    _Measure("lowest KL", lambda row: row.kl, 0.0),
    _Measure("lowest perplexity", lambda row: row.ratio, 1.0),
    _Measure("highest recovery", _not_recovered, 0.0),
)


def _quality(quantized: list[Row]) -> _Measure | None:
    for measure in _MEASURES:
        if any(measure.of(row) is not None for row in quantized):
            return measure
    return None


def _best(rows: Iterable[Row], measure: _Measure) -> Row | None:
    """The best row; of equal ones the smallest, then the fastest, then the first."""
    known = [(value, row) for row in rows if (value := measure.of(row)) is not None]
    if not known:
        return None
    return min(known, key=lambda one: (one[0], one[1].size, -(one[1].tokens_per_second or 0)))[1]


def _in_memory(rows: list[Row], measure: _Measure) -> list[Choice]:
    """The best of all that run in so much memory, where it is known what they take."""
    if not any(row.memory for row in rows):
        return []
    best = _best((row for row in rows if row.memory and row.memory <= MEMORY * 1e9), measure)
    return [
        Choice(
            f"Best quality in {MEMORY} GB of memory",
            best,
            f"{measure.words} of those that take no more to run",
        )
    ]


def _by_budget(rows: list[Row], measure: _Measure) -> list[Choice]:
    """The best of all that fit, for every size from which on it is another."""
    steps: list[Row] = []
    for size in sorted({row.size for row in rows}):
        best = _best((row for row in rows if row.size <= size), measure)
        if best is not None and best not in steps:
            steps.append(best)
    return [
        Choice(
            f"Best quality, size budget from {row.size / 1e6:.1f} MB",
            row,
            f"{measure.words} of those that fit",
        )
        for row in steps
    ]


def _smallest(quantized: list[Row]) -> list[Choice]:
    """Without any loss that can be measured, and with one that is within the margin."""

    def smallest(rows: Iterable[Row]) -> Row | None:
        known = [(row.size, row.kl if row.kl is not None else float("inf"), row) for row in rows]
        return min(known, key=lambda one: one[:2], default=(None,))[-1]

    within = [row for row in quantized if row.lost is False]
    in_part = any(row.verdict.startswith(f"{IN_PART}: {NO_LOSS}") for row in quantized)
    whole = " of all tasks" if in_part else ""
    return [
        Choice(
            "Smallest without measurable loss",
            smallest(row for row in within if not row.measurable),
            f'fewest MB of those of which "{NO_LOSS}" is said{whole}',
        ),
        Choice(
            "Smallest with at most 1% of loss",
            smallest(within),
            f'fewest MB of those and of the ones "within 1%, {MEASURABLE}"',
        ),
    ]


def _fastest(rows: list[Row], measure: _Measure | None) -> Choice:
    timed = [(row.tokens_per_second, row) for row in rows if row.tokens_per_second]
    top = max((speed for speed, _ in timed), default=0.0)
    equal = [row for speed, row in timed if speed >= (1 - SAME_SPEED) * top]
    best = (_best(equal, measure) if measure else None) or next(iter(equal), None)
    rule = "most tokens/s"
    if measure is not None:
        rule += f"; {measure.words} of those within {100 * SAME_SPEED:g}%"
    return Choice("Fastest", best, rule)


def _without_data(quantized: list[Row], measure: _Measure) -> Choice:
    return Choice(
        "Best without calibration data",
        _best((row for row in quantized if row.calibrated is False), measure),
        f"{measure.words} of those that read no text",
    )


def choice_table(rows: list[Row]) -> Table | None:
    """Which one?, as a table; None where nothing is quantized."""
    found = choices(rows)
    if not found:
        return None
    cells = [
        [
            choice.wanted,
            NOBODY if choice.row is None else choice.row.name,
            NONE if choice.row is None else _figures(choice.row),
            choice.rule,
        ]
        for choice in found
    ]
    header = ["What is wanted", "Take", "Which has", "Rule"]
    return Table(
        "Which one?",
        header,
        cells,
        numbers=False,
        note="A size budget takes the last of its lines that it reaches. Sizes are of the weights, "
        "in MB; what they take to run stands beside them. Quality goes by the one "
        "measure that the rule names; what else was lost is in the verdict.",
    )


def _figures(row: Row) -> str:
    """What a row that is chosen has to show."""
    known = [f"{row.size / 1e6:.1f} MB"]
    if row.memory:
        known.append(f"{gib(row.memory)} GiB to run")
    if row.kl is not None and row.name != BASELINE:
        known.append(f"KL {significant(row.kl, 3)}")
    if row.ratio is not None:
        known.append(f"perplexity {number(row.ratio)} x")
    if row.tokens_per_second:
        known.append(f"{speed_in_words(row.tokens_per_second)} tokens/s")
    if row.recovery and row.recovery.percent:
        known.append(f"recovery {row.recovery.percent.value:.0f}%")
    words = ", ".join(known)
    return words if row.verdict == NONE else f"{words}; {row.verdict}"

"""Two evaluated models side by side: every metric with its difference, how sure that is, and a
verdict.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import compress

from common.base.errors import UserError
from common.base.progress import say
from common.reporting import significance
from common.reporting.significance import GAIN, LOSS, NO_LOSS, Difference, Flips, Ratio
from common.tasks import perplexity, speed
from common.tasks.metrics import LARGE, readable
from common.tasks.task import MetricKind, all_metrics

# What is said of a model that answers less often than the baseline, where silence scores.
SILENT = "answers less"
# What is said in place of a difference that nobody can read.
RUNAWAY = "hangs on single answers"


@dataclass(frozen=True)
class Comparison:
    """One metric of both models. For a logarithmic metric `difference` is that of the logarithms.

    p_loss, p_gain: one-sided p-values of a loss and of a gain. ratio: quantized / baseline, where
    the metric counts for the recovery. worse: a loss elsewhere that belies a gain here, in words.
    silent: the model answers less than the baseline did, and that scores here.
    """

    kind: MetricKind
    baseline: float
    quantized: float
    difference: Difference
    flips: Flips | None
    p_loss: float
    p_gain: float
    ratio: Ratio | None = None
    worse: str = ""
    silent: bool = False

    def verdict(self, p_loss: float | None = None, p_gain: float | None = None) -> str:
        """What the difference means, in a few words; p_loss, p_gain: those of `adjusted_p_values`,
        where this is one of many comparisons.
        """
        word = self.word(p_loss, p_gain)
        if self.kind.words:
            less, more = self.kind.words
            return {LOSS: less, GAIN: more, NO_LOSS: "no change seen"}.get(word, word)
        if word == GAIN and self.kind.silence:
            return "less often"
        if word == GAIN and (belied := SILENT if self.silent else self.worse):
            return f"no gain: {belied}"
        return f"{word}, but {SILENT}" if word == NO_LOSS and self.silent else word

    def word(self, p_loss: float | None = None, p_gain: float | None = None) -> str:
        """The verdict on this metric alone, as `significance.verdict`."""
        return significance.verdict(
            self.difference,
            self.kind.larger_is_better,
            self.kind.margin,
            self.p_loss if p_loss is None else p_loss,
            self.p_gain if p_gain is None else p_gain,
        )

    def shown_difference(self) -> str:
        """Difference with its interval, as ratios for a logarithmic metric."""
        values = self.difference.value, self.difference.low, self.difference.high
        if self.kind.logarithmic:
            point, low, high = (
                f"{math.exp(value):.3f}" if math.isfinite(value) else "–" for value in values
            )
            return f"{point} x [{low}, {high}]"
        if any(abs(value) > LARGE for value in values if math.isfinite(value)):
            return RUNAWAY
        shown = [signed(value) for value in values]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]"

    def shown_ratio(self) -> str:
        """Of a logarithmic metric, how many times the baseline's it is."""
        return f"{self.kind.name.lower()} {math.exp(self.difference.value):.3f} x"

    def kept(self) -> dict:
        """All of it as JSON can hold it; of the metric its name."""
        return {**asdict(self), "kind": [self.kind.task, self.kind.key]}

    @classmethod
    def of_kept(cls, found: dict) -> Comparison:
        """What `kept` was made of. Raises KeyError, TypeError or ValueError for anything else."""
        kinds = {(kind.task, kind.key): kind for kind in all_metrics()}
        task, key = found["kind"]
        parts = {"difference": Difference, "flips": Flips, "ratio": Ratio}
        made = {name: found[name] and of(**found[name]) for name, of in parts.items()}
        return cls(**{**found, **made, "kind": kinds[task, key]})

    def as_dict(self) -> dict:
        """For --json and CSV."""
        found: dict = {
            "task": self.kind.task,
            "metric": self.kind.key,
            "name": self.kind.name,
            "baseline": self.baseline,
            "quantized": self.quantized,
            "scale": "log" if self.kind.logarithmic else "linear",
            **{
                "difference" if name == "value" else name: value
                for name, value in asdict(self.difference).items()
            },
            "smallest_detectable": self.difference.detectable,
            "p_value": self.p_loss,
            "p_value_gain": self.p_gain,
            "verdict": self.verdict(),
        }
        if self.flips:
            found.update(to_wrong=self.flips.to_wrong, to_right=self.flips.to_right)
        # JSON has no NaN.
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()
        }


def signed(value: float) -> str:
    """A difference: three digits after the point, four significant ones where it is large."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.3f}" if abs(value) < 100 else readable(value, sign="+")


def compare_samples(
    baseline: dict[str, list[dict]], quantized: dict[str, list[dict]]
) -> list[Comparison]:
    """Compare two models by every metric of the records of their samples, lists by task.

    Raises:
        UserError: the models were evaluated on different samples.
    """
    if apart := other_samples(baseline, quantized):
        raise UserError(
            f"the two models were evaluated on different samples of {', '.join(apart)}; evaluate "
            "both again with --overwrite"
        )
    found = []
    for kind in all_metrics():
        if kind.task not in baseline or kind.task not in quantized:
            continue
        pair = baseline[kind.task], quantized[kind.task]
        if kind.only:
            both = [all(map(kind.only, samples)) for samples in zip(*pair, strict=True)]
            one, other = pair
            pair = list(compress(one, both)), list(compress(other, both))
        found.append(_compare_metric(kind, *pair))
    return _in_context(found)


def _in_context(found: list[Comparison]) -> list[Comparison]:
    """Comparisons that know what the others of the same two models say of theirs."""
    worse = next((one.shown_ratio() for one in found if beyond_margin(one)), "")
    silent = {one.kind.task for one in found if one.kind.silence and one.word() == LOSS}
    return [
        replace(
            one,
            worse="" if one.kind.logarithmic else worse,
            silent=one.kind.rewards_silence and one.kind.task in silent,
        )
        for one in found
    ]


def beyond_margin(one: Comparison) -> bool:
    """Whether this is the loss of a logarithmic metric by more than its margin."""
    return one.kind.logarithmic and one.word() == LOSS and one.difference.value > one.kind.margin


def other_samples(baseline: dict[str, list[dict]], quantized: dict[str, list[dict]]) -> list[str]:
    """The tasks of which two models' records are not of the same samples."""
    ids = [
        {task: [sample["id"] for sample in samples] for task, samples in one.items()}
        for one in (baseline, quantized)
    ]
    return [task for task in ids[0] if ids[0][task] != ids[1].get(task, ids[0][task])]


def _compare_metric(kind: MetricKind, baseline: list[dict], quantized: list[dict]) -> Comparison:
    clusters = [sample[kind.cluster] for sample in baseline] if kind.cluster else None
    pair = significance.pair(kind.metric([*baseline, *quantized]), clusters)
    difference = significance.difference(pair, kind.share)
    flips = None
    if kind.binary:
        before, after = (
            [sample[kind.binary] for sample in samples] for samples in (baseline, quantized)
        )
        flips = significance.flips(before, after)
    if flips and not clusters:
        p_values = flips.p_values
    else:
        lower_higher = (
            significance.t_test(difference) if kind.logarithmic else significance.swap_test(pair)
        )
        p_values = lower_higher if kind.larger_is_better else lower_higher[::-1]
    values = [math.exp(one) for one in pair.values] if kind.logarithmic else pair.values
    lower, higher = p_values
    then, now = values
    ratio = significance.ratio(pair, difference.unseen) if kind.recovered else None
    return Comparison(kind, then, now, difference, flips, lower, higher, ratio)


def by_metric(comparisons: list[Comparison]) -> dict[tuple[str, str], Comparison]:
    """The comparisons of one configuration by task and metric."""
    return {(one.kind.task, one.kind.key): one for one in comparisons}


def adjusted_p_values(
    comparisons: dict[str, list[Comparison]],
) -> dict[tuple[str, str, str], tuple[float, float]]:
    """p-values of a loss and of a gain, each after Holm over all configurations, by (configuration,
    task, metric).
    """
    families: dict[tuple[str, str], dict[str, Comparison]] = {}
    for name, rows in comparisons.items():
        for one in rows:
            families.setdefault((one.kind.task, one.kind.key), {})[name] = one
    adjusted = {}
    for family, members in families.items():
        losses = significance.holm({name: one.p_loss for name, one in members.items()})
        gains = significance.holm({name: one.p_gain for name, one in members.items()})
        adjusted.update({(name, *family): (losses[name], gains[name]) for name in members})
    return adjusted


def facts(baseline: dict, quantized: dict) -> list[tuple[str, float | None, float | None, int]]:
    """Size, time and speed of two results: name, baseline's, quantized's, digits."""
    sizes = [document["quantization"]["weights_bytes"] / 1e6 for document in (baseline, quantized)]
    rows = [
        ("Weights, MB", *sizes, 1),
        ("Quantization, s", None, quantized["quantization"].get("seconds", {}).get("total"), 1),
    ]
    speeds = [speed.TASK.of(document) for document in (baseline, quantized)]
    rows.append(("Tokens/s", *[found.get("tokens_per_second") for found in speeds], 1))
    rows.append(("Latency, s", *[found.get("latency_seconds") for found in speeds], 3))
    return [row for row in rows if row[1] is not None or row[2] is not None]


def print_comparison(baseline: dict, quantized: dict, comparisons: list[Comparison]) -> None:
    """Print one aligned table of everything, then the divergence."""
    lines = [
        [
            "",
            "Baseline",
            "Quantized",
            "Difference [95%]",
            "Flips -/+",
            "p of a loss",
            "p of a gain",
            "Detectable",
            "Verdict",
        ]
    ]
    for name, before, after, digits in facts(baseline, quantized):
        cells = ["–" if value is None else f"{value:.{digits}f}" for value in (before, after)]
        change = f"{after / before:.3f} x" if before and after else "–"
        lines.append([name, *cells, change, "", "", "", "", ""])
    for one in comparisons:
        flips = [
            "–" if one.flips is None else f"{one.flips.to_wrong}/{one.flips.to_right}",
            f"{one.p_loss:.3g}",
            f"{one.p_gain:.3g}",
        ]
        values = [
            "–" if math.isnan(value) else readable(value) for value in (one.baseline, one.quantized)
        ]
        lines.append(
            [one.kind.name, *values, one.shown_difference(), *flips, detectable(one), one.verdict()]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        say(
            "  ".join(
                cell.ljust(width) if i in (0, len(line) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )
    if divergence := perplexity.divergence_of(quantized):
        say(
            f"KL divergence from the baseline over {divergence['tokens']} tokens: mean "
            f"{divergence['kl_mean']:.4g}, median {divergence['kl_median']:.4g}, 99% "
            f"{divergence['kl_99']:.4g}, 99.9% {divergence['kl_999']:.4g} nats; same most likely "
            f"token {100 * divergence['same_top']:.2f}%"
        )


def detectable(one: Comparison) -> str:
    """The smallest difference that would show, as a ratio for a logarithmic metric."""
    size = one.difference.detectable
    if not math.isfinite(size):
        return "–"
    return f"{math.exp(size):.3f} x" if one.kind.logarithmic else f"{size:.3g}"

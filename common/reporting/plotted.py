"""What the plots show, as numbers: README's files and the page draw the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.reporting.comparison import Comparison, by_metric
from common.results.documents import ModelResults
from common.tasks import perplexity, speed
from common.tasks.task import MetricKind, all_metrics

# Phases of a quantization, as metadata names them, in the order in which they are shown. Of another
# library `quantize` is all that it does between reading and writing.
PHASES = {
    "load": ("load", "calibration text"),
    "calibrate": ("statistics", "propagate"),
    "solve": ("solve", "tune", "quantize"),
    "record and write": ("record", "write"),
}


@dataclass(frozen=True)
class Point:
    """A configuration by its size in MB; low, high: the ends of the value's 95% interval."""

    name: str
    size: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class AgainstSize:
    """Something against megabytes of weights. logarithmic: its axis. floor: the noise floor."""

    title: str
    label: str
    larger_is_better: bool
    points: list[Point]
    logarithmic: bool = False
    floor: float | None = None


def megabytes(document: dict) -> float:
    """What a configuration's weights take on disk, 1 MB = 10^6 bytes."""
    return document["quantization"]["weights_bytes"] / 1e6


def scores_against_size(
    results: ModelResults, comparisons: dict[str, list[Comparison]]
) -> list[AgainstSize]:
    """Each metric that is plotted, of two configurations or more. The interval is that of the
    difference to the baseline, laid around the configuration's value.
    """
    found = []
    for kind in all_metrics():
        points = [
            Point(name, megabytes(document), value, *_interval(kind, value, comparisons.get(name)))
            for name, document in results.evaluated()
            if kind.plotted
            and (value := document["tasks"].get(kind.task, {}).get(kind.key)) is not None
        ]
        if len(points) > 1:
            label = f"{kind.name} ({'higher' if kind.larger_is_better else 'lower'} is better)"
            found.append(AgainstSize(kind.name, label, kind.larger_is_better, points))
    return found


def _interval(
    kind: MetricKind, value: float, compared: list[Comparison] | None
) -> tuple[float | None, float | None]:
    one = by_metric(compared or []).get((kind.task, kind.key))
    # One sample has a value and no interval.
    if one is None or not math.isfinite(one.difference.standard_error):
        return None, None
    low, high = (end - one.difference.value for end in (one.difference.low, one.difference.high))
    if kind.logarithmic:
        return value * math.exp(low), value * math.exp(high)
    return value + low, value + high


def divergences(results: ModelResults) -> dict[str, dict]:
    """By configuration, its divergence from the baseline: kl_mean and so on, nats per token."""
    return {
        name: measured
        for name, document in results.evaluated()
        if name != "baseline" and (measured := perplexity.divergence_of(document))
    }


def divergence_against_size(results: ModelResults) -> AgainstSize | None:
    """Mean divergence; the baseline's, where the same model in other batches differs at all, is the
    noise floor. A logarithmic axis has no place for what is exactly zero.
    """
    points = [
        Point(name, megabytes(results.documents[name]), measured["kl_mean"])
        for name, measured in divergences(results).items()
        if measured["kl_mean"] > 0
    ]
    baseline = results.documents.get("baseline", {})
    floor = (perplexity.divergence_of(baseline) or {}).get("kl_mean") or None
    title = "Divergence from the baseline"
    label = "KL mean, nats per token (lower is better)"
    return AgainstSize(title, label, False, points, True, floor) if points else None


def speed_against_size(results: ModelResults) -> AgainstSize | None:
    """Tokens per second of single answers, of two configurations or more."""
    points = [
        Point(name, megabytes(document), rate)
        for name, document in results.evaluated()
        if (rate := speed.TASK.of(document).get("tokens_per_second"))
    ]
    if len(points) < 2:
        return None
    return AgainstSize("Tokens per second", "Tokens per second, batch 1", True, points)


def layer_errors(results: ModelResults) -> dict[str, dict[str, dict[int, float]]]:
    """Relative output error by linear (q_proj, ...), configuration and layer."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, document in results.evaluated():
        for key, error in document["quantization"].get("relative_output_error", {}).items():
            # Of model.layers.0.self_attn.q_proj and the like.
            layer, linear = int(key.split(".")[2]), key.rsplit(".", 1)[-1]
            found.setdefault(linear, {}).setdefault(name, {})[layer] = error
    return found


def quantization_seconds(results: ModelResults) -> dict[str, dict[str, float]]:
    """By configuration, the seconds of each of `PHASES` and the `total` of the whole run."""
    return {
        name: {
            **{
                label: sum(seconds.get(phase, 0.0) for phase in phases)
                for label, phases in PHASES.items()
            },
            "total": seconds["total"],
        }
        for name, document in results.evaluated()
        if (seconds := document["quantization"].get("seconds"))
    }


def memory_gib(results: ModelResults) -> dict[str, dict[str, float]]:
    """By configuration, GiB of weights on disk, weights while running and the peak while
    quantizing, 0 where that is not known.
    """
    found = {}
    for name, document in results.evaluated():
        facts = document["quantization"]
        peaks = facts.get("memory", {})
        peak = peaks.get("peak_device_bytes") or peaks.get("peak_host_bytes") or 0
        found[name] = {
            "weights on disk": facts["weights_bytes"] / 2**30,
            "weights while running": document["memory"]["weights_bytes"] / 2**30,
            "peak while quantizing": peak / 2**30,
        }
    return found

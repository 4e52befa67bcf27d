"""The plots that README and docs show: readable in grey, by the colour-blind, and without
overlapping text.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.reporting.comparison import Comparison, by_metric
from common.results.documents import ModelResults
from common.tasks import perplexity, speed
from common.tasks.task import all_metrics

# Okabe and Ito's colours, in an order whose greys differ, and a marker for each method: colour is
# never alone.
STYLE = {
    "baseline": ("#000000", "*"),
    "gptq": ("#0072B2", "o"),
    "awq": ("#E69F00", "s"),
    "hqq": ("#D55E00", "^"),
    "smoothquant": ("#56B4E9", "D"),
    "adaround": ("#009E73", "v"),
    "quarot": ("#CC79A7", "P"),
}
_OTHER = ("#777777", "X")
SIZE_LABEL = "Weights, MB (equal sizes side by side)"


def style(configuration: str) -> tuple[str, str]:
    """Colour and marker of a configuration."""
    return STYLE.get(configuration.split("-")[0], _OTHER)


def save(figure, file: Path) -> None:
    """Write a figure; without the software's version the same results give the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_all(
    results: ModelResults, comparisons: dict[str, list[Comparison]], folder: Path
) -> list[tuple[str, Path]]:
    """Draw every plot that the results allow into `folder`. Returns captions and files."""
    scores = " and ".join(kind.name for kind in reversed(all_metrics()) if kind.plotted)
    plots = (
        (
            f"{scores} against size",
            "accuracy_against_size",
            lambda: accuracy_against_size(results, comparisons),
        ),
        ("Divergence from the baseline", "divergence", lambda: divergence(results)),
        ("Relative output error by layer", "error_by_layer", lambda: error_by_layer(results)),
        ("Quantization time", "quantization_time", lambda: quantization_time(results)),
        ("Memory", "memory", lambda: memory(results)),
        (
            "Tokens per second against size",
            "speed_against_size",
            lambda: speed_against_size(results),
        ),
    )
    drawn = []
    for caption, name, draw in plots:
        figure = draw()
        if figure is not None:
            save(figure, folder / f"{name}.png")
            drawn.append((f"{caption}, {results.name}", folder / f"{name}.png"))
    return drawn


def _point(axis, name: str, x: float, y: float, error: tuple[float, float] | None = None) -> None:
    """One configuration: its colour and marker, hollow for 8 bits; error: how far the interval
    reaches down and up.
    """
    colour, marker = style(name)
    bars = None if error is None else [[max(error[0], 0.0)], [max(error[1], 0.0)]]
    axis.errorbar(
        x,
        y,
        yerr=bars,
        fmt=marker,
        color=colour,
        markersize=9,
        label=name,
        capsize=3,
        linewidth=1,
        markerfacecolor="white" if name.endswith("8bit") else colour,
        markeredgewidth=1.6,
    )


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def side_by_side(sizes: list[float]) -> list[float]:
    """Where to draw points of these sizes: those that would lie on each other are set side by side
    around their mean.
    """
    step = 0.028 * (max(sizes) - min(sizes))
    places = list(sizes)
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or sizes[order[end]] - sizes[order[end - 1]] > 0.3 * step:
            crowd = order[start:end]
            middle = sum(sizes[i] for i in crowd) / len(crowd)
            for rank, i in enumerate(sorted(crowd)):
                places[i] = middle + (rank - (len(crowd) - 1) / 2) * step
            start = end
    return places


def pareto_front(
    points: list[tuple[float, float]], larger_is_better: bool
) -> list[tuple[float, float]]:
    """Those (size, value) that no other point beats in both, by size."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda p: (p[0], -p[1] if larger_is_better else p[1])):
        if not front or (value > front[-1][1] if larger_is_better else value < front[-1][1]):
            front.append((size, value))
    return front


def accuracy_against_size(results: ModelResults, comparisons: dict[str, list[Comparison]]):
    """Each metric that is plotted against megabytes of weights, with the Pareto front.

    Bars are the 95% interval of the difference to the baseline, laid around the configuration's
    value.
    """
    names = [name for name in results.configurations() if name in results.documents]
    panels = [
        kind
        for kind in all_metrics()
        if kind.plotted and any(kind.task in results.documents[name]["tasks"] for name in names)
    ]
    if len(names) < 2 or not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.4 * len(panels), 4.4), layout="constrained", squeeze=False
    )
    for axis, kind in zip(axes[0], panels, strict=True):
        task, metric, larger = kind.task, kind.key, kind.larger_is_better
        shown = [
            name
            for name in names
            if results.documents[name]["tasks"].get(task, {}).get(metric) is not None
        ]
        points = [
            (
                results.documents[name]["quantization"]["weights_bytes"] / 1e6,
                results.documents[name]["tasks"][task][metric],
            )
            for name in shown
        ]
        for name, (_, value), place in zip(
            shown, points, side_by_side([size for size, _ in points]), strict=True
        ):
            error = None
            one = by_metric(comparisons.get(name, [])).get((task, metric))
            if one:
                error = (
                    one.difference.value - one.difference.low,
                    one.difference.high - one.difference.value,
                )
                if one.kind.logarithmic:
                    error = (value * (1 - math.exp(-error[0])), value * (math.exp(error[1]) - 1))
            _point(axis, name, place, value, error)
        front = pareto_front(points, larger)
        axis.plot(
            *zip(*front, strict=True),
            color="#999999",
            linewidth=1,
            linestyle="--",
            zorder=0,
            drawstyle="steps-post",
            label="Pareto front",
        )
        axis.set_xlabel(SIZE_LABEL)
        axis.set_ylabel(f"{kind.name} ({'higher' if larger else 'lower'} is better)")
        axis.grid(alpha=0.3)
    _legend(figure, axes[0][0])
    return figure


def divergence(results: ModelResults):
    """Divergence from the baseline by configuration: mean, median and the rare large ones, on a
    logarithmic axis.
    """
    found = {
        name: perplexity.divergence_of(document)
        for name, document in results.evaluated()
        if name != "baseline"
    }
    names = [name for name, value in found.items() if value]
    if not names:
        return None
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(names) + 1.8), layout="constrained")
    for key, marker, shade, label in (
        ("kl_median", "o", "#ffffff", "median"),
        ("kl_mean", "D", "#000000", "mean"),
        ("kl_99", "s", "#bdbdbd", "99%"),
        ("kl_999", "^", "#636363", "99.9%"),
    ):
        # A logarithmic axis has no zero.
        values = [max(found[name][key], 1e-9) for name in names]
        axis.scatter(
            values,
            range(len(names)),
            marker=marker,
            color=shade,
            edgecolor="black",
            s=48,
            label=label,
            zorder=3,
        )
    axis.hlines(
        range(len(names)),
        *zip(
            *[(max(found[name]["kl_median"], 1e-9), found[name]["kl_999"]) for name in names],
            strict=True,
        ),
        color="#999999",
        linewidth=1,
    )
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("Kullback-Leibler divergence from the baseline, nats per token")
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def speed_against_size(results: ModelResults):
    """Tokens per second of single answers against megabytes of weights."""
    found = {
        name: rate
        for name, document in results.evaluated()
        if (rate := speed.TASK.of(document).get("tokens_per_second"))
    }
    names = list(found)
    if len(names) < 2:
        return None
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    places = side_by_side(
        [results.documents[name]["quantization"]["weights_bytes"] / 1e6 for name in names]
    )
    for name, place in zip(names, places, strict=True):
        _point(axis, name, place, found[name])
    # After the margins: a limit that is set stops them.
    axis.margins(y=0.1)
    axis.set_ylim(0, axis.get_ylim()[1])
    axis.set_xlabel(SIZE_LABEL)
    axis.set_ylabel("Tokens per second, batch 1")
    axis.grid(alpha=0.3)
    _legend(figure, axis)
    return figure


def comparison_chart(comparisons: list[Comparison], title: str):
    """Differences of one model to its baseline with their intervals: shares on the left, metrics
    that are compared as ratios on the right."""
    shares = [one for one in comparisons if one.kind.share]
    ratios = [one for one in comparisons if one.kind.logarithmic]
    figure, axes = plt.subplots(
        1,
        2,
        figsize=(11, 0.45 * max(len(shares), 2) + 1.8),
        layout="constrained",
        width_ratios=(3, 1),
    )
    panels = (
        (
            axes[0],
            shares,
            "Difference to the baseline, percentage points",
            lambda value: 100 * value,
        ),
        (axes[1], ratios, "Above the baseline, %", lambda value: 100 * math.expm1(value)),
    )
    for axis, rows, label, scale in panels:
        for row, one in enumerate(rows):
            low, value, high = (
                scale(v) for v in (one.difference.low, one.difference.value, one.difference.high)
            )
            axis.errorbar(
                value,
                row,
                xerr=[[max(value - low, 0)], [max(high - value, 0)]],
                fmt="o",
                color="black",
                capsize=4,
            )
            axis.annotate(
                one.verdict(),
                (value, row),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axis.axvline(0, color="#999999", linewidth=1)
        axis.set_yticks(range(len(rows)), [one.kind.name for one in rows])
        axis.set_ylim(len(rows) - 0.5, -0.7)
        axis.margins(x=0.15)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel(label)
    figure.suptitle(title, fontsize=11)
    return figure


def error_by_layer(results: ModelResults):
    """Relative output error of every linear over the layers, a panel for each linear, a line for
    each 4-bit method.
    """
    errors = {
        name: document["quantization"]["relative_output_error"]
        for name, document in results.documents.items()
        if name.endswith("4bit") and document["quantization"].get("relative_output_error")
    }
    names = [name for name in results.configurations() if name in errors]
    if not names:
        return None
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharex=True)
    # Of model.layers.0.self_attn.q_proj and the like. Families with fewer linears leave panels out.
    linears = dict.fromkeys(key.split(".", 3)[-1] for values in errors.values() for key in values)
    for axis, linear in itertools.zip_longest(axes.flat[:-1], linears):
        if linear is None:
            axis.axis("off")
            continue
        for name in names:
            values = {
                int(key.split(".")[2]): error
                for key, error in errors[name].items()
                if key.endswith(linear)
            }
            colour, marker = style(name)
            axis.plot(
                list(values),
                list(values.values()),
                marker=marker,
                markersize=4,
                linewidth=1,
                color=colour,
                label=name,
            )
        axis.set_title(linear.split(".")[1], fontsize=10)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    # The last of the upper row stands above the legend, so it has labels of its own.
    axes[0, -1].tick_params(labelbottom=True)
    for axis in (*axes[1], axes[0, -1]):
        axis.set_xlabel("Layer")
    for axis in axes[:, 0]:
        axis.set_ylabel("Relative output error")
    axes.flat[-1].axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False)
    return figure


def quantization_time(results: ModelResults):
    """Seconds of each configuration's quantization, by phase."""
    times = {
        name: document["quantization"]["seconds"]
        for name, document in results.documents.items()
        if "seconds" in document["quantization"]
    }
    names = [name for name in results.configurations() if name in times]
    if not names:
        return None
    groups = {
        "load": ("load", "calibration text"),
        "calibrate": ("statistics", "propagate"),
        "solve": ("solve",),
        "record and write": ("record", "write"),
    }
    shades = ("#f0f0f0", "#bdbdbd", "#636363", "#252525")
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(names) + 1.6), layout="constrained")
    left = [0.0] * len(names)
    for (label, phases), shade in zip(groups.items(), shades, strict=True):
        values = [sum(times[name].get(phase, 0.0) for phase in phases) for name in names]
        axis.barh(
            names, values, left=left, color=shade, edgecolor="black", linewidth=0.6, label=label
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, name in enumerate(names):
        axis.text(
            max(times[name]["total"], left[row]),
            row,
            f" {times[name]['total']:.1f} s",
            va="center",
            fontsize=9,
        )
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("Seconds (the number is the whole run)")
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def memory(results: ModelResults):
    """Memory in GiB: weights on disk, weights while running, peak while quantizing."""
    names = [name for name in results.configurations() if name in results.documents]
    if not names:
        return None
    bars = {"weights on disk": [], "weights while running": [], "peak while quantizing": []}
    for name in names:
        document = results.documents[name]
        quantizing = document["quantization"].get("memory", {})
        bars["weights on disk"].append(document["quantization"]["weights_bytes"] / 2**30)
        bars["weights while running"].append(document["memory"]["weights_bytes"] / 2**30)
        peak = quantizing.get("peak_device_bytes") or quantizing.get("peak_host_bytes") or 0
        bars["peak while quantizing"].append(peak / 2**30)
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(names) + 1.6), layout="constrained")
    height = 0.26
    for offset, ((label, values), shade) in enumerate(
        zip(bars.items(), ("#252525", "#969696", "#f0f0f0"), strict=True)
    ):
        rows = [row + (offset - 1) * height for row in range(len(names))]
        axis.barh(rows, values, height, color=shade, edgecolor="black", linewidth=0.6, label=label)
        for row, value in zip(rows, values, strict=True):
            if value:
                axis.text(value, row, f" {value:.2f}", va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("GiB")
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure

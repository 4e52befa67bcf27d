"""The plots that README and docs show: readable in grey, by the colour-blind, and without
overlapping text.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt

from common.reporting import plotted
from common.reporting.comparison import Comparison
from common.reporting.drawing import name_points, pareto_front, point, save
from common.reporting.plotted import divergences, scores_against_size
from common.reporting.quantization_plots import error_by_layer, memory, quantization_time
from common.results.documents import ModelResults

SIZE_LABEL = "Weights, MB"


def draw_all(
    results: ModelResults, comparisons: dict[str, list[Comparison]], folder: Path
) -> list[tuple[str, Path]]:
    """Draw every plot that the results allow into `folder`. Returns captions and files."""
    panels = scores_against_size(results, comparisons)
    scores = " and ".join(panel.title for panel in reversed(panels))
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


def accuracy_against_size(results: ModelResults, comparisons: dict[str, list[Comparison]]):
    """Each metric that is plotted against megabytes of weights, with the Pareto front.

    Bars are the 95% interval of the difference to the baseline, laid around the configuration's
    value.
    """
    panels = scores_against_size(results, comparisons)
    if not panels:
        return None
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.4, 4.4 * len(panels)), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for one in panel.points:
            error = None
            if one.low is not None and one.high is not None:
                error = one.value - one.low, one.high - one.value
            point(axis, one.name, one.size, one.value, error)
        front = pareto_front(
            [(one.size, one.value) for one in panel.points], panel.larger_is_better
        )
        axis.plot(
            *zip(*front, strict=True),
            color="#999999",
            linewidth=1,
            linestyle="--",
            zorder=0,
            drawstyle="steps-post",
            label="Pareto front",
        )
        name_points(axis, [(one.name, one.size, one.value) for one in panel.points])
        axis.set_title("Dashed: the Pareto front", fontsize=8, loc="right")
        axis.set_xlabel(SIZE_LABEL)
        axis.set_ylabel(panel.label)
        axis.grid(alpha=0.3)
    return figure


def divergence(results: ModelResults):
    """Divergence from the baseline by configuration: mean, median and the rare large ones, on a
    logarithmic axis.
    """
    found = divergences(results)
    names = list(found)
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
    found = plotted.speed_against_size(results)
    if found is None:
        return None
    figure, axis = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    for one in found.points:
        point(axis, one.name, one.size, one.value)
    # After the margins: a limit that is set stops them.
    axis.margins(y=0.1)
    axis.set_ylim(0, axis.get_ylim()[1])
    axis.set_xlabel(SIZE_LABEL)
    axis.set_ylabel(found.label)
    axis.grid(alpha=0.3)
    name_points(axis, [(one.name, one.size, one.value) for one in found.points])
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

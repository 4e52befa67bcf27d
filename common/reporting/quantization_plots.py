"""Plots of the quantization itself: the error of each layer, seconds, memory."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt

from common.reporting.drawing import style
from common.reporting.plotted import PHASES, layer_errors, memory_gib, quantization_seconds
from common.results.documents import ModelResults


def error_by_layer(results: ModelResults):
    """Relative output error of every linear over the layers, a panel for each linear, a line for
    each 4-bit method.
    """
    errors = {
        linear: four_bits
        for linear, by_name in layer_errors(results).items()
        if (four_bits := {n: values for n, values in by_name.items() if n.endswith("4bit")})
    }
    if not errors:
        return None
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharex=True)
    # Families with fewer linears leave panels out.
    for axis, linear in itertools.zip_longest(axes.flat[:-1], errors):
        if linear is None:
            axis.axis("off")
            continue
        for name, values in errors[linear].items():
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
        axis.set_title(linear, fontsize=10)
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
    times = quantization_seconds(results)
    names = list(times)
    if not names:
        return None
    shades = ("#f0f0f0", "#bdbdbd", "#636363", "#252525")
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(names) + 1.6), layout="constrained")
    left = [0.0] * len(names)
    for label, shade in zip(PHASES, shades, strict=True):
        values = [times[name][label] for name in names]
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
    # Room for the numbers.
    axis.set_xlim(0, 1.15 * max(times[name]["total"] for name in names))
    axis.set_xlabel("Seconds (the number is the whole run)")
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def memory(results: ModelResults):
    """Memory in GiB: weights on disk, weights while running, peak while quantizing."""
    found = memory_gib(results)
    if not found:
        return None
    names = list(found)
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(names) + 1.6), layout="constrained")
    height = 0.26
    for offset, (label, shade) in enumerate(
        zip(found[names[0]], ("#252525", "#969696", "#f0f0f0"), strict=True)
    ):
        values = [found[name][label] for name in names]
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

"""Plots of the quantization itself: the error of each layer, seconds, memory."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt

from common.reporting.drawing import style
from common.results.documents import ModelResults


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
    bars: dict[str, list[float]] = {
        "weights on disk": [],
        "weights while running": [],
        "peak while quantizing": [],
    }
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

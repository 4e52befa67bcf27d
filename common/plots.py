"""The plots that README and docs show: readable in grey, by the colour-blind, and without overlapping text."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

from common.models import LINEARS  # noqa: E402
from common.results import ModelResults  # noqa: E402

# Okabe and Ito's colours, in an order whose greys differ, and a marker for each method: colour is never alone.
STYLE = {"baseline": ("#000000", "*"), "gptq": ("#0072B2", "o"), "awq": ("#E69F00", "s"), "hqq": ("#D55E00", "^"),
         "smoothquant": ("#56B4E9", "D"), "adaround": ("#009E73", "v"), "quarot": ("#CC79A7", "P")}
_OTHER = ("#777777", "X")


def style(configuration: str) -> tuple[str, str]:
    """Colour and marker of a configuration."""
    return STYLE.get(configuration.split("-")[0], _OTHER)


def draw_all(results: ModelResults, folder: Path) -> list[tuple[str, Path]]:
    """Draw every plot that the results allow into `folder`. Returns captions and files."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = (("Perplexity and ARC accuracy against size", "accuracy_against_size", accuracy_against_size),
             ("Quantization time", "quantization_time", quantization_time),
             ("Memory", "memory", memory),
             ("Relative output error by layer", "error_by_layer", error_by_layer))
    drawn = []
    for caption, name, draw in plots:
        figure = draw(results)
        if figure is not None:
            file = folder / f"{name}.png"
            # Without the software's version the same results give the same bytes.
            figure.savefig(file, dpi=120, metadata={"Software": None})
            plt.close(figure)
            drawn.append((f"{caption}, {results.name}", file))
    return drawn


def accuracy_against_size(results: ModelResults):
    """ARC accuracy (left) and perplexity (right) against megabytes of weights."""
    panels = [("arc", "accuracy", "ARC accuracy (higher is better)"),
              ("perplexity", "perplexity", "Perplexity (lower is better)")]
    names = [name for name in results.configurations() if name in results.documents]
    panels = [p for p in panels if any(p[0] in results.documents[name]["tasks"] for name in names)]
    if len(names) < 2 or not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axis, (task, metric, label) in zip(axes[0], panels, strict=True):
        for name in names:
            value = results.documents[name]["tasks"].get(task, {}).get(metric)
            if value is not None:
                colour, marker = style(name)
                size = results.documents[name]["quantization"]["weights_bytes"] / 1e6
                hollow = name.endswith("8bit")
                axis.plot(size, value, marker, color=colour, markersize=11, label=name,
                          markerfacecolor="white" if hollow else colour, markeredgewidth=1.8)
        axis.set_xlabel("Weights, MB")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def error_by_layer(results: ModelResults):
    """Relative output error of every linear over the layers, a panel for each linear, a line for each 4-bit method."""
    errors = {name: document["quantization"]["relative_output_error"] for name, document in results.documents.items()
              if name.endswith("4bit") and document["quantization"].get("relative_output_error")}
    names = [name for name in results.configurations() if name in errors]
    if not names:
        return None
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharex=True)
    for axis, linear in zip(axes.flat, LINEARS, strict=False):
        for name in names:
            values = {int(key.split(".")[2]): error for key, error in errors[name].items() if key.endswith(linear)}
            colour, marker = style(name)
            axis.plot(list(values), list(values.values()), marker=marker, markersize=4, linewidth=1, color=colour,
                      label=name)
        axis.set_title(linear.split(".")[1], fontsize=10)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("Layer")
    for axis in axes[:, 0]:
        axis.set_ylabel("Relative output error")
    axes.flat[-1].axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False)
    return figure


def quantization_time(results: ModelResults):
    """Seconds of each configuration's quantization, by phase."""
    times = {name: document["quantization"]["seconds"] for name, document in results.documents.items()
             if "seconds" in document["quantization"]}
    names = [name for name in results.configurations() if name in times]
    if not names:
        return None
    groups = {"load": ("load", "calibration text"), "calibrate": ("statistics", "propagate"), "solve": ("solve",),
              "record and write": ("record", "write")}
    shades = ("#f0f0f0", "#bdbdbd", "#636363", "#252525")
    figure, axis = plt.subplots(figsize=(8, 0.45 * len(names) + 1.6), layout="constrained")
    left = [0.0] * len(names)
    for (label, phases), shade in zip(groups.items(), shades, strict=True):
        values = [sum(times[name].get(phase, 0.0) for phase in phases) for name in names]
        axis.barh(names, values, left=left, color=shade, edgecolor="black", linewidth=0.6, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, name in enumerate(names):
        axis.text(max(times[name]["total"], left[row]), row, f" {times[name]['total']:.1f} s", va="center", fontsize=9)
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
    for offset, ((label, values), shade) in enumerate(zip(bars.items(), ("#252525", "#969696", "#f0f0f0"), strict=True)):
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

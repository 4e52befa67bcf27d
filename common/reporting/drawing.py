"""What all plots share: a colour and a marker for each configuration, labels, the front of the
best, the file.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

# Files alone are drawn, on machines without a screen too.
matplotlib.use("Agg")

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
# Other libraries have the colour of the method that theirs is most like.
_PEERS = {
    "rtn-4bit": ("#777777", "d"),
    "llmcompressor-gptq-4bit": (STYLE["gptq"][0], "p"),
    "llmcompressor-awq-4bit": (STYLE["awq"][0], "p"),
    "llmcompressor-smoothquant-8bit": (STYLE["smoothquant"][0], "p"),
    "hqq-package-4bit": (STYLE["hqq"][0], "p"),
    "autoround-4bit": (STYLE["adaround"][0], "p"),
    "gptqmodel-gptq-4bit": (STYLE["gptq"][0], "h"),
    "bitsandbytes-nf4": ("#777777", "h"),
}
_OTHER = ("#777777", "X")


def style(configuration: str) -> tuple[str, str]:
    """Colour and marker of a configuration."""
    if configuration in _PEERS:
        return _PEERS[configuration]
    return STYLE.get(configuration.split("-")[0], _OTHER)


def save(figure, file: Path) -> None:
    """Write a figure; without the software's version the same results give the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)


def point(axis, name: str, x: float, y: float, error: tuple[float, float] | None = None) -> None:
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


def legend(figure, axis) -> None:
    """The figure's legend below it, in as many columns as its width has room for."""
    handles, labels = axis.get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    columns = int(figure.get_figwidth() / (0.5 + 0.075 * longest))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(max(columns, 1), 5),
        fontsize=8,
        frameon=False,
    )


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

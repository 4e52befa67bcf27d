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
# Of a point's name: its room in widths of the axis, its height in points, and the part of a
# figure's height that its axis takes.
_NAME_WIDTH, _NAME_HEIGHT, _USED = 0.25, 9.0, 0.8


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


def name_points(axis, points: list[tuple[str, float, float]]) -> None:
    """Write every point's name beside it, where several would lie on each other one above the other
    with a line to its point; points themselves stay where they are.

    Args:
        axis: linear, with everything else on it; its limits are changed to make room.
        points: name, x, y.
    """
    left, right = axis.get_xlim()
    width = right - left
    # Names need room to the right of the last point.
    axis.set_xlim(left, right + _NAME_WIDTH * width)
    bottom, top = axis.get_ylim()
    height = axis.figure.get_figheight() / axis.get_gridspec().nrows
    gap = _NAME_HEIGHT / (_USED * height * 72) * (top - bottom)
    for near in _columns(points, 0.5 * _NAME_WIDTH * width):
        places = spread([y for _, _, y in near], gap)
        # Within the axis: the upper ones down, then, should they lack room, the lower ones up.
        for i, place in reversed([*enumerate(places)]):
            places[i] = min(place, top - (len(places) - i - 0.5) * gap)
        places = [max(place, bottom + (i + 0.5) * gap) for i, place in enumerate(places)]
        edge = max(x for _, x, _ in near) + 0.03 * width
        for (name, x, y), place in zip(near, places, strict=True):
            colour, _ = style(name)
            axis.annotate(
                name,
                (x, y),
                (edge, place),
                textcoords="data",
                fontsize=7,
                va="center",
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.4},
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.6,
                    "shrinkA": 0,
                    "shrinkB": 5,
                    "relpos": (0, 0.5),
                },
            )


def _columns(
    points: list[tuple[str, float, float]], width: float
) -> list[list[tuple[str, float, float]]]:
    """Points parted into those whose names would meet, by x, each from the lowest up."""
    columns: list[list[tuple[str, float, float]]] = []
    for one in sorted(points, key=lambda one: one[1]):
        if not columns or one[1] - columns[-1][0][1] > width:
            columns.append([])
        columns[-1].append(one)
    return [sorted(column, key=lambda one: one[2]) for column in columns]


def spread(places: list[float], gap: float) -> list[float]:
    """Places in ascending order moved as little as possible, in squares, so that neighbours are at
    least `gap` apart.
    """
    # Without the gaps they only have to ascend: neighbours that do not are pooled at their mean.
    pools: list[list[float]] = []
    for i, place in enumerate(places):
        pools.append([place - i * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [place + i * gap for i, place in enumerate(_mean(pool) for pool in pools for _ in pool)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def pareto_front(
    points: list[tuple[float, float]], larger_is_better: bool
) -> list[tuple[float, float]]:
    """Those (size, value) that no other point beats in both, by size."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda p: (p[0], -p[1] if larger_is_better else p[1])):
        if not front or (value > front[-1][1] if larger_is_better else value < front[-1][1]):
            front.append((size, value))
    return front

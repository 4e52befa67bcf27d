"""The page's plots, as data: traces and layouts of plotly.js, which page/plots.js draws.

A trace says whose it is, so that configurations can be left out: `configuration` of a whole trace,
`configurations` point by point. Strings such as `var(--ink)` are colours of the page's style sheet.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.reporting.drawing import style
from common.reporting.plotted import (
    PHASES,
    AgainstSize,
    Point,
    divergence_against_size,
    divergences,
    layer_errors,
    memory_gib,
    quantization_seconds,
    scores_against_size,
    speed_against_size,
)
from common.reporting.tables import Comparisons
from common.results.documents import ModelResults

SYMBOLS = {
    "*": "star",
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "p": "pentagon",
    "h": "hexagon",
    "d": "diamond-tall",
    "X": "x",
}
_SHADES = tuple(f"var(--shade-{i})" for i in range(1, 5))


def plots(results: ModelResults, comparisons: Comparisons) -> list[dict]:
    """Every plot that the results allow: {title, note, views}. A view is {label, height, traces,
    layout}, and where its points bear their names `labels`; one of several views is shown at a
    time. `front` is "higher" or "lower" where the page draws the Pareto front of what is shown.
    """
    against = [
        divergence_against_size(results),
        *scores_against_size(results, comparisons),
        speed_against_size(results),
    ]
    others = (_spread(results), _errors(results), _seconds(results), _memory(results))
    return [*(_against_size(one) for one in against if one), *(one for one in others if one)]


def plain(text: str) -> str:
    """Text for plotly.js, which reads some tags in it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def colour_of(name: str) -> str:
    """A configuration's colour, for a style sheet: black is not to be seen on a dark page."""
    colour, _ = style(name)
    return "var(--ink)" if colour == "#000000" else colour


def _marker(name: str) -> dict:
    """Colour and symbol of a configuration, hollow for 8 bits."""
    colour, (_, marker) = colour_of(name), style(name)
    hollow = name.endswith("8bit")
    return {
        "color": colour,
        "symbol": SYMBOLS[marker] + ("-open" if hollow else ""),
        "size": 11,
        # Between filled ones that lie on each other a line of the page's colour.
        "line": {"width": 2, "color": colour} if hollow else {"width": 1, "color": "var(--paper)"},
    }


def _view(traces: list[dict], height: int, x: dict, y: dict, label: str = "", **more) -> dict:
    layout = {"xaxis": x, "yaxis": y, **more.pop("layout", {})}
    return {"label": label, "height": height, "traces": traces, "layout": layout, **more}


def _axis(title: str, **more) -> dict:
    return {"title": {"text": plain(title)}, **more}


def _log_axis(title: str) -> dict:
    return _axis(title, type="log", dtick=1, exponentformat="none", minor={"dtick": "D1"})


def _against_size(found: AgainstSize) -> dict:
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "configuration": point.name,
            "x": [point.size],
            "y": [point.value],
            "marker": _marker(point.name),
            "hovertext": [_hover(found, point)],
            "hoverinfo": "text",
            **_error_bar(point),
        }
        for point in found.points
    ]
    note = "Dashed: the Pareto front."
    if found.logarithmic:
        note += " The baseline, which is at zero, has no place on a logarithmic axis."
    if any(point.low is not None for point in found.points):
        note += " Bars: 95% interval of the difference to the baseline."
    if found.floor:
        note += f" Dotted: the noise floor, {found.floor:.3g}."
        sizes = [point.size for point in found.points]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [min(sizes), max(sizes)],
                "y": [found.floor] * 2,
                "line": {"dash": "dot", "width": 1, "color": "var(--muted)"},
                "hoverinfo": "skip",
            }
        )
    view = _view(
        traces,
        440,
        _axis("Weights, MB", rangemode="nonnegative"),
        _log_axis(found.label) if found.logarithmic else _axis(found.label),
        layout={"showlegend": False},
        labels=True,
        front="higher" if found.larger_is_better else "lower",
    )
    return {"title": f"{found.title} against size", "note": note, "views": [view]}


def _hover(found: AgainstSize, point: Point) -> str:
    interval = ""
    if point.low is not None and point.high is not None:
        interval = f"<br>95%: {point.low:.4g} to {point.high:.4g}"
    return (
        f"<b>{plain(point.name)}</b><br>{plain(found.title)}: {point.value:.4g}{interval}"
        f"<br>{point.size:,.1f} MB"
    )


def _error_bar(point: Point) -> dict:
    if point.low is None or point.high is None:
        return {}
    return {
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(point.high - point.value, 0.0)],
            "arrayminus": [max(point.value - point.low, 0.0)],
            "thickness": 1,
            "width": 3,
        }
    }


def _rows() -> dict:
    """The axis of configurations one below the other."""
    return {"type": "category", "autorange": "reversed", "automargin": True}


def _spread(results: ModelResults) -> dict | None:
    found = divergences(results)
    names = [name for name, measured in found.items() if measured["kl_999"] > 0]
    if not names:
        return None
    least = min(
        value
        for name in names
        for key, value in found[name].items()
        if key.startswith("kl_") and value > 0
    )
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": label,
            "configurations": names,
            "x": [max(found[name][key], least) for name in names],
            "y": [plain(name) for name in names],
            "marker": {
                "symbol": symbol,
                "size": 10,
                "color": shade,
                "line": {"width": 1, "color": "var(--ink)"},
            },
            "hovertext": [
                f"<b>{plain(name)}</b><br>{label}: {found[name][key]:.4g}" for name in names
            ],
            "hoverinfo": "text",
        }
        for (key, label, symbol), shade in zip(
            (
                ("kl_median", "median", "circle"),
                ("kl_mean", "mean", "diamond"),
                ("kl_99", "99%", "square"),
                ("kl_999", "99.9%", "triangle-up"),
            ),
            _SHADES,
            strict=True,
        )
    ]
    view = _view(traces, 150 + 28 * len(names), _log_axis("KL divergence, nats per token"), _rows())
    return {
        "title": "How divergence is spread over the tokens",
        "note": "Mean, median and the rare large ones.",
        "views": [view],
    }


def _errors(results: ModelResults) -> dict | None:
    found = layer_errors(results)
    views = []
    for linear, by_name in found.items():
        traces = [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(name),
                "configuration": name,
                "x": list(errors),
                "y": list(errors.values()),
                "marker": {**_marker(name), "size": 7},
                "line": {"width": 1, "color": _marker(name)["color"]},
                "hovertext": [
                    f"<b>{plain(name)}</b><br>layer {layer}: {error:.4g}"
                    for layer, error in errors.items()
                ],
                "hoverinfo": "text",
            }
            for name, errors in by_name.items()
        ]
        views.append(_view(traces, 460, _axis("Layer"), _log_axis("Relative output error"), linear))
    note = "Of every linear on the probe text; choose which."
    title = "Relative output error by layer"
    return {"title": title, "note": note, "views": views} if views else None


def _bars(found: dict[str, dict[str, float]], parts: Sequence[str], unit: str) -> list[dict]:
    names = list(found)
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "configurations": names,
            "x": [found[name][part] for name in names],
            "y": [plain(name) for name in names],
            "marker": {"color": shade, "line": {"width": 1, "color": "var(--ink)"}},
            "hovertext": [
                f"<b>{plain(name)}</b><br>{part}: {found[name][part]:.3g} {unit}" for name in names
            ],
            "hoverinfo": "text",
        }
        for part, shade in zip(parts, _SHADES, strict=False)
    ]


def _seconds(results: ModelResults) -> dict | None:
    found = quantization_seconds(results)
    if not found:
        return None
    traces = _bars(found, tuple(PHASES), "s")
    for trace in traces:
        trace["hovertext"] = [
            f"{text}<br>whole run: {found[name]['total']:.1f} s"
            for text, name in zip(trace["hovertext"], found, strict=True)
        ]
    view = _view(
        traces, 150 + 28 * len(found), _axis("Seconds"), _rows(), layout={"barmode": "stack"}
    )
    return {"title": "Quantization time", "note": "", "views": [view]}


def _memory(results: ModelResults) -> dict | None:
    found = memory_gib(results)
    if not found:
        return None
    traces = _bars(found, tuple(next(iter(found.values()))), "GiB")
    view = _view(
        traces,
        150 + 40 * len(found),
        _axis("GiB"),
        _rows(),
        layout={"barmode": "group", "bargap": 0.25},
    )
    return {"title": "Memory", "note": "", "views": [view]}

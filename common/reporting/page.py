"""The page: tables, plots and samples of every model in one HTML file that needs no other.

Everything that it reads stands in it, plotly.js as well, compressed: unpacked it is 5 MB. What the
style sheet and the scripts in page/ do, they do with the HTML and the data made here.
"""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from string import Template

import plotly
from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

from common.reporting.page_plots import colour_of, plots
from common.reporting.report import conditions, first_tables, introduction, more_tables
from common.reporting.tables import Comparisons, Table
from common.results.documents import ModelResults

_PARTS = Path(__file__).parent / "page"
_SCRIPTS = ("page.js", "tables.js", "plots.js", "samples.js")


@dataclass(frozen=True)
class ModelPart:
    """What the page shows of a model; samples: of `page_samples.flipped`."""

    results: ModelResults
    comparisons: Comparisons
    samples: dict


@cache
def _markdown() -> MarkdownIt:
    """Marks within a line. HTML stands as text, and no picture is fetched from elsewhere."""
    return MarkdownIt("commonmark", {"html": False}).disable("image")


def inline(text: str) -> str:
    """A table's cell or a sentence with its markdown marks, as HTML."""
    return _markdown().renderInline(text)


def table_html(table: Table, configurations: list[str]) -> str:
    """A table in a box of its own, which scrolls where it is too wide; rows of which the first cell
    is a configuration say so, for the page's choice of configurations.
    """
    # Of which columns the cells are aligned right.
    right = range(1, len(table.header) - table.words) if table.numbers else ()
    kinds = [' class="number"' if i in right else "" for i in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{kind}>{inline(cell)}</th>'
        for kind, cell in zip(kinds, table.header, strict=True)
    )
    lines = []
    for row in table.rows:
        cells, mine = [inline(cell) for cell in row], ""
        if row[0] in configurations:
            # A name, in which marks are none.
            cells[0], mine = escape(row[0]), f' data-configuration="{escape(row[0])}"'
        line = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, cells, strict=True))
        lines.append(f"<tr{mine}>{line}</tr>")
    note = f"\n{_note(table.note)}" if table.note else ""
    return (
        f'<div class="table"><h3>{escape(table.title)}</h3>\n'
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + f"\n</tbody></table></div>{note}</div>"
    )


def _data(content) -> str:
    """JSON that stands inside a script's tags: no text in it can end them."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )


def _section(part: ModelPart, place: int) -> str:
    results = part.results
    names = [name for name, _ in results.evaluated()]
    data = {
        "configurations": [{"name": name, "colour": colour_of(name)} for name in names],
        "plots": plots(results, part.comparisons),
        "samples": part.samples,
    }
    first, more = (
        [table_html(one, results.configurations()) for one in find(results, part.comparisons)]
        for find in (first_tables, more_tables)
    )
    links = [
        f'<a href="#{name.lower()}-{place}">{name}</a>'
        for name in ("Tables", "Plots", "Everything", "Samples")
    ]
    return "\n".join(
        [
            f'<section class="model" id="model-{place}">',
            f"<h2>{escape(results.title)}</h2>",
            *[_note(text) for text in introduction(results)],
            f'<p class="jump">{" ".join(links)}</p>',
            '<div class="choice"></div>',
            f'<div id="tables-{place}">',
            *first,
            f'</div>\n<div class="plots" id="plots-{place}"></div>\n<div id="everything-{place}">',
            *([_note(conditions(results))] if results.documents else []),
            *more,
            f'</div>\n<div class="samples" id="samples-{place}"></div>',
            f'<script type="application/json">{_data(data)}</script>',
            "</section>",
        ]
    )


def _note(text: str) -> str:
    return f'<p class="note">{inline(text)}</p>'


@cache
def _packed_plotly() -> str:
    """plotly.js, compressed; without a time, so that the same results give the same bytes."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def page(parts: list[ModelPart]) -> str:
    """The page as HTML."""
    links = [
        f'<a href="#model-{place}">{escape(part.results.title)}</a>'
        for place, part in enumerate(parts)
    ]
    return Template((_PARTS / "page.html").read_text(encoding="utf-8")).substitute(
        style=(_PARTS / "page.css").read_text(encoding="utf-8"),
        links="\n".join(links),
        sections="\n".join(_section(part, place) for place, part in enumerate(parts)),
        plotly=_packed_plotly(),
        plotly_version=escape(plotly.__version__),
        scripts="\n".join((_PARTS / name).read_text(encoding="utf-8") for name in _SCRIPTS),
    )

"""README's tables, the HTML report and CSV files, made from results alone."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from common.comparison import Comparison, adjusted_p_values, by_metric
from common.errors import UserError
from common.identity import other_data
from common.results import CONFIGURATIONS, DOCUMENTED_FOLDER, ModelResults
from common.significance import GAIN, NO_LOSS

# By configuration, its differences to the baseline.
Comparisons = dict[str, list[Comparison]]

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
STATES = {"not started": "⬜ Not started", "running": "🔄 Running", "done": "✅ Done", "failed": "❌ Failed",
          "warning": "⚠️ Check"}
NONE = "–"


def status_of(results: ModelResults, configuration: str) -> tuple[str, str]:
    """State of a configuration ("done", "failed", ...) and the reason beside it."""
    known = results.status.get(configuration)
    if known:
        return known["state"], known.get("reason", "")
    return ("done", "") if configuration in results.documents else ("not started", "")


@dataclass(frozen=True)
class Table:
    """A table of strings. numbers: all columns but the first are aligned right. note: a paragraph before it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    numbers: bool = True
    note: str = ""

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:" if self.numbers else "---"] * (len(self.header) - 1)], *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"#### {self.title}", self.note, text) if part)

    def html(self) -> str:
        cells = ["".join(f"<th>{escape(cell)}</th>" for cell in self.header)]
        cells += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.rows]
        style = ' class="numbers"' if self.numbers else ""
        body = "\n".join(f"<tr>{line}</tr>" for line in cells)
        note = f"<p>{escape(self.note)}</p>\n" if self.note else ""
        return f"<h3>{escape(self.title)}</h3>\n{note}<table{style}>\n{body}\n</table>"


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def short_revision(source: str) -> str:
    """A source of data with the first 7 digits of its commit; the results have all 40."""
    return re.sub(r"@([0-9a-f]{7})[0-9a-f]{33}$", r"@\1", source)


def significant(value: float | None) -> str:
    """Three or four significant digits, no exponent below a million."""
    if value is None:
        return NONE
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.2e}"


def status_table(results: ModelResults) -> Table:
    rows = []
    for name in results.configurations():
        state, reason = status_of(results, name)
        rows.append([name, STATES[state], reason.replace("|", "/") or NONE])
    return Table("Status", ["Configuration", "Status", "Note"], rows, numbers=False)


def size_table(results: ModelResults) -> Table:
    baseline = results.documents.get("baseline")
    rows = []
    for name, document in _evaluated(results):
        facts = document["quantization"]
        grid = facts.get("grid")
        ratio = facts.get("compression_ratio")
        if ratio is None and baseline:
            ratio = baseline["quantization"]["weights_bytes"] / facts["weights_bytes"]
        group = NONE if grid is None else str(grid["group_size"] or "channel")
        rows.append([name, "16" if grid is None else str(grid["bits"]), group, f"{facts['weights_bytes'] / 1e6:.1f}",
                     f"{ratio:.2f}" if ratio else NONE, f"{facts['folder_bytes'] / 1e6:.1f}"])
    return Table("Size", ["Configuration", "Bits", "Group", "Weights, MB", "Times smaller", "Folder, MB"], rows)


# Columns of the accuracy table: task, metric, heading.
ACCURACY_COLUMNS = (
    ("arc", "accuracy", "ARC accuracy"), ("arc", "macro_f1", "ARC F1"), ("squad_v2", "f1", "SQuAD v2 F1"),
    ("squad_v2", "exact_match", "SQuAD v2 EM"), ("openmath", "within_tolerance", "OpenMath correct"),
    ("openmath", "mean_absolute_difference", "OpenMath mean absolute difference"),
    ("openmath", "median_absolute_difference", "OpenMath median absolute difference"),
    ("openmath", "no_number", "OpenMath no number"),
)
ACCURACY_NOTE = ("In brackets: the difference to the baseline on the same questions with its 95% interval (Student's t on a "
                 "jackknife, SQuAD v2 by article; of the median a bootstrap's). Mean and median absolute difference are over the "
                 "answers that hold a number, their differences over the problems that both models answered with one, so that "
                 "silence is no gain; `no number` is the share of answers that hold none.")


def accuracy_table(results: ModelResults, comparisons: Comparisons) -> Table:
    rows = []
    for name, document in _evaluated(results):
        compared = by_metric(comparisons.get(name, []))
        row = [name]
        for task, metric, _ in ACCURACY_COLUMNS:
            value = document["tasks"].get(task, {}).get(metric)
            shown = significant(value) if metric.endswith("absolute_difference") else number(value)
            one = compared.get((task, metric))
            row.append(shown if one is None or value is None else f"{shown} ({one.shown_difference()})")
        rows.append(row)
    return Table("Accuracy", ["Configuration", *[heading for *_, heading in ACCURACY_COLUMNS]], rows, note=ACCURACY_NOTE)


VERDICT_COLUMNS = (("arc", "accuracy", "ARC accuracy"), ("squad_v2", "f1", "SQuAD v2 F1"),
                   ("squad_v2", "exact_match", "SQuAD v2 EM"), ("openmath", "within_tolerance", "OpenMath correct"),
                   ("perplexity", "perplexity", "Perplexity"))


def verdict_table(comparisons: Comparisons) -> Table:
    """A word for each difference, with flips to wrong / to right and the p-value after Holm: of a gain where it is one, else
    of a loss."""
    adjusted = adjusted_p_values(comparisons)
    rows, detectable = [], {}
    for name, compared in comparisons.items():
        found = by_metric(compared)
        row = [name]
        for task, metric, heading in VERDICT_COLUMNS:
            one = found.get((task, metric))
            if one is None:
                row.append(NONE)
                continue
            size = one.difference.detectable
            detectable.setdefault(heading, []).append(math.expm1(size) if one.kind.logarithmic else size)
            p_loss, p_gain = adjusted[name, task, metric]
            word = one.verdict(p_loss, p_gain)
            flips = "" if one.flips is None else f"{one.flips.to_wrong}/{one.flips.to_right}, "
            row.append(f"{word} ({flips}p {p_gain if word == GAIN else p_loss:.2g})")
        rows.append(row)
    sizes = "; ".join(f"{heading} {max(values):.2g}" for heading, values in detectable.items() if np.isfinite(max(values)))
    note = (f"A loss is an interval wholly below zero with p at most 0.05, a gain the reverse; \"{NO_LOSS}\" an interval that "
            "excludes a loss of 0.02 (perplexity: 1%). In brackets: answers that went wrong / came right, and the one-sided p of "
            "a loss, or of a gain where it is called one, after Holm over all configurations: McNemar's exact test where answers "
            "are right or wrong, Student's t for perplexity; for SQuAD v2 the two models' answers are swapped at random, article "
            "by article, because answers to one article are not independent. Smallest differences that samples of this size "
            f"detect four times in five: {sizes}.")
    return Table("What the differences mean", ["Configuration", *[heading for *_, heading in VERDICT_COLUMNS]], rows,
                 numbers=False, note=note)


def divergence_table(results: ModelResults, comparisons: Comparisons) -> Table:
    rows = []
    for name, document in _evaluated(results):
        text = document["tasks"].get("perplexity", {})
        apart = text.get("divergence", {})
        one = by_metric(comparisons.get(name, [])).get(("perplexity", "perplexity"))
        value, error = text.get("perplexity"), text.get("standard_error")
        shown = number(value, 2) if error is None or not math.isfinite(error) else f"{value:.2f} ± {error:.2f}"
        rows.append([name, shown, NONE if one is None else one.shown_difference(),
                     *[significant(apart.get(key)) for key in ("kl_mean", "kl_median", "kl_99", "kl_999")],
                     NONE if not apart else f"{100 * apart['same_top']:.2f}"])
    return Table("Perplexity and divergence from the baseline",
                 ["Configuration", "Perplexity ± standard error", "Ratio [95%]", "KL mean", "KL median", "KL 99%", "KL 99.9%",
                  "Same top token, %"], rows,
                 note="Kullback-Leibler divergence in nats per token, on the same tokens. The baseline's own row is the noise "
                      "floor: the same model computed in other batches.")


def efficiency_table(results: ModelResults) -> Table:
    rows = []
    for name, document in _evaluated(results):
        speed, memory, facts = document.get("speed", {}), document["memory"], document["quantization"]
        seconds = facts.get("seconds", {}).get("total")
        quantizing = facts.get("memory", {})
        quantizing_peak = quantizing.get("peak_device_bytes") or quantizing.get("peak_host_bytes")
        rows.append([name, number(speed.get("latency_seconds"), 2), number(speed.get("tokens_per_second"), 1),
                     speed.get("kernels", NONE), gib(memory["weights_bytes"]), gib(speed.get("memory_bytes")),
                     number(seconds, 1), gib(quantizing_peak)])
    return Table("Efficiency", ["Configuration", "Latency, s", "Tokens/s", "Kernels", "Weights in memory, GiB",
                  "Memory to run, GiB", "Quantization, s", "Quantization peak, GiB"], rows,
                 note=" ".join(text for word, text in KERNELS.items() if any(word in row[3] for row in rows)))


# What the words in the column of kernels mean.
KERNELS = {
    "dense": "Kernels `dense`: plain transformers unpacks the weights when the model is loaded, so a smaller checkpoint saves "
             "disk there, not memory or time; the library's wrappers cost a little.",
    "packed": "`packed`: weights stay packed in memory and are unpacked inside the product.",
    "streamed": "`streamed`: the GPU has no room for the weights, so layers are read from the files for every forward pass.",
    "graph": "`graph`: decoding replays a captured CUDA graph.",
}


def gib(size: float | None) -> str:
    return NONE if not size else f"{size / 2**30:.2f}"


def _evaluated(results: ModelResults) -> list[tuple[str, dict]]:
    return [(name, results.documents[name]) for name in results.configurations() if name in results.documents]


def conditions(results: ModelResults) -> str:
    """What the numbers were measured on, in a few sentences; configurations measured otherwise are named."""
    evaluated = _evaluated(results)
    if not evaluated:
        return "Nothing has been evaluated yet."
    _, first = evaluated[0]
    device, versions = first["device"], first["versions"]
    sentences = [f"Evaluated on {device['name']} ({device['type']}, {device['threads']} threads) in "
                 f"{first['compute_dtype']}, torch {versions['torch']}, transformers {versions['transformers']}, "
                 f"Python {versions['python']}."]
    parts = []
    for task, summary in first["tasks"].items():
        count = f"{summary['windows']} windows of {summary['length']} tokens" if task == "perplexity" else \
            f"{summary['samples']} samples"
        parts.append(f"{task} {count} ({short_revision(summary['data'])})")
    if parts:
        sentences.append(f"Data: {'; '.join(parts)}.")
    calibrations = {name: document["quantization"].get("calibration") for name, document in evaluated}
    texts = sorted({f"{c['samples']} x {c['length']} tokens of {short_revision(c['data'])}, seed {c['seed']}"
                    for c in calibrations.values() if c})
    if texts:
        sentences.append(f"Calibration: {'; '.join(texts)}.")
    if "speed" in first:
        speed = first["speed"]
        sentences.append(f"Latency is one answer of {speed['new_tokens']} tokens to a prompt of {speed['prompt_tokens']}, "
                         f"batch 1, median of {speed['runs']} runs; tokens/s is its decoding. Memory to run is what the model "
                         f"takes with 2,048 tokens of context, batch 1: weights, cache and what it works with, "
                         f"{'on the GPU' if device['type'] == 'cuda' else 'on the host without Python and its packages'}.")
    noise = results.documents.get("baseline", {}).get("noise")
    if noise:
        changes = "; ".join(f"{task} {found['changed']} of {found['samples']}" for task, found in noise.items())
        sentences.append(f"Noise floor: the baseline evaluated twice, in other batches, scored differently on {changes} samples.")
    odd = [f"{name}{apart}" for name, document in evaluated if (apart := _apart(document, first)) is not None]
    if odd:
        sentences.append(f"⚠️ Measured on another device, type, version or data than {evaluated[0][0]}, so not to be "
                         f"compared with it: {', '.join(odd)}.")
    if results.left_out:
        tasks = ", ".join(f"{name} ({', '.join(tasks)})" for name, tasks in results.left_out.items())
        sentences.append(f"⚠️ Left out, as evaluated on more or fewer samples than these: {tasks}.")
    return " ".join(sentences)


def _apart(document: dict, other: dict) -> str | None:
    """What of a document is not to be compared with another: in brackets the tasks, empty for all of it; None for nothing."""
    if any(document[key] != other[key] for key in ("device", "versions", "compute_dtype")):
        return ""
    tasks = other_data(other, document)
    return f" ({', '.join(task for task in document['tasks'] if task in tasks)})" if tasks else None


def tables(results: ModelResults, comparisons: Comparisons) -> list[Table]:
    """All tables of one model."""
    found = [status_table(results)]
    if results.documents:
        found += [size_table(results), accuracy_table(results, comparisons)]
        if comparisons:
            found.append(verdict_table(comparisons))
        if any("perplexity" in document["tasks"] for document in results.documents.values()):
            found.append(divergence_table(results, comparisons))
        found.append(efficiency_table(results))
    return found


def introduction(results: ModelResults) -> list[str]:
    """The sentences before a model's tables."""
    dates = sorted({document["date"] for document in results.documents.values() if "date" in document})
    when = f" of {dates[0]}" if dates else ""
    when += f" to {dates[-1]}" if len(dates) > 1 else ""
    parts = [f"The documented run{when}: its results come with the project, in `{DOCUMENTED_FOLDER}`, and are not of "
             "this machine."
             if results.documented else f"A local run{when}.", conditions(results)]
    if any(document["demo_data"] for document in results.documents.values()):
        parts.append("Scores on the demo's own tasks compare methods with each other, not models with the literature.")
    return parts


def section(results: ModelResults, comparisons: Comparisons, figures: list[tuple[str, str]]) -> str:
    """Everything README shows of one model. figures: (caption, path as README links it)."""
    return "\n\n".join([f"### {results.title}", *introduction(results),
                        *[table.markdown() for table in tables(results, comparisons)],
                        *[f"![{caption}]({path})" for caption, path in figures]])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Quantization comparison</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #111; background: #fff }}
table {{ border-collapse: collapse; margin: 1em 0; font-size: 13px }} td, th {{ border: 1px solid #bbb; padding: .25em .6em }}
th {{ background: #eee; text-align: left }} .numbers td:not(:first-child) {{ text-align: right; white-space: nowrap }}
img {{ max-width: 100% }} figure {{ margin: 1.5em 0 }}
</style></head><body>
<h1>Quantization comparison</h1>
{body}
</body></html>
"""


def page(sections: list[tuple[ModelResults, Comparisons, list[tuple[str, Path]]]]) -> str:
    """One HTML page with all tables and plots in it, which needs no other file."""
    parts = []
    for results, comparisons, figures in sections:
        parts.append(f"<h2>{escape(results.title)}</h2>")
        parts += [f"<p>{escape(text)}</p>" for text in introduction(results)]
        parts += [table.html() for table in tables(results, comparisons)]
        for caption, file in figures:
            image = base64.b64encode(file.read_bytes()).decode()
            parts.append(f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">'
                         f"<figcaption>{escape(caption)}</figcaption></figure>")
    return _PAGE.format(body="\n".join(parts))


def write_csv(results: ModelResults, comparisons: Comparisons, folder: Path) -> None:
    """Everything as CSV: measurements.csv, a line for each configuration and number; comparisons.csv, for each difference, to
    eight significant digits, as machines differ in the last ones of sums."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"configuration": name, "quantity": quantity, "value": value} for name, document in _evaluated(results)
             for quantity, value in _numbers(document) if not quantity.startswith("quantization.relative_output_error")]
    pd.DataFrame(lines, columns=["configuration", "quantity", "value"]).to_csv(folder / "measurements.csv", index=False)
    errors = [{"configuration": name, "linear": linear, "relative_output_error": error} for name, document in _evaluated(results)
              for linear, error in document["quantization"].get("relative_output_error", {}).items()]
    pd.DataFrame(errors, columns=["configuration", "linear", "relative_output_error"]).to_csv(
        folder / "error_by_layer.csv", index=False)
    adjusted = adjusted_p_values(comparisons)
    rows = []
    for name, compared in comparisons.items():
        for one in compared:
            p_loss, p_gain = adjusted[name, one.kind.task, one.kind.key]
            rows.append({"configuration": name, **one.as_dict(), "p_value_holm": p_loss, "p_value_gain_holm": p_gain,
                         "verdict": one.verdict(p_loss, p_gain)})
    pd.DataFrame(rows).to_csv(folder / "comparisons.csv", index=False, float_format="%.8g")


def _numbers(value, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested dictionaries, with the dotted path to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, value


def replace_between_markers(readme: Path, content: str) -> None:
    """Put `content` between README's markers. Raises UserError when they are missing."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{readme} needs the lines {BEGIN} and {END} once each, for the tables to go between them")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"
    if new != text:
        readme.write_text(new, encoding="utf-8")


def in_table_order(all_results: list[ModelResults]) -> list[ModelResults]:
    """Local runs first; models by name, those with most configurations evaluated first."""
    return sorted(all_results, key=lambda r: (r.documented, -len(set(r.documents) & set(CONFIGURATIONS)), r.name))

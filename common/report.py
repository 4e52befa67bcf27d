"""README's tables, made from results/ alone."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from common.results import CONFIGURATIONS, ModelResults

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


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    """A markdown table; columns of numbers, all but the first, are aligned right."""
    lines = [header, ["---", *["---:" if numbers else "---"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def with_difference(value: float | None, baseline: float | None, digits: int = 3) -> str:
    """A value and, in brackets, how far it is from the baseline's."""
    if value is None or baseline is None:
        return number(value, digits)
    return f"{value:.{digits}f} ({value - baseline:+.{digits}f})"


def significant(value: float | None) -> str:
    """Three or four significant digits, no exponent below a million."""
    if value is None:
        return NONE
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.2e}"


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{significant(abs(value))}"


def status_table(results: ModelResults) -> str:
    rows = []
    for name in results.configurations():
        state, reason = status_of(results, name)
        rows.append([name, STATES[state], reason.replace("|", "/") or NONE])
    return table(["Configuration", "Status", "Note"], rows, numbers=False)


def size_table(results: ModelResults) -> str:
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
    return table(["Configuration", "Bits", "Group", "Weights, MB", "Times smaller", "Folder, MB"], rows)


# Columns of the accuracy table: task, metric, heading, digits.
ACCURACY_COLUMNS = (
    ("arc", "accuracy", "ARC accuracy", 3), ("arc", "macro_f1", "ARC F1", 3), ("squad_v2", "f1", "SQuAD v2 F1", 3),
    ("squad_v2", "exact_match", "SQuAD v2 EM", 3), ("openmath", "within_tolerance", "OpenMath correct", 3),
)


def accuracy_table(results: ModelResults) -> str:
    baseline = results.documents.get("baseline", {}).get("tasks", {})
    rows = []
    for name, document in _evaluated(results):
        row = [name]
        for task, metric, _, digits in ACCURACY_COLUMNS:
            value = document["tasks"].get(task, {}).get(metric)
            reference = baseline.get(task, {}).get(metric)
            row.append(number(value, digits) if name == "baseline" else with_difference(value, reference, digits))
        math, text = document["tasks"].get("openmath", {}), document["tasks"].get("perplexity", {})
        mean, median = math.get("mean_absolute_difference"), math.get("median_absolute_difference")
        reference = baseline.get("openmath", {}).get("mean_absolute_difference")
        change = "" if name == "baseline" or None in (mean, reference) else f" ({_signed(mean - reference)})"
        row.append(f"{significant(mean)}{change} / {significant(median)}")
        row.append(number(math.get("no_number"), 3))
        reference = baseline.get("perplexity", {}).get("perplexity")
        value = text.get("perplexity")
        row.append(number(value, 2) if value is None or reference is None or name == "baseline"
                   else f"{value:.2f} ({value / reference:.3f} x)")
        rows.append(row)
    headings = [heading for *_, heading, _ in ACCURACY_COLUMNS]
    return table(["Configuration", *headings, "OpenMath difference, mean / median", "no number", "Perplexity"], rows)


def efficiency_table(results: ModelResults) -> str:
    rows = []
    for name, document in _evaluated(results):
        speed, memory, facts = document.get("speed", {}), document["memory"], document["quantization"]
        seconds = facts.get("seconds", {}).get("total")
        quantizing = facts.get("memory", {})
        on_device = document["device"]["type"] == "cuda"
        peak = memory["peak_device_bytes" if on_device else "peak_host_bytes"]
        quantizing_peak = quantizing.get("peak_device_bytes") or quantizing.get("peak_host_bytes")
        rows.append([name, number(speed.get("latency_seconds"), 2), number(speed.get("tokens_per_second"), 1),
                     speed.get("kernels", NONE), gib(memory["weights_bytes"]), gib(peak),
                     number(seconds, 1), gib(quantizing_peak)])
    return table(["Configuration", "Latency, s", "Tokens/s", "Kernels", "Weights in memory, GiB", "Peak memory, GiB",
                  "Quantization, s", "Quantization peak, GiB"], rows)


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
        parts.append(f"{task} {count} ({summary['data']})")
    if parts:
        sentences.append(f"Data: {'; '.join(parts)}.")
    calibrations = {name: document["quantization"].get("calibration") for name, document in evaluated}
    texts = sorted({f"{c['samples']} x {c['length']} tokens of {c['data']}, seed {c['seed']}"
                    for c in calibrations.values() if c})
    if texts:
        sentences.append(f"Calibration: {'; '.join(texts)}.")
    if "speed" in first:
        speed = first["speed"]
        sentences.append(f"Latency is one answer of {speed['new_tokens']} tokens to a prompt of {speed['prompt_tokens']}, "
                         f"batch 1, median of {speed['runs']} runs; tokens/s is its decoding. Peak memory is the evaluating "
                         f"process's, on {'the GPU' if device['type'] == 'cuda' else 'the host'}.")
    odd = [name for name, document in evaluated if not _comparable(document, first)]
    if odd:
        sentences.append(f"⚠️ Measured on another device, type, version or data than {evaluated[0][0]}, so not to be "
                         f"compared with it: {', '.join(odd)}.")
    return " ".join(sentences)


def _comparable(document: dict, other: dict) -> bool:
    same = all(document[key] == other[key] for key in ("device", "versions", "compute_dtype"))
    shared = set(document["tasks"]) & set(other["tasks"])
    fields = ("data", "samples", "windows", "length", "fingerprint")
    return same and all(document["tasks"][task].get(name) == other["tasks"][task].get(name)
                        for task in shared for name in fields)


def section(results: ModelResults, figures: list[tuple[str, str]]) -> str:
    """Everything README shows of one model. figures: (caption, path as README links it)."""
    parts = [f"### {results.name}", conditions(results)]
    if any(document["demo_data"] for document in results.documents.values()):
        parts.append("Scores on the demo's own tasks compare methods with each other, not models with the literature.")
    parts += ["#### Status", status_table(results)]
    if results.documents:
        parts += ["#### Size", size_table(results), "#### Accuracy",
                  "In brackets: difference to the baseline. The mean absolute difference is over the answers that hold a "
                  "number; `no number` is the share of those that hold none.",
                  accuracy_table(results), "#### Efficiency",
                  "Kernels `dense`: plain transformers unpacks the weights when the model is loaded, so a smaller checkpoint "
                  "saves disk there, not memory or time; the library's wrappers cost a little.", efficiency_table(results)]
    parts += [f"![{caption}]({path})" for caption, path in figures]
    return "\n\n".join(parts)


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
    """Models by name, those with most configurations evaluated first."""
    return sorted(all_results, key=lambda r: (-len(set(r.documents) & set(CONFIGURATIONS)), r.name))

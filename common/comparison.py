"""Two evaluated models side by side: the rows of compare_to_baseline.py."""

from __future__ import annotations

from dataclasses import dataclass

from common.progress import say


@dataclass(frozen=True)
class Row:
    """One quantity of both models; None where it was not measured."""

    name: str
    baseline: float | None
    quantized: float | None
    digits: int = 3

    def cells(self) -> list[str]:
        values = ["–" if v is None else f"{v:.{self.digits}f}" for v in (self.baseline, self.quantized)]
        if None in (self.baseline, self.quantized):
            return [self.name, *values, "–", "–"]
        ratio = f"{self.quantized / self.baseline:.3f} x" if self.baseline else "–"
        return [self.name, *values, f"{self.quantized - self.baseline:+.{self.digits}f}", ratio]


_TASK_ROWS = (
    ("arc", "accuracy", "ARC accuracy"), ("arc", "accuracy_norm", "ARC accuracy, length-normalised"),
    ("arc", "macro_f1", "ARC macro F1"), ("squad_v2", "f1", "SQuAD v2 F1"),
    ("squad_v2", "exact_match", "SQuAD v2 exact match"), ("squad_v2", "answerable_f1", "SQuAD v2 F1, answerable"),
    ("squad_v2", "unanswerable_exact_match", "SQuAD v2 exact match, unanswerable"),
    ("openmath", "mean_absolute_difference", "OpenMath mean absolute difference"),
    ("openmath", "median_absolute_difference", "OpenMath median absolute difference"),
    ("openmath", "within_tolerance", "OpenMath within 1e-6"), ("openmath", "no_number", "OpenMath no number"),
    ("perplexity", "perplexity", "Perplexity"),
)


def comparison_rows(baseline: dict, quantized: dict) -> list[Row]:
    """Rows of two results of the evaluation, `baseline` first."""
    sizes = [document["quantization"]["weights_bytes"] / 1e6 for document in (baseline, quantized)]
    rows = [Row("Weights, MB", *sizes, digits=1)]
    seconds = quantized["quantization"].get("seconds", {}).get("total")
    if seconds is not None:
        rows.append(Row("Quantization, s", None, seconds, digits=1))
    speeds = [document.get("speed", {}) for document in (baseline, quantized)]
    rows.append(Row("Tokens/s", *[speed.get("tokens_per_second") for speed in speeds], digits=1))
    rows.append(Row("Latency, s", *[speed.get("latency_seconds") for speed in speeds]))
    tasks = baseline["tasks"], quantized["tasks"]
    for task, metric, name in _TASK_ROWS:
        values = [document.get(task, {}).get(metric) for document in tasks]
        if any(value is not None for value in values):
            rows.append(Row(name, *values))
    return rows


def print_rows(rows: list[Row]) -> None:
    """Print rows as an aligned table."""
    lines = [["", "Baseline", "Quantized", "Difference", "Ratio"], *[row.cells() for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    for line in lines:
        say("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(line, widths, strict=True))))

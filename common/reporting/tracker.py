"""Three small tables: what state each method is in, how large models are, how well they answer."""

from __future__ import annotations

from common.reporting.overview import Row
from common.reporting.significance import mean_of_tasks
from common.reporting.tables import (
    NONE,
    Comparisons,
    Table,
    compression_of,
    evaluated_tasks,
    number,
    whose,
)
from common.results.documents import CONFIGURATIONS, ModelResults
from common.results.naming import BASELINE
from common.results.peers import PEERS
from common.tasks.task import all_metrics, all_tasks, titles_of

STATES = {
    "not started": "⬜ Not started",
    "running": "🔄 Running",
    "done": "✅ Done",
    "failed": "❌ Failed",
    "warning": "⚠️ Check",
}
_IN_PART = "🔄 In part"
# Of several configurations of a method the state that comes first here is the method's.
_URGENT = ("failed", "warning", "running", "not started", "done")
# Name and kind of each method.
METHODS = {
    "gptq": ("GPTQ", "weights, calibrated"),
    "awq": ("AWQ", "weights, calibrated"),
    "hqq": ("HQQ", "weights, no data"),
    "smoothquant": ("SmoothQuant", "weights and activations, calibrated"),
    "adaround": ("AdaRound", "weights, calibrated"),
    "quarot": ("QuaRot", "weights, rotated and calibrated"),
}


def status_of(results: ModelResults, configuration: str) -> tuple[str, str]:
    """State of a configuration ("done", "failed", ...) and the reason beside it."""
    known = results.status.get(configuration)
    if known:
        return known["state"], known.get("reason", "")
    if configuration not in results.documents:
        return "not started", ""
    # Of no batch, whose status would tell.
    tasks = {
        name: {*one["tasks"], *results.left_out.get(name, ())}
        for name, one in results.documents.items()
    }
    left = set().union(*tasks.values()) - tasks[configuration]
    titles = titles_of(left)
    return ("warning", f"not evaluated: {', '.join(titles)}") if titles else ("done", "")


def status_table(results: ModelResults) -> Table:
    """A row for each method; configurations that are none of the comparison's have their own, with
    the library that made them.
    """
    by_method: dict[str, dict[str, str]] = {}
    for name in results.configurations():
        known = CONFIGURATIONS.get(name)
        method, bits = known if known else (name, _bits_of(results, name))
        by_method.setdefault(method, {})[f"{bits}-bit" if bits else ""] = name
    rows = []
    for method, names in by_method.items():
        found = {bits: status_of(results, name) for bits, name in names.items()}
        states = {state for state, _ in found.values()}
        state = min(states, key=_URGENT.index)
        whole = _IN_PART if states == {"done", "not started"} else STATES[state]
        notes = [
            f"{bits}{': ' if bits else ''}{reason}".replace("|", "/")
            for bits, (_, reason) in found.items()
            if reason
        ]
        if library := method in results.documents and whose(results, method):
            notes.insert(0, f"by {library}")
        title, kind = _title(method)
        cells = [STATES[found[bits][0]] if bits in found else NONE for bits in ("4-bit", "8-bit")]
        rows.append([title, kind, *cells, whole, "; ".join(notes) or NONE])
    header = ["Method", "Type", "4-bit", "8-bit", "Status", "Notes"]
    return Table("Status", header, rows, numbers=False)


def _bits_of(results: ModelResults, name: str) -> int:
    """Bits of a configuration that is none of the comparison's; 0 where they have no column."""
    if name in PEERS:
        return PEERS[name].bits
    grid = results.documents.get(name, {}).get("quantization", {}).get("grid") or {}
    return grid.get("bits", 0)


def _title(method: str) -> tuple[str, str]:
    """Name and kind of a method, or of a configuration that stands for itself."""
    if method in PEERS:
        return PEERS[method].title, PEERS[method].kind
    return METHODS.get(method, (method, "not quantized" if method == BASELINE else NONE))


def size_table(results: ModelResults, rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        grid = results.documents[row.name]["quantization"].get("grid")
        ratio = compression_of(results, row.name)
        precision = f"{grid['bits']} bits" if grid else "16 bits" if row.name == BASELINE else NONE
        if grid and row.coded_bits is not None:
            precision += f" ({row.coded_bits:.2f} with scales)"
        cells.append(
            [
                row.name,
                precision,
                f"{row.size / 1e6:.1f} MB ({number(row.bits, 2)} bits per weight)",
                f"{ratio:.2f} x" if ratio else NONE,
                STATES[status_of(results, row.name)[0]],
            ]
        )
    header = ["Model", "Precision", "Size", "Compression", "Status"]
    return Table("Model sizes", header, cells, numbers=False)


def accuracy_table(results: ModelResults, comparisons: Comparisons, rows: list[Row]) -> Table:
    """F1 alone, the mean over the tasks that have one."""
    evaluated = evaluated_tasks(results)
    kinds = [kind for kind in all_metrics() if kind.f1 and kind.task in evaluated]
    cells = []
    for row in rows:
        tasks = results.documents[row.name]["tasks"]
        values = [tasks.get(kind.task, {}).get(kind.key) for kind in kinds]
        known = [value for value in values if value is not None]
        differences = [one.difference for one in comparisons.get(row.name, []) if one.kind.f1]
        whole = len(known) == len(kinds) > 0
        difference = NONE
        if whole and len(differences) == len(kinds):
            difference = mean_of_tasks(differences).shown(3, "+")
        shown = number(sum(known) / len(known)) if whole else NONE
        mark = {True: "⚠️ ", False: "✅ ", None: ""}[row.lost]
        cells.append([row.name, shown, difference, mark + row.verdict])
    titles = {task.name: task.title for task in all_tasks()}
    note = (
        f"F1: the mean of {', '.join(titles[kind.task] for kind in kinds)}; a dash where one is "
        "missing. Status: the verdict of the first table, which counts more than F1."
    )
    header = ["Model", "F1", "Δ vs baseline [95%]", "Status"]
    return Table("Accuracy", header, cells, note=note if kinds else "", words=1)

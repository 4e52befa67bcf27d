"""README's tables read back, and figures of per-sample records with pandas and scipy alone."""

import gzip
import itertools
import json
import math
import re

import numpy as np
import pandas as pd
from scipy import stats


def tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Tables of a README by title, then configuration, then column."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    title, header = "", None
    for line in text.splitlines():
        if line.startswith("#"):
            title, header = line.lstrip("# "), None
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if header is None:
                header = cells
            elif not set(line) <= set("|-: "):
                found.setdefault(title, {})[cells[0]] = dict(
                    zip(header[1:], cells[1:], strict=True)
                )
    return found


def records(folder, model, name) -> dict[str, pd.DataFrame]:
    """The records of a configuration's samples, by task, from a folder of results."""
    found: dict[str, list[dict]] = {}
    with gzip.open(folder / model / "samples" / f"{name}.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            found.setdefault(record["task"], []).append(record)
    return {task: pd.DataFrame(rows) for task, rows in found.items()}


def f1_of_classes(frame: pd.DataFrame) -> float:
    """Macro F1 by its definition."""
    scores = []
    gold, predicted = frame.gold.to_numpy(str), frame.predicted.to_numpy(str)
    for label in np.unique(gold):
        hits = ((gold == label) & (predicted == label)).sum()
        scores.append(2 * hits / ((gold == label).sum() + (predicted == label).sum()))
    return float(np.mean(scores))


def mean_of(column):
    return lambda frame: frame[column].mean() if column in frame else math.nan


def interval(
    before: pd.DataFrame, after: pd.DataFrame, metric, cluster: str | None, share: bool
) -> tuple[float, float]:
    """Student's t on the jackknife over clusters, widened by what no sample may have shown; written
    out by rows.
    """
    groups = before[cluster] if cluster else before.index.to_series()
    left_out = [
        metric(after[groups != name]) - metric(before[groups != name]) for name in groups.unique()
    ]
    degrees = len(before) ** 2 / (groups.value_counts() ** 2).sum() - 1
    error = np.std(left_out) * math.sqrt(len(left_out) - 1)
    rows = [slice(i, i + 1) for i in range(len(before))]
    other = np.array([metric(after[row]) != metric(before[row]) for row in rows])
    changed = np.mean([other[groups == name].any() for name in groups.unique()])
    counted = len(left_out) ** (1 - changed) * len(before) ** changed
    unseen = 1 - 0.025 ** (1 / counted) if share else 0.0
    half = math.hypot(stats.t.ppf(0.975, degrees) * error, unseen)
    value = metric(after) - metric(before)
    return value - half, value + half


# Metrics of a baseline without each of its clusters, which all configurations are held against.
baselines: dict[tuple, list[float]] = {}


def mean_over_tasks(pairs, ratios: bool) -> tuple[float, float, float]:
    """The mean over tasks of how the second model's metric differs from the first's, or how many
    times it is, with its 95% interval.

    Args:
        pairs: for each task the two models' records as arrays [samples, ...], the cluster of each
            sample [samples], and the metric, a function of such records.
    """
    values, variances, all_degrees, floors = [], [], [], []
    for before, after, groups, metric in pairs:
        first, second = metric(before), metric(after)
        names, place = np.unique(groups, return_inverse=True)
        members = [place == name for name in range(len(names))]
        key = before.tobytes(), groups.tobytes(), metric
        if key not in baselines:
            baselines[key] = [metric(before[~one]) for one in members]
        left_out = list(zip(baselines[key], (metric(after[~one]) for one in members), strict=True))
        if ratios:  # to first order, as a model without its only right answer has none
            values.append(second / first)
            moved = [(b - values[-1] * a) / first for a, b in left_out]
        else:
            values.append(second - first)
            moved = [b - a for a, b in left_out]
        variances.append(np.var(moved) * (len(moved) - 1))
        sizes = np.array([one.sum() for one in members])
        all_degrees.append(sizes.sum() ** 2 / (sizes**2).sum() - 1)
        other = (before != after).reshape(len(before), -1).any(1)
        changed = np.mean([other[one].any() for one in members])
        counted = len(members) ** (1 - changed) * len(before) ** changed
        floors.append((1 - 0.025 ** (1 / counted)) / (first if ratios else 1))
    squares = np.square(variances)
    degrees = sum(variances) ** 2 / (squares / all_degrees).sum()
    reach = stats.t.ppf(0.975, degrees) * math.sqrt(sum(variances))
    half = math.hypot(reach, *floors) / len(pairs)
    value = float(np.mean(values))
    return value, value - half, value + half


def drawn_interval(before: pd.DataFrame, after: pd.DataFrame, metric) -> tuple[float, float]:
    """A paired bootstrap by drawing rows, for a median; another random stream than the tables'."""
    rng = np.random.default_rng(99)
    drawn = [rng.integers(0, len(before), len(before)) for _ in range(400)]
    return tuple(
        np.quantile(
            [metric(after.iloc[rows]) - metric(before.iloc[rows]) for rows in drawn], [0.025, 0.975]
        )
    )


def swap_p_value(change: pd.Series, groups: pd.Series) -> float:
    """One-sided p-value of a loss by giving each cluster's change either sign, all ways or 20,000
    at random.
    """
    sums = change.groupby(groups).sum().to_numpy()
    signs = (
        np.array(list(itertools.product((1, -1), repeat=len(sums))))
        if len(sums) <= 12
        else np.random.default_rng(98).choice([1, -1], (20000, len(sums)))
    )
    return float((signs @ sums <= sums.sum() + 1e-9).mean())


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?", cell)]

"""Which rows of a data set are used, and reading these alone out of its parquet files."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

# Data sets of at most this many rows are sampled row by row, larger ones in blocks.
SMALL = 20_000
BLOCK = 256


@dataclass(frozen=True)
class RowGroup:
    """Part of a file that is read as a whole.

    first: number of its first row in the data set. cost: bytes that reading it takes.
    """

    file: int
    index: int
    first: int
    rows: int
    cost: int


def draw_rows(
    groups: list[RowGroup], limit: int | None, seed: int | None, budget: int | None = None
) -> list[int]:
    """Numbers of the rows that are used, in the order in which they are.

    Without a seed these are the first `limit`. With one, all rows are shuffled and the first
    `limit` taken. Where there are more than SMALL rows and not all are wanted, that would mean
    reading nearly everything, so blocks of BLOCK rows that follow each other are drawn until there
    are enough, and their rows shuffled. Neither depends on how the rows are spread over files and
    row groups, unless the budget is too small for what was drawn: a block that would exceed it is
    passed over, so that further rows come from row groups that have to be read already.

    Args:
        groups: all row groups, in the order of their rows.
        limit: at most this many; None for all.
        budget: bytes that reading may take in the case of blocks; the first block is always taken.
    """
    total = sum(group.rows for group in groups)
    if seed is None:
        return list(range(total))[:limit]
    rng = random.Random(seed)
    if total <= SMALL or limit is None or limit >= total:
        rows = list(range(total))
        rng.shuffle(rows)
        return rows[:limit]
    starts = [group.first for group in groups]
    chosen: list[int] = []
    paid: set[int] = set()
    spent = 0
    blocks = -(-total // BLOCK)
    for block in rng.sample(range(blocks), blocks):
        first, end = block * BLOCK, min((block + 1) * BLOCK, total)
        new = set(range(bisect_right(starts, first) - 1, bisect_left(starts, end))) - paid
        cost = sum(groups[number].cost for number in new)
        if chosen and cost and budget is not None and spent + cost > budget:
            continue
        paid |= new
        spent += cost
        chosen.extend(range(first, end))
        if len(chosen) >= limit:
            break
    rng.shuffle(chosen)
    return chosen[:limit]


def read_sample(
    files: list[ParquetFile],
    limit: int | None,
    seed: int | None,
    columns: tuple[str, ...] | None = None,
    budget: int | None = None,
) -> pyarrow.Table:
    """The rows that `draw_rows` names, read out of the row groups that hold them.

    Args:
        files: the files of one split, in order.
        columns: those of these columns that there are; all if None, or if there is none of them.
    """
    import pyarrow

    names = files[0].schema_arrow.names
    kept = [name for name in names if columns is None or name in columns] or names
    groups = row_groups(files, kept)
    rows = draw_rows(groups, limit, seed, budget)
    # In rising order each row group is read once; the drawn order is restored at the end.
    rising = sorted(range(len(rows)), key=rows.__getitem__)
    parts, at = [], 0
    for group in groups:
        local = []
        while at < len(rising) and rows[rising[at]] < group.first + group.rows:
            local.append(rows[rising[at]] - group.first)
            at += 1
        if local:
            parts.append(files[group.file].read_row_group(group.index, columns=kept).take(local))
    if not parts:
        return files[0].schema_arrow.empty_table().select(kept)
    place = [0] * len(rows)
    for position, row in enumerate(rising):
        place[row] = position
    return pyarrow.concat_tables(parts, promote_options="permissive").take(place)


def row_groups(files: list[ParquetFile], columns: list[str]) -> list[RowGroup]:
    """All row groups of a split's files, in order; `cost` counts the named columns as stored."""
    groups, first = [], 0
    for number, file in enumerate(files):
        for index in range(file.metadata.num_row_groups):
            found = file.metadata.row_group(index)
            chunks = [found.column(i) for i in range(found.num_columns)]
            cost = sum(
                chunk.total_compressed_size
                for chunk in chunks
                if chunk.path_in_schema.split(".")[0] in columns
            )
            groups.append(RowGroup(number, index, first, found.num_rows, cost))
            first += found.num_rows
    return groups

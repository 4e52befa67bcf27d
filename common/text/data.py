"""Rows of a data set: a local file, a folder that mirrors the hub (`--data-root`), the hub itself,
or the demo's own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.base.errors import UserError
from common.base.files import lacking
from common.text.sampling import RowGroup, draw_rows, read_sample

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
# Splits of a data set that an error names.
MOST_NAMED = 8


@dataclass(frozen=True)
class DataName:
    """A data set's address: `owner/name`, `owner/name/config` and, after a colon, a split ("train"
    if none).
    """

    repository: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> DataName:
        path, _, split = text.partition(":")
        parts = path.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise UserError(
                f"{text or 'an empty name'} is neither a file ({', '.join(LOCAL_SUFFIXES)}) nor a "
                "data set; write owner/name, owner/name/config or owner/name/config:split, or demo"
            )
        return cls("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train")

    def __str__(self) -> str:
        return f"{self.repository}{'/' + self.config if self.config else ''}:{self.split}"


@dataclass(frozen=True)
class Rows:
    """Rows and where they were read from, as the results name it; from the hub with the commit."""

    rows: list[dict]
    source: str


def load_rows(
    address: str,
    data_root: Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    columns: tuple[str, ...] | None = None,
    budget: int | None = None,
) -> Rows:
    """Read a data set's rows, the same from the hub and from a mirror (`sampling.draw_rows`).

    Args:
        address: path of a .txt, .jsonl or .parquet file, or a `DataName`.
        data_root: looked into before the hub, as DIR/<owner>/<name>/<config>/<split>.parquet.
        limit: at most this many rows.
        seed: rows are drawn from the whole split with this seed; None takes the first.
        columns: those that are needed, as far as there are such; of parquet no others are read.
        budget: bytes to fetch for a sample of a large split.
    Raises:
        UserError: no such file or data set, an unreadable one, or no network.
    """
    path = Path(address)
    if path.suffix in LOCAL_SUFFIXES:
        if not path.is_file():
            raise UserError(f"data file {address} does not exist")
        return Rows(_read_file(path, limit, seed, columns, budget), path.name)
    name = DataName.parse(address)
    local = _find_under(data_root, name) if data_root else None
    if local is not None:
        sample = " (sample)" if local.stem.endswith("_sample") else ""
        return Rows(_read_file(local, limit, seed, columns, budget), f"{name}{sample}")
    from common.text.hub_data import Sample, hub_rows

    with _naming_others(data_root, name):
        rows, revision = hub_rows(name, Sample(limit, seed, columns, budget))
    return Rows(rows, f"{name}@{revision}")


def locate_rows(
    address: str,
    data_root: Path | None,
    limit: int | None,
    seed: int | None,
    columns: tuple[str, ...] | None,
    budget: int | None,
    timeout: float = 10,
) -> str:
    """Where `load_rows` would read these rows, in words; nothing is read or fetched.

    Args:
        timeout: seconds that the hub has to say that it has the data set.
    Raises:
        UserError: they are nowhere.
    """
    path = Path(address)
    if path.suffix in LOCAL_SUFFIXES:
        if not path.is_file():
            raise UserError(f"data file {address} does not exist")
        return "in a file"
    name = DataName.parse(address)
    if data_root and _find_under(data_root, name):
        return f"in {data_root}"
    from common.text.hub_data import Sample, locate

    with _naming_others(data_root, name):
        return locate(name, Sample(limit, seed, columns, budget), timeout)


def is_under(data_root: Path, address: str) -> bool:
    """Whether the folder `data_root`, a mirror of the hub, has the split of an address, or a sample
    of it.
    """
    return _find_under(data_root, DataName.parse(address)) is not None


def _find_under(data_root: Path, name: DataName) -> Path | None:
    """The parquet file of a split under `data_root`; a file <split>_sample.parquet serves where the
    split is not whole.
    """
    if not data_root.is_dir():
        raise UserError(f"--data-root {data_root} is not a folder")
    base = data_root / name.repository
    folders = [base / name.config] if name.config else [base, base / "default"]
    for folder, suffix in itertools.product(folders, ("", "_sample")):
        file = folder / f"{name.split}{suffix}.parquet"
        if file.is_file():
            return file
    return None


@contextmanager
def _naming_others(data_root: Path | None, name: DataName) -> Iterator[None]:
    """While open, an error says which configs and splits of the data set `data_root` has."""
    try:
        yield
    except UserError as error:
        if data_root is None:
            raise
        base = data_root / name.repository
        there = {
            f"{file.parent.relative_to(data_root).as_posix()}:{file.stem.removesuffix('_sample')}"
            for file in (*base.glob("*.parquet"), *base.glob("*/*.parquet"))
        }
        if not there:
            raise
        more = f" and {len(there) - MOST_NAMED} more" if len(there) > MOST_NAMED else ""
        named = ", ".join(sorted(there)[:MOST_NAMED])
        raise UserError(f"{error}. {data_root} has {named}{more}") from None


def _read_file(
    path: Path,
    limit: int | None = None,
    seed: int | None = None,
    columns: tuple[str, ...] | None = None,
    budget: int | None = None,
) -> list[dict]:
    try:
        if path.suffix == ".txt":
            return [{"text": path.read_text(encoding="utf-8")}]
        if path.suffix == ".jsonl":
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            chosen = draw_rows([RowGroup(0, 0, 0, len(lines), 0)], limit, seed)
            rows = [json.loads(lines[i]) for i in chosen]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line holds no JSON object")
            return rows
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            return read_sample([file], limit, seed, columns, budget).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0][:150]})") from None


def check_columns(loaded: Rows, needs: tuple[str, ...], purpose: str) -> None:
    """Refuse rows without what they are needed for.

    Args:
        needs: columns, and with a dot what is inside one.
        purpose: what the rows are for, to end the message with.
    Raises:
        UserError: no rows, or one that lacks something; says what, and what it has.
    """
    if not loaded.rows:
        raise UserError(f"{loaded.source} has no rows")
    for row in loaded.rows:
        if missing := lacking(row, needs):
            raise UserError(
                f"{loaded.source} has a row without {', '.join(missing)}; it has "
                f"{', '.join(row) or 'nothing'}; give other data for {purpose}"
            )


def demo_rows(task: str) -> Rows:
    """The demo's own rows of a task, in the hub's columns: those of its file in demo/."""
    return Rows(_read_file(DEMO_FOLDER / f"{task}.jsonl"), "demo")


def demo_text(part: str) -> list[str]:
    """Texts of the documentation that CPython ships (`pydoc_data.topics`), split in two parts that
    share no paragraph.

    Args:
        part: "calibration" (two topics of three) or "evaluation" (every third).
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    held_out = texts[::3]
    if part == "evaluation":
        return held_out
    # Topics quote each other, so a paragraph that is evaluated is taken out of the calibration
    # text.
    known = {paragraph for text in held_out for paragraph in text.split("\n\n")}
    calibration = [text for i, text in enumerate(texts) if i % 3]
    return ["\n\n".join(p for p in text.split("\n\n") if p not in known) for text in calibration]

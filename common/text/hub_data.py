"""Rows of a data set on the hub: fetched once, at one revision, and kept for later runs.

They are kept in HF_HOME (~/.cache/huggingface), in sampled_rows/<owner>/<name>/<revision>/: a small
parquet file for each config, split and sample. The file `revision` beside holds the commit that all
of them are of. Whoever wants a newer one deletes the folder of the data set.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.base.errors import UserError
from common.base.files import replacing
from common.base.progress import say
from common.text.sampling import SMALL, RowGroup, draw_rows, read_sample

if TYPE_CHECKING:
    import pyarrow

    from common.text.data import DataName

_FOLDER = "sampled_rows"
_HEX = set("0123456789abcdef")
# Raised when another sample would be drawn from the same data.
_DRAW = 1


@dataclass(frozen=True)
class Sample:
    """What is wanted of a split; the arguments of `sampling.read_sample`."""

    limit: int | None = None
    seed: int | None = None
    columns: tuple[str, ...] | None = None
    budget: int | None = None

    def key(self) -> str:
        """A name for the sample: short, and another for another sample."""
        text = repr((_DRAW, self.limit, self.seed, self.columns, self.budget))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def hub_rows(name: DataName, sample: Sample) -> tuple[list[dict], str]:
    """Rows of a split and the commit that they are of: from the cache, or fetched and put there.

    Raises:
        UserError: no such data set, config or split; no network and not in the cache.
    """
    folder = _kept_in(name)
    pinned = _pinned(folder)
    if pinned:
        table = _read(_file(folder, pinned, name, sample))
        if table is not None:
            return table.to_pylist(), pinned
    say(f"Fetching rows of {name}; they are kept in {folder}")
    with _fetching(name):
        revision = pinned or _latest(name.repository)
        table = _fetch(name, revision, sample)
    try:
        _write(_file(folder, revision, name, sample), table)
        if not pinned:
            with replacing(folder / "revision") as unfinished:
                unfinished.write_text(revision + "\n")
    except OSError as error:
        reason = error.strerror or error
        say(f"the rows of {name} cannot be kept for later runs ({reason}: {folder})")
    return table.to_pylist(), revision


def locate(name: DataName, sample: Sample, timeout: float) -> str:
    """Where `hub_rows` would have rows from, in words; of the hub only whether it has the data set.

    Args:
        timeout: seconds that the hub has to answer.
    Raises:
        UserError: as `hub_rows`.
    """
    folder = _kept_in(name)
    pinned = _pinned(folder)
    if pinned and _file(folder, pinned, name, sample).is_file():
        return "in the cache"
    with _fetching(name):
        _latest(name.repository, timeout)
    return "on the hub"


@contextmanager
def _fetching(name: DataName) -> Iterator[None]:
    """While open, what the libraries raise about a data set becomes a UserError."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        yield
    except UserError:
        raise
    except ValueError as error:  # what `datasets` raises for an unknown config or split
        raise UserError(f"data set {name}: {str(error).splitlines()[0][:200]}") from None
    except Exception as error:  # aiohttp, httpx, hub and file-system errors share no base class
        if HF_HUB_OFFLINE:
            raise UserError(
                f"data set {name} cannot be fetched: HF_HUB_OFFLINE is set, and these rows were "
                "not fetched before; unset it, or give a local file, --data-root, or demo"
            ) from None
        raise UserError(
            f"data set {name} cannot be fetched ({type(error).__name__}): no network, or no such "
            "data set; give a local file, --data-root, or demo"
        ) from None


def _kept_in(name: DataName) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, _FOLDER, name.repository)


def _pinned(folder: Path) -> str | None:
    try:
        revision = (folder / "revision").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return revision if len(revision) == 40 and set(revision) <= _HEX else None


def _latest(repository: str, timeout: float | None = None) -> str:
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository, timeout=timeout).sha


def _file(folder: Path, revision: str, name: DataName, sample: Sample) -> Path:
    return folder / revision / f"{name.config or 'default'}-{name.split}-{sample.key()}.parquet"


def _read(file: Path) -> pyarrow.Table | None:
    """What is kept in a file; None where it is not there, or damaged."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file) if file.is_file() else None
    except (OSError, ValueError):
        return None


def _write(file: Path, table: pyarrow.Table) -> None:
    import pyarrow.parquet

    with replacing(file) as unfinished:
        pyarrow.parquet.write_table(table, unfinished, compression="zstd")


def _fetch(name: DataName, revision: str, sample: Sample) -> pyarrow.Table:
    import datasets

    datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(name.repository, name.config, revision=revision)
    files = builder.config.data_files or {}
    if name.split not in files:
        raise UserError(f"data set {name} has no such split; it has {', '.join(map(str, files))}")
    paths = list(files[name.split])
    if all(path.endswith(".parquet") for path in paths):
        return _from_parquet(paths, sample)
    return _from_stream(builder.as_streaming_dataset(split=name.split), sample)


def _from_parquet(paths: list[str], sample: Sample) -> pyarrow.Table:
    """What is needed: the ends of the files, which say where what is, and the row groups drawn."""
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    hub = HfFileSystem()

    def open_file(path: str) -> ParquetFile:
        # The reader asks for the ranges that it wants; reading ahead would only fetch more.
        return ParquetFile(hub.open(path, "rb", cache_type="none"), pre_buffer=False)

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(open_file, paths))
    return read_sample(files, sample.limit, sample.seed, sample.columns, sample.budget)


def _from_stream(stream, sample: Sample) -> pyarrow.Table:
    """Other formats have no index: read from the start, whole or as far as a sample may go."""
    import pyarrow

    end = sample.limit if sample.seed is None else None if sample.limit is None else SMALL
    rows = list(itertools.islice(stream, end))
    rows = [
        rows[i] for i in draw_rows([RowGroup(0, 0, 0, len(rows), 0)], sample.limit, sample.seed)
    ]
    kept = [name for name in sample.columns or () if rows and name in rows[0]]
    return pyarrow.Table.from_pylist(
        [{name: row[name] for name in kept} for row in rows] if kept else rows
    )

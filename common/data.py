"""Rows of a data set: a local file, a folder that mirrors the hub (`--data-root`), the hub itself, or the demo's own."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

DEMO_FOLDER = Path(__file__).parent / "demo"
SHUFFLE_BUFFER = 2000
LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class DataName:
    """A data set's address: `owner/name`, `owner/name/config` and, after a colon, a split ("train" if none)."""

    repository: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> DataName:
        path, _, split = text.partition(":")
        parts = path.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise UserError(f"{text} is neither a file ({', '.join(LOCAL_SUFFIXES)}) nor a data set; write "
                            "owner/name, owner/name/config or owner/name/config:split, or demo")
        return cls("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train")

    def __str__(self) -> str:
        return f"{self.repository}{'/' + self.config if self.config else ''}:{self.split}"


@dataclass(frozen=True)
class Rows:
    """Rows and where they were really read from, in words that go into the results."""

    rows: list[dict]
    source: str


def load_rows(address: str, data_root: Path | None = None, limit: int | None = None,
              seed: int | None = None) -> Rows:
    """Read a data set's rows.

    Args:
        address: path of a .txt, .jsonl or .parquet file, or a `DataName`.
        data_root: looked into before the hub, as DIR/<owner>/<name>/<config>/<split>.parquet.
        limit: at most this many rows; from the hub only these are fetched.
        seed: shuffle with this seed before the limit is taken; None keeps the order.
    Raises:
        UserError: no such file or data set, an unreadable one, or no network.
    """
    path = Path(address)
    if path.suffix in LOCAL_SUFFIXES:
        if not path.is_file():
            raise UserError(f"data file {address} does not exist")
        return Rows(_take(_read_file(path), limit, seed), path.name)
    name = DataName.parse(address)
    local = _find_under(data_root, name) if data_root else None
    if local is not None:
        sample = " (sample)" if local.stem.endswith("_sample") else ""
        return Rows(_take(_read_file(local), limit, seed), f"{name}{sample}")
    return Rows(_stream_from_hub(name, limit, seed), str(name))


def _find_under(data_root: Path, name: DataName) -> Path | None:
    """The parquet file of a split under `data_root`; a file <split>_sample.parquet serves where the split is not whole."""
    if not data_root.is_dir():
        raise UserError(f"--data-root {data_root} is not a folder")
    base = data_root / name.repository
    folders = [base / name.config] if name.config else [base, base / "default"]
    for folder, suffix in itertools.product(folders, ("", "_sample")):
        file = folder / f"{name.split}{suffix}.parquet"
        if file.is_file():
            return file
    return None


def _read_file(path: Path) -> list[dict]:
    try:
        if path.suffix == ".txt":
            return [{"text": path.read_text(encoding="utf-8")}]
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0][:150]})") from None


def _take(rows: list[dict], limit: int | None, seed: int | None) -> list[dict]:
    if seed is not None:
        rows = rows.copy()
        random.Random(seed).shuffle(rows)
    return rows[:limit]


def _stream_from_hub(name: DataName, limit: int | None, seed: int | None) -> list[dict]:
    import datasets

    datasets.disable_progress_bars()
    try:
        stream = datasets.load_dataset(name.repository, name.config, split=name.split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return list(stream if limit is None else stream.take(limit))
    except ValueError as error:  # what `datasets` raises for an unknown config or split
        raise UserError(f"data set {name}: {str(error).splitlines()[0][:200]}") from None
    except Exception as error:  # aiohttp, httpx, hub and file-system errors share no base class
        raise UserError(f"data set {name} cannot be fetched ({type(error).__name__}): no network, or no such data set; "
                        "give a local file, --data-root, or demo") from None


def demo_rows(task: str) -> Rows:
    """The demo's own task rows, in the hub's columns: task is arc, squad or openmath."""
    return Rows(_read_file(DEMO_FOLDER / f"{task}.jsonl"), "demo")


def demo_text(part: str) -> list[str]:
    """Texts of the documentation that CPython ships (`pydoc_data.topics`), split in two parts that share no paragraph.

    Args:
        part: "calibration" (two topics of three) or "evaluation" (every third).
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    held_out = texts[::3]
    if part == "evaluation":
        return held_out
    # Topics quote each other, so a paragraph that is evaluated is taken out of the calibration text.
    known = {paragraph for text in held_out for paragraph in text.split("\n\n")}
    calibration = [text for i, text in enumerate(texts) if i % 3]
    return ["\n\n".join(p for p in text.split("\n\n") if p not in known) for text in calibration]

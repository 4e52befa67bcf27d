"""Where rows and token windows come from."""

import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_tokenizer

from common.base.errors import UserError
from common.text import hub_data
from common.text.data import DataName, load_rows, locate_rows
from common.text.windows import calibration_windows, evaluation_windows

# Arguments of `locate_rows` that say which rows.
UNSET = ("limit", "seed", "columns", "budget")


def test_addresses():
    assert DataName.parse("a/b") == DataName("a/b", None, "train")
    assert DataName.parse("a/b/c:test") == DataName("a/b", "c", "test")
    for wrong in ("a", "a/b/c/d", "a//b", ""):
        with pytest.raises(UserError):
            DataName.parse(wrong)


def test_data_root_comes_before_the_hub(tmp_path):
    for folder, split in (
        ("own/er/config", "test"),
        ("own/plain", "train"),
        ("own/part/default", "train_sample"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"text": [folder]}), tmp_path / folder / f"{split}.parquet")
    assert load_rows("own/er/config:test", tmp_path).rows == [{"text": "own/er/config"}]
    assert load_rows("own/plain", tmp_path).rows == [{"text": "own/plain"}]
    part = load_rows("own/part", tmp_path)
    assert part.rows == [{"text": "own/part/default"}] and "sample" in part.source
    with pytest.raises(UserError, match="not a folder"):
        load_rows("own/plain", tmp_path / "missing")


def test_what_the_data_root_has_of_a_data_set_is_named(tmp_path, monkeypatch):
    """Where the config is left out or the split mistyped, and there is no hub to ask."""
    for folder, split in (
        ("own/er/en", "train_sample"),
        ("own/er/en", "train"),
        ("own/er/de", "test"),
        ("own/er/too/deep", "train"),
        *((f"man/y/{number}", "train") for number in range(12)),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [folder]}), tmp_path / folder / f"{split}.parquet")

    def no_hub(*_):
        raise UserError("no network")

    monkeypatch.setattr(hub_data, "hub_rows", no_hub)
    monkeypatch.setattr(hub_data, "locate", no_hub)
    named = "no network.* has own/er/de:test, own/er/en:train$"
    for address in ("own/er", "own/er/en:trian"):
        for read in (load_rows, partial(locate_rows, **dict.fromkeys(UNSET))):
            with pytest.raises(UserError, match=named):
                read(address, data_root=tmp_path)
    with pytest.raises(UserError, match="man/y/0:train, .*:train and 4 more$"):
        load_rows("man/y", tmp_path)
    for data_root in (tmp_path, None):
        with pytest.raises(UserError, match="^no network$"):
            load_rows("other/one", data_root)


def test_local_files(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    assert load_rows(str(tmp_path / "a.txt")).rows == [{"text": "one two"}]
    assert [row["text"] for row in load_rows(str(tmp_path / "b.jsonl")).rows] == ["x", "y"]
    (tmp_path / "c.jsonl").write_text("{broken")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nonsense")
    for name in ("c.jsonl", "d.parquet"):
        with pytest.raises(UserError, match="cannot be read"):
            load_rows(str(tmp_path / name))


def test_windows_are_seeded_and_whole(calibration_text):
    tokenizer = tiny_tokenizer()
    first, again, other = (
        calibration_windows(str(calibration_text), tokenizer, 6, 50, seed) for seed in (0, 0, 1)
    )
    assert first.tokens.shape == (6, 50)
    assert torch.equal(first.tokens, again.tokens) and first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    with pytest.raises(UserError, match="use at most --calib-samples"):
        calibration_windows(str(calibration_text), tokenizer, 10_000, 50, 0)


def test_chat_rows_go_through_the_chat_template(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "the river"},
                {"role": "assistant", "content": "runs high"},
            ]
        }
    ] * 40
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = tiny_tokenizer()
    windows = calibration_windows(str(tmp_path / "chat.jsonl"), tokenizer, 2, 40, 0)
    text = tokenizer.decode(windows.tokens[0])
    assert "<|start|>user" in text and "<|start|>assistant" in text


def test_evaluation_windows_follow_each_other(calibration_text):
    tokenizer = tiny_tokenizer()
    windows = evaluation_windows(str(calibration_text), tokenizer, 3, 20)
    text = calibration_text.read_text()
    assert (
        tokenizer.decode(windows.tokens.flatten())
        == text[: len(tokenizer.decode(windows.tokens.flatten()))]
    )

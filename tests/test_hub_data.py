"""Rows of data sets on a hub: which are drawn, and that few bytes are fetched, once, and kept."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_data import build_datasets, mirror, write_split
from stub_hub import COMMIT, StubHub

from common.base.errors import UserError
from common.text.data import load_rows
from common.text.sampling import BLOCK, SMALL, RowGroup, draw_rows

ASK = """
import json, sys
from common.text.data import load_rows
from common.base.errors import UserError
for arguments in json.loads(sys.argv[1]):
    try:
        loaded = load_rows(arguments[0], None, *arguments[1:])
        print(json.dumps({"rows": loaded.rows, "source": loaded.source}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""
SQUAD, MATH = "rajpurkar/squad_v2/squad_v2:validation", "nvidia/OpenMathInstruct-2:train"
CHAT, WIKITEXT = (
    "HuggingFaceH4/ultrachat_200k:train_sft",
    "Salesforce/wikitext/wikitext-2-raw-v1:test",
)
# Address, limit, seed, columns, budget: as the evaluation and the calibration ask.
WANTED = [
    (SQUAD, 1000, 1234, None, 40_000_000),
    (MATH, 1024, 1234, ["problem", "expected_answer"], 40_000_000),
    (CHAT, 3072, 0, ["text", "messages"], 120_000_000),
    (WIKITEXT, None, None, ["text"], None),
]
FILES = {
    SQUAD: "squad_v2/validation-*",
    MATH: "data/train-*",
    CHAT: "data/train_sft-*",
    WIKITEXT: "wikitext-2-raw-v1/test-*",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    build_datasets(folder / "datasets", math=21_000, chats=21_000)
    write_lines(folder / "datasets/own/lines", 300)
    with StubHub(folder) as stub:
        yield stub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home) -> dict[str, dict]:
    return ask(hub, home, [*WANTED, ("own/lines:train", 50, 3)])


def ask(hub: StubHub, home: Path, wanted: list, **environment: str) -> dict[str, dict]:
    """What `load_rows` gives in a process that believes the stub is the hub, by address."""
    lines = hub.python(ASK, json.dumps(wanted), home=home, **environment)
    return {
        arguments[0]: json.loads(line)
        for arguments, line in zip(
            wanted, [line for line in lines if line.startswith("{")], strict=True
        )
    }


def write_lines(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {i}", "n": i}) for i in range(count))
    )


def groups_of(sizes: list[int], cost: int = 1) -> list[RowGroup]:
    return [RowGroup(0, i, sum(sizes[:i]), rows, cost) for i, rows in enumerate(sizes)]


def test_the_same_rows_from_the_hub_and_from_a_mirror(hub, online, tmp_path):
    """The hub has several files of several row groups, the mirror one file of others."""
    for address, limit, seed, columns, budget in WANTED:
        path, split = address.split(":")
        owner, name, *config = path.split("/")
        target = tmp_path / owner / name / (config[0] if config else "default") / f"{split}.parquet"
        mirror(hub.folder / "datasets", f"{owner}/{name}", FILES[address], target)
        local = load_rows(address, tmp_path, limit, seed, columns and tuple(columns), budget)
        assert len(local.rows) == (limit or pq.read_metadata(target).num_rows)
        assert local.rows == online[address]["rows"], address
        assert local.source == address and online[address]["source"] == f"{address}@{COMMIT}"
    assert load_rows(WIKITEXT, tmp_path).rows[0] == {"text": ""}  # blank rows are rows


def test_every_article_is_reached(online):
    """The original is sorted by article; a shuffle buffer of 2,000 rows reached 6 of 17."""
    titles = [row["title"] for row in online[SQUAD]["rows"]]
    assert len(set(titles)) == 17
    assert len(set(titles[:200])) == 17


def test_other_formats_are_read_too(online):
    rows = online["own/lines:train"]["rows"]
    everything = [{"text": f"line {i}", "n": i} for i in range(300)]
    random.Random(3).shuffle(everything)
    assert rows == everything[:50]


def test_rows_are_fetched_once_and_kept(hub, home, online):
    """They are there without a network, and what was not fetched before says that it cannot be."""
    other = ("allenai/ai2_arc/ARC-Challenge:test", 10, 0)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = ask(hub, home, [*WANTED, other], **environment)
        error = again.pop(other[0])["error"]
        assert "cannot be fetched" in error
        assert ("HF_HUB_OFFLINE is set" in error) == ("HF_HUB_OFFLINE" in environment)
        assert again == {address: online[address] for address, *_ in WANTED}


def test_where_rows_are_without_fetching_them(hub, home, online, tmp_path):
    """In the cache if this very sample was fetched, else on the hub, which has to answer for the
    data set.
    """
    code = (
        ASK.replace("load_rows(arguments[0], None, *arguments[1:])", "locate_rows(*arguments)")
        .replace('{"rows": loaded.rows, "source": loaded.source}', "loaded")
        .replace("load_rows", "locate_rows")
    )
    other, unknown = (
        [MATH, None, 7, 1234, None, None],
        ["no/such-data:train", None, 3, 0, None, None],
    )
    wanted = [[address, None, *rest] for address, *rest in WANTED]

    def where(home, **environment) -> list:
        return [
            json.loads(line)
            for line in hub.python(
                code, json.dumps([*wanted, other, unknown]), home=home, **environment
            )
        ]

    before = hub.by_repository.copy()
    *kept, more, wrong = where(home)
    assert (
        kept == ["in the cache"] * 4
        and more == "on the hub"
        and "no/such-data:train cannot" in wrong["error"]
    )
    assert where(tmp_path)[:5] == ["on the hub"] * 5 and before == hub.by_repository
    *kept, more, wrong = where(home, HF_HUB_OFFLINE="1")
    assert kept == ["in the cache"] * 4 and "not fetched before; unset it" in more["error"]
    assert not list(tmp_path.rglob("revision"))


def test_few_bytes_are_fetched(hub, online):
    """Of large splits the columns and row groups that are needed; of small ones the files, once."""

    def stored(address: str) -> int:
        folder = hub.folder / "datasets" / "/".join(address.split(":")[0].split("/")[:2])
        return sum(file.stat().st_size for file in folder.glob(FILES[address]))

    sent = {
        address: hub.by_repository["/".join(address.split(":")[0].split("/")[:2])]
        for address in (SQUAD, MATH, CHAT)
    }
    # The ends of the files are fetched in pieces of 64 KB at least.
    assert sent[MATH] < 0.3 * stored(MATH) + 5 * 65_536
    assert sent[CHAT] < 0.8 * stored(CHAT)
    assert sent[SQUAD] < 1.1 * stored(SQUAD) + 4 * 65_536


def test_what_is_wrong_is_said(hub, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/sampled_rows").write_text("a file where the cache should be")
    wanted = [
        ("no/such-data:train", 3, 0),
        ("rajpurkar/squad_v2/nope:train", 3, 0),
        ("rajpurkar/squad_v2:nope", 3, 0),
        ("own/lines:train", 3, 0),
    ]
    found = ask(hub, tmp_path / "home", wanted)
    assert "no/such-data:train cannot be fetched" in found["no/such-data:train"]["error"]
    assert "nope" in found["rajpurkar/squad_v2/nope:train"]["error"]
    assert "it has train, validation" in found["rajpurkar/squad_v2:nope"]["error"]
    assert len(found["own/lines:train"]["rows"]) == 3  # fetched, though not kept


def test_a_damaged_cache_is_fetched_again(hub, home, online):
    """That one alone: what is whole is not fetched twice."""
    before = hub.by_repository.copy()
    [file] = (home / "sampled_rows/own/lines" / COMMIT).iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert ask(hub, home, [*WANTED, ("own/lines:train", 50, 3)]) == online
    assert {name for name, sent in hub.by_repository.items() if sent != before.get(name)} == {
        "own/lines"
    }
    assert pq.read_table(file).num_rows == 50


def test_the_draw_depends_on_the_rows_alone():
    """Not on how they are divided; no row comes twice; small data sets are shuffled whole."""
    total = 5 * SMALL
    draws = [
        draw_rows(groups_of(sizes), 3000, 7)
        for sizes in ([total], [1000] * (total // 1000), [33_333, 1, 66_666])
    ]
    assert draws[0] == draws[1] == draws[2]
    assert len(set(draws[0])) == 3000 and max(draws[0]) < total
    assert len({row // BLOCK for row in draws[0]}) == 12
    assert draw_rows(groups_of([total]), 3000, 8) != draws[0]
    small = list(range(SMALL))
    random.Random(7).shuffle(small)
    assert draw_rows(groups_of([SMALL]), 50, 7) == small[:50]
    assert draw_rows(groups_of([60, 40]), 70, None) == list(range(70))


def test_blocks_are_drawn_evenly():
    """Over seeds, every tenth of a large split gets about a tenth of the rows."""
    total, seen = 10 * SMALL, [0] * 10
    for seed in range(200):
        for row in draw_rows(groups_of([total]), 1024, seed):
            seen[row * 10 // total] += 1
    assert min(seen) > 0.8 * sum(seen) / 10 and max(seen) < 1.2 * sum(seen) / 10


# OpenMathInstruct-2 has 14 million rows in 32 files. Row groups: small, large, one for each file.
@pytest.mark.parametrize("rows_of_group", [1000, 50_000, 437_500])
def test_the_budget_holds(rows_of_group):
    """190 bytes a row in the two columns. As README says, one row group larger than that is taken:
    with one for each file 83 MB instead of 40."""
    cost = 190 * rows_of_group
    groups = groups_of([rows_of_group] * (14_000_000 // rows_of_group), cost)
    budget = 40_000_000
    rows = draw_rows(groups, 1024, 1234, budget)
    assert len(set(rows)) == 1024
    read = {row // rows_of_group for row in rows}
    assert len(read) * cost <= max(budget, cost)
    if rows_of_group <= 50_000:  # then nothing had to be passed over
        assert rows == draw_rows(groups, 1024, 1234)


def test_missing_columns(tmp_path):
    """None of the columns asked for: all are there, for a message that names them."""
    write_split(
        tmp_path,
        "x",
        [{"a": 1, "b": "c"}],
        1,
        10,
        pa.schema([("a", pa.int64()), ("b", pa.string())]),
    )
    [file] = tmp_path.iterdir()
    assert load_rows(str(file), columns=("text",)).rows == [{"a": 1, "b": "c"}]
    assert load_rows(str(file), columns=("b", "text")).rows == [{"b": "c"}]
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_rows(str(file))

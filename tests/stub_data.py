"""Data sets for the stub hub, made up, with the real names, columns, configs, splits and shards."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

_WORDS = (
    "the old river runs past a small stone town where people read write count trade sing and build "
    "boats of pine wood each year in early spring when water is high they race seven boats from "
    "bridge to bridge and the slowest crew must paint every door blue before summer"
).split()


def sentence(rng: random.Random, low: int = 6, high: int = 14) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(low, high))).capitalize() + "."


def text(rng: random.Random, sentences: int) -> str:
    return " ".join(sentence(rng) for _ in range(sentences))


def write_split(
    folder: Path,
    split: str,
    rows: list[dict],
    shards: int,
    group_rows: int,
    schema: pa.Schema | None = None,
) -> None:
    """Rows as `<split>-00000-of-0000N.parquet`, several row groups in each."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    bounds = [len(rows) * i // shards for i in range(shards + 1)]
    for i in range(shards):
        pq.write_table(
            table.slice(bounds[i], bounds[i + 1] - bounds[i]),
            folder / f"{split}-{i:05d}-of-{shards:05d}.parquet",
            row_group_size=group_rows,
        )


def write_card(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """The README that says which files are which split of which config."""
    content = {
        "configs": [
            {
                "config_name": name,
                "data_files": [{"split": split, "path": path} for split, path in splits.items()],
            }
            for name, splits in configs.items()
        ]
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(content)}---\n# Made up for a test\n")


def squad_rows(
    rng: random.Random, articles: int = 17, passages: int = 60, questions: int = 6
) -> list[dict]:
    """Grouped by passage and article, as in the original; half have no answer in their passage."""
    rows = []
    for article in range(articles):
        for _ in range(passages):
            context = text(rng, 5)
            for question in range(questions):
                start = context.index(" ") + 1
                answer = context[start:].split(" ")[0]
                answers = (
                    {"text": [answer], "answer_start": [start]}
                    if question % 2
                    else {"text": [], "answer_start": []}
                )
                rows.append(
                    {
                        "id": f"{len(rows):08x}",
                        "title": f"Article_{article}",
                        "context": context,
                        "question": sentence(rng)[:-1] + "?",
                        "answers": answers,
                    }
                )
    return rows


def arc_rows(rng: random.Random, count: int) -> list[dict]:
    return [
        {
            "id": f"Mercury_{i}",
            "question": sentence(rng)[:-1] + "?",
            "choices": {"text": [sentence(rng, 2, 4) for _ in range(4)], "label": list("ABCD")},
            "answerKey": rng.choice("ABCD"),
        }
        for i in range(count)
    ]


def math_rows(rng: random.Random, count: int) -> list[dict]:
    """Two of three with a numeric answer."""
    rows = []
    for i in range(count):
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        rows.append(
            {
                "problem": f"Problem {i}: a crew has {a} boats and builds {b} more. How many now?",
                "generated_solution": text(rng, 3),
                "expected_answer": str(a + b) if i % 3 else f"{a}x + {b}",
                "problem_source": rng.choice(
                    ("augmented_math", "augmented_gsm8k", "math", "gsm8k")
                ),
            }
        )
    return rows


def chat_rows(rng: random.Random, count: int) -> list[dict]:
    rows = []
    for i in range(count):
        turns = [{"content": text(rng, 4), "role": role} for role in ("user", "assistant") * 2]
        rows.append({"prompt": turns[0]["content"], "prompt_id": f"{i:064x}", "messages": turns})
    return rows


def wikitext_rows(rng: random.Random, articles: int) -> list[dict]:
    """One line a row, with the blank lines."""
    lines = []
    for i in range(articles):
        lines += ["", f" = Article {i} = \n", ""]
        for _ in range(4):
            lines += [f" {text(rng, 5)} \n", ""]
    return [{"text": line} for line in lines]


def build_datasets(root: Path, math: int = 24_000, chats: int = 24_000, articles: int = 60) -> None:
    """The five data sets that a run without options reads; two have more than SMALL rows."""
    rng = random.Random(14)
    strings = pa.list_(pa.string())
    squad = pa.schema(
        [
            ("id", pa.string()),
            ("title", pa.string()),
            ("context", pa.string()),
            ("question", pa.string()),
            ("answers", pa.struct([("text", strings), ("answer_start", pa.list_(pa.int32()))])),
        ]
    )
    folder = root / "allenai/ai2_arc"
    write_split(folder / "ARC-Challenge", "test", arc_rows(rng, 300), 2, 100)
    write_split(folder / "ARC-Easy", "test", arc_rows(rng, 50), 1, 100)
    write_card(folder, {name: {"test": f"{name}/test-*"} for name in ("ARC-Challenge", "ARC-Easy")})
    folder = root / "rajpurkar/squad_v2"
    write_split(folder / "squad_v2", "train", squad_rows(rng, 3), 1, 1000, squad)
    write_split(folder / "squad_v2", "validation", squad_rows(rng), 3, 1000, squad)
    write_card(
        folder, {"squad_v2": {split: f"squad_v2/{split}-*" for split in ("train", "validation")}}
    )
    folder = root / "nvidia/OpenMathInstruct-2"
    write_split(folder / "data", "train", math_rows(rng, math), 4, 1000)
    write_split(folder / "data", "train_1M", math_rows(rng, 100), 1, 1000)
    write_card(folder, {"default": {split: f"data/{split}-*" for split in ("train", "train_1M")}})
    folder = root / "Salesforce/wikitext"
    write_split(folder / "wikitext-2-raw-v1", "test", wikitext_rows(rng, articles), 1, 100)
    write_split(folder / "wikitext-103-raw-v1", "test", wikitext_rows(rng, 5), 1, 100)
    write_card(
        folder,
        {name: {"test": f"{name}/test-*"} for name in ("wikitext-2-raw-v1", "wikitext-103-raw-v1")},
    )
    folder = root / "HuggingFaceH4/ultrachat_200k"
    write_split(folder / "data", "train_sft", chat_rows(rng, chats), 3, 1000)
    write_split(folder / "data", "test_sft", chat_rows(rng, 20), 1, 1000)
    write_card(
        folder, {"default": {split: f"data/{split}-*" for split in ("train_sft", "test_sft")}}
    )


def mirror(root: Path, repository: str, split_files: str, target: Path) -> None:
    """A split's files joined in one, in row groups of another size: what --data-root wants."""
    tables = [pq.read_table(file) for file in sorted((root / repository).glob(split_files))]
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables), target, row_group_size=777)

"""Scores against cases worked by hand, and data of another task."""

import argparse
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.base.errors import UserError
from common.tasks import arc, arc_easy, openmath, squad_v2
from common.tasks.metrics import macro_f1, median_interval
from common.tasks.scoring import token_f1
from common.tasks.task import all_tasks
from common.text.data import DEMO_FOLDER

ARC_LINES = "".join((DEMO_FOLDER / "arc.jsonl").read_text().splitlines(keepends=True)[:2])


@pytest.mark.parametrize(
    "task, name, content, words",
    [
        (
            "arc",
            "a.txt",
            "some words",
            ["question, choices.text, choices.label, answerKey", "it has text"],
        ),
        (
            "arc",
            "a.jsonl",
            '{"question": "q", "choices": ["a", "b"], "answerKey": "A"}',
            ["without choices.text, choices.label; it"],
        ),
        (
            "arc",
            "a.jsonl",
            ARC_LINES.replace('"answerKey": "B"', '"answerKey": "E"'),
            [
                "the answerKey 'E' of demo_001 is none of its labels ['A', 'B', 'C', 'D']",
                "--arc-data",
                "leave arc out of --tasks",
            ],
        ),
        (
            "arc",
            "a.jsonl",
            '{"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, '
            '"answerKey": 1}',
            ["the answerKey 1 of Why? is none of its labels ['1', '2']"],
        ),
        (
            "arc",
            "a.jsonl",
            '{"question": "Why?", "choices": {"text": [], "label": null}, "answerKey": "A"}',
            ["of its labels []"],
        ),
        (
            "squad_v2",
            "a.jsonl",
            ARC_LINES,
            ["without context, answers.text; it has id, question, choices, answerKey"],
        ),
        (
            "openmath",
            "a.jsonl",
            ARC_LINES,
            ["without problem, expected_answer; it has id, question"],
        ),
        (
            "openmath",
            "a.jsonl",
            '{"problem": "p", "expected_answer": "1"}\n{"problem": "q"}',
            ["without expected_answer; it has problem;"],
        ),
        ("squad_v2", "a.jsonl", "", ["no rows"]),
        ("squad_v2", "a.jsonl", "[1]", ["cannot be read", "no JSON object"]),
    ],
)
def test_data_of_another_task_is_one_line(tmp_path, task, name, content, words):
    (tmp_path / name).write_text(content)
    options = argparse.Namespace(
        **{f"{task}_data": str(tmp_path / name)}, limit=None, data_root=None
    )
    with pytest.raises(UserError) as error:
        next(one for one in all_tasks() if one.name == task).rows(options, demo=True)
    assert "\n" not in str(error.value) and name in str(error.value)
    for word in words:
        assert word in str(error.value)


def squad(text, golds):
    return squad_v2.TASK.score({"answers": {"text": golds}, "context": "c", "title": "t"}, [text])


def test_squad_by_hand():
    assert squad("The Normans", ["Normans"])["exact_match"] == 1  # articles and case do not count
    assert squad("in the 10th century!", ["10th century"])["exact_match"] == 0
    assert squad("in the 10th century!", ["10th century"])["f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert squad("Paris", ["Rome", "Paris, France"])["f1"] == pytest.approx(
        2 * 1 / (1 + 2)
    )  # best of the gold answers
    assert squad("Berlin", ["Rome"])["f1"] == 0
    assert squad("unanswerable", [])["exact_match"] == squad("Unanswerable.", [])["f1"] == 1
    assert squad("Rome", [])["f1"] == 0
    assert squad("unanswerable", ["Rome"])["f1"] == 0
    assert squad("\nRome\nand more", ["Rome"])["exact_match"] == 1
    assert token_f1("a a b", "a b b") == pytest.approx(
        2 * 1 / 3
    )  # "a" is an article: [b] against [b, b]


def test_arc_maps_labels_to_letters_and_normalises_by_length():
    doc = {
        "choices": {"text": ["aa", "bbbbbbbb", "c", "d"], "label": ["1", "2", "3", "4"]},
        "answerKey": "2",
    }
    record = arc.TASK.score(doc, [(-4.0, False), (-5.0, False), (-9.0, False), (-9.0, False)])
    assert (record["gold"], record["predicted"], record["acc"]) == ("B", "A", 0)
    assert (record["predicted_norm"], record["acc_norm"]) == ("B", 1)


def test_squad_says_how_often_there_is_no_answer():
    """Unanswerable, empty and a word, on questions with and without an answer."""
    samples = [
        squad(text, golds)
        for golds in (["Rome"], [])
        for text in ("unanswerable", "No answer.", "", "Rome", "rome")
    ]
    summary = squad_v2.TASK.summary(samples)
    assert summary["no_answer"] == 0.6
    assert summary["answerable_f1"] == 0.4 and summary["unanswerable_exact_match"] == 0.6
    # Silence alone scores as many points as there are questions without an answer.
    silent = [squad("", golds) for golds in (["Rome"], [], ["Paris"], [])]
    summary = squad_v2.TASK.summary(silent)
    assert summary["f1"] == 0.5 and summary["no_answer"] == 1 and summary["answerable_f1"] == 0
    # Where all can be answered nothing is said of the others.
    assert squad_v2.TASK.summary([squad("Rome", ["Rome"])])["unanswerable_exact_match"] is None


def test_arc_easy_is_asked_and_scored_as_arc_challenge():
    prompts = [{**task.prompt(), "task": ""} for task in (arc.TASK, arc_easy.TASK)]
    assert prompts[0] == prompts[1] and arc_easy.TASK.prompt()["task"] == "arc_easy"
    keys = [[kind.key for kind in task.metrics] for task in (arc.TASK, arc_easy.TASK)]
    assert keys[0] == keys[1] and "macro_f1" in keys[1]
    assert {kind.task for kind in arc_easy.TASK.metrics} == {"arc_easy"}


def test_a_mirror_without_the_test_split_serves_validation(tmp_path):
    """Of ARC-Easy under --data-root; the results name what was read, and another address wins."""
    rows = [json.loads(line) for line in (DEMO_FOLDER / "arc_easy.jsonl").read_text().splitlines()]
    folder = tmp_path / "allenai/ai2_arc/ARC-Easy"
    folder.mkdir(parents=True)

    def source(**data):
        options = argparse.Namespace(
            **{"arc_easy_data": None, "limit": 7, "data_root": tmp_path, **data}
        )
        loaded = arc_easy.TASK.rows(options, demo=False)
        assert len(loaded.rows) == 7
        return loaded.source

    for split in ("validation", "test"):  # the test split is taken as soon as it is there
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        assert source() == f"allenai/ai2_arc/ARC-Easy:{split}"
        assert arc_easy.TASK.reads(7, tmp_path)[0] == f"allenai/ai2_arc/ARC-Easy:{split}"
    assert source(arc_easy_data="allenai/ai2_arc/ARC-Easy:validation").endswith(":validation")
    for nothing in (None, tmp_path / "nowhere", tmp_path / "allenai"):
        assert arc_easy.TASK.reads(7, nothing)[0] == "allenai/ai2_arc/ARC-Easy:test"


def test_macro_f1_by_hand():
    # A: precision 2/3, recall 1 -> 0.8; B: precision 1, recall 1/2 -> 2/3.
    assert macro_f1(list("AABB"), list("AAAB")).value == pytest.approx((0.8 + 2 / 3) / 2)


def test_answers_without_a_number_are_counted():
    samples = [
        openmath.TASK.score({"expected_answer": "5"}, [text]) for text in ("5", "7", "no idea")
    ]
    summary = openmath.TASK.summary(samples)
    assert summary["no_number"] == pytest.approx(1 / 3)
    assert summary["mean_absolute_difference"] == 1
    assert summary["within_tolerance"] == pytest.approx(1 / 3)
    assert summary["median_low"] is summary["median_high"] is None  # of two
    assert summary["answer_length"] == 3  # of 1, 1 and 7 characters
    nothing = openmath.TASK.summary(samples[2:])
    assert nothing["no_number"] == 1 and nothing["median_absolute_difference"] is None


def test_the_medians_interval_does_not_follow_single_answers():
    differences = [*range(1, 21), 9e12]
    samples = [openmath.TASK.score({"expected_answer": "0"}, [f"{one:.0f}"]) for one in differences]
    summary = openmath.TASK.summary(samples)
    assert summary["mean_absolute_difference"] > 4e11
    assert summary["median_absolute_difference"] == 11
    # By the binomial distribution: of 21 fewer than 6 lie below the median in 1.3% of samples.
    assert (summary["median_low"], summary["median_high"]) == (6, 16)


@pytest.mark.parametrize("count", [5, 6, 7, 20, 79, 500])
def test_the_medians_interval_holds_its_rate(count):
    """Of 600 samples of a distribution with a heavy tail at least 95% hold the median, 1."""
    rng = np.random.default_rng(count)
    found = [median_interval(rng.lognormal(0, 3, count)) for _ in range(600)]
    if count < 6:  # all five are on the same side in 6% of samples
        assert found == [None] * 600
    else:
        assert np.mean([low <= 1 <= high for low, high in found]) >= 0.93
    assert median_interval([]) is None

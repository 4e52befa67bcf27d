"""Scores against cases worked by hand, and data of another task."""

import argparse

import pytest

from common.base.errors import UserError
from common.tasks import arc, openmath, squad_v2
from common.tasks.metrics import macro_f1
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

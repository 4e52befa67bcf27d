"""Scores against cases worked by hand."""

import pytest

from common.tasks.scoring import (arc_sample, extract_number, macro_f1, openmath_sample, parse_number, squad_sample,
                                  summarise, token_f1)


@pytest.mark.parametrize("text, expected", [
    ("The answer is 5.", 5), ("The answer is $1,234.50.", 1234.5), ("so the answer is -3/4", -0.75),
    ("Thus \\boxed{12}.", 12), ("We get \\boxed{\\frac{3}{4}}", 0.75), ("-\\frac{1}{2}", -0.5), ("x = 1e3", 1000),
    ("12 apples", 12), ("It takes 3 hours and then 4 more, so 7 hours", 7), ("The answer is 10 km. Note 2 of 3.", 10),
    ("none at all", None), ("", None), ("The answer is unknown", None), ("about 50%", 50), ("3 + 4 = 7. The answer is 7.", 7),
    ("The answer is 7. The answer is 8.", 8), ("The answer is \\boxed{\\$1,000}", 1000), ("1,2,3", 3),
    ("The answer is \u22123", -3), ("the result: 0.5", 0.5), ("The answer is .25", 0.25), ("v2 model", None),
    ("The answer is 1/0", None),
])
def test_number_in_an_answer(text, expected):
    found = extract_number(text)
    assert found == pytest.approx(expected) if expected is not None else found is None


@pytest.mark.parametrize("text, expected", [("42", 42), ("-7", -7), ("1,234", 1234), ("3/4", .75), ("\\frac{1}{8}", .125),
                                            ("2.5e-3", .0025), ("$80", 80), ("x", None), ("", None)])
def test_parse_number(text, expected):
    assert parse_number(text) == (pytest.approx(expected) if expected is not None else None)


def squad(text, golds):
    return squad_sample({"answers": {"text": golds}, "context": "c", "title": "t"}, [text])


def test_squad_by_hand():
    assert squad("The Normans", ["Normans"])["exact_match"] == 1                # articles and case do not count
    assert squad("in the 10th century!", ["10th century"])["exact_match"] == 0
    assert squad("in the 10th century!", ["10th century"])["f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert squad("Paris", ["Rome", "Paris, France"])["f1"] == pytest.approx(2 * 1 / (1 + 2))   # best of the gold answers
    assert squad("Berlin", ["Rome"])["f1"] == 0
    assert squad("unanswerable", [])["exact_match"] == squad("Unanswerable.", [])["f1"] == 1
    assert squad("Rome", [])["f1"] == 0
    assert squad("unanswerable", ["Rome"])["f1"] == 0
    assert squad("\nRome\nand more", ["Rome"])["exact_match"] == 1
    assert token_f1("a a b", "a b b") == pytest.approx(2 * 1 / 3)               # "a" is an article: [b] against [b, b]


def test_arc_maps_labels_to_letters_and_normalises_by_length():
    doc = {"choices": {"text": ["aa", "bbbbbbbb", "c", "d"], "label": ["1", "2", "3", "4"]}, "answerKey": "2"}
    record = arc_sample(doc, [(-4.0, False), (-5.0, False), (-9.0, False), (-9.0, False)])
    assert (record["gold"], record["predicted"], record["acc"]) == ("B", "A", 0)
    assert (record["predicted_norm"], record["acc_norm"]) == ("B", 1)


def test_macro_f1_by_hand():
    # A: precision 2/3, recall 1 -> 0.8; B: precision 1, recall 1/2 -> 2/3.
    assert macro_f1(list("AABB"), list("AAAB")) == pytest.approx((0.8 + 2 / 3) / 2)


def test_answers_without_a_number_are_counted():
    samples = [openmath_sample({"expected_answer": "5"}, [text]) for text in ("5", "7", "no idea")]
    summary = summarise("openmath", samples)
    assert summary["no_number"] == pytest.approx(1 / 3)
    assert summary["mean_absolute_difference"] == 1
    assert summary["within_tolerance"] == pytest.approx(1 / 3)

"""Numbers in answers and expected answers, against cases worked by hand."""

import argparse
import json
from fractions import Fraction

import numpy as np
import pytest

from common.tasks import openmath
from common.tasks.numbers import extract_number, parse_number


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The answer is 5.", 5),
        ("The answer is $1,234.50.", 1234.5),
        ("so the answer is -3/4", -0.75),
        ("Thus \\boxed{12}.", 12),
        ("We get \\boxed{\\frac{3}{4}}", 0.75),
        ("-\\frac{1}{2}", -0.5),
        ("x = 1e3", 1000),
        ("12 apples", 12),
        ("It takes 3 hours and then 4 more, so 7 hours", 7),
        ("The answer is 10 km. Note 2 of 3.", 10),
        ("none at all", None),
        ("", None),
        ("The answer is unknown", None),
        ("about 50%", 50),
        ("3 + 4 = 7. The answer is 7.", 7),
        ("The answer is 7. The answer is 8.", 8),
        ("The answer is \\boxed{\\$1,000}", 1000),
        ("1,2,3", 3),
        ("The answer is \u22123", -3),
        ("the result: 0.5", 0.5),
        ("The answer is .25", 0.25),
        ("v2 model", None),
        ("The answer is 1/0", None),
        # Mixed fractions.
        ("The answer is 3\\frac{1}{2}.", 3.5),
        ("\\boxed{-3\\frac{1}{2}}", -3.5),
        ("it takes 3 1/2 hours", 3.5),
        ("The answer is 3\\dfrac12 cups", 3.5),
        # Powers, roots, products, sums and factorials are no numbers; what they equal is.
        ("The answer is 2^{10}.", None),
        ("\\boxed{2^{10}}", None),
        ("The answer is 2**10", None),
        ("The answer is 10^5", None),
        ("The answer is $2^{10} = 1024$.", 1024),
        ("\\boxed{2^{10} = 1024}", 1024),
        ("The answer is 1/2 + 1/3.", None),
        ("The answer is 1/2 + 1/3 = 5/6.", 5 / 6),
        ("The answer is 3 + 4 = 7", 7),
        ("12-5=7", 7),
        ("x=-5", -5),
        ("The answer is 5x", None),
        ("The answer is 8\\pi", None),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", None),
        ("The answer is 2 \\times 10^{3}", None),
        ("The answer is $x^2-y^2=2$.", 2),
        ("The answer is 3 million", None),
        ("\\boxed{12!}", None),
        ("The answer is $12!$.", None),
        ("The answer is 5! = 120.", 120),
        ("The answer is 12!", 12),
        # Ratios, times, lists, ranges.
        ("The answer is 3:2.", None),
        ("at 10:30", None),
        ("Step 3: 12 apples", 12),
        ("\\boxed{1, 2}", None),
        ("The answer is 1-2", None),
        ("is 1.2.3", None),
        ("COVID-19", None),
        # Units and emphasis.
        ("\\boxed{5\\text{ cm}}", 5),
        ("The answer is 12 cm^2.", 12),
        ("The answer is 90^{\\circ}.", 90),
        ("The answer is 5cm", 5),
        ("The answer is 3 sixteenths of a mile.", None),
        ("There are 5 third graders", 5),
        ("She has 14 quarters.", 14),
        ("that is 3 quarters of it", None),
        ("The answer is 1 third.", None),
        ("grossed $356 mil", None),
        # Recurring decimals, products written with an x, arguments, remainders, groups of digits,
        # fractions as a character.
        ("The answer is $0.\\overline{3}$.", None),
        ("0.1\\overline{6}", None),
        ("The answer is 0.(3)", None),
        ("\\boxed{0.1(6)}", None),
        ("The answer is 5 x 10^3.", None),
        ("6.02 x 10^23", None),
        ("5 x 10^3 = 5000", 5000),
        ("The answer is $f(3) = 5$", 5),
        ("\\boxed{f(2, 3) = 7}", 7),
        ("The answer is f(3).", None),
        ("The answer is (5).", 5),
        ("10 mod 3", None),
        ("The answer is 10 mod 3 = 1", 1),
        ("The answer is 3 (mod 7)", None),
        ("a modest 5", 5),
        ("1 \u00bd", 1.5),
        ("The answer is 2\u00bd cups", 2.5),
        ("-\u00be", -0.75),
        ("\u215e", 0.875),
        ("x\u00bd", None),
        ("12 000", None),
        ("The answer is 1\u00a0234\u202f567.", None),
        ("12\\,000", 12000),
        ("in 2020 there were 500", 500),
        ("Step 3 12 apples", 12),
        # Products of letters, ordinals, either sign, operators in words, digits that commas group
        # in another way.
        ("The answer is 2 xy", None),
        ("The answer is 2 XYZ.", None),
        ("The answer is 3 i", None),
        ("it is 3 i.", None),
        ("The answer is 3 I think", 3),
        ("The answer is 3 in total", 3),
        ("the 5 th", None),
        ("The answer is 5 y", None),
        ("The answer is 1/3 of it", 1 / 3),
        ("The answer is \u00b15", None),
        ("x = \u00b1 5", None),
        ("\\pm 5", None),
        ("The answer is 5 \u00b1 2", None),
        ("The answer is 2 times 3", None),
        ("2 times 3 is 6", 6),
        ("The answer is 3 times.", 3),
        ("6 divided by 2", None),
        ("The answer is 2 plus 3 = 5", 5),
        ("it rose 3 times since 5 May", 5),
        ("The answer is 12,34,567", None),
        ("The answer is 1,2345", None),
        ("12,34,567 and 8", 8),
        ("It is 0,125.", None),
        ("The answer is 1,234,567.5", 1234567.5),
        ("The answer is 12,100,5.", None),
        ("The answer is 10,000, not 9", 10000),
        ("The answer is **5**.", 5),
        ("The answer is 5 - which is odd", 5),
        ("the answer is:\n\n 42", 42),
        ("\\boxed{x = 5}", 5),
    ],
)
def test_number_in_an_answer(text, expected):
    found = extract_number(text)
    assert found == pytest.approx(expected) if expected is not None else found is None


# What an expected answer is worth; None: the problem has no numeric answer and is left out.
EXPECTED_ANSWERS = [
    ("42", 42),
    ("-7", -7),
    ("+3", 3),
    ("\u22123", -3),
    ("1,234", 1234),
    ("1{,}234", 1234),
    ("12.", 12),
    (".25", 0.25),
    ("3/4", 0.75),
    ("\\frac{1}{8}", 0.125),
    ("\\dfrac{1}{8}", 0.125),
    ("\\frac18", 0.125),
    ("-\\frac{10}{3}", -10 / 3),
    ("\\frac{-1}{2}", -0.5),
    ("2.5e-3", 0.0025),
    ("1e3", 1000),
    ("1e400", None),
    ("3/0", None),
    ("x", None),
    ("", None),
    # Mixed fractions; not of a part that is none, which is a product or a slip.
    ("3\\frac{1}{2}", 3.5),
    ("3 \\frac{1}{2}", 3.5),
    ("3\\tfrac12", 3.5),
    ("3 1/2", 3.5),
    ("-3\\frac{1}{2}", -3.5),
    ("3\\frac{5}{2}", None),
    ("2\\frac{-1}{3}", None),
    ("\\frac{1}{2}\\frac{1}{3}", None),
    # Expressions, even those that have a value.
    ("2^{10}", None),
    ("10^5", None),
    ("2 \\times 10^3", None),
    ("12!", None),
    ("2e", None),
    ("1/2 + 1/3", None),
    ("5x", None),
    ("5 x", None),
    ("5xy", None),
    ("\\sqrt{2}", None),
    ("8\\pi", None),
    ("2 pi", None),
    ("\\frac{4000\\pi}{3}", None),
    ("2 + 3i", None),
    ("x = 5", None),
    ("(3)", None),
    ("101_2", None),
    ("3 million", None),
    ("7 eighths", None),
    # Lists, ratios, dates, numbers written otherwise.
    ("1, 2", None),
    ("0,1", None),
    ("1,23", None),
    ("(1,4)", None),
    ("3:2", None),
    ("1.2.3", None),
    ("3/4/5", None),
    ("0.\\overline{3}", None),
    ("0.(3)", None),
    ("5 x 10^3", None),
    ("10 mod 3", None),
    ("12 000", None),
    ("f(3) = 5", None),
    ("5 bn", None),
    ("5 mil", None),
    ("3 sixteenths", None),
    ("7 twelfths", None),
    ("3 millionths", None),
    ("2 per", None),
    ("2\\text{ per}", None),
    ("1 twentieth", None),
    ("5 or 6", None),
    ("1 234", None),
    ("12\\text{ and }5", None),
    ("2 xy", None),
    ("2 xyz", None),
    ("5 th", None),
    ("3 i", None),
    ("1/3 of it", None),
    ("1/3 of the cake", None),
    ("\u00b15", None),
    ("\\pm 5", None),
    ("2 times 3", None),
    ("12,34,567", None),
    ("1,2345", None),
    ("0,125", None),
    # Units.
    ("5 km", 5),
    ("3 mi", 3),
    ("7 PM", 7),
    ("60 Hz", 60),
    ("12 cups of flour", 12),
    ("5 lbs", 5),
    ("2 sq ft", 2),
    ("$80", 80),
    ("$1,234.50", 1234.5),
    ("\\$5", 5),
    ("50%", 50),
    ("40\\%", 40),
    ("12 apples", 12),
    ("3 months", 3),
    ("5cm", 5),
    ("5 km/h", 5),
    ("5 cm^2", 5),
    ("5\\text{ cm}", 5),
    ("12\\text{ square units}", 12),
    ("90^\\circ", 90),
    ("25^\\circ\\text{C}", 25),
    ("5 miles per hour", 5),
    ("2 percent", 2),
    ("3 milliliters", 3),
    ("5 perches", 5),
    ("1 \u00bd", 1.5),
    ("2\u00bd cups", 2.5),
    ("\u2153", 1 / 3),
    ("-3\u00be", -3.75),
    ("3\\text{ m per s}", 3),
]


@pytest.mark.parametrize("text, expected", EXPECTED_ANSWERS)
def test_parse_number(text, expected):
    assert parse_number(text) == (pytest.approx(expected) if expected is not None else None)
    if expected is not None:  # a model that answers with it is right
        assert (
            openmath.TASK.score({"expected_answer": text}, [f"So the answer is {text}"])["correct"]
            == 1
        )


def test_written_numbers_are_read_back():
    """Random numbers and mixed fractions in several ways of writing, against Fraction."""
    rng = np.random.default_rng(6)
    for _ in range(300):
        whole, bottom, sign = (
            int(rng.integers(1, 9999)),
            int(rng.integers(2, 99)),
            rng.choice(["", "-"]),
        )
        top = int(rng.integers(1, bottom))
        exact = float((whole + Fraction(top, bottom)) * (-1 if sign else 1))
        for text in (
            f"{sign}{whole}\\frac{{{top}}}{{{bottom}}}",
            f"{sign}{whole:,} {top}/{bottom}",
            f"{sign}{whole * bottom + top}/{bottom}",
            repr(exact),
            f"{exact:.17e}",
        ):
            assert (
                parse_number(text)
                == extract_number(f"Hence the answer is ${text}$.")
                == pytest.approx(exact)
            ), text


def test_only_problems_with_numeric_answers_are_evaluated(tmp_path):
    """The filter takes what parse_number takes: one place decides."""
    rows = [{"problem": "p", "expected_answer": text} for text, _ in EXPECTED_ANSWERS]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = argparse.Namespace(openmath_data=str(file), limit=None, data_root=None)
    chosen = [row["expected_answer"] for row in openmath.TASK.rows(options, demo=False).rows]
    assert sorted(chosen) == sorted(
        text for text, expected in EXPECTED_ANSWERS if expected is not None
    )

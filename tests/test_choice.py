"""Which configuration to take: the rules, on made-up rows of the first table."""

from dataclasses import replace

import pytest

from common.reporting.choice import choice_table, choices
from common.reporting.overview import Recovery, Row, overview_table
from common.reporting.significance import Estimate

BASELINE = Row("baseline", 1000, kl=0.0, tokens_per_second=50.0)
# Names say what each is for.
ROWS = [
    BASELINE,
    Row("small", 300, kl=0.2, ratio=1.2, tokens_per_second=80.0, calibrated=True, lost=True),
    Row("small-worse", 300, kl=0.3, ratio=1.1, tokens_per_second=99.0, calibrated=False, lost=True),
    Row("middle", 400, kl=0.1, ratio=1.1, tokens_per_second=99.5, calibrated=True, lost=None),
    Row("large", 500, kl=0.002, ratio=1.0, tokens_per_second=70.0, calibrated=True, lost=False),
    Row("larger", 600, kl=0.005, ratio=1.0, tokens_per_second=100.0, calibrated=False, lost=False),
]


def taken(rows):
    return {choice.wanted: choice.row and choice.row.name for choice in choices(rows)}


def budgets(rows):
    return [choice.row for choice in choices(rows) if "budget" in choice.wanted]


def test_every_rule():
    assert taken(ROWS) == {
        "Best quality, size budget from 0.0 MB": "baseline",  # sizes of a few bytes
        "Smallest without measurable loss": "large",
        "Smallest with at most 1% of loss": "large",
        "Fastest": "larger",
        "Best without calibration data": "larger",
    }
    # The best of those that fit, at every size where that is another; the last whatever the size.
    assert [row.name for row in budgets(ROWS)] == ["small", "middle", "large", "baseline"]
    for budget in (300, 399, 400, 550, 5000):
        fits = [row for row in ROWS if row.size <= budget]
        best = min(fits, key=lambda row: row.kl)
        assert [row for row in budgets(ROWS) if row.size <= budget][-1] == best
    # Nothing depends on the order of the rows.
    assert taken(ROWS[::-1]) == taken(ROWS) and budgets(ROWS[::-1]) == budgets(ROWS)


def test_in_little_memory():
    sizes = {"baseline": 5e9, "small": 1e9, "middle": 4e9, "large": 4.1e9}
    rows = [replace(row, memory=int(sizes[row.name])) for row in ROWS if row.name in sizes]
    assert taken(rows)["Best quality in 4 GB of memory"] == "middle"
    assert taken([rows[0], rows[3]])["Best quality in 4 GB of memory"] is None
    # Of others it is not known.
    assert taken([*rows, ROWS[5]])["Best quality in 4 GB of memory"] == "middle"


def test_ties():
    one = ROWS[4]
    rows = [
        BASELINE,
        replace(one, name="first"),
        replace(one, name="faster", tokens_per_second=70.5),
        replace(one, name="larger", size=501),
    ]
    found = taken(rows)
    assert [row.name for row in budgets(rows)] == ["faster", "baseline"]
    # Of equal size and KL the first.
    assert found["Smallest without measurable loss"] == "first"
    assert found["Fastest"] == "faster"
    # 1% faster is as fast, 3% is not: then the better one of those that are.
    for speed, fastest in ((101.0, "first"), (103.0, "quick")):
        rows = [
            replace(one, name="first", tokens_per_second=100.0),
            replace(one, name="quick", kl=0.5, tokens_per_second=speed),
        ]
        assert taken(rows)["Fastest"] == fastest


def test_nothing_fulfils():
    rows = [BASELINE, ROWS[1], ROWS[3]]
    found = taken(rows)
    assert found["Smallest without measurable loss"] is None
    assert found["Best without calibration data"] is None
    table = choice_table(rows)
    cells = {row[0]: row[1:3] for row in table.rows}
    assert cells["Smallest without measurable loss"] == ["none", "–"]
    assert choices([BASELINE]) == [] and choice_table([BASELINE]) is None
    assert choice_table([]) is None


def test_a_loss_that_is_within_the_margin_is_one_that_can_be_measured():
    near = Row("near", 450, kl=0.004, ratio=1.005, lost=False, measurable=True)
    found = taken([*ROWS, near])
    assert found["Smallest without measurable loss"] == "large"
    assert found["Smallest with at most 1% of loss"] == "near"
    found = taken([BASELINE, near])
    assert found["Smallest without measurable loss"] is None
    assert "the one measure that the rule names" in choice_table([*ROWS, near]).note


def test_what_was_measured_otherwise_is_not_chosen():
    """On another device it may be as fast as it likes."""
    other = Row("other", 100, kl=0.001, tokens_per_second=999.0, lost=False, calibrated=False)
    assert "other" in taken([*ROWS, other]).values()
    assert taken([*ROWS, replace(other, apart=True)]) == taken(ROWS)
    assert choices([BASELINE, replace(other, apart=True)]) == []


def test_the_baseline_is_taken_where_it_is_fastest():
    rows = [replace(BASELINE, tokens_per_second=500.0), *ROWS[1:]]
    assert taken(rows)["Fastest"] == "baseline"


def test_one_configuration_alone():
    for rows in ([ROWS[5]], [BASELINE, ROWS[5]]):
        found = taken(rows)
        assert found["Smallest without measurable loss"] == found["Fastest"] == "larger"
        assert found["Best without calibration data"] == "larger"


@pytest.mark.parametrize("known", ["kl", "ratio", "recovery", None])
def test_quality_is_what_is_known(known):
    """Divergence, else perplexity, else recovery; without any only size and speed decide."""
    values = {
        "kl": (0.1, 0.2),
        "ratio": (1.1, 1.2),
        "recovery": [
            Recovery(Estimate(value, value - 1, value + 1), ("one",), ()) for value in (99.0, 98.0)
        ],
    }
    bare = replace(BASELINE, kl=None)
    good, bad = (
        Row(
            name,
            300,
            tokens_per_second=60.0,
            calibrated=False,
            lost=False,
            **({known: values[known][i]} if known else {}),
        )
        for i, name in enumerate(("good", "bad"))
    )
    found = taken([bare, bad, good])
    assert found["Fastest"] == ("good" if known else "bad")
    assert found.get("Best without calibration data") == ("good" if known else None)
    assert [row.name for row in budgets([bare, bad, good])] == (
        ["good", "baseline"] if known else []
    )
    # What nothing is known of is not taken for its quality.
    blank = Row("blank", 100, calibrated=False)
    if known:
        assert taken([bare, blank, good])["Best without calibration data"] == "good"
        assert budgets([bare, blank, good])[0].name == "good"


def test_speed_that_was_not_measured():
    rows = [replace(row, tokens_per_second=None) for row in ROWS]
    assert taken(rows)["Fastest"] is None


def test_what_is_stored_in_16_bits_is_not_taken_for_its_size():
    """Another library's codes may be small where its folder is not: best by every rule, but what
    would be loaded is as large as the baseline.
    """
    rows = [
        Row("baseline", 1000),
        Row("hqq-4bit", 300, kl=0.2, lost=False, calibrated=False),
        Row("hqq-package-4bit", 290, kl=0.1, lost=False, calibrated=False, by="hqq"),
    ]
    assert taken(rows)["Best without calibration data"] == "hqq-package-4bit"
    rows[2] = replace(rows[2], stored_wide=1010)
    found = taken(rows)
    assert found["Best without calibration data"] == "hqq-4bit"
    assert found["Smallest without measurable loss"] == "hqq-4bit"
    assert "hqq-package-4bit" not in found.values()
    assert "MB of hqq-package-4bit (0.0 MB): what its codes would take" in overview_table(rows).note

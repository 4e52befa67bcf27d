"""The page in a real browser, where there is one: what a reader does with it, on a made-up run."""

import browser
import pytest
from browser import Browser
from made_up_results import NASTY, model_part

from common.reporting.page import page

pytestmark = pytest.mark.skipif(
    not browser.program(), reason=f"none of {', '.join(browser.PROGRAMS)} is installed"
)
# Two share a size and nearly a divergence; names of methods, of nothing known and of no good.
NAMES = ["gptq-4bit", "awq-4bit", "hqq-4bit", "smoothquant-8bit", *NASTY]
TABLE = """(title) => [...document.querySelectorAll('.table')].find(
  (one) => one.querySelector('h3').textContent === title)"""
PLOT = """(title) => [...document.querySelectorAll('figure')].find(
  (one) => one.querySelector('h3').textContent === title).querySelector('.plot')"""
KL = "Divergence from the baseline against size"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    answers = [*NASTY, "</script><script>alert(1)</script>", "a long answer " * 60]
    file = folder / "report.html"
    file.write_text(page([model_part(folder / "results", NAMES, answers)]))
    return file


@pytest.fixture
def opened(chromium, file):
    """The page in a window of a desktop's width; no test may leave a complaint."""
    chromium.complaints.clear()
    chromium.open(file)
    yield chromium
    assert not chromium.complaints


def column(opened, title, place=0):
    """The texts of a table's column, of the rows that are shown."""
    return opened.run(
        f"[...({TABLE})({title!r}).querySelectorAll('tbody tr')]"
        f".filter((row) => !row.hidden).map((row) => row.cells[{place}].textContent)"
    )


def draw(opened, title):
    plot = f"({PLOT})({title!r})"
    opened.run(f"{plot}.scrollIntoView()")
    opened.wait(f"{plot}.dataset.drawn === 'yes'")
    return plot


def drawn_names(opened, plot):
    """Of the names at the points, text and box on the screen, once they are there."""
    opened.wait(f"{plot}.querySelectorAll('.annotation-text').length > 0")
    return opened.run(
        f"[...{plot}.querySelectorAll('.annotation-text')].map((one) => "
        "{ const r = one.getBoundingClientRect(); "
        "return [one.textContent, r.left, r.top, r.right, r.bottom]; })"
    )


def choose(opened, index, value):
    """Set the index-th select of the samples."""
    opened.run(
        f"{{ const s = document.querySelectorAll('.samples select')[{index}]; "
        f"s.value = {value!r}; s.dispatchEvent(new Event('change')); }}"
    )


def test_tables_sort(opened):
    """Up, down and back; numbers as numbers; what is not there last."""
    title = "Perplexity and divergence from the baseline"
    before = column(opened, title, 3)
    numbers = sorted((text for text in before if text != "–"), key=float)
    click = f"({TABLE})({title!r}).querySelectorAll('th button')[3].click()"
    for expected in ([*numbers, "–"], [*reversed(numbers), "–"], before):
        opened.run(click)
        assert column(opened, title, 3) == expected
    assert before[0] == "–" and before[1:] != numbers


def test_numbers_in_cells(opened):
    expected = {
        "0.235 (-0.009 [-0.026, +0.008])": 0.235,
        "-0.5": -0.5,
        "+0.003": 0.003,
        "1.105 x [1.1, 1.2]": 1.105,
        "23.90 ± 0.61": 23.9,
        "1,234.5": 1234.5,
        "1.23e+06": 1.23e6,
        "> 1000000 (hangs on single answers)": 1e6,
        "97 %": 97,
        "4-bit": None,
        "packed W4A16": None,
        "–": None,
        "": None,
    }
    assert opened.run(f"{list(expected)!r}.map(leadingNumber)") == list(expected.values())


def test_a_filter_filters(opened):
    everything = column(opened, "Size and bits")
    opened.run(
        f"{{ const i = ({TABLE})('Size and bits').querySelector('input'); "
        "i.value = '4BIT  gptq'; i.dispatchEvent(new Event('input')); }"
    )
    assert column(opened, "Size and bits") == ["gptq-4bit"] and len(everything) == len(NAMES) + 1
    assert "1 of 8 rows" in opened.run("document.body.innerText")


def test_a_configuration_left_out_is_left_out_everywhere(opened):
    plot = draw(opened, KL)
    assert {name for name, *_ in drawn_names(opened, plot)} == set(NAMES)
    opened.run("document.querySelector('input[value=\"awq-4bit\"]').click()")
    assert "awq-4bit" not in column(opened, "Size and bits") + column(opened, "Scores")
    opened.wait(f"!{plot}.textContent.includes('awq-4bit')")
    assert {name for name, *_ in drawn_names(opened, plot)} == set(NAMES) - {"awq-4bit"}
    assert "awq-4bit" not in opened.run(
        "[...document.querySelectorAll('.sample')].map((one) => one.textContent).join()"
    )
    for button, expected in (("none", []), ("all", ["baseline", *NAMES])):
        opened.run(
            "[...document.querySelectorAll('.choice button')].find("
            f"(one) => one.textContent === {button!r}).click()"
        )
        assert set(column(opened, "Size and bits")) == set(expected)


def test_points_are_true_and_names_apart(opened):
    """Equal sizes have equal places; no name covers another; pointing at one tells its numbers."""
    plot = draw(opened, KL)
    boxes = drawn_names(opened, plot)
    for i, (_, left, top, right, bottom) in enumerate(boxes):
        for _, other_left, other_top, other_right, other_bottom in boxes[:i]:
            wide = min(right, other_right) - max(left, other_left)
            high = min(bottom, other_bottom) - max(top, other_top)
            assert wide <= 1 or high <= 1
    places = opened.run(
        f"[...{plot}.querySelectorAll('.points path')].map((one) => "
        "{ const r = one.getBoundingClientRect(); return [r.left + r.width / 2, r.top + 5]; })"
    )
    assert len({round(x) for x, _ in places}) == 1 and len({round(y) for _, y in places}) > 3
    x, y = places[0]
    opened("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    opened.wait(f"{plot}.querySelector('.hovertext')")
    shown = opened.run(f"{plot}.querySelector('.hovertext').textContent")
    assert "gptq-4bit" in shown and "0.01" in shown and "0.5 MB" in shown


def test_every_plot_is_drawn(opened):
    titles = opened.run("[...document.querySelectorAll('figure h3')].map((h) => h.textContent)")
    assert len(titles) == 8
    for title in titles:
        plot = draw(opened, title)
        assert opened.run(f"{plot}.querySelector('svg') !== null")
    plot = draw(opened, "Relative output error by layer")
    tick = f"{plot}.querySelector('.ytick').textContent"
    assert opened.run(tick) == "0.01"
    opened.run(
        f"{{ const s = {plot}.parentNode.querySelector('select'); s.value = '1'; "
        "s.dispatchEvent(new Event('change')); }"
    )
    opened.wait(f"{tick} !== '0.01'")


def test_samples(opened):
    def shown():
        return opened.run("[...document.querySelectorAll('.sample')].map((one) => one.innerText)")

    tasks = opened.run("state => 0, [...document.querySelector('.samples select').options].length")
    assert tasks == 3
    assert len(shown()) == 10 and all("Gold: " in one for one in shown())
    opened.run("document.querySelector('.samples > button').click()")
    assert len(shown()) > 10
    choose(opened, 1, "1")
    choose(opened, 2, "0")
    cards = opened.run(
        "[...document.querySelectorAll('.sample')].map((one) => [...one.querySelectorAll('tr')]"
        ".map((row) => [row.cells[0].innerText, row.cells[2].innerText]))"
    )
    for rows in cards:
        marks = {
            name: mark for mark, names in rows for name in names.split(", ") if name in NAMES[:4]
        } | {"baseline": next(mark for mark, names in rows if names.startswith("baseline"))}
        assert marks["gptq-4bit"] == "✗ wrong" and marks["baseline"] == "✓ right"
    assert cards
    opened.run(
        "{ const i = document.querySelector('.samples input'); i.value = 'no such words'; "
        "i.dispatchEvent(new Event('input')); }"
    )
    assert shown() == [] and opened.run("document.querySelector('.samples > button').hidden")


def test_no_text_became_html(opened):
    for place in range(3):
        choose(opened, 0, str(place))
    assert opened.run("document.querySelectorAll('img, b, main script:not([type])').length") == 0


def test_colours(opened, file):
    """As the system says, and by the button; plots along with the rest."""
    paper = "getComputedStyle(document.body).backgroundColor"
    tick = f"getComputedStyle(({PLOT})({KL!r}).querySelector('.xtick text')).fill"
    draw(opened, KL)
    light = opened.run(paper), opened.run(tick)
    opened.open(file, dark=True)
    draw(opened, KL)
    dark = opened.run(paper), opened.run(tick)
    assert light[0] == "rgb(255, 255, 255)" and dark[0] != light[0] and dark[1] != light[1]
    opened.run("document.getElementById('theme').click()")
    assert opened.run(paper) == light[0]
    opened.wait(f"{tick} === {light[1]!r}")
    opened.run("document.getElementById('theme').click(); document.getElementById('theme').click()")
    assert opened.run(paper) == dark[0]


@pytest.mark.parametrize("width", [pytest.param(320, marks=pytest.mark.slow), 390])
def test_nothing_runs_out_of_a_narrow_page(chromium, file, width):
    chromium.complaints.clear()
    chromium.open(file, width)
    for title in chromium.run(
        "[...document.querySelectorAll('figure h3')].map((h) => h.textContent)"
    ):
        draw(chromium, title)
    for place in range(3):
        choose(chromium, 0, str(place))
        chromium.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert chromium.run("document.documentElement.scrollWidth") <= width
    # What is wider than the page scrolls inside its own box.
    boxes = "[...document.querySelectorAll('.box')]"
    assert chromium.run(f"{boxes}.some((one) => one.scrollWidth > one.clientWidth)")
    assert not chromium.complaints


@pytest.mark.slow
def test_forty_configurations(chromium, tmp_path):
    chromium.complaints.clear()
    file = tmp_path / "report.html"
    file.write_text(page([model_part(tmp_path / "results", [f"made-{i}" for i in range(40)])]))
    chromium.open(file)
    plot = draw(chromium, KL)
    assert len(drawn_names(chromium, plot)) == 40
    assert chromium.run("document.documentElement.scrollWidth") <= 1280
    assert not chromium.complaints


def test_few_results(chromium, tmp_path):
    """A baseline alone, and a page of no model."""
    chromium.complaints.clear()
    for name, parts in (("one", [model_part(tmp_path / "results", [])]), ("none", [])):
        file = tmp_path / f"{name}.html"
        file.write_text(page(parts))
        chromium.open(file, 390)
        assert chromium.run("document.documentElement.scrollWidth") <= 390
    assert not chromium.complaints

"""Plots against size: points at their true places, names beside them, none on another."""

import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
from made_up_results import document
from sklearn.isotonic import IsotonicRegression

from common.reporting import plots
from common.reporting.drawing import name_points, point, spread
from common.results.documents import CONFIGURATIONS, ModelResults
from common.results.peers import PEERS

NAMES = [*CONFIGURATIONS, *PEERS]


@pytest.fixture(scope="module")
def results():
    """Every 4-bit configuration of one size, nearly as fast as another; an 8-bit one of another."""
    documents = {}
    for i, name in enumerate(NAMES):
        found = document(name, 0.5 + 0.001 * i)
        if name.endswith("8bit"):
            found["quantization"]["weights_bytes"] = 900_000 + 1000 * i
        found["speed"]["tokens_per_second"] = 40 + 0.01 * i
        documents[name] = found
    return ModelResults("tiny", documents)


def drawn(axis) -> dict[str, tuple[float, float]]:
    """Where the points of configurations are, by name."""
    return {
        one.get_label(): tuple(float(values[0]) for values in one.lines[0].get_data())
        for one in axis.containers
    }


@pytest.mark.parametrize(
    "draw", [plots.speed_against_size, lambda r: plots.accuracy_against_size(r, {})]
)
def test_points_are_where_they_belong_and_names_do_not_meet(results, draw):
    figure = draw(results)
    figure.canvas.draw()
    keys = {"Tokens per second, batch 1": ("speed", "tokens_per_second")}
    keys["ARC-Challenge accuracy (higher is better)"] = ("tasks", "arc", "accuracy")
    keys["Perplexity (lower is better)"] = ("tasks", "perplexity", "perplexity")
    for axis in figure.axes:
        places = drawn(axis)
        assert list(places) == NAMES
        for name, place in places.items():
            size = results.documents[name]["quantization"]["weights_bytes"] / 1e6
            value = results.documents[name]
            for key in keys[axis.get_ylabel()]:
                value = value[key]
            assert place == (pytest.approx(size), pytest.approx(value))
        assert sorted(text.get_text() for text in axis.texts) == sorted(NAMES)
        # The text alone, without the line that leads to its point.
        boxes = [text.get_bbox_patch().get_window_extent() for text in axis.texts]
        whole = axis.get_window_extent()
        for i, box in enumerate(boxes):
            assert whole.x0 < box.x0 and box.x1 < whole.x1
            assert whole.y0 - 2 < box.y0 and box.y1 < whole.y1 + 2
            for other in boxes[:i]:
                assert min(box.x1, other.x1) <= max(box.x0, other.x0) or (
                    min(box.y1, other.y1) - max(box.y0, other.y0) < 2  # pixels
                )
    plt.close(figure)


def test_one_point_alone_has_its_name_beside_it():
    figure, axis = plt.subplots()
    point(axis, "gptq-4bit", 500.0, 0.5)
    name_points(axis, [("gptq-4bit", 500.0, 0.5)])
    assert [text.xyann[1] for text in axis.texts] == [0.5] and axis.texts[0].xy == (500.0, 0.5)
    plt.close(figure)


def test_names_move_as_little_as_they_can():
    """As by isotonic regression; what is apart stays."""
    for seed in range(200):
        rng = random.Random(seed)
        gap, count = rng.uniform(0, 2), rng.randint(1, 12)
        places = sorted(rng.uniform(-5, 5) for _ in range(count))
        steps = gap * np.arange(count)
        best = IsotonicRegression().fit_transform(np.arange(count), np.array(places) - steps)
        assert spread(places, gap) == pytest.approx(list(best + steps))
    assert spread([], 1.0) == [] and spread([0.0, 5.0], 1.0) == [0.0, 5.0]

"""The lines that say how far something is."""

import re

import pytest

from common.base import progress

SECONDS = 6.0


@pytest.mark.parametrize("quick", [0, 10])
def test_time_left_goes_by_the_items_that_take_time(capsys, monkeypatch, quick):
    """Those of an earlier run, which are taken over at once, say nothing of it."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for item in progress.track(range(30), "layers", unit="layers", quick=quick):
        clock[0] += SECONDS if item >= quick else 0.1
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) > 5 and last.endswith(f"30 layers in {clock[0]:.1f} s")
    for line in lines:
        done, left = map(int, re.search(r"(\d+)/30 layers, .* about (\d+) s left", line).groups())
        assert left == pytest.approx((30 - done) * SECONDS, abs=1)


def test_no_time_is_guessed_from_items_that_took_none(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for _ in progress.track(range(4), "layers", unit="layers", quick=3):
        clock[0] += 20
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == "  layers: 1/4 layers, 20 s so far"

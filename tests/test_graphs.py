"""The pool that a decoder's graphs are captured into; torch's part is played on the CPU."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch

from common.running.graphs import GraphPool


class Torch:
    """What torch does as a graph is captured: work runs on another stream, which stays the current
    one where the end of the capture fails.
    """

    def __init__(self, monkeypatch):
        self.stream, self.end_fails, self.ended, self.reset = "own", None, 0, []
        handles, torch_ = itertools.count(), self

        class Graph:
            def reset(self):
                torch_.reset.append(self)

        class Capture:
            def __init__(self, graph, pool):
                self.before = torch_.stream

            def __enter__(self):
                torch_.stream = "of captures"

            def __exit__(self, *_):
                torch_.ended += 1
                if torch_.end_fails:
                    raise RuntimeError(torch_.end_fails)
                torch_.stream = self.before

        for name, stand_in in (
            ("graph_pool_handle", lambda: (0, next(handles))),
            ("current_stream", lambda: self.stream),
            ("set_stream", lambda stream: setattr(self, "stream", stream)),
            ("CUDAGraph", Graph),
            ("graph", Capture),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.fixture
def played(monkeypatch) -> Torch:
    return Torch(monkeypatch)


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_what_was_captured(played):
    pool = GraphPool()
    graph, found = pool.capture(lambda: [played.stream])
    assert isinstance(graph, torch.cuda.CUDAGraph) and found == ["of captures"]
    assert played.stream == "own" and played.ended == 1 and not played.reset


@pytest.mark.parametrize("end", [None, "operation failed due to a previous error"])
def test_a_capture_without_memory_leaves_nothing_behind(played, end):
    pool, left = GraphPool(), []

    def work():
        tensor = torch.zeros(3)
        left.append(weakref.ref(tensor))
        out_of_memory()

    first = pool.handle
    played.end_fails = end
    with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        pool.capture(work)
    assert played.stream == "own" and played.ended == len(played.reset) == 1
    assert left[0]() is None
    # A pool without graphs cannot be used again, one with others goes on.
    assert pool.handle != first
    played.end_fails = None
    pool.capture(list)
    second = pool.handle
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pool.capture(out_of_memory)
    assert pool.handle == second


def test_no_memory_for_the_graph_itself(played):
    pool, played.end_fails = GraphPool(), "CUDA error: out of memory"
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA error"):
        pool.capture(list)
    assert played.stream == "own" and len(played.reset) == 1


@pytest.mark.parametrize("end", [None, "the capture was broken off"])
def test_other_errors_are_passed_on(played, end):
    pool, played.end_fails = GraphPool(), end
    with pytest.raises(RuntimeError, match=end or "no such kernel") as caught:
        pool.capture(lambda: (_ for _ in ()).throw(RuntimeError("no such kernel")).send(None))
    assert not isinstance(caught.value, torch.cuda.OutOfMemoryError) and played.stream == "own"

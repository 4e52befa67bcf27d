"""The pool that a decoder's graphs are captured into; torch's part is played on the CPU."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch

from common.base import device_memory
from common.running.graphs import GraphPool

CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
MIB = 2**20


class Torch:
    """What torch does as a graph is captured: work runs on another stream, which stays the current
    one where the end of the capture fails. Of memory, bytes are set by hand.
    """

    def __init__(self, monkeypatch):
        self.stream, self.end_fails, self.ended, self.reset = "own", None, 0, []
        self.total, self.reserved, self.allocated = 4096 * MIB, 0, 0
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
            ("mem_get_info", lambda _: (self.total - self.reserved, self.total)),
            ("memory_reserved", lambda _: self.reserved),
            ("memory_allocated", lambda _: self.allocated),
            ("set_per_process_memory_fraction", lambda *_: None),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(device_memory, "_limits", {})

    def take(self, reserved: int, allocated: int) -> None:
        self.reserved += reserved * MIB
        self.allocated += allocated * MIB


@pytest.fixture
def played(monkeypatch) -> Torch:
    return Torch(monkeypatch)


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_what_was_captured(played):
    pool = GraphPool(CARD)
    graph, found = pool.capture(lambda: [played.stream])
    assert isinstance(graph, torch.cuda.CUDAGraph) and found == ["of captures"]
    assert played.stream == "own" and played.ended == 1 and not played.reset


@pytest.mark.parametrize("end", [None, "operation failed due to a previous error"])
def test_a_capture_without_memory_leaves_nothing_behind(played, end):
    pool, left = GraphPool(CARD), []

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
    pool, played.end_fails = GraphPool(CARD), "CUDA error: out of memory"
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA error"):
        pool.capture(list)
    assert played.stream == "own" and len(played.reset) == 1


@pytest.mark.parametrize("end", [None, "the capture was broken off"])
def test_other_errors_are_passed_on(played, end):
    pool, played.end_fails = GraphPool(CARD), end
    with pytest.raises(RuntimeError, match=end or "no such kernel") as caught:
        pool.capture(lambda: (_ for _ in ()).throw(RuntimeError("no such kernel")).send(None))
    assert not isinstance(caught.value, torch.cuda.OutOfMemoryError) and played.stream == "own"


def test_what_lies_idle_in_a_pool_is_not_available(played):
    def available() -> int:
        return device_memory.available(CARD) // MIB

    whole = available()
    played.take(300, 100)  # what torch keeps in its common pool serves everybody
    assert available() == whole - 100
    pool, other = GraphPool(CARD), GraphPool(OTHER)
    pool.capture(lambda: played.take(200, 10))
    assert pool.idle == 190 * MIB and available() == whole - 300
    # The next graph is given what the first does not hold, and a little more.
    pool.capture(lambda: played.take(20, 50))
    assert pool.idle == 160 * MIB and available() == whole - 320
    other.capture(lambda: played.take(400, 0))  # on another GPU
    assert other.idle == 400 * MIB and available() == whole - 320
    played.take(-400, 0)
    # A capture that fails leaves its memory with the graphs that are there.
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pool.capture(lambda: played.take(30, 0) or out_of_memory())
    assert available() == whole - 350
    played.take(0, -60)  # the graphs are gone, and with them what they put out
    del pool
    assert available() == whole - 100


def test_a_pool_without_graphs_keeps_no_memory(played):
    pool = GraphPool(CARD)
    before = device_memory.available(CARD)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pool.capture(lambda: played.take(30, 0) or out_of_memory())
    assert pool.idle == 0 and device_memory.available(CARD) == before


def test_the_limit_of_a_process_counts_it(played):
    """Where the GPU has more than this process may take."""
    device_memory.limit(CARD, 2)
    before, pool = device_memory.available(CARD), GraphPool(CARD)
    pool.capture(lambda: played.take(64, 4))
    assert device_memory.available(CARD) == before - 64 * MIB

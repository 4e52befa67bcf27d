"""Seconds by phase of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by phase: `with watch("load"): ...`. On a GPU they are read off the stream, and
    nothing is waited for before `seconds` is asked.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((phase, start, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for phase, start, end in self._spans:
            span = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            found[phase] = found.get(phase, 0.0) + span
        return found

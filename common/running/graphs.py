"""CUDA graphs that are captured into one pool of memory, and what becomes of a capture that the
memory does not suffice for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from common.base.device_memory import Reserve, unused

Found = TypeVar("Found")


class GraphPool(Reserve):
    """Captures graphs that share memory, as they run one after the other. It is theirs alone."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.handle = torch.cuda.graph_pool_handle()
        # How many graphs hold memory in it.
        self._graphs = 0

    def capture(self, work: Callable[[], Found]) -> tuple[torch.cuda.CUDAGraph, Found]:
        """Record what `work` launches. Returns the graph and what `work` returned.

        Raises:
            torch.cuda.OutOfMemoryError: the memory does not suffice. All is as it was before, the
                current stream too.
        """
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        problem = None
        try:
            with torch.cuda.graph(graph, pool=self.handle):
                before = unused(self.device)
                try:
                    found = work()
                except torch.cuda.OutOfMemoryError as error:
                    # Not passed on as it is: its frames hold the tensors on the way, which go back
                    # to the pool once this block is left.
                    problem = str(error)
                self.idle += unused(self.device) - before
        except RuntimeError as error:
            # The end of a capture, too, takes memory, and may refuse what was broken off. Then the
            # stream of the capture is still the current one.
            torch.cuda.set_stream(stream)
            if problem is None and "out of memory" not in str(error):
                raise
            problem = problem or str(error)
        if problem is None:
            self._graphs += 1
            return graph, found
        graph.reset()
        if self._graphs == 0:
            # torch gives up a pool without graphs, and takes none in again while anything is left
            # there, such as cuBLAS's workspace.
            self.handle, self.idle = torch.cuda.graph_pool_handle(), 0
        raise torch.cuda.OutOfMemoryError(problem)

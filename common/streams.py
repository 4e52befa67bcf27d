"""Hidden states of many windows, in chunks that fit a card, and how they pass through a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.models import SourceModel
from common.progress import say

# Tokens that go through a layer at once.
CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}
# Hidden states stay on the card while they take at most this share of its free memory.
_DEVICE_SHARE = 0.25


def embed_chunks(source: SourceModel, windows: Tensor) -> list[Tensor]:
    """Hidden states of all windows before the first layer, in chunks, on the device where they fit."""
    home = source.device
    size = windows.numel() * source.config.hidden_size * source.dtype.itemsize
    if home.type == "cuda" and size > _DEVICE_SHARE * torch.cuda.mem_get_info(home)[0]:
        home = torch.device("cpu")
    rows = max(1, CHUNK_TOKENS[source.device.type] // windows.shape[1])
    return [source.embed(chunk).to(home) for chunk in windows.split(rows)]


def run_layer(module: nn.Module, hidden: Tensor, arguments: dict) -> Tensor:
    """Hidden states [batch, length, hidden] after a decoder layer."""
    output = module(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def advance(forward: Callable[[Tensor], Tensor], chunks: list[Tensor], device: torch.device) -> None:
    """Replace hidden states, in chunks, by those after a layer; one chunk at a time, each where it was."""
    def visit(i: int) -> None:
        chunks[i] = forward(chunks[i].to(device)).to(chunks[i].device)

    each_chunk(visit, chunks)


def each_chunk(visit: Callable[[int], None], chunks: list[Tensor], others: list[Tensor] | None = None) -> None:
    """Call visit(i) for every chunk [batch, length, hidden]. One that the card has no room for is halved, and so is what comes
    after; `visit` must not have changed anything when it runs out of memory.

    Args:
        others: a second list, cut alike.
    Raises:
        UserError: there is no room for a single window.
    """
    i, most = 0, None
    while i < len(chunks):
        if most is None or len(chunks[i]) <= most:
            try:
                visit(i)
                i += 1
                continue
            except torch.cuda.OutOfMemoryError:
                # Nothing is done here, where the exception still holds what was allocated.
                pass
            if len(chunks[i]) == 1:
                raise UserError(f"the GPU has no room for one calibration window of {chunks[i].shape[1]} tokens; lower "
                                "--calib-length, or use --device cpu")
            most = len(chunks[i]) // 2
            say(f"the GPU has no room for {len(chunks[i]) * chunks[i].shape[1]} tokens at once; going on with {most} windows of "
                f"{chunks[i].shape[1]}")
            torch.cuda.empty_cache()
        for part in (chunks,) if others is None else (chunks, others):
            part[i:i + 1] = [half.clone() for half in part[i].split(most)]

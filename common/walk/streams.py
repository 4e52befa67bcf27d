"""Hidden states of many windows, in chunks that fit a GPU, and how they pass through a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.base import device_memory
from common.base.errors import UserError
from common.base.progress import say
from common.model import memory
from common.model.source import SourceModel

# Tokens that go through a layer at once.
CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}
# Hidden states stay on the GPU while they take at most this share of what this process has left.
_DEVICE_SHARE = 1 / 3


@dataclass
class Streams:
    """What travels through the layers as they are quantized.

    reference, probed: the probe text [1, length, hidden] in the original and the quantized model.
    hidden: calibration hidden states, in chunks [batch, length, hidden], of the quantized model, or
        of the original with `Method.original_inputs`; None without calibration.
    originals: the same of the original model, to catch up with and to tune towards; None without
        `Method.catch_up` and `Method.tune_steps`.
    probe_arguments, arguments: for each layer, how it is called on the probe and on a window.
    """

    reference: Tensor
    probed: Tensor
    hidden: list[Tensor] | None
    originals: list[Tensor] | None
    probe_arguments: list[dict]
    arguments: list[dict] | None


def home_of(size: int, device: torch.device) -> torch.device:
    """Where hidden states of `size` bytes in all are kept: on the device, or on the host where they
    would take too much of it.
    """
    return (
        device if size <= _DEVICE_SHARE * device_memory.available(device) else torch.device("cpu")
    )


def hidden_bytes(source: SourceModel, windows: Tensor) -> int:
    """Bytes of the hidden states of token ids [samples, length]."""
    return windows.numel() * source.config.hidden_size * source.dtype.itemsize


def token_chunks(source: SourceModel, windows: Tensor) -> tuple[Tensor, ...]:
    """Token ids [samples, length] in chunks that pass through a layer at once."""
    tokens = memory.tokens_at_once(
        CHUNK_TOKENS[source.device.type], source.config, source.dtype.itemsize, source.device
    )
    return windows.split(max(1, tokens // windows.shape[1]))


def embed_chunks(
    source: SourceModel, chunks: tuple[Tensor, ...], home: torch.device
) -> list[Tensor]:
    """Hidden states before the first layer of token ids in chunks [batch, length], kept on
    `home`."""
    return [source.embed(chunk).to(home) for chunk in chunks]


def run_layer(module: nn.Module, hidden: Tensor, arguments: dict) -> Tensor:
    """Hidden states [batch, length, hidden] after a decoder layer."""
    output = module(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def advance(
    forward: Callable[[Tensor], Tensor], chunks: list[Tensor], device: torch.device
) -> None:
    """Replace hidden states, in chunks, by those after a layer; one chunk at a time, each where it
    was.
    """

    def visit(i: int) -> None:
        chunks[i] = forward(chunks[i].to(device)).to(chunks[i].device)

    each_chunk(visit, chunks)


def each_chunk(
    visit: Callable[[int], None], chunks: list[Tensor], others: list[Tensor] | None = None
) -> None:
    """Call visit(i) for every chunk [batch, length, hidden]. One that the GPU has no room for is
    halved, and so is what comes after; `visit` must not have changed anything when it runs out of
    memory.

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
                raise UserError(
                    f"the GPU has no room for one calibration window of {chunks[i].shape[1]} "
                    "tokens; lower --calib-length, or use --device cpu"
                )
            most = len(chunks[i]) // 2
            say(
                f"the GPU has no room for {len(chunks[i]) * chunks[i].shape[1]} tokens at once; "
                f"going on with {most} windows of {chunks[i].shape[1]}"
            )
            torch.cuda.empty_cache()
        for part in (chunks,) if others is None else (chunks, others):
            part[i : i + 1] = [half.clone() for half in part[i].split(most)]

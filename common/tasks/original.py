"""The original model beside a quantized one: its last hidden states, its head for their logits.

The original is walked through layer by layer, so it is never in memory whole beside the other; only
its last hidden states are kept, on disk for the next configuration of a batch, and logits are made
from them a slice at a time.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.base.files import replacing
from common.base.progress import track
from common.model.source import SourceModel
from common.text.windows import Windows
from common.walk.streams import (
    advance,
    embed_chunks,
    hidden_bytes,
    home_of,
    run_layer,
    token_chunks,
)


@torch.no_grad()
def last_hidden_states(source: SourceModel, windows: Tensor) -> Tensor:
    """Hidden states [samples, length, hidden] after the last decoder layer, on the host, of token
    ids [samples, length].
    """
    arguments = source.layer_arguments(windows.shape[1])
    chunks = embed_chunks(
        source, token_chunks(source, windows), home_of(hidden_bytes(source, windows), source.device)
    )
    for index in track(range(source.num_layers), "original model", unit="layers"):
        layer = source.load_layer(index)
        advance(partial(run_layer, layer, arguments=arguments[index]), chunks, source.device)
        source.release_layer(index)
    return torch.cat([chunk.cpu() for chunk in chunks])


def hidden_states(source: SourceModel, windows: Windows, folder: Path) -> Tensor:
    """`last_hidden_states` [samples, length, hidden], from a file in `folder` where this was
    computed before.

    The file's name is a hash of the tokens, the model's files and how it was computed. Above two
    gigabytes nothing is kept.
    """
    identity = repr(
        (
            windows.fingerprint,
            source.tensors.describe(),
            str(source.dtype),
            source.device.type,
            torch.__version__,
        )
    )
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    try:
        return load_file(path)["states"]
    except (OSError, SafetensorError, KeyError):
        states = last_hidden_states(source, windows.tokens)
    if states.nbytes < 2**31:
        with replacing(path) as unfinished:
            save_file({"states": states}, unfinished)
    return states


def place_head(source: SourceModel, model: nn.Module) -> None:
    """Bring the original's head to its device, for `SourceModel.logits` beside `model`; where that
    has the same head, its own serves both.
    """
    head, own = source.model.lm_head, getattr(model.lm_head, "weight", None)
    if (
        own is not None
        and (own.shape, own.dtype) == (head.weight.shape, head.weight.dtype)
        and all(
            torch.equal(one.to(own.device), other)
            for one, other in zip(head.weight.split(4096), own.split(4096), strict=True)
        )
    ):
        head.weight = nn.Parameter(own, requires_grad=False)
    else:
        head.to(source.device)

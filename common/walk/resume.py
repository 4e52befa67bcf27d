"""The walk past layers that an earlier run finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from common.numerics.grid import QuantizedLinear
from common.walk.method import Layer, Method
from common.walk.streams import Streams, advance


@dataclass
class Resumption:
    """Layers that an earlier run finished.

    records: of each, by index.
    restore: puts layer `index`'s weights into a module, and returns the codes of its linears.
    tuned: what tuning their scales found (`tuning.Tuned.describe`), if that was done.
    """

    records: list[dict]
    restore: Callable[[int, nn.Module], dict[str, QuantizedLinear]]
    tuned: dict | None = None


def replay(
    layer: Layer,
    method: Method,
    streams: Streams,
    device: torch.device,
    restore: Callable[[int, nn.Module], dict[str, QuantizedLinear]],
) -> dict[str, QuantizedLinear]:
    """Do to the streams what quantizing the layer did, and put its finished weights into the
    module. Returns their codes.
    """
    if streams.originals is not None:
        with method.as_original():
            advance(layer.forward, streams.originals, device)
    if method.original_inputs:
        advance(layer.forward, streams.hidden, device)
    codes = restore(layer.index, layer.module)
    for name in layer.family.linears:
        method.install_rounding(layer.module.get_submodule(name))
    return codes

"""A layer that the walk is done with, kept for what is done to the whole model at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.base import host_memory, parallel
from common.base.progress import say
from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear
from common.walk.streams import home_of

# Of the host's memory that is left, what the codes of all layers may take.
_HOST_SHARE = 1 / 2


@dataclass
class FinishedLayer:
    """A layer that the walk is done with: its module, whose linears hold no weights, their codes,
    on any device, and how it is called on a window.
    """

    module: nn.Module
    codes: dict[str, QuantizedLinear]
    arguments: dict

    @classmethod
    def keep(
        cls,
        module: nn.Module,
        codes: dict[str, QuantizedLinear],
        arguments: dict,
        home: torch.device,
    ) -> FinishedLayer:
        """A layer whose codes are kept on `home`, and whose weights are let go."""
        layer = cls(module, {name: moved(found, home) for name, found in codes.items()}, arguments)
        layer.clear()
        return layer

    def clear(self) -> None:
        """Leave the linears without weights."""
        for name in self.codes:
            linear = self.module.get_submodule(name)
            empty = torch.empty(linear.out_features, linear.in_features, device="meta")
            set_weight(linear, nn.Parameter(empty, requires_grad=False))

    @torch.no_grad()
    def put(self, dtype: torch.dtype, device: torch.device) -> None:
        """Give the module the weights that its codes stand for."""
        for name, found in self.codes.items():
            weight = moved(found, device).dequantize(dtype)
            set_weight(self.module.get_submodule(name), nn.Parameter(weight, requires_grad=False))


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Put a tensor [out, in], which may carry a gradient, in the place of a linear's weights."""
    del linear.weight
    linear.weight = weight


def moved(quantized: QuantizedLinear, device: torch.device) -> QuantizedLinear:
    """The same codes on a device."""
    return quantized.map(lambda tensor: tensor.to(device))


def home_of_codes(source: SourceModel, grid: Grid) -> torch.device | None:
    """Where the codes of all layers, a byte for each weight, are kept until their scales are tuned.
    None, and said, where neither the GPU nor the host has room.
    """
    layer = source.model.model.layers[0]
    size = source.num_layers * sum(
        QuantizedLinear.bytes_of(linear.out_features, linear.in_features, grid)
        for linear in map(layer.get_submodule, source.family.linears)
    )
    # A ninth of the GPU at most: what solves the layers needs it more.
    home = home_of(3 * size, source.device)
    # The host has the codes of every process.
    room = _HOST_SHARE * host_memory.available()
    fits = home.type != "cpu" or size * parallel.size() <= room
    if all(parallel.gather(fits)):
        return home
    say(
        f"scales are not tuned: the codes of all layers, {size / 2**30:.1f} GiB, would take more "
        "than half of what is left of the host's memory"
    )
    return None

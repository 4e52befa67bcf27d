"""A layer that the walk is done with, kept for what is done to the whole model at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.numerics.grid import QuantizedLinear


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

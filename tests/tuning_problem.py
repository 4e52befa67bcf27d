"""What tests of tuned scales tune: a model whose scales are off."""

from dataclasses import replace

import torch
from conftest import build_tiny, save_tiny
from torch.func import functional_call

from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear, grouped, min_max, round_scale
from common.tasks.original import last_hidden_states
from common.walk import tuning
from common.walk.finished import FinishedLayer
from common.walk.tuning import tune_scales

CPU = torch.device("cpu")
LENGTH = 64
# Of the twelve windows.
HELD_OUT = torch.arange(12) % tuning.HELD_OUT == 0


def rounded(weight, grid, generator):
    """Nearest codes, their scales then off by a tenth, so that there is something to tune."""
    scale, zero_point = min_max(grouped(weight, grid), grid, scale_dtype=torch.bfloat16)
    found = QuantizedLinear.nearest(weight, scale, zero_point, grid)
    off = scale * torch.exp(0.1 * torch.randn(scale.shape, generator=generator))
    return replace(found, scale=round_scale(off, torch.bfloat16))


class Problem:
    """A tiny model on a device, its rounded layers, whose codes lie on `home`, and twelve windows
    with the original's last hidden states.
    """

    def __init__(
        self,
        folder,
        architecture="llama",
        bits=3,
        size=32,
        dtype=torch.float32,
        device=CPU,
        home=CPU,
    ):
        self.model = build_tiny(architecture, True).requires_grad_(False)
        save_tiny(folder, architecture, True)
        self.source = source = SourceModel(str(folder), device, dtype)
        generator = torch.Generator().manual_seed(5)
        self.windows = torch.randint(0, 320, (12, LENGTH), generator=generator)
        self.targets = list(last_hidden_states(source, self.windows).split([5, 4, 3]))
        grid, self.layers = Grid(bits, size), []
        for index, arguments in enumerate(source.layer_arguments(LENGTH)):
            module = source.load_layer(index)
            codes = {
                name: rounded(module.get_submodule(name).weight.float().cpu(), grid, generator)
                for name in source.family.linears
            }
            self.layers.append(FinishedLayer.keep(module, codes, arguments, home))
        self.codes = [layer.codes for layer in self.layers]

    def tune(self, steps):
        return tune_scales(self.source, self.layers, self.windows, self.targets, steps)

    def divergence(self, weights, windows):
        """Mean over tokens of the divergence, by transformers' own model in float64, whose linears
        have `weights` [out, in] by full name.
        """
        model = self.model.double()
        wanted = model(windows).logits.log_softmax(-1)
        found = functional_call(model, weights, (windows,)).logits.log_softmax(-1)
        total = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum")
        return total / windows.numel()

    def by_name(self, layers):
        """What lists of dicts by layer hold, by full name."""
        return {
            f"model.layers.{index}.{name}.weight": value
            for index, layer in enumerate(layers)
            for name, value in layer.items()
        }

    def weights(self, codes):
        return {name: found.dequantize().double() for name, found in self.by_name(codes).items()}

"""The walk over decoder layers: statistics, the method's rounding, propagation, a record per linear.

A method is a `Method`: what it needs, and a function that rounds one layer. Everything else is the same for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.grid import Grid, QuantizedLinear
from common.models import LINEAR_GROUPS, LINEARS, SourceModel
from common.progress import track
from common.statistics import InputStatistics, group_inputs, new_statistics

# Tokens that go through a layer at once.
CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384}
# Hidden states stay on the card while they take at most this share of its free memory.
_DEVICE_SHARE = 0.25


@dataclass
class Layer:
    """A decoder layer in the course of being quantized."""

    index: int
    module: nn.Module
    grid: Grid
    scale_dtype: torch.dtype
    # One for each of LINEAR_GROUPS; None for a method that needs no calibration.
    statistics: list[InputStatistics] | None = None

    def weight(self, name: str) -> Tensor:
        """The weights [out, in] of linear `name`, in float32."""
        return self.module.get_submodule(name).weight.float()

    def where(self, name: str) -> str:
        return f"model.layers.{self.index}.{name}"


@dataclass(frozen=True)
class Method:
    """A quantization method.

    quantize_layer returns the codes of every linear of a layer (`models.LINEARS`).
    """

    name: str
    quantize_layer: Callable[[Layer], dict[str, QuantizedLinear]]
    needs_calibration: bool = True


@dataclass
class Stopwatch:
    """Wall-clock seconds by phase; device work is waited for at the end of each."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class WalkResult:
    """What the walk leaves behind, beside the layers it handed on.

    linears: by full name, bits, group_size and relative_output_error, which is ‖x(Q - W)ᵀ‖ / ‖xWᵀ‖ over the probe text.
    probe_logits, baseline_probe_logits: [length, vocabulary] of the quantized and of the original model.
    """

    linears: dict[str, dict]
    probe_logits: Tensor
    baseline_probe_logits: Tensor


@torch.inference_mode()
def quantize_model(source: SourceModel, method: Method, grid: Grid, windows: Tensor | None, probe: Tensor,
                   finished: Callable[[int, nn.Module, dict[str, QuantizedLinear]], None],
                   watch: Stopwatch) -> WalkResult:
    """Quantize every decoder layer in turn; each sees the output of the quantized layers before it.

    Args:
        windows: calibration tokens [samples, length], or None for a method that needs none.
        probe: tokens [1, length] of a fixed text that travels along; errors and recorded logits are measured on it.
        finished: called with (index, layer, codes) once a layer holds its dequantized weights.
    Raises:
        UserError: a layer whose codes or scales are not finite; names it.
    """
    linears: dict[str, dict] = {}
    with watch("load"):
        probe_arguments = source.layer_arguments(probe.shape[1])
        reference = source.embed(probe)
        probed = reference
        hidden, arguments = None, None
        if windows is not None:
            arguments = source.layer_arguments(windows.shape[1])
            hidden = _embed_chunks(source, windows)
    for index in track(range(source.num_layers), f"{method.name} {grid.bits}-bit layers", unit="layers"):
        with watch("load"):
            module = source.load_layer(index)
            layer = Layer(index, module, grid, source.storage_dtype)
        with watch("statistics"):
            if windows is not None:
                layer.statistics = _collect(module, hidden, arguments[index], source)
        with watch("record"):
            reference = _forward(module, reference, probe_arguments[index])
            inputs: dict[int, Tensor] = {}
            with group_inputs(module, inputs.__setitem__):
                _forward(module, probed, probe_arguments[index])
        with watch("solve"):
            codes = method.quantize_layer(layer)
        with watch("record"):
            for group_index, group in enumerate(LINEAR_GROUPS):
                for name in group.linears:
                    record = _install(layer, name, codes[name], inputs[group_index])
                    linears[layer.where(name)] = record
            probed = _forward(module, probed, probe_arguments[index])
        with watch("propagate"):
            if windows is not None and index + 1 < source.num_layers:
                for i, chunk in enumerate(hidden):
                    hidden[i] = _forward(module, chunk.to(source.device), arguments[index]).to(chunk.device)
        with watch("write"):
            finished(index, module, codes)
            source.release_layer(index)
    with watch("record"):
        return WalkResult(linears, source.logits(probed)[0], source.logits(reference)[0])


def _embed_chunks(source: SourceModel, windows: Tensor) -> list[Tensor]:
    """Hidden states of all windows before the first layer, in chunks, on the device where they fit."""
    home = source.device
    size = windows.numel() * source.config.hidden_size * source.dtype.itemsize
    if home.type == "cuda" and size > _DEVICE_SHARE * torch.cuda.mem_get_info(home)[0]:
        home = torch.device("cpu")
    rows = max(1, CHUNK_TOKENS[source.device.type] // windows.shape[1])
    return [source.embed(chunk).to(home) for chunk in windows.split(rows)]


def _forward(module: nn.Module, hidden: Tensor, arguments: dict) -> Tensor:
    output = module(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def _collect(module: nn.Module, hidden: list[Tensor], arguments: dict, source: SourceModel) -> list[InputStatistics]:
    statistics = new_statistics(module, source.device)
    with group_inputs(module, lambda group, inputs: statistics[group].add(inputs)):
        for chunk in hidden:
            _forward(module, chunk.to(source.device), arguments)
    return [group.finish() for group in statistics]


def _install(layer: Layer, name: str, quantized: QuantizedLinear, inputs: Tensor) -> dict:
    """Put the dequantized weights into the layer; returns the linear's record."""
    linear = layer.module.get_submodule(name)
    weight = quantized.dequantize(linear.weight.dtype)
    before = nn.functional.linear(inputs, linear.weight).float()
    change = nn.functional.linear(inputs, weight - linear.weight).float()
    error = (change.norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny)).item()
    if not torch.isfinite(quantized.scale).all() or not torch.isfinite(weight).all():
        raise UserError(f"{layer.where(name)}: quantization gave NaN or Inf; use other calibration data or --dtype float32")
    linear.weight.data = weight
    return {"bits": quantized.grid.bits, "group_size": quantized.grid.group_size, "relative_output_error": error}

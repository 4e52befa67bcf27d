"""The walk over decoder layers: statistics, the method's rounding, propagation, a record per linear.

A method is a `Method`: what it needs, and a function that rounds one layer. Everything else is the same for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from common import parallel
from common.architecture import Family, LinearGroup, family_of
from common.errors import UserError
from common.grid import Grid, QuantizedLinear, scale_type
from common.models import SourceModel
from common.online import OnlineTransforms
from common.probe import check_finite, overflow
from common.progress import say, track
from common.rounding import catch_up
from common.statistics import InputStatistics, add_in_parts, group_inputs, new_statistics
from common.streams import advance, cut, each_chunk, embed_chunks, hidden_bytes, home_of, run_layer


@dataclass
class Layer:
    """A decoder layer in the course of being quantized."""

    index: int
    module: nn.Module
    grid: Grid
    scale_dtype: torch.dtype
    # None for a method that needs no calibration.
    statistics: dict[LinearGroup, InputStatistics] | None = None
    # Calibration hidden states before the layer, in chunks [batch, length, hidden], and how to run the layer on one.
    inputs: list[Tensor] | None = None
    forward: Callable[[Tensor], Tensor] | None = None
    # The original model's hidden states after the layer, in the same chunks; None without `Method.catch_up`.
    targets: list[Tensor] | None = None
    # What a method wants to have recorded about the layer, such as the settled share of a learned rounding.
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return family_of(self.module)

    @property
    def config(self):
        return self.module.self_attn.config

    def weight(self, name: str) -> Tensor:
        """The weights [out, in] of linear `name`, in float32."""
        return self.module.get_submodule(name).weight.float()

    def own_weight(self, name: str) -> Tensor:
        """The rows of them that this process rounds: all, unless there are several processes (`parallel`)."""
        return parallel.own_rows(self.module.get_submodule(name).weight).float()

    def choose_scale_type(self, storage_dtype: torch.dtype) -> None:
        """Set the type of the layer's scales, which its linears' weights as they are now decide (`grid.scale_type`)."""
        self.scale_dtype = scale_type(map(self.weight, self.family.linears), self.grid, storage_dtype)

    def stacked_weight(self, group: LinearGroup) -> Tensor:
        """The own weights of a group's linears, one under the other: they share the input."""
        return torch.cat([self.own_weight(name) for name in group.linears])

    def split(self, group: LinearGroup, codes: Tensor, scale: Tensor, zero_point: Tensor) -> dict[str, QuantizedLinear]:
        """The linears of a group by name, out of what was found for their stacked weights."""
        sizes = [len(parallel.own_rows(self.module.get_submodule(name).weight)) for name in group.linears]
        parts = zip(group.linears, codes.split(sizes), scale.split(sizes), zero_point.split(sizes), strict=True)
        return {name: QuantizedLinear(*tensors, self.grid) for name, *tensors in parts}

    def groups(self) -> list[tuple[LinearGroup, InputStatistics | None]]:
        """The groups of linears and their statistics."""
        return [(group, self.statistics and self.statistics[group]) for group in self.family.groups]

    def where(self, name: str) -> str:
        return f"model.layers.{self.index}.{name}"


NOTHING, RANGES, GRAM = "nothing", "ranges", "gram"


@dataclass(frozen=True)
class Method:
    """A quantization method.

    quantize_layer: returns the codes of a layer's `own_weight` of every linear. What it does to a row may not
        depend on the other rows.
    needs: GRAM, statistics of the quantized layers' output; RANGES, statistics without Gram matrices in one pass through
        the original layers, for 8-bit methods whose errors are small; or NOTHING.
    rewrite_model, rewrite_layer: change the model without changing its function before anything is measured, the small
        parts once and each layer when it is loaded, its inputs known and its statistics not (a rotation).
    prepare_layer: the same for a layer whose statistics are known, magnitudes too (a scaling); has to keep them true.
    catch_up: share of the residual stream's lag behind the original model that o_proj and down_proj are made to recover
        before they are rounded (`rounding.catch_up`); needs GRAM, and a second pass through the original layers.
    activation_bits: what a plain load rounds the inputs of the linears to, per token as they come.
    round_inputs: that rounding.
    online: what is done as the model runs and no plain load does; rewrite_layer attaches it.
    """

    name: str
    quantize_layer: Callable[[Layer], dict[str, QuantizedLinear]]
    needs: str = GRAM
    rewrite_model: Callable[[SourceModel], None] | None = None
    rewrite_layer: Callable[[Layer], None] | None = None
    prepare_layer: Callable[[Layer], None] | None = None
    catch_up: float = 0.0
    activation_bits: int | None = None
    round_inputs: Callable[[Tensor], Tensor] | None = None
    online: OnlineTransforms | None = None
    # rewrite_model gives a tied head weights of its own.
    unties: bool = False


class Stopwatch:
    """Seconds by phase. On a card they are read off the stream, and nothing is waited for before `seconds` is asked."""

    def __init__(self, device: torch.device):
        self._on_card = device.type == "cuda"
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_card:
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
        if self._on_card:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for phase, start, end in self._spans:
            span = start.elapsed_time(end) / 1000 if self._on_card else end - start
            found[phase] = found.get(phase, 0.0) + span
        return found


@dataclass
class WalkResult:
    """What the walk leaves behind, beside the layers it handed on.

    linears: by full name, bits, group_size and relative_output_error, which is ‖x(Q - W)ᵀ‖ / ‖xWᵀ‖ over the probe text.
    probe_logits, baseline_probe_logits: [length, vocabulary] of the quantized and of the original model.

    layer_notes: by layer index, what the method recorded.
    """

    linears: dict[str, dict]
    layer_notes: list[dict[str, float]]
    probe_logits: Tensor
    baseline_probe_logits: Tensor


@dataclass
class Resumption:
    """Layers that an earlier run finished: their records, and a function that puts layer `index`'s weights into a module."""

    records: list[dict]
    restore: Callable[[int, nn.Module], None]


@dataclass
class _Streams:
    """What travels through the layers.

    reference, probed: the probe text [1, length, hidden] in the original and the quantized model.
    hidden: calibration hidden states, in chunks [batch, length, hidden], of the quantized model (for RANGES the original).
    originals: the same of the original model, to catch up with.
    probe_arguments, arguments: for each layer, how it is called on the probe and on a window.
    """

    reference: Tensor
    probed: Tensor
    hidden: list[Tensor] | None
    originals: list[Tensor] | None
    probe_arguments: list[dict]
    arguments: list[dict] | None


@torch.no_grad()
def quantize_model(source: SourceModel, method: Method, grid: Grid, windows: Tensor | None, probe: Tensor,
                   finished: Callable[[int, nn.Module, dict[str, QuantizedLinear], dict], None], watch: Stopwatch,
                   round_ends: Callable[[], None] = lambda: None, resumption: Resumption | None = None) -> WalkResult:
    """Quantize every decoder layer in turn; each sees the output of the quantized layers before it.

    Args:
        windows: calibration tokens [samples, length], or None for a method that needs none.
        probe: tokens [1, length] of a fixed text that travels along; errors and recorded logits are measured on it.
        finished: called with (index, layer, codes, record) once a layer holds its dequantized weights.
        round_ends: called before the first layer, to round embedding and head.
        resumption: layers that need not be quantized again; the streams are led through them as they were then.
    Raises:
        UserError: a layer whose codes or scales are not finite, or activations that overflow; names the layer or the head.
    """
    records = list(resumption.records) if resumption else []
    resumed = len(records)
    with watch("load"):
        streams = _start(source, method, windows, probe, round_ends)
        source.move_ends(torch.device("cpu"))
    for index in track(range(source.num_layers), f"{method.name} {grid.bits}-bit layers", unit="layers"):
        with watch("load"):
            module = source.load_layer(index)
            layer = Layer(index, module, grid, source.storage_dtype)
        with watch("record"):
            streams.reference = run_layer(module, streams.reference, streams.probe_arguments[index])
        if windows is not None:
            layer.inputs = streams.hidden
            layer.forward = partial(run_layer, module, arguments=streams.arguments[index])
        if method.rewrite_layer:
            with watch("statistics"):
                method.rewrite_layer(layer)
                round_to_storage(module, source.family, source.storage_dtype)
        if index < resumed:
            with watch("resume"):
                _replay(layer, method, streams, source.device, resumption.restore)
        else:
            codes, record = _quantize_layer(layer, method, streams, source, watch)
            records.append(record)
            with watch("write"):
                finished(index, module, codes, record)
        with watch("propagate"):
            streams.probed = run_layer(module, streams.probed, streams.probe_arguments[index])
            if method.needs == GRAM and index + 1 < source.num_layers:
                advance(layer.forward, streams.hidden, source.device)
        source.release_layer(index)
        del layer
    # Embedding and head come back to the card, which may not have room for both.
    streams.hidden = streams.originals = None
    linears = {name: linear for record in records for name, linear in record["linears"].items()}
    with watch("record"):
        source.move_ends(source.device)
        logits = source.logits(streams.probed)[0], source.original_logits(streams.reference)[0]
        for found in logits:
            check_finite(found, f"{source.name}, the last layer or the head", source.dtype)
        return WalkResult(linears, [record["notes"] for record in records], *logits)


def _start(source: SourceModel, method: Method, windows: Tensor | None, probe: Tensor,
           round_ends: Callable[[], None]) -> _Streams:
    """The streams before the first layer, the model's small parts rewritten and rounded."""
    reference = source.embed(probe)
    if method.rewrite_model:
        method.rewrite_model(source)
        round_to_storage(source.model, source.family, source.storage_dtype)
    chunks, home, originals = (), source.device, None
    catches_up = bool(method.catch_up) and windows is not None and not source.family.normalises_output
    if method.catch_up and source.family.normalises_output:
        say(f"{source.family.model_type} normalises what attention and MLP add to the residual stream, so linears cannot catch "
            "up with its lag: --catch-up does nothing")
    if windows is not None:
        chunks = cut(source, windows)
        home = home_of((2 if catches_up else 1) * hidden_bytes(source, windows), source.device)
    if catches_up:
        originals = embed_chunks(source, chunks, home)
    round_ends()
    hidden, arguments = None, None
    if windows is not None:
        hidden, arguments = embed_chunks(source, chunks, home), source.layer_arguments(windows.shape[1])
        if originals is not None:
            # Chunks that nothing has changed yet are the same tensors, which need to pass through the first layer once.
            hidden = [old if torch.equal(old, new) else new for old, new in zip(originals, hidden, strict=True)]
    return _Streams(reference, source.embed(probe), hidden, originals, source.layer_arguments(probe.shape[1]), arguments)


def _quantize_layer(layer: Layer, method: Method, streams: _Streams, source: SourceModel, watch: Stopwatch,
                    ) -> tuple[dict[str, QuantizedLinear], dict]:
    """Quantize a layer and put the dequantized weights into it. Returns the codes and the record of the layer."""
    module = layer.module
    if streams.hidden is not None:
        with watch("statistics"):
            layer.statistics = _collect(layer, source.device, method, streams.originals)
            layer.targets = streams.originals
            _catch_up(layer, method.catch_up)
    with watch("solve"):
        layer.choose_scale_type(source.storage_dtype)
        if method.prepare_layer:
            method.prepare_layer(layer)
            round_to_storage(module, source.family, source.storage_dtype)
            layer.choose_scale_type(source.storage_dtype)
    with watch("record"):
        inputs: dict[LinearGroup, Tensor] = {}
        with group_inputs(module, inputs.__setitem__):
            run_layer(module, streams.probed, streams.probe_arguments[layer.index])
    with watch("solve"):
        codes = _exchange(layer, method.quantize_layer(layer))
    with watch("record"):
        found = [_install(layer, name, codes[name], inputs[group], method.round_inputs)
                 for group in layer.family.groups for name in group.linears]
        errors, finite = torch.stack([torch.stack(pair) for pair in found]).T.tolist()
    linears = {}
    for name, error, is_finite in zip(layer.family.linears, errors, finite, strict=True):
        if not is_finite:
            raise UserError(f"{layer.where(name)}: quantization gave NaN or Inf; use other calibration data or --dtype float32")
        if not math.isfinite(error):
            raise overflow(layer.where(name), streams.probed.dtype)
        linears[layer.where(name)] = {"bits": layer.grid.bits, "group_size": layer.grid.group_size,
                                      "relative_output_error": error}
    return codes, {"linears": linears, "notes": layer.notes}


def _exchange(layer: Layer, codes: dict[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    """The codes of all rows, out of those that each process found; of the notes, the least of all processes."""
    if parallel.size() == 1:
        return codes
    whole = {}
    for name in layer.family.linears:
        found, count = codes[name], layer.module.get_submodule(name).out_features
        whole[name] = QuantizedLinear(*(parallel.join_rows(tensor, count)
                                        for tensor in (found.codes, found.scale, found.zero_point)), layer.grid)
    for notes in parallel.gather(layer.notes):
        for key, value in notes.items():
            layer.notes[key] = min(value, layer.notes.get(key, value))
    return whole


def _replay(layer: Layer, method: Method, streams: _Streams, device: torch.device,
            restore: Callable[[int, nn.Module], None]) -> None:
    """Do to the streams what quantizing the layer did, and put its finished weights into the module."""
    if streams.originals is not None:
        with _paused(method):
            advance(layer.forward, streams.originals, device)
    if method.needs == RANGES:
        advance(layer.forward, streams.hidden, device)
    restore(layer.index, layer.module)
    for name in layer.family.linears:
        _round_inputs(layer.module.get_submodule(name), method.round_inputs)


def _paused(method: Method) -> AbstractContextManager:
    """A context in which layers run as the original ones would."""
    return method.online.paused() if method.online else nullcontext()


def _collect(layer: Layer, device: torch.device, method: Method, originals: list[Tensor] | None) -> dict[LinearGroup, InputStatistics]:
    """Statistics of every linear group over all calibration windows. For RANGES the inputs become the layer's outputs.

    The residual stream is normalised before it is read again, so an error that o_proj or down_proj adds to it counts
    relative to the token's size. A few tokens, the first of each text above all, carry values hundreds of times the
    usual; unweighted, they alone would decide how these two are rounded. By the square of their size they would count for
    nothing, and all other tokens rest their attention on them: they are weighed by one over the size itself. Where the
    output is normalised first, an error counts relative to the output's own size as well.

    Args:
        originals: hidden states of the original model before the layer; they become those after it.
    """
    statistics = new_statistics(layer.module, device, method.needs == GRAM, method.prepare_layer is not None)
    inputs: dict[LinearGroup, Tensor] = {}
    after_attention: list[Tensor] = []
    attention, mlp = layer.family.writing
    watch = layer.module.get_submodule(layer.family.reading[1].fed_by).register_forward_pre_hook(
        lambda _, arguments: after_attention.append(arguments[0]))
    with group_inputs(layer.module, inputs.__setitem__):
        def visit(i: int) -> None:
            chunk, original = layer.inputs[i].to(device), None
            after_attention.clear()
            inputs.clear()
            parted = originals is not None and (originals[i] is not layer.inputs[i] or method.online is not None)
            if parted:
                with _paused(method):
                    original = layer.forward(originals[i].to(device))
            output = layer.forward(chunk)
            lags, weights = {}, {attention: _token_weights(chunk), mlp: _token_weights(output)}
            if layer.family.normalises_output:
                weights = {group: found * _output_weights(layer, group, inputs[group]) for group, found in weights.items()}
            if parted:
                lags = {attention: after_attention[0] - after_attention[1], mlp: original - output}
                lags = {group: layer.family.lag_of_output(lag, layer.config) for group, lag in lags.items()}
            for group in layer.family.groups:
                add_in_parts(statistics[group], inputs[group], weights.get(group), lags.get(group))
            if originals is not None:
                originals[i] = (original if parted else output).to(originals[i].device)
            if method.needs == RANGES:
                layer.inputs[i] = output.to(layer.inputs[i].device)

        each_chunk(visit, layer.inputs, originals)
    watch.remove()
    return {group: found.finish() for group, found in statistics.items()}


def _catch_up(layer: Layer, share: float) -> None:
    """Change the weights of the linears that write the residual stream so that they make up for its lag."""
    for group, statistics in layer.groups():
        if statistics.lag is not None:
            weight, lag = layer.module.get_submodule(group.linears[0]).weight, parallel.own_rows(statistics.lag)
            changed = catch_up(layer.own_weight(group.linears[0]), statistics.gram, lag, share).to(weight.dtype)
            weight.data = parallel.join_rows(changed, len(weight))


def _token_weights(hidden: Tensor) -> Tensor:
    """One over the size of each token's hidden state [..., hidden], the root of its mean square: [...]."""
    return hidden.float().square().mean(-1).clamp(min=1e-12).rsqrt()


def _output_weights(layer: Layer, group: LinearGroup, inputs: Tensor) -> Tensor:
    """One over the mean square of the group's output for each token of its inputs [..., in]: [...]. What an error of the output
    is divided by, squared, where a norm follows.
    """
    linear = layer.module.get_submodule(group.linears[0])
    output = nn.functional.linear(inputs, linear.weight, linear.bias)           # past what is hooked to it
    return output.float().square().mean(-1).clamp(min=1e-12).reciprocal()


def round_to_storage(module: nn.Module, family: Family, dtype: torch.dtype) -> None:
    """Round what is stored as it is (norms, biases, embedding, head) to the stored type, so that memory equals file."""
    quantized = {f"{name}.weight" for name in family.linears}
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and name not in quantized:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _round_inputs(linear: nn.Module, round_inputs: Callable[[Tensor], Tensor] | None) -> None:
    """Let a linear round its inputs from now on."""
    if round_inputs:
        linear.register_forward_pre_hook(lambda _, arguments: round_inputs(arguments[0]))


def _install(layer: Layer, name: str, quantized: QuantizedLinear, inputs: Tensor,
             round_inputs: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Put the dequantized weights into the layer; returns the relative output error, and whether all is finite as 0 or 1."""
    linear = layer.module.get_submodule(name)
    weight = quantized.dequantize(linear.weight.dtype)
    before = nn.functional.linear(inputs, linear.weight).float()
    _round_inputs(linear, round_inputs)
    if round_inputs:
        change = nn.functional.linear(round_inputs(inputs), weight).float() - before
    else:
        change = nn.functional.linear(inputs, weight - linear.weight).float()
    error = change.norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny)
    linear.weight.data = weight
    return error, (torch.isfinite(quantized.scale).all() & torch.isfinite(weight).all()).float()

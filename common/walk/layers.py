"""The walk over decoder layers: statistics, the method's rounding, propagation, a record per
linear.

What differs from method to method is in its `Method`; all the rest is here, and the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from common.base import parallel
from common.base.errors import UserError
from common.base.progress import say, track
from common.base.stopwatch import Stopwatch
from common.model.architecture import Family, LinearGroup
from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear
from common.text.probe import check_finite, overflow
from common.walk.collecting import catch_up_layer, collect_statistics
from common.walk.finished import FinishedLayer, home_of_codes
from common.walk.inputs import group_inputs
from common.walk.method import Layer, Method
from common.walk.resume import Resumption, replay
from common.walk.streams import (
    Streams,
    advance,
    embed_chunks,
    hidden_bytes,
    home_of,
    run_layer,
    token_chunks,
)
from common.walk.tuning import Tuned, tune_scales

# Is handed index, module, codes by linear, and record of each finished layer.
LayerReceiver = Callable[[int, nn.Module, dict[str, QuantizedLinear], dict], None]
# Is handed the codes of all layers by index, whose scales alone are others than before, and what
# the tuning found.
ScaleReceiver = Callable[[list[dict[str, QuantizedLinear]], dict], None]


@dataclass
class WalkResult:
    """What the walk leaves behind, beside the layers it handed on.

    linears: by full name, bits, group_size and relative_output_error, which is ‖x(Q - W)ᵀ‖ / ‖xWᵀ‖
    over the probe text, before scales are tuned.
    probe_logits, baseline_probe_logits: [length, vocabulary] of the quantized and of the original
    model.
    layer_notes: by layer index, what the method recorded.
    tuned: what tuning the scales found (`Tuned.describe`); None where they were not.
    """

    linears: dict[str, dict]
    layer_notes: list[dict[str, float]]
    probe_logits: Tensor
    baseline_probe_logits: Tensor
    tuned: dict | None = None


@torch.no_grad()
def quantize_model(
    source: SourceModel,
    method: Method,
    grid: Grid,
    windows: Tensor | None,
    probe: Tensor,
    finished: LayerReceiver,
    watch: Stopwatch,
    round_embedding_and_head: Callable[[], None] = lambda: None,
    resumption: Resumption | None = None,
    rescaled: ScaleReceiver = lambda *_: None,
) -> WalkResult:
    """Quantize every decoder layer in turn; each sees the output of the quantized layers before it.

    Args:
        windows: calibration tokens [samples, length], or None for a method that needs none.
        probe: tokens [1, length] of a fixed text that travels along; errors and recorded logits are
            measured on it.
        finished: called with (index, layer, codes, record) once a layer holds its dequantized
            weights.
        round_embedding_and_head: called before the first layer, to round embedding and head.
        resumption: layers that need not be quantized again; the streams are led through them as
            they were then.
        rescaled: called after the last layer where tuned scales are better than those handed on.
    Raises:
        UserError: a layer whose codes or scales are not finite, or activations that overflow; names
            the layer or the head.
    """
    records = list(resumption.records) if resumption else []
    resumed = len(records)
    tuned, done = resumption.tuned if resumption else None, []
    with watch("load"):
        home = home_of_codes(source, grid) if method.tune_steps and not tuned else None
        tunes = home is not None
        streams = _start(source, method, windows, probe, round_embedding_and_head, tunes)
        source.move_vocabulary(torch.device("cpu"))
    for index in track(
        range(source.num_layers),
        f"{method.name} {grid.bits}-bit layers",
        unit="layers",
        quick=resumed,
    ):
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
                round_to_storage(module, source.family, source.storage_dtype, layer.where(""))
        if index < resumed:
            with watch("resume"):
                codes = replay(layer, method, streams, source.device, resumption.restore)
        else:
            codes, record = _quantize_layer(layer, method, streams, source, watch)
            records.append(record)
            with watch("write"):
                finished(index, module, codes, record)
        with watch("propagate"):
            streams.probed = run_layer(module, streams.probed, streams.probe_arguments[index])
            if windows is not None and not method.original_inputs and index + 1 < source.num_layers:
                advance(layer.forward, streams.hidden, source.device)
        if home is None:
            source.release_layer(index)
        else:
            done.append(FinishedLayer.keep(module, codes, streams.arguments[index], home))
        del layer
    # Embedding and head come back to the GPU, which may not have room for both.
    streams.hidden = None
    if done:
        found = _tune(source, method, streams, windows, done, probe, watch)
        if found:
            tuned = found.describe()
            if found.better:
                with watch("write"):
                    rescaled(found.codes, tuned)
        for index in range(source.num_layers):
            source.release_layer(index)
    streams.originals = None
    linears = {name: linear for record in records for name, linear in record["linears"].items()}
    with watch("record"):
        source.move_vocabulary(source.device)
        logits = source.logits(streams.probed)[0], source.original_logits(streams.reference)[0]
        for found in logits:
            check_finite(found, f"{source.name}, the last layer or the head", source.dtype)
        return WalkResult(linears, [record["notes"] for record in records], *logits, tuned)


def _tune(
    source: SourceModel,
    method: Method,
    streams: Streams,
    windows: Tensor,
    layers: list[FinishedLayer],
    probe: Tensor,
    watch: Stopwatch,
) -> Tuned | None:
    """Tune the scales of all layers; where that is better, lead the probe text through them."""
    with watch("tune"):
        tuned = tune_scales(source, layers, windows, streams.originals, method.tune_steps)
    if tuned and tuned.better:
        with watch("record"):
            streams.probed = source.embed(probe)
            for index, layer in enumerate(layers):
                layer.put(source.dtype, source.device)
                arguments = streams.probe_arguments[index]
                streams.probed = run_layer(layer.module, streams.probed, arguments)
                layer.clear()
    return tuned


def _start(
    source: SourceModel,
    method: Method,
    windows: Tensor | None,
    probe: Tensor,
    round_embedding_and_head: Callable[[], None],
    tunes: bool = False,
) -> Streams:
    """The streams before the first layer, the model's small parts rewritten and rounded.

    Args:
        tunes: whether scales will be tuned towards the original model.
    """
    reference = source.embed(probe)
    if method.rewrite_model:
        method.rewrite_model(source)
        round_to_storage(source.model, source.family, source.storage_dtype)
    chunks, home, originals = (), source.device, None
    _say_if_nothing_catches_up(method, source.family)
    beside = method.catches_up(source.family) or tunes
    if windows is not None:
        chunks = token_chunks(source, windows)
        home = home_of((2 if beside else 1) * hidden_bytes(source, windows), source.device)
    if beside and windows is not None:
        originals = embed_chunks(source, chunks, home)
    round_embedding_and_head()
    hidden, arguments = None, None
    if windows is not None:
        hidden, arguments = (
            embed_chunks(source, chunks, home),
            source.layer_arguments(windows.shape[1]),
        )
        if originals is not None:
            # Chunks that nothing has changed yet are the same tensors, which need to pass through
            # the first layer once.
            hidden = [
                old if torch.equal(old, new) else new
                for old, new in zip(originals, hidden, strict=True)
            ]
    return Streams(
        reference,
        source.embed(probe),
        hidden,
        originals,
        source.layer_arguments(probe.shape[1]),
        arguments,
    )


def _say_if_nothing_catches_up(method: Method, family: Family) -> None:
    if method.catch_up and not method.catches_up(family):
        say(
            f"{family.model_type} normalises what attention and MLP add to the residual stream, so "
            "linears cannot catch up with its lag: --catch-up does nothing"
        )


def _quantize_layer(
    layer: Layer, method: Method, streams: Streams, source: SourceModel, watch: Stopwatch
) -> tuple[dict[str, QuantizedLinear], dict]:
    """Quantize a layer and put the dequantized weights into it. Returns the codes and the record of
    the layer.
    """
    module = layer.module
    if streams.hidden is not None:
        with watch("statistics"):
            layer.statistics = collect_statistics(layer, source.device, method, streams.originals)
            layer.targets = streams.originals if method.catches_up(layer.family) else None
            catch_up_layer(layer, method.catch_up)
    with watch("solve"):
        layer.choose_scale_type(source.storage_dtype)
        if method.prepare_layer:
            method.prepare_layer(layer)
            round_to_storage(module, source.family, source.storage_dtype, layer.where(""))
            layer.choose_scale_type(source.storage_dtype)
    with watch("record"):
        inputs: dict[LinearGroup, Tensor] = {}
        with group_inputs(module, inputs.__setitem__):
            run_layer(module, streams.probed, streams.probe_arguments[layer.index])
    with watch("solve"):
        codes = _exchange(layer, method.quantize_layer(layer))
    with watch("record"):
        found = [
            _install(layer, name, codes[name], inputs[group], method)
            for group in layer.family.groups
            for name in group.linears
        ]
        errors, finite = torch.stack([torch.stack(pair) for pair in found]).T.tolist()
    linears = {}
    for name, error, is_finite in zip(layer.family.linears, errors, finite, strict=True):
        if not is_finite:
            raise UserError(
                f"{layer.where(name)}: quantization gave NaN or Inf; use other calibration data or "
                f"--dtype float32"
            )
        if not math.isfinite(error):
            raise overflow(layer.where(name), streams.probed.dtype)
        linears[layer.where(name)] = {
            "bits": layer.grid.bits,
            "group_size": layer.grid.group_size,
            "relative_output_error": error,
        }
    return codes, {"linears": linears, "notes": layer.notes}


def _exchange(layer: Layer, codes: dict[str, QuantizedLinear]) -> dict[str, QuantizedLinear]:
    """The codes of all rows, out of those that each process found; of the notes, the least of all
    processes.
    """
    if parallel.size() == 1:
        return codes
    whole = {}
    for name in layer.family.linears:
        found, count = codes[name], layer.module.get_submodule(name).out_features
        codes_of_all, scale, zero_point = (
            parallel.join_rows(tensor, count)
            for tensor in (found.codes, found.scale, found.zero_point)
        )
        whole[name] = QuantizedLinear(codes_of_all, scale, zero_point, layer.grid)
    for notes in parallel.gather(layer.notes):
        for key, value in notes.items():
            layer.notes[key] = min(value, layer.notes.get(key, value))
    return whole


def round_to_storage(
    module: nn.Module, family: Family, dtype: torch.dtype, where: str = ""
) -> None:
    """Round what is stored as it is (norms, biases, embedding, head) to the stored type, so that
    memory equals file. where: before their names, for the message.

    Raises:
        UserError: what a method made of them is more than float16 holds.
    """
    quantized = {f"{name}.weight" for name in family.linears}
    for name, parameter in module.named_parameters():
        if parameter.is_meta or name in quantized:
            continue
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        if dtype == torch.float16 and torch.isinf(parameter).any():
            raise UserError(
                f"{where}{name}: once it is rewritten, float16, in which the model is stored, does "
                "not hold it; convert the model to bfloat16 first"
            )


def _install(
    layer: Layer, name: str, quantized: QuantizedLinear, inputs: Tensor, method: Method
) -> tuple[Tensor, Tensor]:
    """Put the dequantized weights into the layer; returns the relative output error, and whether
    all is finite as 0 or 1.
    """
    linear = layer.module.get_submodule(name)
    weight = quantized.dequantize(linear.weight.dtype)
    before = nn.functional.linear(inputs, linear.weight).float()
    method.install_rounding(linear)
    if round_inputs := method.round_inputs:
        change = nn.functional.linear(round_inputs(inputs), weight).float() - before
    else:
        change = nn.functional.linear(inputs, weight - linear.weight).float()
    error = change.norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny)
    linear.weight.data = weight
    return error, (torch.isfinite(quantized.scale).all() & torch.isfinite(weight).all()).float()

"""One quantization run, from options to a finished checkpoint. Every quantize script ends up here."""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from common import metadata, overlap, parallel, probe, reuse
from common.calibration import Windows, calibration_windows
from common.checkpoint import METADATA_FILE, CheckpointWriter, check_output, folder_bytes
from common.cli import configure_torch, resolve_sizes
from common.device import device_and_dtype, dtype_name
from common.errors import UserError
from common.grid import SUPPORTED_BITS, Grid, QuantizedLinear, quantize, resolve_group_size, scale_type
from common.kernels.rounding import search_range
from common.inputs import Needs
from common.layers import WalkResult, quantize_model
from common.method import Method
from common.resume import Resumption
from common.stopwatch import Stopwatch
from common.models import MODELS_FOLDER, SourceModel, load_config, load_tokenizer, resolve_folder
from common.naming import filed_as
from common.progress import say
from common.results import RESULTS_FOLDER
from common.verification import wrecked

# Rows of an embedding or head that are rounded at once.
ROWS_AT_ONCE = 16384


def run(options: argparse.Namespace, method: Method, bits: tuple[int, ...] = SUPPORTED_BITS) -> Path:
    """Quantize as the options say and write the checkpoint.

    Args:
        options: what `cli.quantization_parser` parsed.
        bits: the widths this method supports.
    Returns:
        The checkpoint's folder.
    Raises:
        UserError: any mistake of the user's, before anything is written.
    """
    started = time.perf_counter()
    if options.bits not in bits:
        raise UserError(f"{method.name} does not support {options.bits} bits; use --bits {' or '.join(map(str, bits))}")
    device, dtype = device_and_dtype(options)
    configure_torch(options.seed)
    parallel.start(device)
    resolve_sizes(options)
    output = options.output or MODELS_FOLDER / filed_as(options.model) / f"{method.name}-{options.bits}bit"
    if options.resume and (output / METADATA_FILE).is_file() and not options.overwrite:
        _check_finished(output, options, method, dtype)
        say(f"{output} is finished, with the same options; there is nothing to resume")
        return output
    check_output(output, options.overwrite)
    watch = Stopwatch(device)
    with watch("load"):
        made_from = reuse.made_from(options.model, method.name, RESULTS_FOLDER)
        source = SourceModel(options.model, device, dtype)
        if options.head_bits and source.tied and not method.unties:
            raise UserError(f"{source.name} shares its head with the embedding, so --head-bits has nothing to act on; "
                            "--embedding-bits 8 rounds both")
        grid = Grid(options.bits, resolve_group_size(options.group_size, source.in_features()), options.symmetric)
    windows = None
    if method.needs != Needs.NOTHING:
        with watch("calibration text"):
            windows = _windows(options, source.tokenizer, source.config)
    say(_headline(method, grid, source, windows, device, dtype))
    tokens = probe.probe_tokens(source.tokenizer)
    fingerprint = _fingerprint(options, method, source, made_from, windows, device, dtype)
    with _writer(CheckpointWriter(output, source, grid, method.activation_bits, method.online, fingerprint,
                                  options.resume)) as writer:
        ends: dict[str, QuantizedLinear] = {}
        end_records: dict[str, dict] = {}

        def round_ends() -> None:
            for name, width in (("model.embed_tokens", options.embedding_bits), ("lm_head", options.head_bits)):
                if width:
                    ends[name], error = _quantize_rows(source, name, width)
                    end_records[name] = {"bits": width, "relative_output_error": error}

        own = None if windows is None else parallel.share(windows.tokens)
        result = quantize_model(source, method, grid, own, tokens, writer.write_layer if writer else lambda *_: None, watch,
                                round_ends, _resumption(writer))
        parallel.stop()
        if not writer:
            return output
        with watch("write"):
            weight_bytes = writer.write_rest(ends)
        document = _document(options, method, grid, source, windows, result, tokens, watch, device, dtype)
        document["made_from"] = made_from
        if end_records:
            document["ends"] = end_records
        document["bytes"] = _sizes(source, weight_bytes, writer.folder)
        document["compression_ratio"] = round(document["bytes"]["baseline_weights"] / weight_bytes, 4)
        document["seconds"]["total"] = round(time.perf_counter() - started, 3)
        writer.finish(document if options.save_metadata else None)
    say(_summary(output, document))
    verdict = "verify_model.py will fail" if options.save_metadata else "saved without metadata, so verify_model.py cannot know"
    for name, error in wrecked({**result.linears, **end_records}):
        say(f"warning: {name} is wrecked, its output is off by {error:.2f} of its size; {verdict}")
    return output


def _check_finished(output: Path, options: argparse.Namespace, method: Method, dtype: torch.dtype) -> None:
    """Refuse a finished checkpoint that was made with other options or from other things than are there now.

    Raises:
        UserError: naming them and the way out.
    """
    record = metadata.read(output)
    changes = reuse.changed_options(record, options, method.name, dtype_name(dtype))
    then = reuse.recorded_sources(record)
    changes += reuse.changed_sources(then, reuse.made_from(options.model, method.name, RESULTS_FOLDER))
    # To compare the text it has to be read and cut into tokens, by the tokenizer of the same model.
    if not changes and record["calibration"] is not None:
        folder = resolve_folder(options.model)
        windows = _windows(options, load_tokenizer(folder), load_config(folder))
        changes = reuse.changed_sources(then, {"calibration": windows.fingerprint})
    if changes:
        more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
        raise UserError(f"{output} was made with {', '.join(changes[:2])}{more}; --overwrite makes it again; to "
                        "keep it, move it away first")


def _windows(options: argparse.Namespace, tokenizer, config) -> Windows:
    length = min(options.calib_length, config.max_position_embeddings)
    return calibration_windows(options.calib_data, tokenizer, options.calib_samples, length, options.seed, options.data_root)


def _writer(writer: CheckpointWriter) -> AbstractContextManager[CheckpointWriter | None]:
    """The writer, in the first of several processes; None in the others."""
    return writer if parallel.first() else nullcontext()


def _resumption(writer: CheckpointWriter | None) -> Resumption:
    """The layers that an earlier run finished, which the first process reads."""
    records = parallel.gather(writer.records if writer else None)[0]

    def restore(index: int, module: nn.Module) -> None:
        if writer:
            writer.restore_layer(index, module)
        for parameter in module.parameters():
            parameter.data = parallel.from_first(parameter.data)

    return Resumption(records, restore)


# Options that change nothing in the result.
_WITHOUT_EFFECT = ("output", "overwrite", "resume", "save_metadata", "data_root", "device", "device_memory", "dtype", "calib_data",
                   "model")


def _fingerprint(options, method: Method, source: SourceModel, made_from: dict[str, str], windows, device, dtype) -> dict:
    """All that decides a checkpoint's codes, for a run that goes on with another's layers."""
    return {"method": method.name, "model": source.name,
            **{reuse.MADE_FROM[key]: found[:16] for key, found in made_from.items()},
            "calibration": windows and windows.fingerprint[:16],
            **{f"--{name.replace('_', '-')}": value for name, value in vars(options).items() if name not in _WITHOUT_EFFECT},
            "device": metadata.describe_device(device)["name"], "processes": parallel.size(),
            "type": dtype_name(dtype),
            **{f"version of {package}": version for package, version in metadata.versions().items()}}


def _quantize_rows(source: SourceModel, name: str, bits: int) -> tuple[QuantizedLinear, float]:
    """Round the embedding or head to nearest, one symmetric scale per row of the vocabulary, and put the result in place.
    Returns the codes and the relative error of the matrix.
    """
    grid = Grid(bits, None, symmetric=True)
    parameter = source.model.get_submodule(name).weight
    # All of a large vocabulary at once would take gigabytes in float32.
    kind = scale_type((rows.float() for rows in parameter.data.split(ROWS_AT_ONCE)), grid, source.storage_dtype)
    parts, values, squares = [], [], []
    for stored in parameter.data.split(ROWS_AT_ONCE):
        rows = stored.float()
        scale, zero_point = search_range(rows, grid, scale_dtype=kind)
        part = QuantizedLinear(quantize(rows, scale, zero_point, grid), scale, zero_point, grid)
        values.append(part.dequantize(parameter.dtype))
        squares.append(torch.stack([(values[-1].float() - rows).square().sum(), rows.square().sum()]))
        parts.append((part.codes.cpu(), scale.cpu(), zero_point.cpu()))
    parameter.data = torch.cat(values)
    missed, whole = torch.stack(squares).sum(0).sqrt().tolist()
    return QuantizedLinear(*(torch.cat(column) for column in zip(*parts, strict=True)), grid), missed / max(whole, 1e-30)


def _headline(method: Method, grid: Grid, source: SourceModel, windows, device, dtype) -> str:
    size = "one group per channel" if grid.group_size is None else f"groups of {grid.group_size}"
    kind = "symmetric" if grid.symmetric else "asymmetric"
    text = "no calibration" if windows is None else \
        f"calibration {windows.tokens.shape[0]} x {windows.tokens.shape[1]} tokens of {windows.source}"
    return (f"{method.name} {grid.bits}-bit, {size}, {kind}: {source.name} on {device} in "
            f"{dtype_name(dtype)}, {text}")


def _document(options, method, grid, source, windows, result: WalkResult, tokens, watch, device, dtype) -> dict:
    """The metadata, but for sizes and the total time."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    logits = result.probe_logits
    return {
        "format_version": metadata.VERSION,
        "method": method.name,
        "bits": grid.bits,
        "grid": {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric},
        "activation_bits": method.activation_bits,
        "online_transforms": asdict(method.online) if method.online else None,
        "model": {"name": source.name, "source": options.model, "architecture": source.config.model_type,
                  "storage_dtype": dtype_name(source.storage_dtype)},
        "options": given,
        "seed": options.seed,
        "calibration": None if windows is None else
        {**windows.describe(), "passages": overlap.pack([source.tokenizer.decode(window) for window in windows.tokens])},
        "versions": metadata.versions(),
        "device": metadata.describe_device(device),
        "processes": parallel.size(),
        "compute_dtype": dtype_name(dtype),
        "seconds": {phase: round(seconds, 3) for phase, seconds in watch.seconds.items()},
        "memory": metadata.peak_memory(device),
        "probe": {
            "tokens": tokens.shape[1],
            "baseline_perplexity": probe.perplexity(result.baseline_probe_logits, tokens),
            "perplexity": probe.perplexity(logits, tokens),
            "divergence": probe.divergence(result.baseline_probe_logits, logits),
            **probe.sample_logits(logits),
        },
        "linears": result.linears,
        **({"layers": result.layer_notes} if any(result.layer_notes) else {}),
    }


def _sizes(source: SourceModel, weight_bytes: int, folder: Path) -> dict[str, int]:
    return {"baseline_weights": source.tensors.total_bytes(), "baseline_folder": folder_bytes(source.folder),
            "quantized_weights": weight_bytes, "quantized_folder": folder_bytes(folder)}


def _summary(output: Path, document: dict) -> str:
    sizes, found = document["bytes"], document["probe"]
    return (f"{output}: {sizes['quantized_weights'] / 1e6:.1f} MB of weights ({document['compression_ratio']:.2f} x "
            f"smaller), {document['seconds']['total']:.1f} s, peak host memory "
            f"{document['memory']['peak_host_bytes'] / 2**30:.2f} GiB, perplexity of the probe text "
            f"{found['baseline_perplexity']:.2f} -> {found['perplexity']:.2f}")

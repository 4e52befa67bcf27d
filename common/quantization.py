"""One quantization run, from options to a finished checkpoint. Every quantize script ends up
here."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import metadata
from common.base import parallel
from common.base.device import device_and_dtype, dtype_name
from common.base.errors import UserError
from common.base.progress import say
from common.base.stopwatch import Stopwatch
from common.checkpoint.format import WeightFormat, form_of_linears, open_checkpoint
from common.checkpoint.sizes import sizes
from common.checkpoint.unfinished import CANNOT_RESUME
from common.checkpoint.writer import METADATA_FILE, CheckpointWriter, check_output
from common.cli import configure_torch, resolve_sizes
from common.exporting.gguf_file import check_file, check_source, export_beside, file_beside
from common.model.origin import origin_of
from common.model.source import MODELS_FOLDER, SourceModel, resolve_folder
from common.numerics.divergence import (
    divergence_of_logits,
    perplexity_of_logits,
    sample_logits,
)
from common.numerics.grid import SUPPORTED_BITS, Grid, QuantizedLinear, resolve_group_size
from common.reporting.card import write_card
from common.reporting.engines import INT8_EMBEDDING, support
from common.results import reuse
from common.results.documents import RESULTS_FOLDER
from common.results.naming import filed_as
from common.solvers.vocabulary import VocabularyRounding
from common.text import overlap, probe
from common.text.windows import Windows, windows_of
from common.verification import wrecked
from common.walk.layers import WalkResult, quantize_model
from common.walk.method import Method
from common.walk.resume import Resumption


def quantize(
    options: argparse.Namespace, method: Method, bits: tuple[int, ...] = SUPPORTED_BITS
) -> Path:
    """Quantize as the options say and write the checkpoint.

    Args:
        options: what `cli.quantization_parser` parsed.
        bits: the widths this method supports.
    Returns:
        The checkpoint's folder.
    Raises:
        UserError: any mistake of the user's, before anything is written.
    """
    if options.bits not in bits:
        raise UserError(
            f"{method.name} does not support {options.bits} bits; "
            f"use --bits {' or '.join(map(str, bits))}"
        )
    device, dtype = device_and_dtype(options)
    configure_torch(options.seed)
    parallel.start(device)
    resolve_sizes(options)
    if options.symmetric is None:
        # Zero-points gain nothing at 8 bits, and fast kernels elsewhere have none.
        options.symmetric = options.bits == 8
    configuration = f"{method.name}-{options.bits}bit"
    output = options.output or MODELS_FOLDER / filed_as(options.model) / configuration
    if options.resume and (output / METADATA_FILE).is_file() and not options.overwrite:
        reuse.check_finished(output, options, method.name, dtype_name(dtype), RESULTS_FOLDER)
        say(f"{output} is finished, with the same options; there is nothing to resume")
        if options.gguf and parallel.first() and not file_beside(output).exists():
            say(export_beside(output, True))
        return output
    check_output(output, options.overwrite)
    # What is made once, for all methods, counts for none.
    resolve_folder(options.model)
    started = time.perf_counter()
    if options.gguf:
        check_file(file_beside(output), options.overwrite)
    whole = _Run.begin(options, method, output, device, dtype)
    if options.gguf:
        whole.check_export()
    say(whole.headline())
    if options.embedding_bits and not method.online:
        say(f"note: {INT8_EMBEDDING}")
    # The first of several processes writes.
    with whole.writer() if parallel.first() else nullcontext() as writer:
        rounding = VocabularyRounding(whole.source, options.embedding_bits, options.head_bits)
        result = whole.walk(writer, rounding)
        parallel.stop()
        if not writer:
            return output
        with whole.watch("write"):
            writer.write_rest(rounding.codes)
        document = whole.document(result, rounding.records, writer.folder)
        seconds = time.perf_counter() - started + writer.unfinished.earlier_seconds
        document["seconds"]["total"] = round(seconds, 3)
        write_card(writer.folder, document, before=output)
        writer.finish(document if options.save_metadata else None)
    say(_summary(output, document))
    verdict = (
        "verify_model.py will fail"
        if options.save_metadata
        else "saved without metadata, so verify_model.py cannot know"
    )
    for name, error in wrecked({**result.linears, **rounding.records}):
        say(f"warning: {name} is wrecked, its output is off by {error:.2f} of its size; {verdict}")
    if words := export_beside(output, options.gguf):
        say(words)
    return output


@dataclass(frozen=True)
class _Run:
    """What a run works with, from when its model is open.

    made_from: hashes, as `reuse.made_from`.
    windows: of calibration; None for a method that needs none.
    probe_tokens: [1, length], of the text that errors are measured on.
    """

    options: argparse.Namespace
    method: Method
    output: Path
    device: torch.device
    dtype: torch.dtype
    watch: Stopwatch
    made_from: dict[str, str]
    source: SourceModel
    grid: Grid
    windows: Windows | None
    probe_tokens: Tensor

    @classmethod
    def begin(
        cls,
        options: argparse.Namespace,
        method: Method,
        output: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> _Run:
        """Open the model and read the calibration text.

        Raises:
            UserError: a model or text that cannot be had, or options that do not fit the model.
        """
        watch = Stopwatch(device)
        with watch("load"):
            made_from = reuse.made_from(options.model, method.name, RESULTS_FOLDER)
            source = SourceModel(options.model, device, dtype)
            if options.head_bits and source.tied and not method.unties:
                raise UserError(
                    f"{source.name} shares its head with the embedding, so --head-bits "
                    "has nothing to act on; --embedding-bits 8 rounds both"
                )
            size = resolve_group_size(options.group_size, source.in_features())
            grid = Grid(options.bits, size, options.symmetric)
            if grid.stored_bits >= 16:
                raise UserError(
                    f"groups of {size} take {grid.stored_bits:g} bits a weight with their scales, "
                    "no less than the model's own 16; use --group-size 32 or more"
                )
        windows = None
        if method.needs_calibration:
            with watch("calibration text"):
                windows = windows_of(options, source.tokenizer, source.config)
        tokens = probe.probe_tokens(source.tokenizer)
        return cls(
            options, method, output, device, dtype, watch, made_from, source, grid, windows, tokens
        )

    def check_export(self) -> None:
        """Refuse, before anything is quantized, what GGUF cannot tell."""
        bits = self.method.activation_bits
        # Embedding and head are rounded to grids that it always can.
        form = WeightFormat(self.grid, form_of_linears(bits), bits, {}, {})
        check_source(self.source, form, online=self.method.online is not None)

    def headline(self) -> str:
        grid, windows = self.grid, self.windows
        one = grid.group_size is None
        size = "one group per channel" if one else f"groups of {grid.group_size}"
        kind = "symmetric" if grid.symmetric else "asymmetric"
        text = "no calibration"
        if windows is not None:
            samples, length = windows.tokens.shape
            text = f"calibration {samples} x {length} tokens of {windows.source}"
        return (
            f"{self.method.name} {grid.bits}-bit, {size}, {kind}: {self.source.name} on "
            f"{self.device} in {dtype_name(self.dtype)}, {text}"
        )

    def writer(self) -> CheckpointWriter:
        return CheckpointWriter(
            self.output,
            self.source,
            self.grid,
            self.method.activation_bits,
            self.method.online,
            self._fingerprint(),
            self.options.resume,
        )

    def _fingerprint(self) -> dict:
        """All that decides a checkpoint's codes, for a run that goes on with another's layers."""
        options = vars(self.options).items()
        return {
            "method": self.method.name,
            "model": self.source.name,
            **{reuse.MADE_FROM[key]: found[:16] for key, found in self.made_from.items()},
            "calibration": self.windows and self.windows.fingerprint[:16],
            **{
                f"--{name.replace('_', '-')}": value
                for name, value in options
                # The text's fingerprint stands for where it comes from; scales are tuned after.
                if name not in (*reuse.WITHOUT_EFFECT, "calib_data", "tune_scales")
            },
            "device": metadata.describe_device(self.device)["name"],
            "processes": parallel.size(),
            "type": dtype_name(self.dtype),
            **{f"version of {name}": found for name, found in metadata.versions().items()},
        }

    def walk(self, writer: CheckpointWriter | None, rounding: VocabularyRounding) -> WalkResult:
        """Quantize the model, each layer written as it is finished."""
        own = None if self.windows is None else parallel.own_windows(self.windows.tokens)
        return quantize_model(
            self.source,
            self.method,
            self.grid,
            own,
            self.probe_tokens,
            writer.write_layer if writer else lambda *_: None,
            self.watch,
            rounding,
            _resumption(writer, self.source, self.grid, self.method.tune_steps),
            writer.rescale_layers if writer else lambda *_: None,
        )

    def document(self, result: WalkResult, vocabulary: dict[str, dict], folder: Path) -> dict:
        """The metadata, but for the total time.

        Args:
            vocabulary: records of embedding and head, where they were rounded.
            folder: where the checkpoint lies.
        """
        options, method, grid, source = self.options, self.method, self.grid, self.source
        origin = origin_of(options.model, source.folder)
        engines = support(*open_checkpoint(folder))
        given = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
        }
        return {
            "format_version": metadata.VERSION,
            "method": method.name,
            "bits": grid.bits,
            "grid": {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric},
            "activation_bits": method.activation_bits,
            "online_transforms": asdict(method.online) if method.online else None,
            "model": {
                "name": source.name,
                "source": options.model,
                **asdict(origin),
                "architecture": source.config.model_type,
                "storage_dtype": dtype_name(source.storage_dtype),
            },
            "options": given,
            "seed": options.seed,
            "calibration": self._calibration(),
            "versions": metadata.versions(),
            "device": metadata.describe_device(self.device),
            "processes": parallel.size(),
            "compute_dtype": dtype_name(self.dtype),
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.watch.seconds.items()},
            "memory": metadata.peak_memory(self.device),
            "probe": self._probe(result),
            "linears": result.linears,
            **({"layers": result.layer_notes} if any(result.layer_notes) else {}),
            **({"tuned": result.tuned} if result.tuned else {}),
            "made_from": self.made_from,
            **({"ends": vocabulary} if vocabulary else {}),
            "engines": {name: asdict(found) for name, found in engines.items()},
            **sizes(source.tensors, source.folder, folder),
        }

    def _calibration(self) -> dict | None:
        if self.windows is None:
            return None
        passages = [self.source.tokenizer.decode(window) for window in self.windows.tokens]
        return {**self.windows.describe(), "passages": overlap.encode(passages)}

    def _probe(self, result: WalkResult) -> dict:
        tokens = self.probe_tokens
        logits, baseline = result.probe_logits, result.baseline_probe_logits
        return {
            "tokens": tokens.shape[1],
            "baseline_perplexity": perplexity_of_logits(baseline, tokens),
            "perplexity": perplexity_of_logits(logits, tokens),
            "divergence": divergence_of_logits(baseline, logits),
            **sample_logits(logits),
        }


def _resumption(
    writer: CheckpointWriter | None, source: SourceModel, grid: Grid, steps: int
) -> Resumption:
    """The layers that an earlier run finished, which the first process reads."""
    done = (writer.records, writer.unfinished.tuned) if writer else None
    records, tuned = parallel.gather(done)[0]
    if tuned and tuned["steps"] != steps:
        raise UserError(
            f"{CANNOT_RESUME} {source.name}: its scales are tuned already, with --tune-scales "
            f"{tuned['steps']}; run it with that, or without --resume to start again"
        )

    def restore(index: int, module: nn.Module) -> dict[str, QuantizedLinear]:
        if writer:
            codes = writer.restore_layer(index, module)
        else:
            weights = {name: module.get_submodule(name).weight for name in source.family.linears}
            codes = {name: QuantizedLinear.zeros_like(one, grid) for name, one in weights.items()}
        for parameter in module.parameters():
            parameter.data = parallel.from_first(parameter.data)
        return {name: found.map(parallel.from_first) for name, found in codes.items()}

    return Resumption(records, restore, tuned)


def _summary(output: Path, document: dict) -> str:
    size, bits = document["bytes"]["quantized_weights"], document["bits_per_weight"]
    found = document["probe"]
    return (
        f"{output}: {size / 1e6:.1f} MB of weights "
        f"({document['compression_ratio']:.2f} x smaller; {bits['coded']:.2f} bits for each weight "
        f"with a code, {bits['all']:.2f} for each of all), {document['seconds']['total']:.1f} s, "
        f"peak host memory {document['memory']['peak_host_bytes'] / 2**30:.2f} GiB, "
        "perplexity of the probe text "
        f"{found['baseline_perplexity']:.2f} -> {found['perplexity']:.2f}"
    )

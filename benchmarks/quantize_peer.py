#!/usr/bin/env python3
"""Quantize a model with another library, from the calibration tokens that our scripts use.

    python benchmarks/quantize_peer.py autoround-4bit --model demo --output /tmp/autoround-4bit
    python benchmarks/quantize_peer.py bitsandbytes-nf4 --model meta-llama/Llama-3.2-1B-Instruct

Writes a folder that transformers loads, with quantization_metadata.json: library, version, seconds,
peak memory, calibration. `bash run_all_quantization.sh --with-peers` runs all of them in an
environment of their own. What is finished with the same options is not made again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peers
import torch

from common import cli
from common.base.device import dtype_name, resolve_device
from common.base.errors import UserError, first_line
from common.base.files import replace_folder, unfinished_of, write_json
from common.base.libraries import how_to_install
from common.base.progress import say
from common.base.stopwatch import Stopwatch
from common.checkpoint import metadata
from common.checkpoint.foreign import foreign_facts
from common.checkpoint.sizes import rounded, weights_of
from common.checkpoint.writer import METADATA_FILE, folder_bytes
from common.model.source import MODELS_FOLDER, SourceModel
from common.numerics.grid import resolve_group_size
from common.results.documents import RESULTS_FOLDER
from common.results.hashes import code_hash, source_hash
from common.results.naming import filed_as
from common.results.peers import PEERS, Peer
from common.text import overlap
from common.text.windows import Windows, windows_of

# What decides a checkpoint, beside the model, the text and the code.
_DECIDING = ("group_size", "calib_data", "calib_samples", "calib_length", "seed")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", choices=tuple(PEERS), help=", ".join(PEERS))
    cli.add_model(parser)
    cli.add_place(parser)
    parser.add_argument("--bits", type=int, help="bits per weight (default: NAME's, the only ones)")
    parser.add_argument(
        "--output", type=Path, help="checkpoint folder (default: models/<model>/NAME)"
    )
    cli.add_group_size(parser)
    cli.add_calibration_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main() -> None:
    started = time.perf_counter()
    options = argument_parser().parse_args()
    peer = PEERS[options.name]
    if options.bits not in (None, peer.bits):
        raise UserError(f"{options.name} quantizes to {peer.bits} bits; leave --bits out")
    device = resolve_device(options.device)
    cli.configure_torch(options.seed)
    cli.resolve_sizes(options)
    output = options.output or MODELS_FOLDER / filed_as(options.model) / options.name
    watch = Stopwatch(device)
    # It refuses what our own scripts refuse, and knows the widths of all linears.
    source = SourceModel(options.model, torch.device("cpu"), torch.bfloat16)
    size = resolve_group_size(options.group_size, source.in_features())
    if peer.grouped and size is None:
        raise UserError(f"{options.name} rounds in groups; give --group-size a number")
    windows = None
    if peer.calibrated:
        with watch("calibration text"):
            windows = windows_of(options, source.tokenizer, source.config)
    made = {
        "options": {name: getattr(options, name) for name in _DECIDING},
        "made_from": {
            "model": source_hash(source.folder, RESULTS_FOLDER),
            "code": code_hash(entry="benchmarks.peers"),
        },
        "library": {"name": peer.package, "version": _version(options.name, peer)},
    }
    if _finished(output, made, windows, options.overwrite):
        say(f"{output} is finished, with the same options; there is nothing to do")
        return
    tokens = None if windows is None else windows.tokens
    work = peers.Work(source.folder, source.tokenizer, tokens, size or 0, device, watch)
    text = "no calibration"
    if windows is not None:
        text = f"calibration {' x '.join(map(str, windows.tokens.shape))} tokens of "
        text += windows.source
    library = " ".join(made["library"].values())
    say(f"{options.name}: {library}, {source.name} on {device}, {text}")
    unfinished = unfinished_of(output)
    shutil.rmtree(unfinished, ignore_errors=True)
    quantized = _by_library(options.name, peer, work, unfinished)
    source.tokenizer.save_pretrained(unfinished)
    document = {
        "format_version": metadata.VERSION,
        "method": options.name,
        **made,
        "model": {
            "name": source.name,
            "source": options.model,
            "storage_dtype": dtype_name(source.storage_dtype),
        },
        "seed": options.seed,
        "calibration": _calibration(windows, source.tokenizer),
        "versions": metadata.versions(),
        "device": metadata.describe_device(device),
        "memory": metadata.peak_memory(device),
        **_sizes(quantized, unfinished, source, peer, size),
        "seconds": {phase: round(seconds, 3) for phase, seconds in watch.seconds.items()},
    }
    document["seconds"]["total"] = round(time.perf_counter() - started, 3)
    write_json(unfinished / METADATA_FILE, document)
    replace_folder(unfinished, output)
    bits = document["bits_per_weight"]
    say(
        f"{output}: {document['bytes']['quantized_weights'] / 1e6:.1f} MB of weights "
        f"({document['compression_ratio']:.2f} x smaller; {bits['coded']:.2f} bits for each weight "
        f"with a code, {bits['all']:.2f} for each of all), {document['seconds']['total']:.1f} s, "
        f"peak host memory {document['memory']['peak_host_bytes'] / 2**30:.2f} GiB"
    )


def _version(name: str, peer: Peer) -> str:
    """The library's version. Raises UserError where it is not installed."""
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{name} needs {peer.package}, which is not installed: {how_to_install([peer.package])}"
        ) from None


def _finished(output: Path, made: dict, windows: Windows | None, overwrite: bool) -> bool:
    """Whether there is a checkpoint that was made from the same. Raises UserError for another, or
    for anything else that is in the way.
    """
    if overwrite and metadata.read(output) or not output.exists():
        return False
    record = metadata.read(output)
    if record is None:
        raise UserError(f"output {output} exists already and is not replaced; choose another")
    fingerprint = (record["calibration"] or {}).get("fingerprint")
    changes = [key for key, now in made.items() if record.get(key) != now]
    if fingerprint != (windows.fingerprint if windows else None):
        changes.append("calibration text")
    if changes:
        raise UserError(
            f"{output} was made with another {' and '.join(changes).replace('_', ' ')}; "
            "--overwrite makes it again; to keep it, move it away first"
        )
    return True


def _by_library(name: str, peer: Peer, work: peers.Work, folder: Path) -> peers.Quantized:
    """Quantize and save. Raises UserError with whatever the library says."""
    try:
        quantized = peers.PEERS[name](work)
        folder.mkdir(parents=True)
        with work.watch("write"):
            quantized.save(folder)
        return quantized
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a library may come to
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ImportError):
            raise UserError(f"{name}: {peer.package} cannot be used: {first_line(error)}") from None
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{name}: {peer.package} failed: {type(error).__name__}: {first_line(error)} "
            f"({Path(where.filename).name}:{where.lineno})"
        ) from None


def _calibration(windows: Windows | None, tokenizer) -> dict | None:
    if windows is None:
        return None
    passages = [tokenizer.decode(window) for window in windows.tokens]
    return {**windows.describe(), "passages": overlap.encode(passages)}


def _sizes(
    quantized: peers.Quantized, folder: Path, source: SourceModel, peer: Peer, size: int | None
) -> dict:
    """Bytes, ratio, bits of a weight and grid, from the tensors that were written or, where the
    folder holds plain numbers, from the library's own in memory.
    """
    was = source.tensors.total_bytes()
    facts = foreign_facts(folder, source.tensors)
    now, bits = facts["weights_bytes"], facts["bits_per_weight"]
    more = {}
    if quantized.dense_bytes:
        now, coded, count = quantized.dense_bytes
        bits = {
            "coded": rounded(8 * coded / count),
            "all": rounded(8 * now / weights_of(source.tensors)),
        }
        more["stored"] = "16-bit numbers; sizes are those of the library's own form in memory"
    return {
        "bits": peer.bits,
        "grid": facts.get("grid", {"bits": peer.bits, "group_size": size}),
        "bytes": {
            "baseline_weights": was,
            "baseline_folder": folder_bytes(source.folder),
            "quantized_weights": now,
            "quantized_folder": folder_bytes(folder),
        },
        "compression_ratio": round(was / now, 4),
        "bits_per_weight": bits,
        **more,
    }


if __name__ == "__main__":
    cli.run(main)

"""What a checkpoint was made from, and whether a finished one answers for what is asked now.

It does with the same options, from the same weights and calibration text, by the same code. What
its metadata does not say is unknown, which is not the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.base.errors import UserError
from common.checkpoint import metadata
from common.checkpoint.public import OF_CALIBRATION, OF_THIS_MACHINE
from common.checkpoint.writer import METADATA_FILE
from common.model.source import load_config, load_tokenizer, resolve_folder
from common.results.hashes import PROJECT, code_hash, source_hash
from common.results.naming import Subject, source_of
from common.text.windows import windows_of

# What a checkpoint is made from besides options, and how it is called.
MADE_FROM = {
    "model": "files of --model",
    "calibration": "text of --calib-data",
    "code": "quantization code",
}
# Modules that quantize scripts import to check, name or describe what they make.
_BESIDE_CODES = (
    "common.numerics.divergence",
    "common.base.errors",
    "common.base.files",
    "common.reporting.engines",
    "common.checkpoint.public",
    "common.exporting.gguf_file",
    "common.model.origin",
    "common.reporting.card",
    "common.results.identity",
    "common.results.hashes",
    "common.base.machine",
    "common.checkpoint.metadata",
    "common.results.naming",
    "common.text.overlap",
    "common.base.progress",
    "common.results.documents",
    "common.results.reuse",
    "common.base.stopwatch",
    "common.verification",
)
# Options of a quantize script that are not compared as they are: they change nothing in the
# checkpoint, or what they come to is compared.
WITHOUT_EFFECT = (*OF_THIS_MACHINE, "dtype", "model")
_DAMAGED = f"{METADATA_FILE} is damaged; quantize again with --overwrite"


def quantization_code_hash(method: str) -> str:
    """SHA-256 of the code that decides the codes of a method's checkpoints, as `code_hash`.

    Raises UserError for a name that no script has, which stands for no code.
    """
    if not (PROJECT / f"quantize_{method}.py").is_file():
        raise UserError(
            f'there is no quantize_{method}.py; the name of a Method, here "{method}", has to be '
            "that of its script"
        )
    return code_hash(entry=f"quantize_{method}", beside=_BESIDE_CODES)


def made_from(model: str, method: str, results_dir: Path) -> dict[str, str]:
    """The hashes of what a checkpoint of `model` is made from, as far as they are known before it
    is opened. Raises UserError where the model cannot be had.
    """
    model_hash = source_hash(resolve_folder(model), results_dir)
    return {"model": model_hash, "code": quantization_code_hash(method)}


def recorded_sources(record: dict) -> dict:
    """The hashes of what metadata says a checkpoint was made from, by the keys of MADE_FROM; of an
    earlier version it says less. Raises UserError for damaged metadata.
    """
    try:
        calibration = (record["calibration"] or {}).get("fingerprint")
        return {**record.get("made_from", {}), "calibration": calibration}
    except (TypeError, AttributeError):
        raise UserError(_DAMAGED) from None


def changed_sources(then: dict, now: dict[str, str]) -> list[str]:
    """In what a checkpoint was made from other things than those there now, in words."""
    return [
        f"{'other' if then.get(key) else 'unknown'} {MADE_FROM[key]}"
        for key, found in now.items()
        if then.get(key) != found
    ]


def changed_options(
    record: dict, options: argparse.Namespace, method: str, dtype: str
) -> list[str]:
    """In what the options that a checkpoint was made with differ from those asked for, in words;
    only those that decide its weights count. One that is not recorded is unknown, not the same.

    Args:
        dtype: what --dtype comes to.
    Raises:
        UserError: damaged metadata.
    """
    try:
        made, grid = record["options"], record["grid"]
        found = [
            ("method", record["method"], method),
            ("--model", source_of(record["model"]["source"]), source_of(options.model)),
            ("--dtype", record["compute_dtype"], dtype),
        ]
        ignored = {*WITHOUT_EFFECT, *(OF_CALIBRATION if record["calibration"] is None else ())}
        for name, now in vars(options).items():
            then = made.get(name, "unknown")
            if name == "group_size" and now == str(grid["group_size"] or "channel"):
                then = now  # what auto came to
            if name not in ignored:
                found.append(
                    (
                        f"--{name.replace('_', '-')}",
                        then,
                        str(now) if isinstance(now, Path) else now,
                    )
                )
    except (KeyError, TypeError, AttributeError):
        raise UserError(_DAMAGED) from None
    return [f"{name} {then}, not {now}" for name, then, now in found if then != now]


def check_finished(
    output: Path, options: argparse.Namespace, method: str, dtype: str, results_dir: Path
) -> None:
    """Refuse a finished checkpoint that was made with other options or from other things than are
    there now.

    Raises:
        UserError: naming them and the way out.
    """
    record = metadata.read(output) or {}
    changes = changed_options(record, options, method, dtype)
    then = recorded_sources(record)
    changes += changed_sources(then, made_from(options.model, method, results_dir))
    # To compare the text it has to be read and cut into tokens, by the tokenizer of the same model.
    if not changes and record["calibration"] is not None:
        folder = resolve_folder(options.model)
        windows = windows_of(options, load_tokenizer(folder), load_config(folder))
        changes = changed_sources(then, {"calibration": windows.fingerprint})
    if changes:
        more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
        raise UserError(
            f"{output} was made with {', '.join(changes[:2])}{more}; --overwrite makes it again; "
            "to keep it, move it away first"
        )


def check_original(subject: Subject, results_dir: Path) -> None:
    """Refuse a 16-bit model with other files than the checkpoint's metadata says it was made from.

    Raises:
        UserError: naming both.
    """
    record = metadata.read(subject.folder)
    then = record and recorded_sources(record).get("model")
    try:
        now = then and source_hash(resolve_folder(subject.original), results_dir)
    except UserError:
        return  # a model that cannot be had is not compared with either
    if then != now:
        raise UserError(
            f"{subject.original} has changed since {subject.folder} was made from it, or is "
            "another model; quantize again with --overwrite, or name the right one with --baseline"
        )

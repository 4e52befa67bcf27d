"""Check that a checkpoint is whole, loads plainly and is the model that was quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from common import metadata
from common.base.device import dtype_name
from common.base.errors import UserError, first_line
from common.checkpoint.format import (
    VOCABULARY,
    family_of_config,
    open_checkpoint,
    unknown_form,
    weight_format,
)
from common.checkpoint.tensors import REQUIRED_PARTS, decompress, stored_codes, stored_parts
from common.checkpoint.writer import file_hashes
from common.model.memory import logits_at_once
from common.model.online import CONFIG_KEY
from common.model.tensors import TensorReader
from common.numerics.divergence import perplexity_of_logits, sample_difference
from common.numerics.grid import Grid
from common.running.runtime import load_model
from common.text import probe

# Perplexity of the probe text may be this many times the baseline's.
PERPLEXITY_RATIO = {8: 1.1, 4: 2.0, 3: 5.0, 2: 1000.0}
# From so many bits on no linear's output may be off by more than this share of its size: something
# else is wrong then.
ERROR_BITS, OUTPUT_ERROR = 4, 0.5
# Logits may differ from the recorded ones by this share of their spread: in float32, in 16 bits, or
# in any type where its rounding, or another processor's, tips what inputs, keys and values are
# rounded to, by the bits of those. Sound ones did by 0.04 in 16 bits, by 0.11 and 0.72 with 8 and
# 4 bits, with one wrong linear of 12 by 0.39, independent ones by 1.4: with 4 it tells little.
EXACT_LOGITS, LOGITS = 1e-3, {16: 0.08, 8: 0.25, 4: 1.0}
GENERATION_PROMPT, GENERATION_TOKENS = "The three most important things about water are", 24
# What reading and unpacking damaged tensors ends with, here and in the library.
_UNREADABLE = (UserError, RuntimeError, ValueError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class Check:
    """One line of the report. passed None means that the check could not be made."""

    name: str
    passed: bool | None
    detail: str


def verify(folder: Path, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Run all checks on a checkpoint, yielding each as it is done. Stops early where nothing
    further can work.

    Raises:
        UserError: the folder is no checkpoint of the quantize scripts at all.
    """
    config, tensors = open_checkpoint(folder)
    if reason := unknown_form(config):
        raise UserError(
            f"{folder} is not a checkpoint of the quantize scripts, but of a form that they do not "
            f"write: {reason}"
        )
    complete = _complete(folder, config, tensors)
    yield complete
    if not complete.passed:
        return
    try:
        record = metadata.read(folder)
    except UserError as error:
        yield Check("metadata", False, str(error))
        return
    if record is not None and "library" in record:
        raise UserError(
            f"{folder} was quantized by {record['library']['name']}, and only our own checkpoints "
            "are verified; common/evaluation.py tells what it is worth"
        )
    yield _unchanged(folder, record)
    yield from _codes(config, tensors, device)
    try:
        model, tokenizer = load_model(folder, device, dtype)
    except UserError as error:
        yield Check("plain load", False, str(error))
        return
    device = next(model.parameters()).device
    parameters = sum(p.numel() for p in model.parameters())
    loaded = f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters on {device}"
    yield _refused(folder, loaded) if CONFIG_KEY in config else Check("plain load", True, loaded)
    tokens = probe.probe_tokens(tokenizer)
    logits = _logits(model, tokens.to(device))
    finite = bool(torch.isfinite(logits).all()) and all(
        _is_finite(parameter) for parameter in model.parameters()
    )
    yield Check(
        "no NaN or Inf", finite, "weights and logits are finite" if finite else "NaN or Inf found"
    )
    try:
        yield _output_errors(record)
        yield from _recorded(record, logits, tokens, dtype)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError):
        yield Check(
            "recorded logits", False, f"{metadata.METADATA_FILE} is damaged; quantize again"
        )
    yield _generation(model, tokenizer, device)


@torch.inference_mode()
def _logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [length, vocabulary] of tokens [1, length], on the host: beside unpacked weights a
    GPU may lack the room.
    """
    hidden = model.model(tokens, use_cache=False).last_hidden_state[0]
    positions = logits_at_once(256, model.config.vocab_size, hidden.device)
    return torch.cat([model.lm_head(part).float().cpu() for part in hidden.split(positions)])


def _is_finite(parameter: torch.Tensor) -> bool:
    """Whether all values are, without a copy of them."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(parameter.detach()))


def _refused(folder: Path, loaded: str) -> Check:
    """Whether transformers alone refuses a checkpoint that it would run wrongly."""
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        return Check(
            "plain load",
            True,
            f"refused, as it should be: it rounds activations online; here {loaded}",
        )
    return Check("plain load", False, "transformers loads it without the online rotations it needs")


def _complete(folder: Path, config: dict, tensors: TensorReader) -> Check:
    described = ("tokenizer.json", "tokenizer_config.json")
    wanted = [file for file in described if not (folder / file).is_file()]
    layers, family = config["num_hidden_layers"], family_of_config(config)
    parts = REQUIRED_PARTS[(stored := weight_format(config)).form]
    names = [
        f"model.layers.{i}.{linear}.{part}"
        for i in range(layers)
        for linear in family.linears
        for part in parts
    ]
    names += [f"model.layers.{i}.{norm}.weight" for i in range(layers) for norm in family.norms]
    names.append("model.norm.weight")
    for name in _stored_vocabulary(config):
        form = stored.vocabulary_forms.get(name)
        names += [f"{name}.{part}" for part in (REQUIRED_PARTS[form] if form else ("weight",))]
    wanted += [name for name in names if name not in tensors]
    if wanted:
        return Check(
            "files complete",
            False,
            f"missing: {', '.join(wanted[:3])}"
            f"{f' and {len(wanted) - 3} more' if len(wanted) > 3 else ''}",
        )
    return Check(
        "files complete", True, f"{len(tensors.names())} tensors, tokenizer, configuration"
    )


def _stored_vocabulary(config: dict) -> tuple[str, ...]:
    """Embedding and head by name, a matrix that they share once."""
    return VOCABULARY[:1] if config.get("tie_word_embeddings") else VOCABULARY


def _unchanged(folder: Path, record: dict | None) -> Check:
    if record is None or not isinstance(record.get("files"), dict):
        return Check(
            "files unchanged",
            None,
            "saved without metadata, or by an earlier version: no hashes to compare with",
        )
    found = file_hashes(folder)
    changed = sorted(
        name for name in {*found, *record["files"]} if found.get(name) != record["files"].get(name)
    )
    return Check(
        "files unchanged",
        not changed,
        f"differ from what was saved: {', '.join(changed[:3])}"
        if changed
        else f"{len(found)} files have the hashes they were saved with",
    )


def _codes(config: dict, tensors: TensorReader, device: torch.device) -> Iterator[Check]:
    stored, linears = weight_format(config), family_of_config(config).linears
    grids = {
        f"model.layers.{layer}.{linear}": stored.grid
        for layer in range(config["num_hidden_layers"])
        for linear in linears
    }
    vocabulary = {
        name: stored.vocabulary[name]
        for name in _stored_vocabulary(config)
        if name in stored.vocabulary
    }
    bad_codes, bad_scales, damaged = [], [], []
    for name, grid in {**grids, **vocabulary}.items():
        whole = name in grids
        for place in (device, "cpu") if whole else ("cpu",):
            try:
                codes, scales, weights = _sound(tensors, name, grid, place, whole)
            except torch.cuda.OutOfMemoryError:
                continue  # where there is room
            except _UNREADABLE as error:
                damaged.append(f"{name} ({first_line(error)[:80]})")
            else:
                bad_codes += [] if codes else [name]
                bad_scales += [] if scales else [name]
                damaged += [] if weights else [name]
            break
    total = " and ".join([f"{len(grids)} linears", *vocabulary])
    widths = [f"{stored.grid.bits}-bit codes and zero-points of {len(grids)} linears"]
    widths += [f"{grid.bits}-bit codes of {name}" for name, grid in vocabulary.items()]
    yield _listed("tensors readable", damaged, f"{total} unpack")
    yield _listed("codes within range", bad_codes, " and ".join(widths))
    yield _listed("scales positive", bad_scales, f"scales of {total}")


def _sound(
    tensors: TensorReader, name: str, grid: Grid, device: torch.device | str, whole: bool
) -> tuple[bool, bool, bool]:
    """Whether a linear's codes lie in the grid's range, its scales are positive, and its weights
    finite, where both are so. Not a `whole` vocabulary's: unpacked they would take gigabytes.

    Raises:
        one of _UNREADABLE: its tensors cannot be read or unpacked.
    """
    state = stored_parts(lambda part: tensors.read(part).to(device), tensors, name)
    codes, scale = _in_range(state, grid), state["weight_scale"].float()
    scales = bool(torch.isfinite(scale).all() and (scale > 0).all())
    fine = not (whole and codes and scales) or torch.isfinite(decompress(state, grid)).all()
    return codes, scales, bool(fine)


def _in_range(state: dict, grid: Grid) -> bool:
    """Whether shapes fit together and codes and zero-points lie in the grid's range."""
    codes, zero_point = stored_codes(state, grid)
    rows, columns = state["weight_shape"].tolist() if "weight_shape" in state else codes.shape
    right_shape = codes.shape == (rows, columns) and state["weight_scale"].shape == (
        rows,
        grid.groups(columns),
    )
    if zero_point is not None:
        right_shape &= zero_point.shape == state["weight_scale"].shape
    return right_shape and all(
        tensor is None or (tensor.min() >= grid.code_min and tensor.max() <= grid.code_max)
        for tensor in (codes, zero_point)
    )


def wrecked(linears: dict[str, dict]) -> list[tuple[str, float]]:
    """Names and relative output errors of recorded linears whose error no rounding to their bits
    explains, the worst first.
    """
    errors = {
        name: linear["relative_output_error"]
        for name, linear in linears.items()
        if linear["bits"] >= ERROR_BITS
    }
    # NaN, which a record can hold, is no error that is small enough.
    return sorted(
        ((name, error) for name, error in errors.items() if not error <= OUTPUT_ERROR),
        key=lambda pair: -pair[1],
    )


def _output_errors(record: dict | None) -> Check:
    if record is None:
        return Check("output errors", None, "saved without metadata: not recorded")
    # Embedding and head are recorded apart where they were rounded.
    errors = {**record["linears"], **record.get("ends", {})}
    found = wrecked(errors)
    if found:
        named = ", ".join(f"{name} ({error:.2f})" for name, error in found[:3])
        return Check(
            "output errors",
            False,
            f"{len(found)} linears are off by more than {OUTPUT_ERROR} of their output: {named}",
        )
    worst = max(linear["relative_output_error"] for linear in errors.values())
    return Check(
        "output errors", True, f"{len(errors)} linears, off by at most {worst:.3f} of their output"
    )


def _listed(name: str, offenders: list[str], fine: str) -> Check:
    if offenders:
        return Check(name, False, f"{len(offenders)} linears are not: {', '.join(offenders[:3])}")
    return Check(name, True, fine)


def _recorded(
    record: dict | None, logits: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype
) -> Iterator[Check]:
    found = perplexity_of_logits(logits, tokens)
    if record is None:
        yield Check("recorded logits", None, "saved without metadata: nothing to compare with")
        yield Check(
            "perplexity",
            None,
            f"{found:.2f} on the probe text; saved without metadata, no baseline known: "
            "compare_to_baseline.py takes it as --baseline",
        )
        return
    expected = record["probe"]
    online = record.get("online_transforms") or {}
    rounded = record.get("activation_bits"), online.get("activation_bits"), online.get("kv_bits")
    tolerance = LOGITS[min(filter(None, rounded), default=16)]
    if record["compute_dtype"] == "float32" == dtype_name(dtype) and not any(rounded):
        tolerance = EXACT_LOGITS
    same_text = expected["tokens"] == tokens.shape[1]
    difference = sample_difference(logits, expected) if same_text else float("inf")
    yield Check(
        "recorded logits",
        difference <= tolerance,
        f"differ by {difference:.1e} of their spread (allowed {tolerance:g})"
        if same_text
        else "the tokenizer no longer cuts the probe text as it did",
    )
    allowed = PERPLEXITY_RATIO[record["bits"]]
    ratio = found / expected["baseline_perplexity"]
    yield Check(
        "perplexity",
        ratio <= allowed,
        f"{found:.2f} on the probe text, {ratio:.3f} x the baseline's "
        f"{expected['baseline_perplexity']:.2f} (allowed {allowed:g} x)",
    )


def _generation(model, tokenizer, device: torch.device) -> Check:
    prompt = tokenizer(GENERATION_PROMPT, return_tensors="pt").to(device)
    with torch.inference_mode():
        output = model.generate(
            **prompt,
            max_new_tokens=GENERATION_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return Check("generation", bool(text.strip()), f"{GENERATION_PROMPT} {' '.join(text.split())}")

"""The model card of a checkpoint, README.md in its folder: what it is, how it was made, how to load
it, and its results once there are some.

A card is signed with the hash of its own text. One that was edited, or is the user's own, is never
replaced. What is local, paths above all, stays out of it.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCardData

from common.base.files import replacing
from common.base.progress import say
from common.checkpoint import metadata
from common.checkpoint.format import WeightFormat, open_checkpoint, weight_format
from common.checkpoint.public import command, without_path, without_paths
from common.checkpoint.writer import METADATA_FILE
from common.model.online import CONFIG_KEY
from common.model.origin import README, origin_of
from common.reporting.compare_all import compare_all
from common.reporting.comparison import Comparison
from common.reporting.engines import (
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Support,
    support,
)
from common.reporting.report import conditions, short_revision
from common.reporting.tables import NONE, Table, significant
from common.results.documents import ModelResults, read_document
from common.results.naming import BASELINE, Subject
from common.tasks import perplexity, speed
from common.tasks.task import all_metrics

_RESULTS = "\n## Results\n"
_SIGNATURE = "<!-- Kept up to date until it is edited by hand; SHA-256 of the text above: "
_DEMO = (
    "The base was unpacked from a 4-bit package and its channels put in another order, which "
    "leaves its function as it is: a model to compare methods on, not to use."
)
_LOADING = {
    TRANSFORMERS: """```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # with compressed-tensors installed
tokenizer = AutoTokenizer.from_pretrained("MODEL")
model = AutoModelForCausalLM.from_pretrained("MODEL", device_map="auto")
```""",
    VLLM: "```\nvllm serve MODEL\n```",
    SGLANG: "```\npython -m sglang.launch_server --model-path MODEL\n```",
    LLAMA_CPP: """```
python common/gguf_export.py --model-path MODEL --output model.gguf
llama-server -m model.gguf
```
The first command belongs to the project that made this checkpoint; MODEL is a folder there.""",
}


def write_card(folder: Path, record: dict, before: Path) -> None:
    """Write the card of a finished checkpoint, or keep what the user wrote.

    Args:
        folder: the checkpoint, which may not have its real name yet.
        record: its metadata.
        before: where an older checkpoint may be that it replaces, with a README.md.
    """
    old = before / README
    if old.is_file() and _own_text(old) is None:
        shutil.copy(old, folder / README)
        say(f"{old} is not a card that was written here, so it stays as it is")
    else:
        _sign(folder / README, _about(folder, record))


def ensure_card(folder: Path) -> None:
    """Write the card of a checkpoint that has no README.md, of an earlier version, if its metadata
    is there.
    """
    record = metadata.read(folder)
    # Another library's checkpoint is not ours to describe.
    if record is not None and "library" not in record and not (folder / README).exists():
        write_card(folder, record, before=folder)


def refresh_card(subject: Subject, results_dir: Path) -> None:
    """Put the results of a checkpoint into its card. One that was not written here, or was edited,
    is left as it is.
    """
    folder = subject.folder
    if subject.configuration == BASELINE:
        return
    try:
        ensure_card(folder)
        text = _own_text(folder / README)
        if text is None:
            return
        results = _results_of(subject, results_dir)
        comparisons = compare_all(results_dir, results).get(subject.configuration, [])
        section = _results(results, subject.configuration, comparisons)
        _sign(folder / README, f"{text.partition(_RESULTS)[0]}{_RESULTS}\n{section}\n")
    except OSError as error:
        say(f"{folder / README} keeps its older results: it cannot be written ({error.strerror})")


def _results_of(subject: Subject, results_dir: Path) -> ModelResults:
    """The checkpoint's document and, where it is there, its baseline's."""
    names = (BASELINE, subject.configuration)
    files = {name: results_dir / subject.name / f"{name}.json" for name in names}
    found = {name: read_document(file) for name, file in files.items() if file.is_file()}
    return ModelResults(subject.name, found)


def _own_text(card: Path) -> str | None:
    """The text of a card that was written here and not changed since, without its signature."""
    try:
        text, mark, signature = card.read_text(encoding="utf-8").rpartition(_SIGNATURE)
    except (OSError, UnicodeDecodeError):
        return None
    return text if mark and signature == f"{_hash(text)} -->\n" else None


def _sign(card: Path, text: str) -> None:
    with replacing(card) as unfinished:
        unfinished.write_text(f"{text}{_SIGNATURE}{_hash(text)} -->\n", encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _about(folder: Path, record: dict) -> str:
    """The card but for results."""
    config, tensors = open_checkpoint(folder)
    made = record["model"]
    if "hub_id" not in made:  # of an earlier version
        origin = origin_of(made["source"], Path(made["source"]))
        made = {**made, **asdict(origin)}
    front = ModelCardData(
        base_model=made["hub_id"],
        base_model_relation="quantized" if made["hub_id"] else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(record),
        **made["licence"],
    )
    engines = support(config, tensors)
    loading = [
        f"**{engine}**{f', {found.words}' if found.words else ''}:\n\n{_LOADING[engine]}"
        for engine, found in engines.items()
        if found.runs
    ]
    if CONFIG_KEY in config:
        loading = ["With `common/evaluation.py` of the project that made it, and no other way."]
    record = without_paths(record)
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {made['name']}, {record['method']} {record['bits']}-bit",
        _what(record, made["hub_id"] or made["name"], weight_format(config)),
        *([_DEMO] if made["source"] == "demo" else []),
        "## How to load it",
        "MODEL is this folder, or its id on the hub.",
        *loading,
        *_others(engines),
        "## How it was made",
        f"```\n{command(record)}\n```",
        _how(record),
    ]
    return "\n\n".join(parts) + "\n"


def _tags(record: dict) -> list[str]:
    width = f"w{record['bits']}a{_activation_bits(record) or 16}"
    return ["compressed-tensors", record["method"], f"{record['bits']}-bit", width]


def _activation_bits(record: dict) -> int | None:
    online = record.get("online_transforms") or record
    return online.get("activation_bits")


def _what(record: dict, base: str, stored: WeightFormat) -> str:
    grid, activations = stored.grid, _activation_bits(record)
    scales = "one scale per output channel"
    if grid.group_size:
        scales = f"one scale for {grid.group_size} input channels"
    kind = "symmetric" if grid.symmetric else "asymmetric"
    rounded = [f"{name} to {one.bits} bits per row" for name, one in stored.vocabulary.items()]
    sentences = [
        f"{base}, its linears quantized to {grid.bits} bits by {record['method']}: {kind}, "
        f"{scales}.",
        f"Their inputs are rounded to {activations} bits as they come." if activations else "",
        f"Rounded besides: {', '.join(rounded)}." if rounded else "",
        f"{record['bytes']['quantized_weights'] / 1e6:.1f} MB of weights, "
        f"{record['compression_ratio']:.2f} times smaller than the original's{_bits(record)}.",
    ]
    return " ".join(filter(None, sentences))


def _bits(record: dict) -> str:
    """Bits of a weight, which metadata of earlier versions does not tell."""
    bits = record.get("bits_per_weight")
    if not bits:
        return ""
    return (
        f": {bits['coded']:.2f} bits for each weight with a code, scales included, "
        f"{bits['all']:.2f} for each of all"
    )


def _others(engines: dict[str, Support]) -> list[str]:
    """What is said of engines that do not run the checkpoint, or with which nobody has tried."""
    by_reason: dict[str, list[str]] = {}
    for engine, found in engines.items():
        if found.runs is False:
            by_reason.setdefault(found.words, []).append(engine)
    lines = [f"Not with {', '.join(names)}: {reason}." for reason, names in by_reason.items()]
    if untried := [engine for engine, found in engines.items() if found.runs is None]:
        lines.append(f"Not tried: {', '.join(untried)}.")
    return lines


def _how(record: dict) -> str:
    """What a checkpoint was made from and with."""
    calibration, versions, probe = record["calibration"], record["versions"], record["probe"]
    text = "No calibration text."
    if calibration:
        text = (
            f"Calibration: {calibration['samples']} x {calibration['length']} tokens of "
            f"{short_revision(calibration['data'])}, seed {calibration['seed']}; SHA-256 of the "
            f"token ids {calibration['fingerprint']}."
        )
    made_from = record.get("made_from", {}).get("model")
    more = f"- Options, versions, times and the error of every linear: `{METADATA_FILE}`."
    return "\n".join(
        [
            f"- {text}",
            *([f"- SHA-256 over the base model's files: {made_from}."] if made_from else []),
            f"- On {record['device']['name']} in {record['compute_dtype']}; Python "
            f"{versions['python']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}, compressed-tensors {versions['compressed-tensors']}.",
            f"- Perplexity of a fixed short text {probe['baseline_perplexity']:.2f} before, "
            f"{probe['perplexity']:.2f} after.",
            *([more] if record["options"]["save_metadata"] else []),
        ]
    )


def _results(results: ModelResults, configuration: str, comparisons: list[Comparison]) -> str:
    """What is said under Results, from the documents of a configuration and its baseline."""
    document = results.documents[configuration]
    tasks = {
        name: {**task, "data": without_path(task["data"])}
        for name, task in document["tasks"].items()
    }
    # Neither speed nor, once more, the calibration.
    told = {**document, "tasks": tasks, "quantization": {}, speed.TASK.name: {}}
    shown = ModelResults(results.name, {configuration: told})
    found = {(one.kind.task, one.kind.key): one for one in comparisons}
    rows = []
    for kind in all_metrics():
        value = document["tasks"].get(kind.task, {}).get(kind.key)
        one = found.get((kind.task, kind.key))
        if value is None:
            continue
        row = [kind.name, NONE, significant(value), NONE, NONE, NONE]
        if one is not None:
            part = kind.share and kind.larger_is_better and one.baseline > 0
            recovery = f"{100 * one.quantized / one.baseline:.1f}%" if part else NONE
            difference = one.shown_difference()
            row[1:] = [significant(one.baseline), row[2], recovery, difference, one.verdict()]
        rows.append(row)
    note = (
        "Recovery is this model's score as a share of the 16-bit baseline's; in brackets the "
        "difference's 95% interval, of both models on the same questions (perplexity: a ratio)."
    )
    header = ["", "Baseline", "This model", "Recovery", "Difference [95%]", "Verdict"]
    parts = [conditions(shown)]
    if rows:
        parts.append(Table("Scores", header, rows, note=note if comparisons else "").markdown())
    if apart := perplexity.divergence_of(document):
        parts.append(
            f"Kullback-Leibler divergence from the baseline's next-token distributions: mean "
            f"{significant(apart['kl_mean'])} nats per token; the same most likely token "
            f"{100 * apart['same_top']:.2f}% of the time."
        )
    if document["demo_data"]:
        parts.append("The demo's own tasks: they compare methods, not models with the literature.")
    return "\n\n".join(parts)

"""One evaluation, from options to written results."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.base.device import device_and_dtype, dtype_name
from common.base.errors import UserError
from common.base.files import write_json
from common.base.progress import say
from common.checkpoint import metadata
from common.checkpoint.foreign import check_readable
from common.cli import configure_torch
from common.model.located import described_by
from common.model.source import load_tokenizer, read_config, resolve_folder
from common.model.tensors import TensorReader
from common.results import hashes, identity
from common.results.documents import (
    check_folder,
    load_samples,
    read_document,
    samples_by_task,
    stored_document,
    write_samples,
)
from common.results.naming import BASELINE, Subject
from common.running.packed import unpack_for_prompts
from common.running.runtime import load_for_running
from common.running.speed import weight_bytes
from common.tasks.task import Evaluation, Record, Task, all_tasks, task_names
from common.text import overlap


def evaluate_model(
    subject: Subject,
    options: argparse.Namespace,
    reuse: bool,
    twice: bool = False,
    compared: str | None = None,
) -> dict:
    """Evaluate a model and write its results. Returns the document that was written, or found.

    Args:
        reuse: leave out tasks whose results are there and were made from the same (`identity`).
        twice: run tasks a second time in other batches, for the noise floor of every comparison;
            the results are said before.
        compared: the configuration that a baseline is evaluated for; with `reuse`, refused where
            others would lose theirs.
    Raises:
        UserError: no data, or evaluation data that the model was calibrated on.
    """
    folder, results_dir = subject.folder, options.results_dir
    check_folder(results_dir, subject.name)
    device, dtype = device_and_dtype(options)
    configure_torch(0)
    demo = on_demo_data(options.data, subject.source, options.data_root)
    # Early: what cannot be loaded, or has damaged metadata, should not cost an evaluation.
    check_readable(folder)
    described = described_by(folder, subject.original)
    original = _original_tensors(subject)
    facts = metadata.quantization_facts(folder, original)
    tasks = [task for task in all_tasks() if task.name in options.tasks]
    with ThreadPoolExecutor(1) as beside:
        # What is read meanwhile takes the interpreter, which hashing leaves free.
        checkpoint = beside.submit(hashes.checkpoint_hash, folder, results_dir)
        tokenizer = load_tokenizer(described)
        evaluation = Evaluation(subject, described, options, demo, device, dtype, tokenizer)
        # Data first: a missing data set should not cost the time it takes to load the model.
        loaded = {task.name: task.load(evaluation) for task in tasks}
        _check_overlap(tasks, loaded, evaluation)
    shared = {
        "source": subject.source,
        "checkpoint": checkpoint.result(),
        "code": hashes.code_hash(),
        "demo_data": demo,
        "versions": metadata.versions(),
        "device": metadata.describe_device(device),
        "compute_dtype": dtype_name(dtype),
    }
    found = {task.name: task.conditions(loaded[task.name], evaluation) for task in tasks}
    conditions = {name: found[name] for name in options.tasks}
    file, once = results_dir / subject.name / f"{subject.configuration}.json", list[Task]()
    if reuse:
        left, half = identity.left_to_do(subject, results_dir, shared, conditions, twice)
        if not left and not half:
            return read_document(file)
        conditions = {name: conditions[name] for name in left}
        once = [task for task in tasks if task.name in half]
        tasks = [task for task in tasks if task.name in left]
    if subject.configuration == BASELINE:
        refuse = reuse and compared is not None
        identity.spare(subject, results_dir, conditions, compared, refuse)
    # What is done stays if the rest is not, but no results are replaced by a part of others.
    in_parts = identity.may_be_in_parts(subject, results_dir, shared, conditions)
    if not in_parts:
        say(f"{file}: there are other results, so nothing of these is kept until all is done")
    prepared = {task.name: task.prepare(loaded[task.name], evaluation) for task in [*tasks, *once]}
    started = time.perf_counter()
    model, _ = load_for_running(folder, device, dtype, evaluation.tokenizer)
    loading, device = time.perf_counter() - started, next(model.parameters()).device
    _check_made_from(subject, model.config)
    memory = metadata.peak_memory(device)
    # Here the model is alone on the device.
    alone = {
        task.name: task.run(model, prepared[task.name], evaluation)[0]
        for task in tasks
        if not task.per_sample
    }
    summaries: dict[str, dict] = {}
    samples: dict[str, list[Record]] = {}
    asked = [task for task in tasks if task.per_sample]

    def so_far() -> dict:
        # Measuring the memory to run has reset the peaks.
        peaks = metadata.peak_memory(device)
        peaks = {key: max(memory[key], value) for key, value in peaks.items()}
        return {
            "format_version": 2,
            "model": subject.name,
            "configuration": subject.configuration,
            **shared,
            "date": time.strftime("%Y-%m-%d"),
            "load_seconds": round(loading, 2),
            "quantization": facts,
            "tasks": dict(summaries),
            **alone,
            "memory": {"weights_bytes": weight_bytes(model), **peaks},
            "seconds": round(time.perf_counter() - started, 2),
        }

    kept: list[str] = []
    if alone and in_parts:
        write_results(results_dir, so_far(), samples)
        kept = [*alone]
    unpack_for_prompts(model)  # most of what follows is reading prompts
    if asked:
        what = f"{subject.name} {subject.configuration} on {device} in {dtype_name(dtype)}"
        say(f"Evaluating {what}: {', '.join(task.name for task in asked)}")
    try:
        for task in asked:
            summary, samples[task.name] = task.run(model, prepared[task.name], evaluation)
            summaries[task.name] = {**summary, **conditions[task.name]}
            if in_parts and task is not asked[-1]:
                write_results(results_dir, so_far(), samples)
                kept.append(task.name)
    except KeyboardInterrupt:
        if kept:
            say(f"kept: {', '.join(kept)}; --reuse, which a batch does itself, goes on from there")
        raise
    if tasks:
        document = so_far()
        say(in_words(document))
        written = write_results(results_dir, document, samples)
    else:
        document = written = read_document(file)
    # Last, as it is a newcomer's first result that it would keep waiting.
    again = [task for task in [*asked, *once] if twice and task.varies]
    if again:
        say("Once more in other batches: how far scores move by themselves")
    if once:
        stored = samples_by_task(results_dir, subject.name, subject.configuration)
        samples = {task: samples.get(task, records) for task, records in stored.items()}
    for task in again:
        began = time.perf_counter()
        moved = task.noise(model, prepared[task.name], evaluation, samples[task.name])
        document["noise"] = {**document.get("noise", {}), task.name: moved}
        document["seconds"] = round(document["seconds"] + time.perf_counter() - began, 2)
        written = write_results(results_dir, document, samples)
    return written


def on_demo_data(data: str, source: str, data_root: Path | None) -> bool:
    """Whether the demo's own data are evaluated on: `data` is what --data says, `source` the 16-bit
    model."""
    return data == "demo" or (data == "auto" and source == "demo" and not data_root)


def _original_tensors(subject: Subject) -> TensorReader | None:
    """The tensors of a quantized model's 16-bit one; None where they cannot be had."""
    if subject.configuration == BASELINE:
        return None
    try:
        return TensorReader(resolve_folder(subject.original))
    except UserError:
        return None


def _check_made_from(subject: Subject, config) -> None:
    """Refuse a model of another shape than the 16-bit one that it is to be compared with."""
    try:
        original = read_config(resolve_folder(subject.original))
    except UserError:
        return
    for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
        then, now = original.get(key), getattr(config, key, None)
        if then is not None and now is not None and then != now:
            raise UserError(
                f"{subject.folder} has {key} {now}, {subject.source} has {then}, so it was not "
                "made from that; name its 16-bit model with --baseline"
            )


def _check_overlap(tasks: list[Task], loaded: dict, evaluation: Evaluation) -> None:
    """Refuse to evaluate a model on text that it was calibrated on."""
    folder = evaluation.subject.folder
    record = metadata.read(folder)
    prints = ((record or {}).get("calibration") or {}).get("passages")
    if not prints:
        return
    known = overlap.decode(prints)
    for task in tasks:
        share, passage = overlap.largest_share(known, task.texts(loaded[task.name], evaluation))
        if share >= overlap.TOO_MUCH:
            raise UserError(
                f"{task.name} would be evaluated on text that {folder} was calibrated on "
                f'("{passage} ..."); quantize with other --calib-data, evaluate on other data, '
                f"or leave {task.name} out of --tasks"
            )


def write_results(results_dir: Path, document: dict, samples: dict[str, list[Record]]) -> dict:
    """Write metrics and per-sample records; returns the document as written.

    Tasks that an earlier run evaluated on the same checkpoint, with the same code and device, and
    this one did not, are kept.
    """
    name, configuration = document["model"], document["configuration"]
    path = results_dir / name / f"{configuration}.json"
    if earlier := stored_document(results_dir, name, configuration):
        if not identity.shared_changes(earlier, document):
            missing = {task for task in earlier["tasks"] if task not in document["tasks"]}
            old = load_samples(results_dir, name, configuration) if missing else []
            kept = {
                task: [
                    {key: value for key, value in sample.items() if key != "task"}
                    for sample in old
                    if sample["task"] == task
                ]
                for task in missing
            }
            samples = {**kept, **samples}
            other = identity.other_data(earlier, document)
            noise = {
                task: found for task, found in earlier.get("noise", {}).items() if task not in other
            }
            document = {
                **earlier,
                **document,
                "tasks": {**earlier["tasks"], **document["tasks"]},
                "noise": {**noise, **document.get("noise", {})},
            }
            if not document["noise"]:
                del document["noise"]
    order = [task for task in task_names() if task in document["tasks"]]
    document["tasks"] = {task: document["tasks"][task] for task in order}
    records = {task: samples[task] for task in order}
    # Nothing answers for samples of another run, should this one end here.
    write_samples(
        results_dir, name, configuration, records, before=lambda: path.unlink(missing_ok=True)
    )
    write_json(path, document)
    return document


def in_words(document: dict) -> str:
    """The evaluation in a few words."""
    words = [task.in_words(found) for task in all_tasks() if (found := task.of(document))]
    return (
        f"{document['model']} {document['configuration']}: {'; '.join(words)} "
        f"({document['seconds']:.0f} s)"
    )

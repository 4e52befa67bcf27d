#!/usr/bin/env python3
"""Evaluate a model: ARC, SQuAD v2, OpenMath, perplexity, speed and memory.

    python common/evaluation.py --model-path models/Llama-3.2-1B-Instruct/gptq-4bit
    python common/evaluation.py --model-path models/SmolLM2-135M-Instruct/baseline --limit 20

Tasks run in lm-eval with the task files in common/tasks, on the same samples and prompts for every configuration.
Metrics go to results/<model>/<configuration>.json, a record for each sample to results/<model>/samples/, both with what they
were made from. A quantized model that does not say what it was made from is told with --baseline.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Started as a script: `common` is a folder of the project's, not of this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import yaml
from torch import Tensor

from common import identity, metadata, overlap
from common.calibration import Windows, evaluation_windows
from common.chat import template_date
from common.cli import add_device_arguments, configure_torch, positive, run, two_or_more
from common.data import Rows, check_columns, demo_rows, load_rows
from common.device import device_and_dtype, dtype_name
from common.device_memory import logits_at_once
from common.divergence import compare, hidden_states, place_head, summarise
from common.errors import UserError
from common.files import write_json
from common.models import SourceModel, load_tokenizer, read_config
from common.naming import Subject, subject_of
from common.probe import check_finite
from common.progress import say, track
from common.results import RESULTS_FOLDER, has_samples, load_samples, read_document, write_samples
from common.reuse import check_original
from common.runtime import load_for_running, measure_memory, measure_speed, weight_bytes
from common.tasks import scoring
from common.tasks.numbers import parse_number

TASKS = ("arc", "squad_v2", "openmath", "perplexity", "speed")
TASK_FILES = Path(__file__).parent / "tasks"
SAMPLE_SEED = 1234
STATES_FOLDER = "baseline_states"


@dataclass(frozen=True)
class TaskData:
    """Where a task's rows come from: demo file, hub address, and how many by default.

    fetch: rows of a seeded sample that are looked through for OpenMath, many of which have no
    numeric answer. needs: the columns that a row must have, with a dot what is inside one. columns:
    those that are read, where that is less than all.
    """

    demo: str
    address: str
    limit: int
    needs: tuple[str, ...]
    chat: bool = True
    fetch: int | None = None
    columns: tuple[str, ...] | None = None


# Limits keep one model of a billion weights under three minutes on a GPU.
TASK_DATA = {
    "arc": TaskData("arc", "allenai/ai2_arc/ARC-Challenge:test", 1172,
                    ("question", "choices.text", "choices.label", "answerKey"), chat=False),
    "squad_v2": TaskData("squad", "rajpurkar/squad_v2/squad_v2:validation", 1000,
                         ("context", "question", "answers.text")),
    "openmath": TaskData("openmath", "nvidia/OpenMathInstruct-2:train", 200,
                         ("problem", "expected_answer"), fetch=1024,
                         columns=("problem", "expected_answer")),
}
# Bytes to fetch for one task's sample of a split too large to be fetched whole, unless one row group is larger.
TRAFFIC = 40_000_000
PERPLEXITY_DATA = "Salesforce/wikitext/wikitext-2-raw-v1:test"
# On a CPU; on a GPU the whole text is evaluated, as in published tables.
CPU_WINDOWS, WINDOW_LENGTH = 40, 2048
DEMO_WINDOWS, DEMO_WINDOW_LENGTH = 16, 512


def task_sample(task: str, limit: int | None) -> tuple:
    """Which rows of a task's data set `data.load_rows` is asked for, at a --limit: limit, seed, columns, budget."""
    data = TASK_DATA[task]
    limit = limit or data.limit
    # At least the usual number is drawn, so that a smaller --limit finds them in the cache.
    wanted = max(data.limit, limit) if data.fetch is None else max(data.fetch, 4 * limit)
    return wanted, SAMPLE_SEED, data.columns, TRAFFIC


def task_rows(task: str, options: argparse.Namespace, demo: bool) -> Rows:
    """The rows a task is evaluated on: the same for every model.

    Raises:
        UserError: no data, or rows without what the task needs.
    """
    data = TASK_DATA[task]
    address = getattr(options, f"{task}_data", None)
    limit = options.limit or data.limit
    if demo and not address:
        loaded = demo_rows(data.demo)
        return Rows(loaded.rows[:options.limit], loaded.source)
    loaded = load_rows(address or data.address, options.data_root, *task_sample(task, options.limit))
    check_columns(loaded, data.needs, f"{task}, whose data are like {data.address}")
    if task == "arc":
        _check_answer_keys(loaded)
    if data.fetch is None:
        return Rows(loaded.rows[:limit], loaded.source)
    # A problem whose answer is an expression has no distance from a number.
    numeric = [row for row in loaded.rows if parse_number(str(row["expected_answer"])) is not None]
    if not numeric:
        raise UserError(f"{loaded.source} has no row with a numeric expected_answer")
    return Rows(numeric[:limit], loaded.source)


def _check_answer_keys(loaded: Rows) -> None:
    """Refuse questions of ARC whose right answer is none of their choices. Raises UserError, naming the first."""
    for row in loaded.rows:
        key, labels = row["answerKey"], row["choices"]["label"] or []
        if key not in labels:
            name = row.get("id") or row["question"]
            raise UserError(f"{loaded.source}: the answerKey {key!r} of {name} is none of its labels {labels}; correct it, "
                            "give other data with --arc-data, or leave arc out of --tasks")


def run_task(task: str, model, tokenizer, rows: Rows, demo: bool, batch_share: float = 1.0) -> tuple[dict, list[dict]]:
    """Run one lm-eval task, in batches of a share of the usual size. Returns its summary and the record of every sample."""
    import datasets
    import lm_eval.api.task
    from lm_eval.evaluator import evaluate

    from common.language_model import HarnessModel

    lm_eval.api.task.tqdm = lambda items, **_: items                            # its bar has no switch
    config = yaml.safe_load((TASK_FILES / f"{task}.yaml").read_text())
    config.update(custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(rows.rows)},
                  process_results=lambda doc, results: {"record": scoring.SAMPLE_SCORES[task](doc, results)},
                  metric_list=[{"metric": "record", "aggregation": len, "higher_is_better": True}])
    if demo:
        config.update(config["metadata"].get("demo", {}))
    loaded = {"tasks": {task: lm_eval.api.task.ConfigurableTask(config=config)}, "groups": {}}
    chat = TASK_DATA[task].chat and not demo and bool(tokenizer.chat_template)
    start = time.perf_counter()
    outcome = evaluate(HarnessModel(model, tokenizer, batch_share), loaded, bootstrap_iters=0, apply_chat_template=chat,
                       fewshot_as_multiturn=chat)
    seconds = time.perf_counter() - start
    logged = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    samples = [{"id": sample["doc"].get("id") or f"{task}-{sample['doc_id']}", **sample["record"]} for sample in logged]
    summary = {**scoring.summarise(task, samples), "data": rows.source, "chat_template": chat,
               "template_date": template_date(tokenizer) if chat else None, "seconds": round(seconds, 2),
               "first_prompt": logged[0]["arguments"][0][0]}
    return summary, samples


@torch.inference_mode()
def perplexity(model, windows: Windows, original: SourceModel | None = None, references: Tensor | None = None,
               ) -> tuple[dict, list[dict]]:
    """Perplexity of consecutive windows [samples, length]: exp of the mean negative log-likelihood per token.

    Every window's first token is context only, and no BOS is put before it, as in published tables. The record of each window
    is its mean negative log-likelihood and, where the original model is given, the divergence from it at every token
    (`common.divergence`); references: its last hidden states [samples, length, hidden].
    """
    device = next(model.parameters()).device
    start = time.perf_counter()
    if original is None:
        references = [None] * len(windows.tokens)
    else:
        place_head(original, model)
    slice_size = logits_at_once(256, model.config.vocab_size, device)
    samples = []
    for index, (window, reference) in enumerate(zip(track(windows.tokens, "perplexity", unit="windows"), references,
                                                    strict=True)):
        window = window.to(device)
        hidden = model.model(window.unsqueeze(0), use_cache=False).last_hidden_state[0, :-1]
        # A slice of the vocabulary's logits at a time: all of them would take gigabytes.
        total, divergence, same = torch.zeros((), device=device), [], torch.zeros((), dtype=torch.long, device=device)
        for first in range(0, len(hidden), slice_size):
            part = slice(first, first + slice_size)
            found = torch.log_softmax(model.lm_head(hidden[part]).float(), -1)
            total -= found.gather(1, window[1:][part].unsqueeze(1)).sum()
            if reference is not None:
                values, equal = compare(torch.log_softmax(original.logits(reference[:-1][part].to(device)), -1), found)
                divergence.append(values)
                same += equal.sum()
        check_finite(total, f"window {index} of the perplexity's text", hidden.dtype)
        samples.append({"id": f"window-{index}", "loss": total.item() / (len(window) - 1)})
        if divergence:
            samples[-1] |= {"kl": [float(f"{value:.3e}") for value in torch.cat(divergence).tolist()], "same_top": same.item()}
    values = torch.tensor([sample["loss"] for sample in samples], dtype=torch.float64)
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("nan"))
    mean = values.mean()
    summary = {"perplexity": mean.exp().item(), "standard_error": (mean.exp() * error).item(), "windows": len(values),
               "length": windows.tokens.shape[1], "data": windows.source, "fingerprint": windows.fingerprint,
               "seconds": round(time.perf_counter() - start, 2)}
    if original:
        summary["divergence"] = summarise(samples)
    return summary, samples


def _original(subject: Subject, device: torch.device, dtype: torch.dtype) -> SourceModel | None:
    """The model that a checkpoint was made from, or the folder itself where it is one; None where it is not to be had."""
    try:
        return SourceModel(subject.original, device, dtype)
    except UserError as error:
        say(f"divergence from the baseline is left out: {error}")
        return None


def _noise(samples: dict[str, list[dict]], model, tokenizer, rows: dict, demo: bool) -> dict:
    """The tasks once more in other batches: how many answers change, and by how much at most, though nothing has changed."""
    scores = {"arc": "acc", "squad_v2": "f1", "openmath": "correct"}
    found = {}
    for task in samples:
        _, again = run_task(task, model, tokenizer, rows[task], demo, batch_share=0.5)
        changes = [abs(one[scores[task]] - other[scores[task]]) for one, other in zip(samples[task], again, strict=True)]
        found[task] = {"changed": sum(change > 0 for change in changes), "largest": max(changes), "samples": len(changes)}
    return found


def evaluate_model(subject: Subject, options: argparse.Namespace, reuse: bool, twice: bool = False,
                   compared: str | None = None) -> dict:
    """Evaluate a model and write its results. Returns the document that was written, or found.

    Args:
        reuse: leave out tasks whose results are there, if they were made from the same (`identity`).
        twice: run the tasks a second time in other batches, for the noise floor of every comparison.
        compared: the configuration that a baseline is evaluated for; with `reuse`, refused where others would lose theirs.
    Raises:
        UserError: no data, or evaluation data that the model was calibrated on.
    """
    folder, name, configuration = subject.folder, subject.name, subject.configuration
    device, dtype = device_and_dtype(options)
    configure_torch(0)
    demo = options.data == "demo" or (options.data == "auto" and subject.source == "demo" and options.data_root is None)
    chosen = options.tasks
    # Data first: a missing data set should not cost the time it takes to load the model.
    rows = {task: task_rows(task, options, demo) for task in chosen if task in TASK_DATA}
    tokenizer, windows = load_tokenizer(folder), None
    if "perplexity" in chosen:
        windows = evaluation_windows(options.perplexity_data or ("demo" if demo else PERPLEXITY_DATA), tokenizer,
                                     options.windows or default_windows(demo, device),
                                     _window_length(folder, options.window_length, demo),
                                     options.data_root)
    facts = _quantization_facts(folder)  # early: damaged metadata should not cost an evaluation
    _check_overlap(folder, tokenizer, rows, windows)
    shared = {"source": subject.source, "checkpoint": identity.checkpoint_hash(folder, options.results_dir),
              "code": identity.code_hash(), "demo_data": demo, "versions": metadata.versions(),
              "device": metadata.describe_device(device), "compute_dtype": dtype_name(dtype)}
    if windows is not None:
        check_original(subject, options.results_dir)
    conditions = _conditions(subject, options.results_dir, chosen, rows, windows)
    if reuse:
        chosen = identity.left_to_do(subject, options.results_dir, shared, conditions, twice)
        if not chosen:
            return read_document(options.results_dir / name / f"{configuration}.json")
        if compared:
            identity.spare(subject, options.results_dir, {task: conditions[task] for task in chosen}, compared)
        rows, windows = {task: rows[task] for task in rows if task in chosen}, windows if "perplexity" in chosen else None
    # Before the model takes its room: the original passes through the device layer by layer.
    original = _original(subject, device, dtype) if windows is not None else None
    references = None
    if original:
        references = hidden_states(original, windows, options.results_dir / name / STATES_FOLDER)
        original.move_ends(torch.device("cpu"))
    started = time.perf_counter()
    model, _ = load_for_running(folder, device, dtype)
    loading, device = time.perf_counter() - started, next(model.parameters()).device
    loaded = metadata.peak_memory(device)
    # Here the model is alone on the device.
    speed = None
    if "speed" in chosen:
        speed = measure_speed(model, model.config.vocab_size)
        speed["memory_bytes"] = measure_memory(model, model.config.vocab_size)
    say(f"Evaluating {name} {configuration} on {device} in {dtype_name(dtype)}: {', '.join(chosen)}")
    tasks, samples = {}, {}
    for task in rows:
        tasks[task], samples[task] = run_task(task, model, tokenizer, rows[task], demo)
    noise = _noise(samples, model, tokenizer, rows, demo) if twice else None
    if windows is not None:
        tasks["perplexity"], samples["perplexity"] = perplexity(model, windows, original, references)
    document = {
        "format_version": 2, "model": name, "configuration": configuration, **shared, "date": time.strftime("%Y-%m-%d"),
        "load_seconds": round(loading, 2), "quantization": facts,
        "tasks": {task: {**summary, **conditions[task]} for task, summary in tasks.items()},
    }
    if noise:
        document["noise"] = noise
    if speed:
        document["speed"] = speed
    # Measuring the memory to run has reset the peaks.
    peaks = {key: max(loaded[key], value) for key, value in metadata.peak_memory(device).items()}
    document["memory"] = {"weights_bytes": weight_bytes(model), **peaks}
    document["seconds"] = round(time.perf_counter() - started, 2)
    say(describe(document))
    return write_results(options.results_dir, document, samples)


def default_windows(demo: bool, device: torch.device) -> int | None:
    """How many perplexity windows are evaluated unless told; None is the whole text."""
    if demo:
        return DEMO_WINDOWS
    return CPU_WINDOWS if device.type == "cpu" else None


def _window_length(folder: Path, asked: int | None, demo: bool) -> int:
    """Tokens of a perplexity window: as asked for or the default, cut to the model's context."""
    length = asked or (DEMO_WINDOW_LENGTH if demo else WINDOW_LENGTH)
    context = read_config(folder).get("max_position_embeddings")
    if not isinstance(context, int) or length <= context:
        return length
    say(f"perplexity windows are cut from {length:,} to {context:,} tokens, the model's context")
    return context


def _conditions(subject: Subject, results_dir: Path, chosen: tuple[str, ...], rows: dict[str, Rows],
                windows: Windows | None) -> dict[str, dict]:
    """By task, what its results depend on besides what all tasks share."""
    found = {task: {"data": data.source, "samples": len(data.rows), "fingerprint": identity.rows_fingerprint(data.rows)}
             for task, data in rows.items()}
    if windows is not None:
        found["perplexity"] = {"data": windows.source, "windows": len(windows.tokens), "length": windows.tokens.shape[1],
                               "fingerprint": windows.fingerprint, "original": identity.original_hash(subject, results_dir)}
    return {task: found.get(task, {}) for task in chosen}


def _check_overlap(folder: Path, tokenizer, rows: dict[str, Rows], windows: Windows | None) -> None:
    """Refuse to evaluate a model on text that it was calibrated on."""
    record = metadata.read(folder)
    prints = ((record or {}).get("calibration") or {}).get("passages")
    if not prints:
        return
    texts = {task: [" ".join(_strings(row)) for row in data.rows] for task, data in rows.items()}
    if windows is not None:
        texts["perplexity"] = [tokenizer.decode(window) for window in windows.tokens]
    known = overlap.unpack(prints)
    for task, passages in texts.items():
        share, passage = overlap.largest_share(known, passages)
        if share >= overlap.TOO_MUCH:
            raise UserError(f"{task} would be evaluated on text that {folder} was calibrated on (\"{passage} ...\"); quantize "
                            f"with other --calib-data, evaluate on other data, or leave {task} out of --tasks")


def _strings(value) -> Iterator[str]:
    """All text in a row of a data set."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _quantization_facts(folder: Path) -> dict:
    """What the README's tables say about how the checkpoint came about; sizes alone
    where there is no metadata.

    Raises:
        UserError: metadata with values of another kind.
    """
    document = metadata.read(folder)
    if document is None:
        from common.checkpoint import folder_bytes
        from common.models import TensorReader

        return {"weights_bytes": TensorReader(folder).total_bytes(), "folder_bytes": folder_bytes(folder)}
    try:
        return _recorded_facts(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / metadata.METADATA_FILE} is damaged ({type(error).__name__}: "
                        f"{error}); quantize again with --overwrite, or delete it and name the "
                        "16-bit model with --baseline") from None


def _recorded_facts(document: dict) -> dict:
    errors = {name: round(record["relative_output_error"], 6) for name, record in document["linears"].items()}
    return {"weights_bytes": document["bytes"]["quantized_weights"],
            "folder_bytes": document["bytes"]["quantized_folder"], "compression_ratio": document["compression_ratio"],
            "seconds": document["seconds"], "memory": document["memory"], "device": document["device"],
            "grid": document["grid"], "calibration": _without_passages(document["calibration"]),
            "probe": {key: document["probe"][key] for key in ("baseline_perplexity", "perplexity", "divergence")},
            "relative_output_error": errors}


def _without_passages(calibration: dict | None) -> dict | None:
    return calibration and {key: value for key, value in calibration.items() if key != "passages"}


def write_results(results_dir: Path, document: dict, samples: dict[str, list[dict]]) -> dict:
    """Write metrics and per-sample records; returns the document as written.

    Tasks that an earlier run evaluated on the same checkpoint, with the same code and device, and this one did not, are kept.
    """
    path = results_dir / document["model"] / f"{document['configuration']}.json"
    if path.is_file() and has_samples(results_dir, document["model"], document["configuration"]):
        earlier = read_document(path)
        if not identity.shared_changes(earlier, document):
            old = load_samples(results_dir, document["model"], document["configuration"])
            missing = {task for task in earlier["tasks"] if task not in document["tasks"]}
            samples = {**{task: [{k: v for k, v in sample.items() if k != "task"} for sample in old
                                 if sample["task"] == task] for task in missing}, **samples}
            noise = {**{task: found for task, found in earlier.get("noise", {}).items() if task in missing},
                     **document.get("noise", {})}
            document = {**earlier, **document, "tasks": {**earlier["tasks"], **document["tasks"]}, "noise": noise}
    order = [task for task in TASKS if task in document["tasks"]]
    document["tasks"] = {task: document["tasks"][task] for task in order}
    # Nothing answers for samples of another run, should this one end here.
    path.unlink(missing_ok=True)
    write_samples(results_dir, document["model"], document["configuration"], {task: samples[task] for task in order})
    write_json(path, document)
    return document


def describe(document: dict) -> str:
    """The evaluation in a few words."""
    tasks, words = document["tasks"], []
    if "arc" in tasks:
        words.append(f"ARC accuracy {tasks['arc']['accuracy']:.3f} F1 {tasks['arc']['macro_f1']:.3f}")
    if "squad_v2" in tasks:
        words.append(f"SQuAD F1 {tasks['squad_v2']['f1']:.3f} EM {tasks['squad_v2']['exact_match']:.3f}")
    if "openmath" in tasks:
        difference = tasks["openmath"]["mean_absolute_difference"]
        words.append(f"OpenMath correct {tasks['openmath']['within_tolerance']:.3f}, mean difference "
                     f"{'none' if difference is None else f'{difference:.4g}'}")
    if "perplexity" in tasks:
        words.append(f"perplexity {tasks['perplexity']['perplexity']:.3f}")
    if "speed" in document:
        words.append(f"{document['speed']['tokens_per_second']:.1f} tokens/s")
    return f"{document['model']} {document['configuration']}: {'; '.join(words)} ({document['seconds']:.0f} s)"


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that the evaluation shares with baseline.py and the batch."""
    add_device_arguments(parser)
    limits = ", ".join(f"{task} {data.limit}" for task, data in TASK_DATA.items())
    parser.add_argument("--limit", type=positive, metavar="N", help=f"samples per task (default: {limits}; the demo's own "
                                                                    "tasks whole)")
    parser.add_argument("--tasks", type=_tasks, default=TASKS, metavar="A,B",
                        help=f"what to evaluate (default: {','.join(TASKS)})")
    parser.add_argument("--data", choices=("auto", "demo", "hub"), default="auto",
                        help="the demo's own tasks or the real data sets; auto is demo for the demo model without "
                             "--data-root")
    parser.add_argument("--arc-data", metavar="DATA", help=f"another data set (default: {TASK_DATA['arc'].address})")
    parser.add_argument("--squad-data", dest="squad_v2_data", metavar="DATA",
                        help=f"another data set (default: {TASK_DATA['squad_v2'].address})")
    parser.add_argument("--openmath-data", metavar="DATA",
                        help=f"another data set (default: {TASK_DATA['openmath'].address})")
    parser.add_argument("--perplexity-data", metavar="DATA", help=f"another text (default: {PERPLEXITY_DATA})")
    parser.add_argument("--windows", type=positive, metavar="N",
                        help="at most this many perplexity windows, from the text's beginning (default: the whole "
                             f"text on a GPU, {CPU_WINDOWS} on a CPU; demo {DEMO_WINDOWS})")
    parser.add_argument("--window-length", type=two_or_more, metavar="N",
                        help="tokens per window, at least 2, cut to the model's context (default: "
                             f"{WINDOW_LENGTH}; demo {DEMO_WINDOW_LENGTH})")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_FOLDER, metavar="DIR",
                        help="where results go (default: %(default)s)")


def add_reuse_argument(parser: argparse.ArgumentParser) -> None:
    """--reuse, for the batch."""
    parser.add_argument("--reuse", action="store_true",
                        help="evaluate only what has no results of the same checkpoint, data, device and code yet")


def _tasks(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [task for task in chosen if task not in TASKS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"unknown task {', '.join(unknown)}; known are {', '.join(TASKS)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint or model folder")
    parser.add_argument("--baseline", help="the 16-bit model that a quantized one was made from: hub id, folder, or "
                                           "demo (default: what its metadata says)")
    add_evaluation_arguments(parser)
    add_reuse_argument(parser)
    options = parser.parse_args()
    evaluate_model(subject_of(options.model_path, options.baseline, options.results_dir), options, options.reuse)


if __name__ == "__main__":
    run(main)

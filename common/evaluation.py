#!/usr/bin/env python3
"""Evaluate a model: ARC, SQuAD v2, OpenMath, perplexity, speed and memory.

    python common/evaluation.py --model-path models/Llama-3.2-1B-Instruct/gptq-4bit
    python common/evaluation.py --model-path models/SmolLM2-135M-Instruct/baseline --limit 20

Tasks run in lm-eval with the task files in common/tasks, on the same samples and prompts for every configuration.
Metrics go to results/<model>/<configuration>.json, a record for each sample to results/<model>/samples/.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script this folder would be searched first, and hide the standard library's `statistics`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from dataclasses import dataclass

import torch
import yaml

from common import metadata
from common.calibration import evaluation_windows
from common.cli import add_device_arguments, configure_torch, positive, resolve_device, resolve_dtype, run
from common.data import Rows, demo_rows, load_rows
from common.demo.model import DEMO_NAME
from common.errors import UserError
from common.models import model_name
from common.progress import say, track
from common.results import RESULTS_FOLDER, load_samples, read_json, write_json, write_samples
from common.runtime import load_model, measure_speed, weight_bytes
from common.tasks import scoring

TASKS = ("arc", "squad_v2", "openmath", "perplexity", "speed")
TASK_FILES = Path(__file__).parent / "tasks"
SAMPLE_SEED = 1234
# Results of two runs belong together when these agree.
_SAME_RUN = ("demo_data", "versions", "device", "compute_dtype", "quantization")


@dataclass(frozen=True)
class TaskData:
    """Where a task's rows come from: demo file, hub address, and how many by default.

    fetch: rows that are looked through for OpenMath, whose only split is huge; a seeded sample is taken from them.
    """

    demo: str
    address: str
    limit: int
    chat: bool = True
    fetch: int | None = None


# Limits keep one model of a billion weights under three minutes on a GPU.
TASK_DATA = {
    "arc": TaskData("arc", "allenai/ai2_arc/ARC-Challenge:test", 1172, chat=False),
    "squad_v2": TaskData("squad", "rajpurkar/squad_v2/squad_v2:validation", 1000),
    "openmath": TaskData("openmath", "nvidia/OpenMathInstruct-2:train", 200, fetch=4000),
}
PERPLEXITY_DATA = "Salesforce/wikitext/wikitext-2-raw-v1:test"
WINDOWS, WINDOW_LENGTH = 40, 2048
DEMO_WINDOWS, DEMO_WINDOW_LENGTH = 16, 512


def task_rows(task: str, options: argparse.Namespace, demo: bool) -> Rows:
    """The rows a task is evaluated on: the same for every model."""
    data = TASK_DATA[task]
    address = getattr(options, f"{task}_data", None)
    limit = options.limit or data.limit
    if demo and not address:
        loaded = demo_rows(data.demo)
        return Rows(loaded.rows[:options.limit], loaded.source)
    if data.fetch is None:
        loaded = load_rows(address or data.address, options.data_root, seed=SAMPLE_SEED)
        return Rows(loaded.rows[:limit], loaded.source)
    loaded = load_rows(address or data.address, options.data_root, limit=data.fetch, seed=SAMPLE_SEED)
    # A problem whose answer is an expression has no distance from a number.
    numeric = [row for row in loaded.rows if _is_plain_number(str(row["expected_answer"]))]
    if not numeric:
        raise UserError(f"{loaded.source} has no row with a numeric expected_answer")
    return Rows(numeric[:limit], loaded.source)


def _is_plain_number(text: str) -> bool:
    return scoring.parse_number(text) is not None and not any(c.isalpha() for c in text.replace("\\frac", "").lower()
                                                      .replace("e", ""))


def run_task(task: str, model, tokenizer, rows: Rows, demo: bool) -> tuple[dict, list[dict]]:
    """Run one lm-eval task. Returns its summary and the record of every sample."""
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
    outcome = evaluate(HarnessModel(model, tokenizer), loaded, bootstrap_iters=0, apply_chat_template=chat,
                       fewshot_as_multiturn=chat)
    seconds = time.perf_counter() - start
    logged = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    samples = [{"id": sample["doc"].get("id") or f"{task}-{sample['doc_id']}", **sample["record"]} for sample in logged]
    summary = {**scoring.summarise(task, samples), "data": rows.source, "chat_template": chat, "seconds": round(seconds, 2),
               "first_prompt": logged[0]["arguments"][0][0]}
    return summary, samples


@torch.inference_mode()
def perplexity(model, windows) -> tuple[dict, list[dict]]:
    """Perplexity of consecutive windows [samples, length]: exp of the mean negative log-likelihood per token.

    Every window's first token is context only. The record of each window is its mean negative log-likelihood.
    """
    device = next(model.parameters()).device
    start = time.perf_counter()
    losses = []
    for window in track(windows.tokens, "perplexity", unit="windows"):
        window = window.to(device)
        hidden = model.model(window.unsqueeze(0), use_cache=False).last_hidden_state[0, :-1]
        # A slice of the vocabulary's logits at a time: all of them would take gigabytes.
        total = sum(torch.nn.functional.cross_entropy(model.lm_head(part).float(), target, reduction="sum")
                    for part, target in zip(hidden.split(256), window[1:].split(256), strict=True))
        losses.append(total / (len(window) - 1))
    values = torch.stack(losses).double().cpu()
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(float("nan"))
    mean = values.mean()
    samples = [{"id": f"window-{i}", "loss": loss} for i, loss in enumerate(values.tolist())]
    return {"perplexity": mean.exp().item(), "standard_error": (mean.exp() * error).item(), "windows": len(values),
            "length": windows.tokens.shape[1], "data": windows.source, "fingerprint": windows.fingerprint,
            "seconds": round(time.perf_counter() - start, 2)}, samples


def evaluate_model(folder: Path, options: argparse.Namespace, name: str, configuration: str) -> dict:
    """Evaluate the model in `folder` and write its results. Returns the document that was written."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model: it has no config.json")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    configure_torch(0)
    demo = options.data == "demo" or (options.data == "auto" and name == DEMO_NAME and options.data_root is None)
    chosen = options.tasks
    # Data first: a missing data set should not cost the time it takes to load the model.
    rows = {task: task_rows(task, options, demo) for task in chosen if task in TASK_DATA}
    started = time.perf_counter()
    model, tokenizer = load_model(folder, device, dtype)
    loading = time.perf_counter() - started
    say(f"Evaluating {name} {configuration} on {device} in {str(dtype).removeprefix('torch.')}: {', '.join(chosen)}")
    tasks, samples = {}, {}
    for task in rows:
        tasks[task], samples[task] = run_task(task, model, tokenizer, rows[task], demo)
    if "perplexity" in chosen:
        windows = evaluation_windows(options.perplexity_data or ("demo" if demo else PERPLEXITY_DATA), tokenizer,
                                     options.windows or (DEMO_WINDOWS if demo else WINDOWS),
                                     options.window_length or (DEMO_WINDOW_LENGTH if demo else WINDOW_LENGTH),
                                     options.data_root)
        tasks["perplexity"], samples["perplexity"] = perplexity(model, windows)
    document = {
        "format_version": 1, "model": name, "configuration": configuration, "demo_data": demo,
        "versions": metadata.versions(), "device": metadata.describe_device(device),
        "compute_dtype": str(dtype).removeprefix("torch."), "load_seconds": round(loading, 2),
        "quantization": _quantization_facts(folder), "tasks": tasks,
    }
    if "speed" in chosen:
        document["speed"] = measure_speed(model, model.config.vocab_size)
    document["memory"] = {"weights_bytes": weight_bytes(model), **metadata.peak_memory(device)}
    document["seconds"] = round(time.perf_counter() - started, 2)
    say(describe(document))
    return write_results(options.results_dir, document, samples)


def _quantization_facts(folder: Path) -> dict:
    """What the README's tables say about how the checkpoint came about; sizes alone for a baseline."""
    document = metadata.read(folder)
    if document is None:
        from common.checkpoint import folder_bytes
        from common.models import TensorReader

        return {"weights_bytes": TensorReader(folder).total_bytes(), "folder_bytes": folder_bytes(folder)}
    errors = {name: round(record["relative_output_error"], 6) for name, record in document["linears"].items()}
    return {"weights_bytes": document["bytes"]["quantized_weights"],
            "folder_bytes": document["bytes"]["quantized_folder"], "compression_ratio": document["compression_ratio"],
            "seconds": document["seconds"], "memory": document["memory"], "device": document["device"],
            "grid": document["grid"], "calibration": document["calibration"],
            "probe": {key: document["probe"][key] for key in ("baseline_perplexity", "perplexity", "divergence")},
            "relative_output_error": errors}


def write_results(results_dir: Path, document: dict, samples: dict[str, list[dict]]) -> dict:
    """Write metrics and per-sample records; returns the document as written.

    Tasks that an earlier run evaluated on the same checkpoint, data and device, and this one did not, are kept.
    """
    path = results_dir / document["model"] / f"{document['configuration']}.json"
    if path.is_file():
        earlier = read_json(path)
        if all(earlier.get(key) == document[key] for key in _SAME_RUN):
            old = load_samples(results_dir, document["model"], document["configuration"])
            missing = {task for task in earlier["tasks"] if task not in document["tasks"]}
            samples = {**{task: [{k: v for k, v in sample.items() if k != "task"} for sample in old
                                 if sample["task"] == task] for task in missing}, **samples}
            document = {**earlier, **document, "tasks": {**earlier["tasks"], **document["tasks"]}}
    order = [task for task in TASKS if task in document["tasks"]]
    document["tasks"] = {task: document["tasks"][task] for task in order}
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
                        help=f"perplexity windows (default: {WINDOWS}; demo {DEMO_WINDOWS})")
    parser.add_argument("--window-length", type=positive, metavar="N",
                        help=f"tokens per window (default: {WINDOW_LENGTH}; demo {DEMO_WINDOW_LENGTH})")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_FOLDER, metavar="DIR",
                        help="where results go (default: %(default)s)")


def _tasks(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [task for task in chosen if task not in TASKS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"unknown task {', '.join(unknown)}; known are {', '.join(TASKS)}")
    return chosen


def names_of(folder: Path) -> tuple[str, str]:
    """Model name and configuration under which the results of a checkpoint folder are filed."""
    document = metadata.read(folder)
    folder = folder.resolve()
    if document is not None:
        return document["model"]["name"], folder.name
    if folder.name == "baseline":
        return folder.parent.name, "baseline"
    return model_name(str(folder)), "baseline"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint or model folder")
    add_evaluation_arguments(parser)
    options = parser.parse_args()
    if not options.model_path.is_dir():
        raise UserError(f"{options.model_path} is not a folder; give the --output of a quantize script")
    name, configuration = names_of(options.model_path)
    evaluate_model(options.model_path, options, name, configuration)


if __name__ == "__main__":
    run(main)

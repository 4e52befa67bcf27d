#!/usr/bin/env python3
"""Compare a quantized model with its 16-bit baseline: size, time, speed, and every metric with its difference.

    python compare_to_baseline.py --quantized models/Llama-3.2-1B-Instruct/gptq-4bit
    python compare_to_baseline.py --quantized models/SmolLM2-135M-Instruct/awq-4bit --json

Differences are paired, question by question, with a 95% interval; flips are answers that went wrong / came right; the
last column says what the difference is. Results that are missing are evaluated first; the other arguments are those of
common/evaluation.py. A chart goes beside the results.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from common import cli, metadata
from common.checkpoint import open_checkpoint
from common.comparison import compare, facts, print_comparison, samples_by_task
from common.errors import UserError
from common.evaluation import add_evaluation_arguments, evaluate_model, names_of
from common.models import resolve_folder
from common.plots import comparison_chart, save
from common.progress import say
from common.results import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantized", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--baseline", help="hub id, folder, or demo (default: the model the checkpoint was made from)")
    parser.add_argument("--overwrite", action="store_true", help="evaluate again even where there are results")
    parser.add_argument("--json", action="store_true", help="print JSON alone, for other programs")
    add_evaluation_arguments(parser)
    options = parser.parse_args()
    open_checkpoint(options.quantized)
    name, configuration = names_of(options.quantized)
    baseline = options.baseline or _made_from(options.quantized)
    # What the evaluation says on the way would spoil the JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        documents = [_evaluated(resolve_folder(baseline), options, name, "baseline"),
                     _evaluated(options.quantized, options, name, configuration)]
    samples = [samples_by_task(options.results_dir, name, part) for part in ("baseline", configuration)]
    comparisons = compare(*[{task: rows for task, rows in one.items() if task in options.tasks} for one in samples])
    chart = options.results_dir / name / f"{configuration}-against-baseline.png"
    save(comparison_chart(comparisons, f"{name} {configuration} against its baseline"), chart)
    if options.json:
        print(json.dumps({"model": name, "configuration": configuration, "chart": str(chart),
                          "facts": {row[0]: {"baseline": row[1], "quantized": row[2]} for row in facts(*documents)},
                          "metrics": [one.as_dict() for one in comparisons],
                          "divergence": documents[1]["tasks"].get("perplexity", {}).get("divergence")}, indent=1))
        return
    print_comparison(*documents, comparisons)
    say(f"chart: {chart}")


def _made_from(folder: Path) -> str:
    record = metadata.read(folder)
    if record is None:
        raise UserError(f"{folder} was saved without metadata; name the model it was made from with --baseline")
    return record["model"]["source"]


def _evaluated(folder: Path, options: argparse.Namespace, name: str, configuration: str) -> dict:
    file = options.results_dir / name / f"{configuration}.json"
    if file.is_file() and not options.overwrite:
        document = read_json(file)
        if all(task in document["tasks"] or task in document for task in options.tasks):
            return document
    return evaluate_model(folder, options, name, configuration)


if __name__ == "__main__":
    cli.run(main)

#!/usr/bin/env python3
"""Compare a quantized model with its 16-bit baseline: size, time, speed, and every metric with its
difference.

    python compare_to_baseline.py --quantized models/Llama-3.2-1B-Instruct/gptq-4bit
    python compare_to_baseline.py --quantized models/SmolLM2-135M-Instruct/awq-4bit --json

Differences are paired, question by question, with a 95% interval; flips are answers that went wrong
and that came right; the last column says what the difference is. What has no results of the same
checkpoint, data, device and code is evaluated first; the other arguments are those of
common/evaluation.py. A chart goes beside the results.
"""

import argparse
import contextlib
import json
import sys

from common import cli
from common.base.arguments import Parser
from common.base.errors import UserError
from common.base.progress import say
from common.evaluation import add_evaluation_arguments
from common.model.source import resolve_folder
from common.reporting.card import refresh_card
from common.reporting.comparison import compare_samples, facts, print_comparison
from common.reporting.drawing import save
from common.reporting.plots import comparison_chart
from common.results.documents import samples_by_task
from common.results.identity import incomparable, other_data
from common.results.naming import BASELINE, baseline_of, subject_of
from common.results.reuse import check_original
from common.tasks.evaluate import evaluate_model
from common.tasks.perplexity import divergence_of


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quantized",
        required=True,
        help="checkpoint folder; of others also a hub id, a .gguf file, or owner/name/file.gguf",
    )
    parser.add_argument(
        "--name", help="what it is called in results (default: the last part of --quantized)"
    )
    parser.add_argument(
        "--baseline",
        help="hub id, folder, or demo (default: the model that the checkpoint says it was made "
        "from)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="evaluate again even where there are results"
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone, for other programs")
    add_evaluation_arguments(parser)
    options = parser.parse_args()
    # What the evaluation says on the way would spoil the JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        quantized = subject_of(
            options.quantized, options.baseline, options.results_dir, options.name
        )
        if quantized.configuration == BASELINE:
            raise UserError(
                f"{options.quantized} is not a checkpoint of the quantize scripts, nor quantized "
                "otherwise"
            )
        baseline = baseline_of(
            quantized.source, resolve_folder(quantized.source), options.results_dir
        )
        check_original(quantized, options.results_dir)
        documents = [
            evaluate_model(
                baseline, options, not options.overwrite, compared=quantized.configuration
            ),
            evaluate_model(quantized, options, not options.overwrite),
        ]
        refresh_card(quantized, options.results_dir)
    reasons = incomparable(*documents) + [
        f"other data of {task}" for task in other_data(*documents) if task in options.tasks
    ]
    if reasons:
        # Both were evaluated with the same flags, so that to do it again changes nothing.
        raise UserError(
            f"the two models cannot be compared: {'; '.join(reasons)}; leave a task that "
            "read other data out of --tasks, or quantize this 16-bit model again with "
            "--overwrite"
        )
    samples = [
        samples_by_task(options.results_dir, one.name, one.configuration)
        for one in (baseline, quantized)
    ]
    name, configuration = quantized.name, quantized.configuration
    comparisons = compare_samples(
        *[{task: rows for task, rows in one.items() if task in options.tasks} for one in samples]
    )
    chart = options.results_dir / name / f"{configuration}-against-baseline.png"
    save(comparison_chart(comparisons, f"{name} {configuration} against its baseline"), chart)
    if options.json:
        print(
            json.dumps(
                {
                    "model": name,
                    "configuration": configuration,
                    "chart": str(chart),
                    "facts": {
                        row[0]: {"baseline": row[1], "quantized": row[2]}
                        for row in facts(*documents)
                    },
                    "metrics": [one.as_dict() for one in comparisons],
                    "divergence": divergence_of(documents[1]),
                },
                indent=1,
            )
        )
        return
    print_comparison(*documents, comparisons)
    say(f"chart: {chart}")


if __name__ == "__main__":
    cli.run(main)

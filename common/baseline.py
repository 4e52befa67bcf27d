#!/usr/bin/env python3
"""The 16-bit baseline that every quantized model is compared with: fetch it, evaluate it.

    python common/baseline.py
    python common/baseline.py --model demo

Metrics and samples go to results/, where those of the evaluation go.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Started as a script: `common` is a folder of the project's, not of this one.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from common import cli
from common.base.arguments import DEFAULT_MODEL, Parser
from common.evaluation import add_evaluation_arguments, add_reuse_argument
from common.model.source import load_config, resolve_folder
from common.results.naming import baseline_of
from common.tasks.evaluate import evaluate_model


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="hub id, folder, or demo (default: %(default)s)"
    )
    add_evaluation_arguments(parser)
    add_reuse_argument(parser)
    options = parser.parse_args()
    folder = resolve_folder(options.model)
    load_config(folder)
    evaluate_model(
        baseline_of(options.model, folder, options.results_dir), options, options.reuse, twice=True
    )


if __name__ == "__main__":
    cli.run(main)

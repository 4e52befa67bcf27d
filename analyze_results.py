#!/usr/bin/env python3
"""Regenerate README's tables and the plots it shows, from results/ alone.

    python analyze_results.py
    python analyze_results.py --results-dir /tmp/results --readme /tmp/README.md --figures-dir /tmp/figures
"""

import argparse
import os
from pathlib import Path

from common import cli
from common.errors import UserError
from common.plots import draw_all
from common.progress import say
from common.report import in_table_order, replace_between_markers, section
from common.results import RESULTS_FOLDER, load_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=RESULTS_FOLDER, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="default: %(default)s")
    parser.add_argument("--figures-dir", type=Path, default=Path("docs/figures"), help="default: %(default)s")
    options = parser.parse_args()
    models = in_table_order(load_all(options.results_dir))
    if not models:
        raise UserError(f"{options.results_dir} holds no results; run common/evaluation.py or run_all_quantization.sh first")
    sections = []
    for results in models:
        drawn = draw_all(results, options.figures_dir / results.name)
        links = [(caption, Path(os.path.relpath(file, options.readme.parent)).as_posix()) for caption, file in drawn]
        sections.append(section(results, links))
    replace_between_markers(options.readme, "\n\n".join(sections))
    say(f"{options.readme}: tables of {', '.join(results.name for results in models)}")


if __name__ == "__main__":
    cli.run(main)

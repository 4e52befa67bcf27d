#!/usr/bin/env python3
"""Regenerate README's tables, the plots, docs/report.html, our column of docs/published.md and CSV
files, from results/ and docs/results/ alone.

    python analyze_results.py
    python analyze_results.py --texts --data-root ../shared/data
    python analyze_results.py --results-dir /tmp/results --figures-dir /tmp/figures

results/ holds this machine's runs, docs/results/ the documented run, which comes with the project.
Each is marked as what it is.
"""

import argparse
import contextlib
import os
from pathlib import Path

from common import cli
from common.base.arguments import Parser
from common.base.errors import UserError
from common.base.progress import say, track
from common.model.source import MODELS_FOLDER
from common.reporting.compare_all import REMEMBERED, Remembered, compare_all
from common.reporting.page import ModelPart, page
from common.reporting.page_samples import flipped
from common.reporting.plots import draw_all
from common.reporting.published import PUBLISHED, write_published
from common.reporting.report import (
    in_table_order,
    replace_between_markers,
    section,
    write_csv,
)
from common.reporting.summaries import completed
from common.results.documents import (
    DOCUMENTED_FOLDER,
    RESULTS_FOLDER,
    ModelResults,
    load_all,
    of_one_size,
)
from common.results.hashes import checkpoint_hash
from common.results.identity import of_one_card

README = Path("README.md")


def say_what_is_stale(results: ModelResults, results_dir: Path) -> None:
    """Name the configurations whose checkpoint is another by now than the one that was
    evaluated."""
    for name, document in results.documents.items():
        folder = MODELS_FOLDER / results.name / name
        if "checkpoint" in document and (folder / "config.json").is_file():
            with contextlib.suppress(UserError):  # verify_model.py says what is broken
                if checkpoint_hash(folder, results_dir) != document["checkpoint"]:
                    say(
                        f"{results.name} {name}: the figures are of another checkpoint than "
                        f"{folder} holds now; evaluate it again"
                    )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results-dir", type=Path, default=RESULTS_FOLDER, help="local runs (default: %(default)s)"
    )
    parser.add_argument(
        "--documented-dir",
        type=Path,
        help=f"the documented run (default: {DOCUMENTED_FOLDER}; none where both "
        "--results-dir and --readme are others)",
    )
    parser.add_argument("--readme", type=Path, default=README, help="default: %(default)s")
    parser.add_argument(
        "--figures-dir", type=Path, default=Path("docs/figures"), help="default: %(default)s"
    )
    parser.add_argument(
        "--report",
        type=Path,
        help="HTML page with everything in it (default: report.html beside the figures' folder)",
    )
    parser.add_argument(
        "--tables-dir", type=Path, help="CSV files (default: tables beside the figures' folder)"
    )
    parser.add_argument(
        "--texts",
        action="store_true",
        help="also write report.html into the --results-dir: the page of the local runs (of the "
        "documented one where there are none) with the texts of the questions whose answers "
        "flipped, which are not to be published with the project. Those of the demo's own tasks "
        "are in the page anyway",
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        help="where --texts looks data sets up before the cache and the hub, as "
        "DIR/<owner>/<name>/<config>/<split>.parquet",
    )
    options = parser.parse_args()
    if options.data_root and not options.texts:
        parser.error("--data-root is where --texts looks for them; give both or neither")
    report = options.report or options.figures_dir.parent / "report.html"
    tables = options.tables_dir or options.figures_dir.parent / "tables"
    folders = {False: options.results_dir, True: options.documented_dir}
    # The project's README shows the documented run, whichever local one is beside it.
    usual = options.results_dir == RESULTS_FOLDER or options.readme.resolve() == README.resolve()
    if options.documented_dir is None and usual:
        folders[True] = DOCUMENTED_FOLDER
        if options.results_dir.resolve() == DOCUMENTED_FOLDER.resolve():
            folders[False] = None
    models = in_table_order(
        [
            completed(folder, results)
            for documented, folder in folders.items()
            if folder
            for results in map(of_one_card, map(of_one_size, load_all(folder, documented)))
        ]
    )
    # A documented run that was not asked for does not answer for a folder that is not there.
    named = options.results_dir != RESULTS_FOLDER and options.documented_dir is None
    if not models or (named and not options.results_dir.is_dir()):
        raise UserError(
            f"{options.results_dir} holds no results; run common/evaluation.py or "
            f"run_all_quantization.sh first"
        )
    drawn, remembered = [], Remembered(options.results_dir / REMEMBERED)
    for results in track(models, "comparisons and figures", "models"):
        if not results.documented:
            say_what_is_stale(results, options.results_dir)
        comparisons = compare_all(folders[results.documented], results, remembered)
        place = Path("documented" if results.documented else "", results.name)
        drawn.append(
            (results, comparisons, draw_all(results, comparisons, options.figures_dir / place))
        )
        write_csv(results, comparisons, tables / place)
    remembered.save()
    sections = [
        section(
            results,
            comparisons,
            [
                (caption, Path(os.path.relpath(file, options.readme.parent)).as_posix())
                for caption, file in figures
            ],
        )
        for results, comparisons, figures in drawn
    ]
    replace_between_markers(options.readme, "\n\n".join(sections))
    if options.readme.resolve() == README.resolve() and PUBLISHED.is_file():
        write_published([(results, comparisons) for results, comparisons, _ in drawn])
    pages = [(report, drawn, False)]
    if options.texts:
        local = [one for one in drawn if not one[0].documented]
        pages.append((options.results_dir / "report.html", local or drawn, True))
    for file, shown, texts in pages:
        parts = [
            ModelPart(
                results,
                comparisons,
                flipped(
                    results, comparisons, folders[results.documented], texts, options.data_root
                ),
            )
            for results, comparisons, _ in shown
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(parts), encoding="utf-8")
    say(
        f"{options.readme}: tables of {', '.join(results.title for results in models)}; "
        f"{', '.join(str(file) for file, *_ in pages)}; CSV in {tables}"
    )


if __name__ == "__main__":
    cli.run(main)

"""docs/published.md: what others report for Llama-3.2-1B, and ours beside it where there is any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from common.reporting.comparison import by_metric
from common.reporting.report import replace_between_markers
from common.reporting.tables import NONE, Comparisons, Table
from common.results.documents import ModelResults

PUBLISHED = Path("docs/published.md")
INSTRUCT, BASE = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"
NOT_MEASURED = "not measured: gated model, hub out of reach"
_PERPLEXITY, _ARC, _MATHS = (
    ("perplexity", "perplexity"),
    ("arc", "accuracy"),
    ("openmath", "within_tolerance"),
)


@dataclass(frozen=True)
class Figure:
    """One that others report. reported, ratio: as they give them, the second to 16 bits. ours: the
    configuration that is most like it, and the task and metric whose ratio to the baseline stands
    beside theirs; None where nothing here is like it.
    """

    source: str
    measure: str
    quantized_by: str
    reported: str
    ratio: str
    ours: tuple[str, tuple[str, str]] | None = None


_EXL3 = "[exllamav3's plot](https://github.com/turboderp-org/exllamav3/blob/master/doc/exl3.md)"
_META = (
    "[Meta's model card](https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/"
    "MODEL_CARD.md)"
)
_CAT = "[arXiv 2603.04359](https://arxiv.org/abs/2603.04359)"
_CI = (
    "[GPTQModel's own tests](https://github.com/ModelCloud/GPTQModel/tree/main/tests/models), "
    "groups of 128, symmetric"
)
_TESSERAQ = "method: [arXiv 2410.19103](https://arxiv.org/abs/2410.19103)"
_GPTQ = "method: [arXiv 2210.17323](https://arxiv.org/abs/2210.17323)"
_AWQ = "method: [arXiv 2306.00978](https://arxiv.org/abs/2306.00978)"
_HQQ = "method: [its authors' page](https://mobiusml.github.io/hqq_blog/)"
_WIKITEXT = "WikiText-2 perplexity"
_W4A4KV4 = "perplexity, 13.16 at 16 bits; 4 bits for weights, activations and cache"
_MMLU, _ARC_C = "MMLU, 49.3 at 16 bits", "ARC-Challenge, generated, 59.4 at 16 bits"
_GSM8K, _PLATINUM = "GSM8K, 44.4 at 16 bits", "GSM8K-Platinum"
_ROUNDED, _SPIN = "plain rounding after training", "SpinQuant"
_BASE_TEXT = "WikiText-2 in windows of 2,048 tokens, 9.75 at 16 bits"
FIGURES = {
    INSTRUCT: (
        Figure(_EXL3, _WIKITEXT, "EXL3, 4.0 bits", NONE, "1.020"),
        Figure(_EXL3, _WIKITEXT, "GGUF IQ4_XS", NONE, "1.046"),
        Figure(_EXL3, _WIKITEXT, "EXL2, 4.0 bits", NONE, "1.066", ("gptq-4bit", _PERPLEXITY)),
        Figure(_EXL3, _WIKITEXT, "AWQ, 4 bits", NONE, "1.090", ("awq-4bit", _PERPLEXITY)),
        Figure(
            _EXL3,
            _WIKITEXT,
            "bitsandbytes, 4 bits",
            NONE,
            "1.120",
            ("bitsandbytes-nf4", _PERPLEXITY),
        ),
        Figure(_META, _MMLU, _ROUNDED, "43.3", "0.88"),
        Figure(_META, _MMLU, _SPIN, "47.3", "0.96"),
        Figure(_META, _ARC_C, _ROUNDED, "54.3", "0.91", ("rtn-4bit", _ARC)),
        Figure(_META, _ARC_C, _SPIN, "57.0", "0.96", ("quarot-4bit", _ARC)),
        Figure(_META, _GSM8K, _ROUNDED, "33.1", "0.75", ("rtn-4bit", _MATHS)),
        Figure(_META, _GSM8K, _SPIN, "40.6", "0.91", ("quarot-4bit", _MATHS)),
        Figure(_CAT, _W4A4KV4, "QuaRot", "19.97", "1.52"),
        Figure(_CAT, _W4A4KV4, _SPIN, "18.16", "1.38"),
        Figure(_CAT, _W4A4KV4, "CAT, without training", "17.89", "1.36"),
        Figure(_CAT, _W4A4KV4, "FlatQuant", "16.34", "1.24"),
        Figure(_CAT, _W4A4KV4, "CAT, trained", "16.33", "1.24"),
        Figure(_CI, _PLATINUM, "GPTQ", "0.469", NONE, ("gptq-4bit", _MATHS)),
        Figure(_CI, _PLATINUM, "AWQ", "0.453", NONE, ("awq-4bit", _MATHS)),
        Figure(_CI, "ARC-Challenge, normalised", "GPTQ", "0.351", NONE, ("gptq-4bit", _ARC)),
        Figure(_CI, "ARC-Challenge, normalised", "AWQ", "0.357", NONE, ("awq-4bit", _ARC)),
    ),
    BASE: (
        Figure(
            _TESSERAQ,
            _BASE_TEXT,
            "TesseraQ (rounding learnt block by block)",
            "10.09",
            "1.035",
            ("adaround-4bit", _PERPLEXITY),
        ),
        Figure(
            _GPTQ, _BASE_TEXT, "GPTQ, groups of 128", "10.36", "1.063", ("gptq-4bit", _PERPLEXITY)
        ),
        Figure(
            _AWQ,
            _BASE_TEXT,
            "AWQ, groups of 128, asymmetric",
            "10.85",
            "1.113",
            ("awq-4bit", _PERPLEXITY),
        ),
        Figure(_HQQ, _BASE_TEXT, "HQQ, 4 bits", "11.07", "1.135", ("hqq-4bit", _PERPLEXITY)),
    ),
}


def published_table(model: str, results: ModelResults | None, comparisons: Comparisons) -> Table:
    """What others report for a model, and ours.

    Args:
        model: one of FIGURES.
        results: ours of that very model, None without any; comparisons: theirs.
    """
    rows = [
        [
            one.source,
            one.measure,
            one.quantized_by,
            one.reported,
            one.ratio,
            _ours(one, results, comparisons),
        ]
        for one in FIGURES[model]
    ]
    header = ["Source", "Measure", "Quantized by", "Reported", "Ratio to 16 bits", "Ours, ratio"]
    return Table(f"{model.split('/')[1]}", header, rows, numbers=False)


def _ours(figure: Figure, results: ModelResults | None, comparisons: Comparisons) -> str:
    """The ratio to our own baseline, and what it is of; why there is none."""
    if figure.ours is None:
        return NONE
    configuration, metric = figure.ours
    one = by_metric(comparisons.get(configuration, [])).get(metric)
    if results is None:
        return NOT_MEASURED
    if one is None or not one.baseline:
        return f"not measured: {configuration} has no results of {metric[0]}"
    ratio = math.exp(one.difference.value) if one.kind.logarithmic else one.quantized / one.baseline
    return f"{ratio:.3f} ({configuration}, {one.kind.name})"


def write_published(found: list[tuple[ModelResults, Comparisons]], file: Path = PUBLISHED) -> None:
    """Fill the tables of docs/published.md from results, this machine's before the documented
    run's. Raises UserError where the file has no place for them.

    Args:
        found: results and comparisons of every model, in the order of the tables.
    """
    tables = []
    for model in FIGURES:
        own = [
            (results, comparisons)
            for results, comparisons in found
            if any(one.get("source") == model for one in results.documents.values())
        ]
        tables.append(published_table(model, *(own[0] if own else (None, {}))).markdown())
    replace_between_markers(file, "\n\n".join(tables))

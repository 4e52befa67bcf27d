"""Perplexity of WikiText-2, and the divergence from the original model at each of its tokens."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.base.arguments import positive, two_or_more
from common.base.errors import UserError
from common.base.progress import say, track
from common.model.memory import logits_at_once
from common.model.source import SourceModel, read_config
from common.numerics.divergence import summarise_divergence, token_divergence
from common.results import hashes
from common.results.reuse import check_original
from common.tasks.original import hidden_states, place_head
from common.tasks.task import Evaluation, MetricKind, Record, Task, of_field
from common.text.probe import check_finite
from common.text.windows import Windows, evaluation_windows, text_sample

ADDRESS = "Salesforce/wikitext/wikitext-2-raw-v1:test"
# On a CPU; on a GPU the whole text is evaluated, as in published tables.
CPU_WINDOWS, WINDOW_LENGTH = 40, 2048
DEMO_WINDOWS, DEMO_WINDOW_LENGTH = 16, 512
STATES_FOLDER = "baseline_states"


@dataclass(frozen=True)
class Prepared:
    """Windows [samples, length], and for the divergence from it the original model with its last
    hidden states [samples, length, hidden], where it can be had.
    """

    windows: Windows
    original: SourceModel | None = None
    references: Tensor | None = None


class Perplexity(Task):
    """Perplexity of consecutive windows of a text."""

    name, title, place = "perplexity", "Perplexity", 5
    metrics = (
        MetricKind(
            name,
            "perplexity",
            "Perplexity",
            of_field("loss"),
            larger_is_better=False,
            margin=0.01,
            share=False,
            logarithmic=True,
            judged=True,
            plotted=True,
        ),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--perplexity-data", metavar="DATA", help=f"another text (default: {ADDRESS})"
        )
        parser.add_argument(
            "--windows",
            type=positive,
            metavar="N",
            help="at most this many perplexity windows, from the text's beginning "
            f"(default: the whole text on a GPU, {CPU_WINDOWS} on a CPU; demo "
            f"{DEMO_WINDOWS})",
        )
        parser.add_argument(
            "--window-length",
            type=two_or_more,
            metavar="N",
            help="tokens per window, at least 2, cut to the model's context "
            f"(default: {WINDOW_LENGTH}; demo {DEMO_WINDOW_LENGTH})",
        )

    def reads(self, limit: int | None, data_root: Path | None) -> tuple:
        return ADDRESS, *text_sample()

    def load(self, evaluation: Evaluation) -> Windows:
        options, demo = evaluation.options, evaluation.demo
        return evaluation_windows(
            options.perplexity_data or ("demo" if demo else ADDRESS),
            evaluation.tokenizer,
            options.windows or default_windows(demo, evaluation.device),
            _window_length(evaluation.described_by, options.window_length, demo),
            options.data_root,
        )

    def conditions(self, loaded: Windows, evaluation: Evaluation) -> dict:
        """Raises UserError where the 16-bit model is another than the one that the checkpoint was
        made from.
        """
        subject, results_dir = evaluation.subject, evaluation.options.results_dir
        check_original(subject, results_dir)
        samples, length = loaded.tokens.shape
        return {
            "data": loaded.source,
            "windows": samples,
            "length": length,
            "fingerprint": loaded.fingerprint,
            "original": hashes.original_hash(subject, results_dir),
        }

    def texts(self, loaded: Windows, evaluation: Evaluation) -> list[str]:
        return [evaluation.tokenizer.decode(window) for window in loaded.tokens]

    def prepare(self, loaded: Windows, evaluation: Evaluation) -> Prepared:
        """The original passes through the device, before the model takes its room."""
        subject = evaluation.subject
        try:
            original = SourceModel(subject.original, evaluation.device, evaluation.dtype)
        except UserError as error:
            say(f"divergence from the baseline is left out: {error}")
            return Prepared(loaded)
        folder = evaluation.options.results_dir / subject.name / STATES_FOLDER
        references = hidden_states(original, loaded, folder)
        original.move_vocabulary(torch.device("cpu"))
        return Prepared(loaded, original, references)

    def run(self, model, prepared: Prepared, evaluation: Evaluation) -> tuple[dict, list[Record]]:
        return perplexity(model, prepared.windows, prepared.original, prepared.references)

    def in_words(self, summary: dict) -> str:
        return f"perplexity {summary['perplexity']:.3f}"


TASK = Perplexity()


def divergence_of(document: dict) -> dict | None:
    """The divergence from the original in a document of results; None where it was not measured."""
    return TASK.of(document).get("divergence")


def default_windows(demo: bool, device: torch.device) -> int | None:
    """How many windows are evaluated unless told; None is the whole text."""
    if demo:
        return DEMO_WINDOWS
    return CPU_WINDOWS if device.type == "cpu" else None


def _window_length(folder: Path, asked: int | None, demo: bool) -> int:
    """Tokens of a window: as asked for or the default, cut to the model's context."""
    length = asked or (DEMO_WINDOW_LENGTH if demo else WINDOW_LENGTH)
    context = read_config(folder).get("max_position_embeddings")
    if not isinstance(context, int) or length <= context:
        return length
    say(f"perplexity windows are cut from {length:,} to {context:,} tokens, the model's context")
    return context


@torch.inference_mode()
def perplexity(
    model, windows: Windows, original: SourceModel | None = None, references: Tensor | None = None
) -> tuple[dict, list[Record]]:
    """Perplexity of consecutive windows [samples, length]: exp of the mean negative log-likelihood
    per token.

    Every window's first token is context only, and no BOS is put before it, as in published tables.
    The record of each window is its mean negative log-likelihood and, where the original model is
    given, the divergence from it at every token (`common.numerics.divergence`).

    Args:
        references: the original's last hidden states [samples, length, hidden], with it.
    """
    device = next(model.parameters()).device
    start = time.perf_counter()
    expected_states: Sequence[Tensor | None] = [None] * len(windows.tokens)
    if original is not None and references is not None:
        place_head(original, model)
        expected_states = references.unbind()
    slice_size = logits_at_once(256, model.config.vocab_size, device)
    samples = []
    for index, (window, reference) in enumerate(
        zip(track(windows.tokens, "perplexity", unit="windows"), expected_states, strict=True)
    ):
        window = window.to(device)
        hidden = model.model(window.unsqueeze(0), use_cache=False).last_hidden_state[0, :-1]
        # A slice of the vocabulary's logits at a time: all of them would take gigabytes.
        total, divergence = torch.zeros((), device=device), []
        same = torch.zeros((), dtype=torch.long, device=device)
        for first in range(0, len(hidden), slice_size):
            part = slice(first, first + slice_size)
            found = torch.log_softmax(model.lm_head(hidden[part]).float(), -1)
            total -= found.gather(1, window[1:][part].unsqueeze(1)).sum()
            if original is not None and reference is not None:
                expected = original.logits(reference[:-1][part].to(device))
                values, equal = token_divergence(torch.log_softmax(expected, -1), found)
                divergence.append(values)
                same += equal.sum()
        check_finite(total, f"window {index} of the perplexity's text", hidden.dtype)
        samples.append({"id": f"window-{index}", "loss": total.item() / (len(window) - 1)})
        if divergence:
            values = torch.cat(divergence).tolist()
            samples[-1] |= {
                "kl": [float(f"{value:.3e}") for value in values],
                "same_top": same.item(),
            }
    losses = torch.tensor([sample["loss"] for sample in samples], dtype=torch.float64)
    error = losses.std() / len(losses) ** 0.5 if len(losses) > 1 else torch.tensor(float("nan"))
    mean = losses.mean()
    summary = {
        "perplexity": mean.exp().item(),
        "standard_error": (mean.exp() * error).item(),
        "windows": len(losses),
        "length": windows.tokens.shape[1],
        "data": windows.source,
        "fingerprint": windows.fingerprint,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if original:
        summary["divergence"] = summarise_divergence(samples)
    return summary, samples

"""Perplexity against an independent computation, and the windows it is of."""

from __future__ import annotations

import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, WORDS, assert_user_error, build_tiny, run_script, tiny_tokenizer
from stub_chats import chat_file, conversations, llama_like

from common.tasks.perplexity import CPU_WINDOWS, DEMO_WINDOWS, default_windows, perplexity
from common.text.windows import evaluation_windows


@pytest.fixture(scope="module")
def rows_with_blanks(tmp_path_factory):
    """A data set in WikiText's form: rows of text with blank ones (empty or null) before each."""
    rng = random.Random(11)
    texts = []
    for _ in range(60):
        row = " ".join(rng.choices(WORDS, k=rng.randint(5, 20)))
        texts += [rng.choice(["", None]), f" {row} \n"]
    folder = tmp_path_factory.mktemp("rows") / "own/wiki/raw"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "test.parquet")
    return folder.parents[2], texts


@pytest.mark.parametrize("make", [llama_like, tiny_tokenizer])
def test_perplexity_is_that_of_an_independent_computation(rows_with_blanks, make):
    """Rows joined by hand, whole text, transformers' own loss in float64, window by window."""
    (root, texts), tokenizer, length = rows_with_blanks, make(), 64
    model = build_tiny("llama", tied=True, seed=3).double().eval()
    joined = "\n\n".join("" if text is None else text for text in texts)
    ids = tokenizer(joined, return_tensors="pt").input_ids
    losses, first = [], 0
    while first + length <= ids.shape[1]:
        window = ids[:, first : first + length]
        with torch.no_grad():
            losses.append(model(input_ids=window, labels=window).loss.item())
        first += length
    windows = evaluation_windows("own/wiki/raw:test", tokenizer, None, length, root)
    assert (ids[0, 0] == 0) == (make is llama_like)
    assert not (windows.tokens.flatten()[1:] == 0).any()
    summary, samples = perplexity(model.float(), windows)
    assert summary["windows"] == len(losses) > 10
    assert [sample["loss"] for sample in samples] == pytest.approx(losses, rel=1e-5)
    expected = math.exp(math.fsum(losses) / len(losses))
    assert summary["perplexity"] == pytest.approx(expected, rel=1e-5)
    few, _ = perplexity(model, evaluation_windows("own/wiki/raw:test", tokenizer, 3, length, root))
    assert few["perplexity"] == pytest.approx(math.exp(math.fsum(losses[:3]) / 3), rel=1e-5)


def test_conversations_can_be_evaluated_too(tmp_path):
    tokenizer, rows = llama_like(), conversations(30)
    windows = evaluation_windows(chat_file(tmp_path, rows), tokenizer, None, 50)
    text = "".join(
        f"system: 26 Jul 2024<|end|>user: {user['content']}<|end|>"
        f"assistant: {assistant['content']}<|end|>"
        for user, assistant in rows
    )
    ids = tokenizer(text)["input_ids"]
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 50 * 50]
    assert windows.template_date == "2024-07-26"


def test_the_whole_text_is_evaluated_on_a_gpu():
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert default_windows(False, card) is None
    assert default_windows(False, cpu) == CPU_WINDOWS
    assert default_windows(True, card) == default_windows(True, cpu) == DEMO_WINDOWS


def test_windows_are_cut_to_the_models_context(tiny, calibration_text, tmp_path):
    """256 tokens of a tiny model, whether the length is the default or asked for."""
    for folder, length in (("default", []), ("asked", ["--window-length", 300])):
        result = run_script(
            ROOT / "common/evaluation.py",
            "--model-path",
            tiny,
            "--results-dir",
            tmp_path / folder,
            "--perplexity-data",
            calibration_text,
            "--tasks",
            "perplexity",
            "--windows",
            2,
            "--device",
            "cpu",
            *length,
        )
        assert result.returncode == 0, result.stderr
        assert "to 256 tokens, the model's context" in result.stdout
        document = json.loads((tmp_path / folder / tiny.name / "baseline.json").read_text())
        assert document["tasks"]["perplexity"]["length"] == 256
        assert document["tasks"]["perplexity"]["windows"] == 2


def test_a_window_of_one_token_is_refused(tiny, tmp_path):
    """Its only token is context, so nothing is left to be evaluated."""
    result = run_script(
        ROOT / "common/evaluation.py",
        "--model-path",
        tiny,
        "--results-dir",
        tmp_path,
        "--tasks",
        "perplexity",
        "--window-length",
        1,
        "--device",
        "cpu",
    )
    assert_user_error(result, "--window-length", "1 is less than 2")

"""Divergence from the baseline against scipy in float64, and the overlap of calibration and
evaluation texts.
"""

import json

import pytest
import torch
from conftest import ROOT, assert_user_error, run_quantize, run_script
from scipy import stats

from common.checkpoint.writer import METADATA_FILE
from common.model.source import SourceModel
from common.numerics.divergence import summarise_divergence, token_divergence
from common.running.runtime import load_model
from common.tasks.original import hidden_states, last_hidden_states
from common.text import overlap
from common.text.windows import Windows

CPU = torch.device("cpu")


def test_divergence_is_scipys():
    generator = torch.Generator().manual_seed(0)
    original, other = torch.randn(2, 30, 50, generator=generator, dtype=torch.float64) * 3
    divergence, same = token_divergence(
        original.float().log_softmax(-1), other.float().log_softmax(-1)
    )
    expected = [
        stats.entropy(p.numpy(), q.numpy())
        for p, q in zip(original.softmax(-1), other.softmax(-1), strict=True)
    ]
    assert torch.allclose(divergence.double(), torch.tensor(expected), rtol=1e-4)
    assert same.tolist() == (original.argmax(-1) == other.argmax(-1)).tolist()
    nothing, all_same = token_divergence(
        original.float().log_softmax(-1), original.float().log_softmax(-1)
    )
    assert nothing.max() < 1e-6 and all_same.all()


def test_summary_by_hand():
    found = summarise_divergence(
        [{"kl": [0.0, 1.0, 2.0], "same_top": 2}, {"kl": [3.0, 4.0], "same_top": 1}]
    )
    assert (
        found["kl_mean"] == 2.0
        and found["kl_median"] == 2.0
        and found["tokens"] == 5
        and found["same_top"] == 0.6
    )
    assert found["kl_99"] == pytest.approx(3.96)


def test_the_walk_gives_the_models_own_hidden_states(tiny):
    windows = torch.randint(0, 300, (5, 30), generator=torch.Generator().manual_seed(1))
    states = last_hidden_states(SourceModel(str(tiny), CPU, torch.float32), windows)
    model = load_model(tiny, CPU, torch.float32)[0]
    with torch.no_grad():
        expected = model.model(windows).last_hidden_state
        assert torch.allclose(model.model.norm(states), expected, atol=1e-4)


def test_hidden_states_are_kept_for_the_same_model_and_tokens_only(tiny, tiny_models, tmp_path):
    generator = torch.Generator().manual_seed(3)
    windows = [
        Windows(torch.randint(0, 300, (2, 20), generator=generator), "made up", None)
        for _ in range(2)
    ]
    source = SourceModel(str(tiny), CPU, torch.float32)
    first = hidden_states(source, windows[0], tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    source.load_layer = None  # a second walk would fail
    assert torch.equal(hidden_states(source, windows[0], tmp_path), first)
    other = SourceModel(str(tiny_models["qwen3", False]), CPU, torch.float32)
    for model, tokens in (
        (SourceModel(str(tiny), CPU, torch.float32), windows[1]),
        (other, windows[0]),
    ):
        assert not torch.equal(hidden_states(model, tokens, tmp_path), first)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(
        hidden_states(SourceModel(str(tiny), CPU, torch.float32), windows[0], tmp_path), first
    )


def test_shared_passages_are_found_wherever_they_lie():
    words = [f"w{i}" for i in range(400)]
    known = overlap.decode(overlap.encode([" ".join(words)]))
    for start in range(0, 40):
        passage = "Some text before. " + " ".join(words[start : start + 20]) + ", and after."
        share, found = overlap.largest_share(known, ["nothing here", passage])
        assert share >= overlap.TOO_MUCH and found in passage
    assert (
        overlap.largest_share(known, [" ".join(words[5:17])])[0] == 0
    )  # twelve words are no passage
    assert overlap.largest_share(known, [" ".join(reversed(words))])[0] == 0
    assert overlap.largest_share(known, [" ".join(words[10:40]).upper()])[0] >= overlap.TOO_MUCH
    mostly_new = " ".join([f"n{i}" for i in range(300)] + words[10:40])
    assert 0 < overlap.largest_share(known, [mostly_new])[0] < overlap.TOO_MUCH


def test_evaluation_on_calibration_text_is_refused(tiny, tmp_path, calibration_text):
    output = tmp_path / "checkpoint"
    result = run_quantize("gptq", tiny, output, text=calibration_text)
    assert result.returncode == 0, result.stderr
    assert json.loads((output / METADATA_FILE).read_text())["calibration"]["passages"]
    evaluate = [
        ROOT / "common/evaluation.py",
        "--model-path",
        output,
        "--results-dir",
        tmp_path / "results",
        "--tasks",
        "perplexity",
        "--windows",
        200,
        "--window-length",
        64,
    ]
    assert_user_error(
        run_script(*evaluate, "--perplexity-data", calibration_text),
        "was calibrated on",
        "--calib-data",
    )
    assert run_script(*evaluate, "--perplexity-data", "demo").returncode == 0


def test_the_demos_calibration_and_evaluation_texts_share_little():
    from common.text.data import demo_rows, demo_text

    known = overlap.decode(overlap.encode(demo_text("calibration")))
    assert overlap.largest_share(known, demo_text("evaluation"))[0] < 0.1
    for task in ("arc", "arc_easy", "squad", "openmath"):
        assert (
            overlap.largest_share(known, [json.dumps(row) for row in demo_rows(task).rows])[0] < 0.1
        )

"""GGUF files in a real llama.cpp: `bash tests/serving.sh llama.cpp`.

To multiply with blocks llama.cpp rounds activations to 8 bits, which moves logits more than all
that export rounds. So every model is also compared as the same file with its weights in float32,
which has to give transformers' logits.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import FUSED, ROOT, run_script, save_tiny
from gguf_fidelity import compare, logits_of, with_weights_of
from llama_cpp import PACKAGE, Model, in_float32, library

from common.text.windows import evaluation_windows

pytestmark = pytest.mark.slow

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
FAMILIES = FUSED  # by name and whether the head is the embedding
TEXTS = (
    "The river runs past a small town.",
    "  leading and   inner spaces \n\n and\ttabs\r\n",
    "Don't, I'LL, we're: 12345 items at 6.5%, or 1/3?",
    "naïve café, Ünïcödé, 日本語, 한국어, العربية, 😀👍🏽",
    "def f(x):\n    return x ** 2  # square\n",
    "",
)


@pytest.fixture(scope="module")
def lib():
    if not PACKAGE.is_dir():
        pytest.skip("no llama.cpp; run bash tests/serving.sh llama.cpp")
    return library(PACKAGE)


def made(method, model, output, *options):
    """A checkpoint and its file."""
    script = ROOT / f"quantize_{method}.py"
    result = run_script(script, "--model", model, "--output", output, "--gguf", *options)
    assert result.returncode == 0, result.stderr
    return output, output.with_name(output.name + ".gguf")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_tiny_models_give_transformers_logits(lib, generator, tmp_path, family, rope):
    """Names, rows of q and k, biases, norms, rotary embedding, tied heads."""
    if rope == "llama3" and family[0] in ("qwen2", "qwen3"):
        pytest.skip("refused: llama.cpp reads no frequencies of its own there")
    save_tiny(tmp_path / "tiny", *family, rope_parameters=ROPES[rope])
    folder, file = made("hqq", tmp_path / "tiny", tmp_path / "q", "--group-size", 32)
    tokens = torch.randint(2, 320, (200,), generator=generator).tolist()
    expected = logits_of(plain(folder))(tokens)
    for name, allowed in ((file, 0.05), (in_float32(file, tmp_path / "f32.gguf"), 2e-3)):
        with closing(Model(lib, name, 256)) as model:
            difference = (model.logits(tokens) - expected).square().mean().sqrt()
            assert difference < allowed * expected.std(), (name.name, difference / expected.std())


@pytest.fixture(scope="module")
def demo(demo_model, tmp_path_factory):
    """The demo model's checkpoint and its file."""
    return made("hqq", demo_model, tmp_path_factory.mktemp("demo") / "hqq-4bit")


def test_demo_tokens(lib, demo):
    """Texts, and a chat as the template in the file writes it."""
    folder, file = demo
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model, version 2."},
    ]
    with closing(Model(lib, file)) as model:
        assert model.chat_template() == tokenizer.chat_template
        written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for text in (*TEXTS, written):
            assert model.tokens(text) == tokenizer(text)["input_ids"], text
        # Generation ends where transformers' does, and goes on after all else of the chat.
        ends = plain(folder).generation_config.eos_token_id
        assert [token for token in model.tokens(written) if model.ends(token)] == [ends] * 3


def test_demo_runs_as_in_transformers(lib, demo, tmp_path):
    """What the blocks round away: below 1e-4 nats, perplexity within 0.2 %; greedy tokens agree up
    to a tie. With activations that llama.cpp rounds to 8 bits: what that explains, no more.
    """
    folder, file = demo
    model, tokenizer = plain(folder), AutoTokenizer.from_pretrained(folder)
    windows = evaluation_windows("demo", tokenizer, 4, 256).tokens.tolist()
    logits = logits_of(model)
    expected = [logits(window) for window in windows]
    blocks = compare(logits_of(with_weights_of(file, model)), windows, expected)
    assert blocks.divergence.mean() < 1e-5 and abs(blocks.after / blocks.before - 1) < 5e-4
    exact = in_float32(file, tmp_path / "float32.gguf")
    for name, divergence, change, tie in ((exact, 1e-4, 0.002, 0.05), (file, 0.01, 0.02, 1.0)):
        with closing(Model(lib, name)) as running:
            found = compare(running.logits, windows, expected)
            print(name.name, found)
            assert found.divergence.mean() < divergence
            assert abs(found.after / found.before - 1) < change
            for window in windows:
                ids = window[:32] + running.greedy(window[:32], 24)
                judged = logits(ids)[31:-1]
                chosen = judged.gather(1, torch.tensor(ids[32:]).unsqueeze(1))[:, 0]
                assert (judged.amax(1) - chosen < tie).all()

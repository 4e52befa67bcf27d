"""GGUF files in a real llama.cpp: `bash tests/serving.sh llama.cpp`.

To multiply with blocks llama.cpp rounds activations to 8 bits, which moves logits more than all
that export rounds. So every model is also compared as the same file with its weights in float32,
which has to give transformers' logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from conftest import FUSED, ROOT, build_tiny, run_script, tiny_tokenizer
from llama_cpp import Model, in_float32, library

PACKAGE = ROOT / ".serving" / "llama.cpp"
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


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits_of(model, tokens):
    return model(torch.tensor([tokens])).logits[0].numpy()


def log_softmax(logits):
    return torch.from_numpy(logits).double().log_softmax(-1)


def divergence(expected, found):
    """KL divergence in nats of each token's distribution, [length]."""
    before, after = log_softmax(expected), log_softmax(found)
    return (before.exp() * (before - after)).sum(-1)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_tiny_models_give_transformers_logits(lib, tmp_path, family, rope):
    """Names, rows of q and k, biases, norms, rotary embedding, tied heads."""
    if rope == "llama3" and family[0] in ("qwen2", "qwen3"):
        pytest.skip("refused: llama.cpp reads no frequencies of its own there")
    build_tiny(*family, rope_parameters=ROPES[rope]).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    folder, file = made("hqq", tmp_path / "tiny", tmp_path / "q", "--group-size", 32)
    tokens = np.random.default_rng(3).integers(2, 320, 200).tolist()
    expected = logits_of(plain(folder), tokens)
    spread = expected.std()
    for name, allowed in ((file, 0.1), (in_float32(file, tmp_path / "f32.gguf"), 3e-3)):
        model = Model(lib, name, 256)
        difference = np.sqrt(np.square(model.logits(tokens) - expected).mean()) / spread
        assert difference < allowed
        model.close()

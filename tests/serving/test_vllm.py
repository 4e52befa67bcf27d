"""Checkpoints in a real vLLM on a CPU: `bash tests/serving.sh vllm`.

Two questions, asked apart. Does vLLM read from the files what transformers reads? With
products of its rounded weights that round nothing else (vllm_driver.py), activations least of all.
And what do its own products give? That depends on the CPU: for 4 bits they need AVX-512, and for 8
bits they are exact only with VNNI.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ARCHITECTURES, ROOT, run_quantize, save_tiny

from common.text.windows import evaluation_windows

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".serving" / "vllm" / "bin" / "python"
FOUR, EIGHT = "CPUWNA16LinearKernel", "CPUInt8ScaledMMLinearKernel"
NEW = 16
# Heads of a size that vLLM's attention knows, channels of several groups of 128.
SIZES = dict(hidden_size=256, head_dim=64, intermediate_size=384)
# Name, method, options and what holds the rounded weights.
CONFIGURATIONS = {
    "gptq-g64": ("gptq", ("--group-size", 64), FOUR),
    "gptq-g32": ("gptq", ("--group-size", 32), FOUR),
    "gptq-g128": ("gptq", ("--group-size", 128), FOUR),
    "gptq-channel": ("gptq", ("--group-size", "channel"), FOUR),
    "gptq-symmetric": ("gptq", ("--symmetric",), FOUR),
    "gptq-symmetric-channel": ("gptq", ("--symmetric", "--group-size", "channel"), FOUR),
    "gptq-head-4": ("gptq", ("--head-bits", 4), FOUR),
    "awq": ("awq", (), FOUR),
    "hqq": ("hqq", (), FOUR),
    "adaround": ("adaround", (), FOUR),
    "quarot": ("quarot", (), FOUR),
    "smoothquant": ("smoothquant", (), EIGHT),
}
KERNEL = "Failed to find a kernel that can implement the WNA16 linear layer"
# Refused, by README's troubleshooting or because a CPU has no kernel, and the words.
REFUSED = {
    "8-bit-symmetric": ("hqq", ("--bits", 8), KERNEL),
    "8-bit-asymmetric": ("hqq", ("--bits", 8, "--asymmetric"), KERNEL),
    "2-bit": ("hqq", ("--bits", 2), KERNEL),
    "3-bit": ("hqq", ("--bits", 3), KERNEL),
    "head-8": ("hqq", ("--head-bits", 8), KERNEL),
    "embedding": ("hqq", ("--embedding-bits", 8), "Assertion failed"),
    "activations": ("quarot", ("--act-bits", 4), "_with_online_transforms"),
    "cache": ("quarot", ("--act-bits", 4, "--kv-bits", 4), "_with_online_transforms"),
}


class Vllm:
    """The driver, and what it says of this CPU."""

    def __init__(self, log):
        self.process = subprocess.Popen(
            [PYTHON, Path(__file__).with_name("vllm_driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self.log = Path(log.name)
        self.units = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-2000:]
        return json.loads(line)

    def __call__(self, folder, prompts, dtype="float32", stand_in=True, every=True) -> dict:
        """What it makes of a checkpoint, as vllm_driver.py says."""
        request = {
            "folder": str(folder),
            "dtype": dtype,
            "prompts": prompts,
            "all": every,
            "new": NEW,
            "stand_in": stand_in,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    if not PYTHON.is_file():
        pytest.skip("no vLLM; run bash tests/serving.sh vllm")
    with open(tmp_path_factory.mktemp("vllm") / "log.txt", "w") as log:
        driver = Vllm(log)
        yield driver
        driver.process.stdin.close()
        driver.process.wait(timeout=60)


@dataclass(frozen=True)
class Agreement:
    """How far vLLM's log-probabilities are from transformers': of the prompts' own tokens, or of
    all where it gave all, with the divergence in nats; and by how many nats the most unlikely token
    that it chose is below transformers' likeliest.
    """

    mean: float
    largest: float
    divergence: float | None
    tie: float


def agreement(folder, prompts, found: dict, dtype="float32", stand_in=True) -> Agreement:
    """Of an answer of the driver with transformers.

    Args:
        prompts: token ids, of one length.
        stand_in: as it was asked; then transformers does not round activations either.
    """
    assert "refused" not in found, found["refused"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if stand_in:
        model.apply(disable_quantization)
    whole = torch.tensor([ask + new for ask, new in zip(prompts, found["generated"], strict=True)])
    with torch.no_grad():
        expected = torch.cat([model(ids[None]).logits.float().log_softmax(-1) for ids in whole])
    length = len(prompts[0])
    judged = expected[:, length - 1 : -1]
    chosen = judged.gather(2, whole[:, length:, None])[..., 0]
    expected, own = expected[:, : length - 1], whole[:, 1:length, None]
    values = torch.tensor(found["log_probabilities"])
    divergence = None
    if values.shape[2] == 1:
        expected = expected.gather(2, own)
    else:
        divergence = (expected.exp() * (expected - values)).sum(2).mean().item()
    difference = (values - expected).abs()
    result = Agreement(
        difference.mean().item(),
        difference.max().item(),
        divergence,
        (judged.amax(2) - chosen).max().item(),
    )
    print(Path(folder).name, dtype, found["kernels"], result)
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory, calibration_text):
    """Checkpoints of an untied tiny Llama by name of a configuration; each is made once."""
    base = tmp_path_factory.mktemp("llama")
    save_tiny(base / "model", "llama", False, **SIZES)

    def make(name: str) -> Path:
        method, options, _ = {**CONFIGURATIONS, **REFUSED}[name]
        if not (base / name).is_dir():
            text = None if method == "hqq" else calibration_text
            result = run_quantize(method, base / "model", base / name, *options, text=text)
            assert result.returncode == 0, result.stderr
        return base / name

    return make


@pytest.fixture
def prompts(generator):
    """Two prompts of 100 tokens of the tiny vocabulary."""
    return torch.randint(2, 320, (2, 100), generator=generator).tolist()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_reads_what_transformers_reads(vllm, made, prompts, name):
    """Codes, scales, zero-points, head and what stays in 16 bits; prompt and decoding."""
    found = vllm(made(name), prompts)
    result = agreement(made(name), prompts, found)
    assert found["kernels"] == [CONFIGURATIONS[name][2]]
    assert result.largest < 1e-3 and result.divergence < 1e-6 and result.tie < 1e-3


@pytest.mark.parametrize("family", ARCHITECTURES, ids=str)
def test_families(vllm, prompts, tmp_path, family):
    """Every family's linears, two of which vLLM stacks, and what each has beside Llama's."""
    save_tiny(tmp_path / "model", *family, **SIZES)
    result = run_quantize("hqq", tmp_path / "model", tmp_path / "q", "--group-size", 32)
    assert result.returncode == 0, result.stderr
    result = agreement(tmp_path / "q", prompts, vllm(tmp_path / "q", prompts))
    assert result.largest < 1e-3 and result.divergence < 1e-6 and result.tie < 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(vllm, made, prompts, name):
    """With the words that README's troubleshooting has."""
    words = REFUSED[name][2]
    found = vllm(made(name), prompts)
    assert words in found.get("refused", "it runs"), found


def test_product_of_4_bits(vllm, made, prompts):
    """vLLM's own, in the type that it serves in; without AVX-512 it stops with these words."""
    found = vllm(made("gptq-g64"), prompts, "bfloat16", stand_in=False)
    if not vllm.units["avx512"]:
        assert "'_C' object has no attribute 'cpu_gemm_wna16'" in found["refused"]
        pytest.skip("vLLM's product for 4 bits needs AVX-512, which this CPU is without")
    result = agreement(made("gptq-g64"), prompts, found, "bfloat16", stand_in=False)
    assert result.divergence < 1e-3


def test_product_of_8_bits(vllm, made, prompts):
    """vLLM's own. Its scale of a token is the largest value by 127, transformers' by 127.5; without
    VNNI its sums of two products overflow 16 bits, too.
    """
    found = vllm(made("smoothquant"), prompts, stand_in=False)
    result = agreement(made("smoothquant"), prompts, found, stand_in=False)
    assert result.divergence < (2e-3 if vllm.units["vnni"] else 0.1)


@pytest.mark.parametrize("configuration", (None, "hqq", "smoothquant"), ids=str)
def test_demo(vllm, demo_model, tmp_path, configuration):
    """A real model: in float32 as tiny ones; in bfloat16 no further off than the 16-bit model."""
    folder = demo_model
    if configuration:
        folder = tmp_path / configuration
        text = None if configuration == "hqq" else "demo"
        result = run_quantize(configuration, demo_model, folder, text=text)
        assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    windows = evaluation_windows("demo", tokenizer, 2, 256).tokens.tolist()
    for dtype, mean, largest, tie in (("float32", 1e-4, 2e-3, 1e-2), ("bfloat16", 0.1, 1.0, 1.0)):
        found = vllm(folder, windows, dtype, every=False)
        result = agreement(folder, windows, found, dtype)
        assert result.mean < mean and result.largest < largest and result.tie < tie

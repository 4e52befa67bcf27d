"""The rotary embedding in config.json, for transformers 4 and 5; with -m slow, the same logits from
transformers 4.57.
"""

import json
import subprocess

import pytest
import torch
from conftest import ROOT, build_tiny, run_script, save_tiny, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES = {
    "llama": (500000.0, LLAMA3),
    "mistral": (1000000.0, None),
    "qwen2": (1000000.0, None),
    "qwen3": (5000000.0, None),
    "granite": (10000.0, None),
    "smollm3": (2000000.0, LLAMA3),
}
FORMS = {
    "w4 asymmetric": ("hqq", "--bits", 4),
    "w4 symmetric": ("hqq", "--bits", 4, "--symmetric"),
    "w8": ("hqq", "--bits", 8),
    "w8a8": ("smoothquant",),
    "embedding": ("hqq", "--embedding-bits", 8),
    "w3": ("hqq", "--bits", 3),
}
OLD = ROOT / ".venv" / "transformers-4.57"
# The one of its time that unpacks zero-points; those before refuse these checkpoints, 0.19 refuses
# the asymmetric ones.
OLD_PACKAGES = (
    "torch==2.13.0",
    "transformers==4.57.6",
    "compressed-tensors==0.15.0.1",
    "psutil",
    "accelerate",
)
OLD_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
results = {}
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = model(torch.arange(2, 62)[None]).logits
        tokens = tokenizer("the river runs <|im|> past")["input_ids"]
        results[folder] = logits, tokens, tokenizer.chat_template
    except Exception as error:
        results[folder] = f"{type(error).__name__}: {error}"
torch.save(results, sys.argv[1])
"""


def source_of(architecture, folder):
    theta, scaling = ROPES[architecture]
    model = build_tiny(architecture, architecture in ("llama", "qwen2"))
    model.config.rope_parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def quantized(source, output, method, *options, text=None):
    calibration = ("--calib-data", text, "--calib-samples", 2, "--calib-length", 64) if text else ()
    result = run_script(
        ROOT / f"quantize_{method}.py",
        "--model",
        source,
        "--output",
        output,
        *options,
        *calibration,
    )
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("architecture", ROPES)
def test_both_forms_are_written_and_agree(tmp_path, architecture):
    source = source_of(architecture, tmp_path / "source")
    output = quantized(source, tmp_path / "out", "hqq")
    theta, scaling = ROPES[architecture]
    content = json.loads((output / "config.json").read_text())
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == theta
    assert content["rope_scaling"] == scaling
    # Each form alone, and both together, are the source's configuration to transformers 5.
    expected = AutoConfig.from_pretrained(source).rope_parameters
    for left_out in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):
        (output / "config.json").write_text(
            json.dumps({k: v for k, v in content.items() if k not in left_out})
        )
        assert AutoConfig.from_pretrained(output).rope_parameters == expected
    tokenizer = json.loads((output / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] != "TokenizersBackend" and not isinstance(
        tokenizer.get("extra_special_tokens"), list
    )
    text = "the river runs <|im|> past"
    assert (
        AutoTokenizer.from_pretrained(output)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    )


FACTORS = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
}
GLOBAL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    "architecture, rope, old",
    [
        (
            "gemma3_text",
            {"full_attention": GLOBAL, "sliding_attention": LOCAL},
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "phi3",
            {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75},
            {"rope_theta": 5e4, "partial_rotary_factor": 0.75, "rope_scaling": None},
        ),
        (
            "phi3",
            {"rope_type": "longrope", **FACTORS, "rope_theta": 5e4, "partial_rotary_factor": 0.75},
            {
                "rope_theta": 5e4,
                "partial_rotary_factor": 0.75,
                "rope_scaling": {"type": "longrope", **FACTORS},
            },
        ),
    ],
    ids=["two kinds of layers", "part of a head", "long"],
)
def test_forms_of_their_own(tmp_path, architecture, rope, old):
    """Gemma's, for each kind of layer; Phi-3's, for a part of a head, scaled by three fields."""
    save_tiny(tmp_path / "source", architecture, False, rope_parameters=rope)
    output = quantized(tmp_path / "source", tmp_path / "out", "hqq")
    content = json.loads((output / "config.json").read_text())
    assert {name: content[name] for name in old} == old
    expected = AutoConfig.from_pretrained(tmp_path / "source").rope_parameters
    for left_out in ((), ("rope_parameters",), tuple(old)):
        kept = {name: value for name, value in content.items() if name not in left_out}
        (output / "config.json").write_text(json.dumps(kept))
        found = AutoConfig.from_pretrained(output).rope_parameters
        found.pop("type", None)
        assert found == expected


@pytest.fixture(scope="session")
def old_python():
    """Python with transformers 4.57, in an environment of its own that is set up on first use."""
    python = OLD / "bin" / "python"
    ready = OLD / "ready"
    if not ready.is_file():
        import venv

        venv.create(OLD, with_pip=True, clear=True)
        pip = subprocess.run(
            [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                *OLD_PACKAGES,
            ],
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            pytest.skip(
                f"transformers 4.57 cannot be installed: {pip.stderr.strip().splitlines()[-1:]}"
            )
        ready.touch()
    return python


@pytest.mark.slow
def test_transformers_4_computes_the_same(tmp_path, calibration_text, old_python):
    outputs = {}
    for architecture in ROPES:
        source = source_of(architecture, tmp_path / architecture)
        for form, (method, *options) in FORMS.items():
            output = tmp_path / f"{architecture} {form}"
            outputs[str(output)] = quantized(
                source, output, method, *options, text=calibration_text
            )
    run = subprocess.run(
        [old_python, "-c", OLD_LOAD, tmp_path / "old.pt", *outputs], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    old = torch.load(tmp_path / "old.pt")
    for name, folder in outputs.items():
        if name.endswith("w3"):  # its packing is younger, and is refused
            assert isinstance(old[name], str) and "size mismatch" in old[name], old[name]
            continue
        assert not isinstance(old[name], str), f"{name}: {old[name]}"
        logits, tokens, template = old[name]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (tokens, template) == (
            tokenizer("the river runs <|im|> past")["input_ids"],
            tokenizer.chat_template,
        )
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
                torch.arange(2, 62)[None]
            ).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

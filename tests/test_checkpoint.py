"""Quantize, save, load plainly in a fresh process outside the repository: every architecture, width
and grid.
"""

import json

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    ROOT,
    assert_user_error,
    run_quantize,
    run_script,
    sampled,
)
from methods import method_options

from common.checkpoint.format import open_checkpoint, weight_format
from common.checkpoint.tensors import decompress, stored_parts
from common.checkpoint.writer import METADATA_FILE
from common.model.architecture import FAMILIES
from common.numerics.divergence import perplexity_of_logits, sample_difference

CASES = [(architecture, tied, "gptq", 4, "auto", False) for architecture, tied in ARCHITECTURES] + [
    ("llama", True, "hqq", 4, "32", False),
    ("llama", True, "hqq", 8, "channel", True),
    ("llama", False, "gptq", 8, "channel", True),
    ("qwen2", True, "gptq", 3, "64", False),
    ("qwen3", False, "hqq", 3, "channel", False),
    ("mistral", False, "hqq", 2, "32", True),
    ("llama", True, "gptq", 2, "32", False),
    ("llama", True, "smoothquant", 8, "channel", True),
    ("qwen2", True, "smoothquant", 8, "channel", True),
    ("llama", True, "awq", 4, "auto", False),
    ("qwen2", True, "quarot", 4, "auto", False),
    ("llama", True, "adaround", 4, "32", True),
]
# Loaded plainly in a fresh process too, but with less to look at: every method on every
# architecture.
METHODS = method_options(
    iterations=30,
    gptq=["--sweeps", "0", "--damping", "0.02", "--symmetric"],
    awq=["--bits", "3", "--tune-scales", "8"],
    hqq=["--lp-norm", "2"],
    smoothquant=["--alpha", "auto"],
    adaround=["--bits", "8"],
    quarot=["--sweeps", "0", "--damping", "0.02"],
)


@pytest.mark.parametrize("architecture, tied, method, bits, group_size, symmetric", CASES)
def test_plain_load_equals_what_was_quantized(
    tiny_models,
    calibration_text,
    plain_load,
    tmp_path,
    architecture,
    tied,
    method,
    bits,
    group_size,
    symmetric,
):
    source = tiny_models[architecture, tied]
    output = tmp_path / "quantized"
    result = run_quantize(
        method,
        source,
        output,
        "--bits",
        bits,
        "--group-size",
        group_size,
        *(["--symmetric"] if symmetric else []),
        *(["--tune-scales", 8] if method == "gptq" and bits < 4 else []),
        text=calibration_text,
    )
    assert result.returncode == 0, result.stderr

    config, tensors = open_checkpoint(output)
    grid = weight_format(config).grid
    assert (grid.bits, grid.symmetric) == (bits, symmetric)
    from common.model.source import load_tokenizer
    from common.text.probe import probe_tokens

    tokens = probe_tokens(load_tokenizer(output))
    loaded = plain_load(output, tokens, tmp_path)
    # The dequantized weights, by the format's own decompressor, are those of the plain load, bit
    # for bit.
    for layer in range(config["num_hidden_layers"]):
        for linear in FAMILIES[architecture].linears:
            name = f"model.layers.{layer}.{linear}"
            state = stored_parts(tensors.read, tensors, name)
            assert torch.equal(decompress(state, grid), loaded["weights"][f"{name}.weight"])
    # The logits are those of the model in memory when it was quantized.
    record = json.loads((output / METADATA_FILE).read_text())
    assert sample_difference(loaded["logits"][0], record["probe"]) < 1e-5
    assert record["probe"]["perplexity"] == pytest.approx(
        perplexity_of_logits(loaded["logits"][0], tokens), rel=1e-4
    )
    # Tied embeddings stay tied and are stored once, but for a rotation's; template and generation
    # config came along.
    tied = tied and (method != "quarot" or FAMILIES[architecture].normalises_output)
    assert loaded["tied"] is tied
    assert ("lm_head.weight" in tensors) is not tied
    assert loaded["template"] and (output / "generation_config.json").is_file()


def in_six(method: str, architecture: str, tied: bool) -> bool:
    """A method for every architecture, beside GPTQ above; each method on one or two."""
    place = ARCHITECTURES.index((architecture, tied))
    return (list(METHODS).index(method) + place) % 6 == 0


@pytest.mark.parametrize(
    "method, architecture, tied",
    sampled([(method, *one) for method in METHODS for one in ARCHITECTURES], in_six),
)
def test_every_method_on_every_architecture(
    tiny_models, calibration_text, tmp_path, method, architecture, tied
):
    """verify_model.py loads each plainly and compares its logits with those recorded when it was
    quantized.
    """
    output = tmp_path / "quantized"
    result = run_quantize(
        method, tiny_models[architecture, tied], output, *METHODS[method], text=calibration_text
    )
    assert result.returncode == 0, result.stderr
    verified = run_script(ROOT / "verify_model.py", "--model-path", output)
    assert verified.returncode == 0, verified.stdout
    record = json.loads((output / METADATA_FILE).read_text())
    assert max(linear["relative_output_error"] for linear in record["linears"].values()) < 0.4


HEAD, EMBEDDING = ("--head-bits", 8), ("--embedding-bits", 8)


@pytest.mark.parametrize(
    "method, architecture, tied, options",
    [
        ("gptq", "qwen3", False, HEAD),
        ("hqq", "mistral", False, ("--head-bits", 4)),
        ("quarot", "qwen2", True, (*HEAD, *EMBEDDING)),
        ("gptq", "llama", True, EMBEDDING),
        ("awq", "qwen2", True, EMBEDDING),
        ("smoothquant", "llama", True, EMBEDDING),
        ("adaround", "qwen3", False, EMBEDDING),
        *sampled(
            [
                ("quarot", "llama", True, HEAD),
                ("smoothquant", "llama", False, HEAD),
                ("hqq", "llama", False, (*EMBEDDING, *HEAD)),
            ],
            lambda *case: False,
        ),
    ],
)
def test_quantized_head_and_embedding(
    tiny_models, calibration_text, plain_load, tmp_path, method, architecture, tied, options
):
    output, plain = tmp_path / "head", tmp_path / "plain"
    source = tiny_models[architecture, tied]
    few = ("--iterations", 20) if method == "adaround" else ()
    for folder, extra in ((output, options), (plain, ())):
        result = run_quantize(method, source, folder, *extra, *few, text=calibration_text)
        assert result.returncode == 0, result.stderr
    verified = run_script(ROOT / "verify_model.py", "--model-path", output)
    assert verified.returncode == 0, verified.stdout
    sizes = [
        json.loads((folder / METADATA_FILE).read_text())["bytes"]["quantized_weights"]
        for folder in (output, plain)
    ]
    # One matrix is stored where it is shared, of one byte for two; each row has a scale more.
    assert sizes[0] < sizes[1] - 0.45 * 320 * 64 * 2 * len(options) / 2
    config, tensors = open_checkpoint(output)
    assert bool(config.get("tie_word_embeddings")) is (tied and method != "quarot")
    assert ("model.embed_tokens.weight_scale" in tensors) is ("--embedding-bits" in options)
    assert ("lm_head.weight" in tensors or "lm_head.weight_packed" in tensors) is not config.get(
        "tie_word_embeddings", False
    )
    if method == "gptq":  # verify has loaded it plainly already
        from common.model.source import load_tokenizer
        from common.text.probe import probe_tokens

        loaded = plain_load(output, probe_tokens(load_tokenizer(output)), tmp_path)
        record = json.loads((output / METADATA_FILE).read_text())["probe"]
        assert sample_difference(loaded["logits"][0], record) < 1e-5


def test_a_tied_head_cannot_be_rounded_alone(tiny, calibration_text, tmp_path):
    result = run_quantize("gptq", tiny, tmp_path / "out", "--head-bits", 8, text=calibration_text)
    assert_user_error(result, "shares its head", "--embedding-bits 8")
    assert not (tmp_path / "out").exists()


def test_block_reconstruction(tiny, calibration_text, tmp_path):
    output = tmp_path / "quantized"
    result = run_quantize(
        "adaround",
        tiny,
        output,
        "--reconstruction",
        "block",
        "--iterations",
        20,
        text=calibration_text,
    )
    assert result.returncode == 0, result.stderr
    assert run_script(ROOT / "verify_model.py", "--model-path", output).returncode == 0


def test_metadata_says_what_was_run(tiny, calibration_text, tmp_path):
    output = tmp_path / "gptq-4bit"
    assert run_quantize("gptq", tiny, output, "--seed", 3, text=calibration_text).returncode == 0
    record = json.loads((output / METADATA_FILE).read_text())
    assert record["method"] == "gptq" and record["bits"] == 4 and record["seed"] == 3
    assert record["options"]["calib_samples"] == 8
    assert (
        record["calibration"]["tokens"] == 8 * 64
        and len(record["calibration"]["fingerprint"]) == 64
    )
    assert set(record["versions"]) >= {"python", "torch", "transformers", "compressed-tensors"}
    assert len(record["linears"]) == 2 * len(FAMILIES["llama"].linears)
    for linear in record["linears"].values():
        assert (
            linear["bits"] == 4
            and linear["group_size"] == 64
            and 0 < linear["relative_output_error"] < 0.5
        )
    assert record["bytes"]["quantized_weights"] < record["bytes"]["baseline_weights"]
    assert record["compression_ratio"] == pytest.approx(
        record["bytes"]["baseline_weights"] / record["bytes"]["quantized_weights"], rel=1e-3
    )
    stored = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert (
        record["bytes"]["quantized_weights"]
        <= stored
        < record["bytes"]["quantized_weights"] + 50_000
    )
    assert (
        record["seconds"]["total"]
        >= sum(v for k, v in record["seconds"].items() if k != "total") * 0.99
    )
    assert record["memory"]["peak_host_bytes"] > 50e6


def test_same_seed_gives_the_same_file_and_another_seed_does_not(tiny, calibration_text, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert (
            run_quantize(
                "gptq", tiny, tmp_path / name, "--seed", seed, text=calibration_text
            ).returncode
            == 0
        )
    shard = "model-00001-of-00003.safetensors"
    a, b, c = ((tmp_path / name / shard).read_bytes() for name in "abc")
    assert a == b != c


def test_no_metadata_and_overwrite(tiny, tmp_path):
    output = tmp_path / "hqq"
    assert run_quantize("hqq", tiny, output, "--no-save-metadata").returncode == 0
    assert not (output / METADATA_FILE).exists()
    before = (output / "config.json").stat().st_mtime_ns
    assert_user_error(run_quantize("hqq", tiny, output), "exists already", "--overwrite")
    assert (output / "config.json").stat().st_mtime_ns == before
    assert run_quantize("hqq", tiny, output, "--overwrite").returncode == 0
    assert (output / METADATA_FILE).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hqq"]
    verified = run_script(ROOT / "verify_model.py", "--model-path", output)
    assert verified.returncode == 0, verified.stdout

"""Checkpoints as GGUF files, read back by the gguf package: tensors, settings, what is refused."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, assert_user_error, build_tiny, run_script, save_tiny, tiny_tokenizer
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from test_layout import FILES, imports
from transformers import AutoModelForCausalLM

from common.results.reuse import _BESIDE_CODES, WITHOUT_EFFECT
from common.run_all.passed_on import share_out

HQQ, EXPORT = ROOT / "quantize_hqq.py", ROOT / "common" / "gguf_export.py"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# transformers' names inside a layer, by GGUF's.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def settings(reader: GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def weights(reader: GGUFReader, turned: bool, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """The file's tensors under transformers' names, float32, rows of q and k put back."""
    found = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        values = values.reshape(tuple(reversed(tensor.shape.tolist())))
        first, *rest = tensor.name.split(".")
        if first == "blk":
            name = f"model.layers.{rest[0]}.{LAYER[rest[1]]}.{rest[2]}"
            if turned and rest[1] in ("attn_q", "attn_k"):
                size = len(values) // heads[rest[1]]
                order = [
                    head * size + channel
                    for head in range(heads[rest[1]])
                    for channel in (*range(0, size, 2), *range(1, size, 2))
                ]
                values = values[order]
        else:
            name = f"{WHOLE[first]}.{rest[0]}" if first in WHOLE else tensor.name
        found[name] = values
    return found


def quantized(model, output, *options):
    result = run_script(HQQ, "--model", model, "--output", output, *options)
    assert result.returncode == 0, result.stderr
    return result


FORMS = {
    "llama": (("llama", True), ("--group-size", 32), "Q4_1"),
    "llama untied, per channel": (("llama", False), ("--group-size", "channel"), "Q4_1"),
    "mistral": (("mistral", False), ("--symmetric", "--group-size", 64), "Q4_0"),
    "qwen2": (("qwen2", True), ("--bits", 8, "--embedding-bits", 8), "Q8_0"),
    "qwen3": (("qwen3", False), ("--group-size", 32, "--head-bits", 8), "Q4_1"),
    "qwen3, embedding": (("qwen3", False), ("--embedding-bits", 8, "--symmetric"), "Q4_0"),
}


@pytest.mark.parametrize("model, options, kind", FORMS.values(), ids=FORMS)
def test_the_file_holds_the_checkpoint_s_weights(tiny_models, tmp_path, model, options, kind):
    """As a plain load unpacks them, up to the minimum's last digit; names, types and sizes too."""
    folder = tmp_path / "made"
    said = quantized(tiny_models[model], folder, "--gguf", *options).stdout
    file = tmp_path / "made.gguf"
    assert f"{file}: " in said and not list(tmp_path.glob("made.gguf.*"))
    reader = GGUFReader(file)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain(torch.zeros(1, 2, dtype=torch.long))  # unpacks
    config = plain.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    turned = model[0] in ("llama", "mistral")
    found = weights(reader, turned, heads)
    assert found.keys() == load_file(tiny_models[model] / "model.safetensors").keys()
    for name, values in found.items():
        # Eight binary digits of the scale times four of the zero-point; float16 has eleven.
        expected = plain.get_parameter(name)
        assert torch.allclose(values, expected, rtol=0, atol=3e-4), name
        if kind != "Q4_1":
            assert torch.equal(values, expected), name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds[f"blk.1.{name}.weight"] for name in LAYER if name.startswith("ffn_g")} == {kind}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == ("Q8_0" if "--embedding-bits" in options else "BF16")
    if not model[1]:
        assert kinds["output.weight"] == ("Q8_0" if "--head-bits" in options else "BF16")
    bits = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}[kind]
    assert len(options) > 2 or f"{bits:.2f} bits for each weight with a code" in said
    stored = settings(reader)
    name = {"mistral": "llama"}.get(model[0], model[0])
    assert stored["general.architecture"] == name
    for key, value in {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "rope.dimension_count": 16,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": 320,
    }.items():
        assert stored[f"{name}.{key}"] == value, key
    assert math.isclose(
        stored[f"{name}.attention.layer_norm_rms_epsilon"], config.rms_norm_eps, rel_tol=1e-6
    )
    assert stored["tokenizer.chat_template"] == tiny_tokenizer().chat_template


def rope_of(tmp_path, architecture, rope, **fields):
    """What a file says of a rotary embedding: its settings, and its frequencies' factors."""
    save_tiny(tmp_path / "m", architecture, True, rope_parameters=rope, **fields)
    quantized(tmp_path / "m", tmp_path / "q", "--gguf")
    reader = GGUFReader(tmp_path / "q.gguf")
    factors = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    said = {
        name.split(".", 1)[1]: value for name, value in settings(reader).items() if ".rope." in name
    }
    return said, factors


def test_llama_3_frequencies_are_written_as_factors(tmp_path):
    """By the published rule, in float64: long waves slower by the factor, short ones as they are,
    those between in between.
    """
    said, (factors,) = rope_of(tmp_path, "llama", LLAMA3, head_dim=32)
    assert said == {"rope.dimension_count": 32, "rope.freq_base": 500000.0}
    old, low, high = 64, LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    kinds = set()
    for index, found in enumerate(factors.tolist()):
        frequency = 500000.0 ** (-2 * index / 32)
        wave = 2 * math.pi / frequency
        if wave > old / low:
            expected, kind = LLAMA3["factor"], "long"
        elif wave < old / high:
            expected, kind = 1.0, "short"
        else:
            smooth = (old / wave - low) / (high - low)
            expected, kind = 1 / ((1 - smooth) / LLAMA3["factor"] + smooth), "between"
        kinds.add(kind)
        assert math.isclose(found, expected, rel_tol=1e-5)
    assert kinds == {"long", "short", "between"} and factors.dtype == "float32"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotary_embeddings_are_told(tmp_path, architecture, kind):
    original = {"original_max_position_embeddings": 64} if kind == "yarn" else {}
    rope = {"rope_type": kind, "rope_theta": 7000.0, "factor": 4.0, **original}
    said, factors = rope_of(tmp_path, architecture, rope)
    context = {"rope.scaling.original_context_length": 64} if original else {}
    assert factors == [] and said == {
        "rope.dimension_count": 16,
        "rope.freq_base": 7000.0,
        "rope.scaling.type": kind,
        "rope.scaling.factor": 4.0,
        **context,
    }


@pytest.mark.parametrize(
    "architecture, fields, words",
    [
        ("qwen2", {"rope_parameters": LLAMA3}, ["rotary embedding", "qwen2", "llama3"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["rotary embedding", "dynamic"],
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "attention_factor": 1.5,
                }
            },
            ["rotary embedding", "yarn, attention_factor 1.5"],
        ),
        ("qwen3", {"attention_bias": True}, ["no biases"]),
        ("llama", {"hidden_act": "gelu"}, ["activation is gelu"]),
        ("granite", {}, ["granite is not exported", "llama, mistral, qwen2, qwen3"]),
        ("llama", {"intermediate_size": 144}, ["rows of 144 weights", "blocks of 32"]),
    ],
)
def test_models_that_cannot_be_told(tmp_path, architecture, fields, words):
    """Before anything is quantized."""
    save_tiny(tmp_path / "m", architecture, True, **fields)
    options = "--output", tmp_path / "q", "--group-size", "channel", "--gguf"
    assert_user_error(run_script(HQQ, "--model", tmp_path / "m", *options), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    "script, options, words",
    [
        ("hqq", ["--bits", 3], ["3-bit codes", "--bits 4 or 8"]),
        (
            "hqq",
            ["--bits", 8, "--asymmetric"],
            ["8-bit blocks with zero-points", "without --asymmetric"],
        ),
        ("hqq", ["--group-size", 16], ["groups of 16", "a multiple of 32"]),
        ("smoothquant", [], ["activations are rounded to 8 bits (W8A8)", "leave --gguf out"]),
        ("quarot", ["--kv-bits", 4], ["--act-bits and --kv-bits"]),
    ],
)
def test_forms_that_cannot_be_told(tiny, calibration_text, tmp_path, script, options, words):
    """One line from the quantize script, before it quantizes, and from the export of such a
    checkpoint.
    """
    calibration = ["--calib-data", calibration_text, "--calib-samples", 2, "--calib-length", 64]
    command = [ROOT / f"quantize_{script}.py", "--model", tiny, "--output", tmp_path / "q"]
    command += [*options, *calibration]
    assert_user_error(run_script(*command, "--gguf"), *words)
    assert not list(tmp_path.iterdir())
    assert run_script(*command).returncode == 0
    found = run_script(EXPORT, "--model-path", tmp_path / "q")
    assert_user_error(found, *(word for word in words if not word.startswith("leave")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_a_mistral_s_sliding_window_ends_the_context(tmp_path):
    save_tiny(tmp_path / "m", "mistral", False, sliding_window=100)
    assert "ends after 100 tokens" in quantized(tmp_path / "m", tmp_path / "q", "--gguf").stdout
    assert settings(GGUFReader(tmp_path / "q.gguf"))["llama.context_length"] == 100


def test_scales_that_float16_does_not_hold(tmp_path):
    """bfloat16 does; the file would lose them."""
    model = build_tiny("llama", True)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e-8)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    result = run_script(HQQ, "--model", tmp_path / "m", "--output", tmp_path / "q", "--gguf")
    assert_user_error(result, "float16, which does not hold", "model.layers.1.mlp.up_proj")
    assert (tmp_path / "q").is_dir() and not list(tmp_path.glob("q.gguf*"))


def test_an_existing_file_is_kept_unless_told_otherwise(tiny, tmp_path):
    folder, file = tmp_path / "q", tmp_path / "q.gguf"
    file.write_text("precious")
    refused = run_script(HQQ, "--model", tiny, "--output", folder, "--gguf")
    assert_user_error(refused, "q.gguf exists already", "--overwrite")
    assert not folder.exists() and file.read_text() == "precious"
    # Without --gguf it is left alone, and a line says that it is of something else.
    assert "is of an earlier checkpoint" in quantized(tiny, folder).stdout
    assert_user_error(run_script(EXPORT, "--model-path", folder), "q.gguf exists already")
    assert file.read_text() == "precious"
    again = run_script(EXPORT, "--model-path", folder, "--overwrite")
    assert again.returncode == 0 and GGUFReader(file).tensors
    first = file.read_bytes()
    quantized(tiny, folder, "--gguf", "--overwrite")
    assert file.read_bytes() == first
    file.unlink()
    # The checkpoint answers for the same command with --gguf, and the file is written.
    resumed = quantized(tiny, folder, "--gguf", "--resume")
    assert "nothing to resume" in resumed.stdout and file.read_bytes() == first
    other = tmp_path / "deeper" / "x.gguf"
    assert run_script(EXPORT, "--model-path", f"{folder}/", "--output", other).returncode == 0
    assert other.read_bytes() == first


def test_what_is_no_checkpoint_is_refused(tiny, tmp_path):
    for folder, words in (
        (tmp_path / "none", ["is not a folder"]),
        (tiny, ["not a checkpoint of the quantize scripts"]),
    ):
        found = run_script(EXPORT, "--model-path", folder, "--output", tmp_path / "x.gguf")
        assert_user_error(found, *words)
    quantized(tiny, tmp_path / "q")
    assert_user_error(
        run_script(EXPORT, "--model-path", tmp_path / "q", "--output", tmp_path), "is a folder"
    )
    damaged = shutil.copytree(tmp_path / "q", tmp_path / "damaged")
    shard = sorted(damaged.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:4000])
    assert_user_error(run_script(EXPORT, "--model-path", damaged), "incomplete or damaged")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert_user_error(run_script(EXPORT, "--model-path", tmp_path / "q"), "of a form that they do")
    assert not list(tmp_path.glob("*.gguf*"))


def test_export_is_no_part_of_the_quantization_code():
    """A checkpoint stays what it is when the export changes."""
    used = {
        (name, other)
        for name in FILES
        for other in imports(name)
        if other.startswith("common.exporting") and not name.startswith("common.exporting")
    }
    file, engines = "common.exporting.gguf_file", "common.reporting.engines"
    assert used == {
        ("common.quantization", file),
        ("common.gguf_export", file),
        (engines, "common.exporting.settings"),
    }
    assert {file, engines} <= set(_BESIDE_CODES) and "gguf" in WITHOUT_EFFECT


def test_the_batch_passes_it_on_to_methods_that_take_it(capsys):
    assert share_out(["--gguf"], {"gptq", "smoothquant"}) == {"gptq": ["--gguf"], "smoothquant": []}
    assert "left out" in capsys.readouterr().out

"""Checkpoints as GGUF files, read back by the gguf package: tensors, settings, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ROOT, run_script, tiny_tokenizer
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

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

"""Packed models and the decoder, on CPU through the twins of their kernels, against transformers'
own load and generate.
"""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, FUSED, build_tiny, run_quantize, sampled
from methods import method_options
from transformers import AutoModelForCausalLM, DynamicCache

from common.model.architecture import FAMILIES, let_head_finish_logits
from common.model.fused import fuse_layers
from common.running.decoding import Decoder, can_decode
from common.running.packed import PackedLinear, load_packed
from common.running.runtime import load_model

CPU = torch.device("cpu")
FORMS = method_options(
    iterations=5,
    gptq=["--group-size", "32"],
    hqq=["--bits", "8", "--symmetric"],
    quarot=["--group-size", "32", "--head-bits", "8", "--embedding-bits", "8"],
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 320, (length,), generator=generator).tolist() for length in (5, 12, 1)]


def greedy(model, prompt: list[int], steps: int) -> list[int]:
    """Each token by a whole forward pass."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(steps):
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("architecture", "tied"), FUSED)
def test_decoder_writes_what_forward_passes_do(tiny_models, prompts, architecture, tied):
    model, _ = load_model(tiny_models[architecture, tied], CPU, torch.float32)
    expected = [greedy(model, prompt, 9) for prompt in prompts]
    assert can_decode(model, 32)
    decoder = Decoder(model, 4, 32)
    with torch.inference_mode():
        decoder.start(prompts)
        first = decoder.tokens[:3].tolist()
        written = decoder.run(3).T.tolist()
    assert [[token, *rest] for token, rest in zip(first, written, strict=True)] == expected
    # The model's own forward pass still works: its linears are views now.
    assert greedy(model, prompts[0], 9) == expected[0]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("dynamic", {"factor": 4.0}),
        ("longrope", {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}),
        ("yarn", {"factor": 4.0}),
    ],
)
def test_frequencies_that_follow_from_the_length_of_a_text_are_left_to_transformers(kind, fields):
    """A decoder's table would turn the tokens of short texts as those of its longest."""
    rope = {"rope_type": kind, "rope_theta": 1e4, **fields}
    rope["original_max_position_embeddings"] = 64
    model = build_tiny("llama", True, rope_parameters=rope, max_position_embeddings=64)
    model.config._attn_implementation = "sdpa"
    positions = torch.arange(65).unsqueeze(0)
    whole, part = (
        model.model.rotary_emb(torch.zeros(1), positions[:, :length])[0] for length in (65, 63)
    )
    fixed = torch.equal(whole[:, :63], part)
    assert can_decode(model, 63) and can_decode(model, 65) == fixed == (kind == "yarn")


OTHERS = [pair for pair in ARCHITECTURES if pair not in FUSED]
OPTIONS = [
    ("gptq", "--bits", 4, "--group-size", 32),
    ("smoothquant",),
    ("hqq", "--bits", 8, "--symmetric", "--embedding-bits", 8),
]


@pytest.mark.parametrize(
    ("options", "architecture", "tied"),
    # Each family with two of the three.
    sampled(
        [(options, *one) for options in OPTIONS for one in OTHERS],
        lambda options, *one: (OPTIONS.index(options) + OTHERS.index(one)) % 3 != 1,
    ),
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_other_families_run_packed_through_their_own_layers(
    tiny_models, tmp_path, architecture, tied, options
):
    """Neither decoded through graphs nor fused, and the head gives the same logits as the model."""
    method, *options = options
    output = tmp_path / method
    source = tiny_models[architecture, tied]
    result = run_quantize(method, source, output, *options, text="demo", samples=2)
    assert result.returncode == 0, result.stderr
    plain = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    tokens = torch.randint(2, 320, (2, 60), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        expected = plain(tokens).logits
        for load in (lambda *asked: load_model(*asked)[0], load_packed):
            model = load(output, CPU, torch.float32)
            assert not can_decode(model, 32)
            let_head_finish_logits(model)
            fuse_layers(model)
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
            hidden = model.model(tokens).last_hidden_state
            torch.testing.assert_close(model.lm_head(hidden), expected, rtol=1e-4, atol=1e-4)
    name = f"model.layers.0.{FAMILIES[architecture].linears[0]}"
    assert isinstance(model.get_submodule(name), PackedLinear)


@pytest.mark.parametrize(
    ("method", "architecture"), [*((method, "qwen2") for method in FORMS), ("gptq", "llama")]
)
def test_packed_model_equals_plain_load(tiny_models, tmp_path, prompts, method, architecture):
    output = tmp_path / method
    source = tiny_models[architecture, True]
    result = run_quantize(method, source, output, *FORMS[method], text="demo", samples=2)
    assert result.returncode == 0, result.stderr
    plain, _ = load_model(output, CPU, torch.float32)
    # On dense weights transformers rounds inputs in the linears, which a decoder would not see.
    assert can_decode(plain, 32) == (method != "smoothquant")
    packed = load_packed(output, CPU, torch.float32)
    assert can_decode(packed, 32)
    assert isinstance(packed.model.layers[0].mlp.down_proj, PackedLinear)
    tokens = torch.tensor([prompts[1]])
    with torch.inference_mode():
        torch.testing.assert_close(
            packed(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4
        )
        decoder = Decoder(packed, 1, 32)
        decoder.start([prompts[1]])
        # One row runs through products that take norms, gate and sums with them.
        assert all(layer.one_row for layer in decoder.layers)
        written = [decoder.tokens[0].item(), *decoder.run(1)[:, 0].tolist()]
        torch.testing.assert_close(
            packed(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4
        )
    assert written == greedy(plain, prompts[1], 9)


def test_keep_moves_rows(tiny_models, prompts):
    model, _ = load_model(tiny_models["llama", True], CPU, torch.float32)
    with torch.inference_mode():
        decoder = Decoder(model, 3, 40)
        decoder.start(prompts)
        decoder.run(3)
        decoder.keep([0, 2])
        written = decoder.run(2).T.tolist()
    assert written == [greedy(model, prompts[row], 17)[9:] for row in (0, 2)]


def test_a_prompt_leaves_room_for_a_token(tiny_models):
    """Or the first step would write behind the cache."""
    model, _ = load_model(tiny_models["llama", True], CPU, torch.float32)
    prompt = list(range(5, 21))
    with torch.inference_mode():
        prefix = DynamicCache()
        model(torch.tensor([prompt[:4]]), past_key_values=prefix, use_cache=True)
        for length in (15, 16):
            decoder = Decoder(model, 2, length)
            for given in ((prompt, None), (prompt[4:], prefix)):
                with pytest.raises(ValueError, match=f"cache of {length} tokens .* prompt of 16 "):
                    decoder.start([[5], given[0]], given[1])
        decoder = Decoder(model, 2, 17)
        for given in ((prompt, None), (prompt[4:], prefix)):
            decoder.start([given[0]], given[1])
            assert decoder.tokens[0] == greedy(model, prompt, 1)[0]
            assert decoder.run(1)[0] == greedy(model, prompt, 2)[1]

"""On a GPU only: prompts as a decoder reads them, through graphs and without, against transformers'
own forward pass.
"""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from conftest import build_tiny
from kernel_checks import relative
from prompt_models import note_calls, pack_linears, pack_vocabulary, random_prompts
from transformers import DynamicCache

from common.kernels import products_triton
from common.kernels.inference import unpack
from common.running import decoding, prompts
from common.running.decoding import Decoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
# Largest relative difference of logits between the kernels and transformers' forward pass.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.02}
PROMPTS = [(5,), (64,), (65,), (12, 3, 16), (100, 7, 100), (40,) * 40]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def models(architecture: str, form: str, dtype: torch.dtype = torch.bfloat16, **fields):
    """A tiny model and a dense one that computes the same."""
    model = build_tiny(architecture, architecture != "qwen3", **fields).to(dtype)
    model = model.eval().requires_grad_(False)
    if form == "dense":
        plain = copy.deepcopy(model)
    else:
        plain = pack_linears(model, form)
    return model.to(CUDA), plain.to(CUDA)


class Reference:
    """transformers' forward pass over each prompt alone, in a model's type and in float32."""

    def __init__(self, plain, tolerance: float | None = None):
        self.models = plain, copy.deepcopy(plain).float()
        self.tolerance = tolerance or TOLERANCE[plain.dtype]

    def check(self, found: torch.Tensor, asked: list[list[int]]) -> None:
        rounded, exact = (
            torch.cat([model(torch.tensor([prompt]).cuda()).logits[:, -1] for prompt in asked])
            for model in self.models
        )
        # Few logits: where the type itself is further off, as far as that.
        assert relative(found, exact) < max(self.tolerance, 1.5 * relative(rounded, exact))


@pytest.mark.parametrize("form", ["dense", "W4A16", "W4A16 g32", "W8A16", "W8A8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_prompts_read_through_graphs(architecture, form):
    """The first time without a graph; then the same to the last bit, whatever was read meanwhile.
    Near what transformers' forward pass gives for each prompt alone.
    """
    model, plain = models(architecture, form)
    # Rounded activations make small differences large where a value lies between two codes.
    reference = Reference(plain, 0.06 if form == "W8A8" else None)
    decoder = Decoder(model, 40, 256)
    for number, lengths in enumerate(PROMPTS):
        asked, other = (random_prompts(*lengths, seed=2 * number + one) for one in range(2))
        rows, longest = len(asked), max(lengths)
        first = decoder.start(asked)
        cache, written = decoder.cache.clone(), decoder.run(rows).clone()
        assert not decoder.reader.has_graph(rows, longest)
        between = decoder.start(other)
        assert decoder.reader.has_graph(rows, longest) and not torch.equal(between, first)
        decoder.run(rows)
        assert torch.equal(decoder.start(asked), first)
        for row, length in enumerate(lengths):
            place = (slice(None), slice(None), row, slice(None), slice(length))
            assert torch.equal(decoder.cache[place], cache[place])
        assert torch.equal(decoder.run(rows), written)
        # A single prompt's logits are few: chance decides how far off they are.
        more = [random_prompts(*lengths, seed=100 + one) for one in range(7 if rows == 1 else 0)]
        read = [first, *(decoder.start(one).clone() for one in more)]
        reference.check(torch.cat(read), sum(more, asked))
    captured = [graph for graph, _ in decoder.reader._graphs.values()]
    assert len(captured) == len(PROMPTS)
    pools = {graph.pool() for graph in (*captured, *decoder._graphs.values())}
    assert pools == {decoder._pool.handle}


@pytest.mark.parametrize("form", ["W4A16", "W8A16"])
@pytest.mark.parametrize("rows", [2, 8, 35])
def test_steps_of_several_rows_on_bytes(monkeypatch, form, rows):
    """What each step makes most likely after what was written so far; attention rounds for the
    product after it, as a key's heads have whole blocks of channels.
    """
    model, plain = models("llama", form, torch.float16, head_dim=32)
    asked = random_prompts(*[3 + row % 9 for row in range(rows)])
    given = []
    note_calls(monkeypatch, products_triton, "bytes_matmul", given)
    check_steps(Decoder(model, rows, 64), plain, asked, 0.02)
    assert given


# The demo model's.
WIDTHS = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


@pytest.mark.parametrize("form", ["W4A16", "W4A16 g32", "W8A16", "W8A8"])
@pytest.mark.parametrize("rows", [64, 100, 128])
def test_steps_of_many_rows_of_a_real_models_widths(form, rows):
    """Where programs of a product add up several blocks of channels, which tiny models' do not."""
    model, plain = models("llama", form, torch.float16, layers=4, **WIDTHS)
    asked = random_prompts(*[3 + row % 9 for row in range(rows)])
    check_steps(Decoder(model, rows, 128), plain, asked, 0.4 if form == "W8A8" else 0.02, 10)


def check_steps(decoder, plain, asked: list[list[int]], allowed: float, rounds: int = 1) -> None:
    """That all tokens which a decoder writes are the most likely ones, or as likely up to a share
    of the largest logit.
    """
    rows, exact = len(asked), copy.deepcopy(plain).float()
    decoder.start(asked)
    first = decoder.tokens[:rows, None].clone()
    written = torch.cat([first, *[decoder.run(rows).T.clone() for _ in range(rounds)]], dim=1)
    assert (written >= 0).all()  # the logits were finite
    for prompt, tokens in zip(asked, written.tolist(), strict=True):
        logits = exact(torch.tensor([[*prompt, *tokens]], device=CUDA)).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        found = logits.gather(1, torch.tensor(tokens, device=CUDA)[:, None])[:, 0]
        assert (logits.amax(1) - found <= allowed * logits.abs().amax(1)).all()


@pytest.mark.parametrize(
    ("form", "dtype", "biases", "head"),
    [
        ("dense", torch.float16, False, False),
        ("dense", torch.float32, False, False),
        ("W4A16", torch.float16, False, True),
        ("W4A16", torch.float32, False, False),
        ("dense", torch.bfloat16, True, False),
        ("W4A16", torch.bfloat16, True, True),
    ],
)
def test_types_biases_and_a_packed_head(form, dtype, biases, head):
    """Biases of all linears; a head of 8 bits, for as many rows as it is unpacked for, too."""
    model, plain = models("llama", form, dtype, attention_bias=biases, mlp_bias=biases)
    if head:
        plain.lm_head.weight.copy_(unpack(pack_vocabulary(model).codes, torch.float32))
    reference, decoder = Reference(plain), Decoder(model, 70, 256)
    for lengths in ((5,), (90,), (12, 3, 16), (9,) * 70):
        asked = random_prompts(*lengths)
        first = decoder.start(asked)
        reference.check(first, asked)
        for _ in range(2):
            assert torch.equal(decoder.start(asked), first)
        assert decoder.reader.has_graph(len(asked), max(lengths))


@pytest.mark.parametrize(
    ("architecture", "form", "dtype"),
    [
        ("llama", "dense", torch.bfloat16),
        ("llama", "W4A16", torch.bfloat16),
        ("qwen3", "W4A16", torch.bfloat16),
        ("qwen3", "dense", torch.float16),
        ("llama", "dense", torch.float32),
    ],
)
def test_prompts_that_follow_a_prefix(monkeypatch, architecture, form, dtype):
    """And the tokens that are written then, which are those after the whole prompts."""
    model, plain = models(architecture, form, dtype)
    reference, decoder = Reference(plain), Decoder(model, 5, 256)
    monkeypatch.setattr(decoding, "cache_after", None)  # not by transformers
    for length, lengths in ((7, (5, 12, 1, 20)), (100, (90, 3)), (64, (1,))):
        (begin,) = random_prompts(length, seed=length)
        prefix = DynamicCache()
        plain(torch.tensor([begin]).cuda(), past_key_values=prefix, use_cache=True)
        rest = random_prompts(*lengths)
        asked, rows = [begin + one for one in rest], len(rest)
        for _ in range(2):
            reference.check(decoder.start(rest, prefix), asked)
            assert decoder.positions[:rows].tolist() == [len(one) for one in asked]
        follows = decoder.tokens[:rows].clone()
        written = [decoder.run(rows).T.clone(), decoder.run(rows).T.clone()]
        whole = [
            [*prompt, *new]
            for prompt, new in zip(
                asked, torch.cat([follows[:, None], *written], 1).tolist(), strict=True
            )
        ]
        # What was written has nearly the largest logit.
        for row, text in enumerate(whole):
            logits = plain(torch.tensor([text]).cuda()).logits[0, len(asked[row]) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(text[len(asked[row]) :]).cuda()[:, None])
            lacking = logits.amax(1) - chosen.squeeze(1)
            assert (lacking <= 0.05 * logits.std()).float().mean() > 0.9


@pytest.mark.parametrize("form", ["dense", "W4A16"])
def test_two_decoders_of_one_model(form):
    """Alive at once, each with a pool of its own; one goes on when the other is gone."""
    model, plain = models("qwen2", form)
    reference = Reference(plain)
    decoders = [Decoder(model, 3, 64), Decoder(model, 2, 128)]
    asked = [random_prompts(9, 14, 3), random_prompts(30, 5)]
    first = []
    for decoder, own in zip(decoders, asked, strict=True):
        logits = decoder.start(own)
        reference.check(logits, own)
        first.append((logits, decoder.run(len(own)).clone()))
    for _ in range(2):
        for decoder, own, (logits, written) in zip(decoders, asked, first, strict=True):
            assert torch.equal(decoder.start(own), logits)
            assert torch.equal(decoder.run(len(own)), written)
    assert decoders[0]._pool.handle != decoders[1]._pool.handle
    del decoder, decoders[0]
    torch.cuda.empty_cache()
    filled = torch.full((1 << 26,), 1e4, device=CUDA)  # where the other's memory was
    assert torch.equal(decoders[0].start(asked[1]), first[1][0])
    assert torch.equal(decoders[0].run(2), first[1][1])
    del filled


def test_a_capture_that_runs_out_of_memory(monkeypatch):
    """Of prompts of more than 16 tokens, with no graph in the pool and with some."""
    model, plain = models("llama", "W4A16")
    reference, decoder = Reference(plain), Decoder(model, 2, 128)
    original, tried = prompts.read_prompts, []

    def limited(model, tables, tokens, *rest):
        found = original(model, tables, tokens, *rest)
        if torch.cuda.is_current_stream_capturing() and tokens.shape[1] > 16:
            tried.append((tokens.shape[1], weakref.ref(found)))
            torch.empty(1 << 50, dtype=torch.int8, device=CUDA)
        return found

    monkeypatch.setattr(prompts, "read_prompts", limited)
    stream, handles, known = torch.cuda.current_stream(), [decoder._pool.handle], []
    for lengths in ((20, 32), (16, 7), (5, 40)):
        asked = random_prompts(*lengths)
        logits = decoder.start(asked)
        reference.check(logits, asked)
        for _ in range(3):
            assert torch.equal(decoder.start(asked), logits)
            assert torch.cuda.current_stream() == stream
            assert not torch.cuda.is_current_stream_capturing()
        assert decoder.reader.has_graph(2, max(lengths)) == (max(lengths) <= 16)
        handles.append(decoder._pool.handle)
        known.append((asked, logits, decoder.run(2).clone()))
    assert [length for length, _ in tried] == [32, 48]
    assert not any(left() is not None for _, left in tried)
    assert handles[0] != handles[1] == handles[2] == handles[3]
    for asked, logits, written in known:
        assert torch.equal(decoder.start(asked), logits)
        assert torch.equal(decoder.run(2), written)


@pytest.mark.parametrize("form", ["dense", "W4A16"])
def test_memory_that_prompts_and_graphs_take(form):
    """What is counted before is no less than what is taken, and of what a pool keeps after as much
    lies idle as torch says.
    """
    model, _ = models("llama", form, vocab_size=4096, hidden_size=256, intermediate_size=1024)
    if form == "W4A16":
        pack_vocabulary(model)
    decoder = Decoder(model, 80, 256)
    for rows, length in ((1, 64), (2, 192), (80, 16)):
        asked, tokens = [[7] * length] * rows, torch.full((rows, length), 7, device=CUDA)
        decoder.start(asked)  # compiles
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        decoder.reader._read(tokens)
        taken = torch.cuda.max_memory_allocated() - before
        assert 0 < taken <= decoder.reader.bytes_to_read(rows, length)
        decoder.start(asked)
        decoder.run(rows)
        assert decoder.reader.has_graph(rows, length)
        segments = [
            segment
            for segment in torch.cuda.memory_snapshot()
            if segment["segment_pool_id"] == decoder._pool.handle
        ]
        idle = sum(segment["total_size"] - segment["allocated_size"] for segment in segments)
        assert decoder._pool.idle == idle > 0


def test_prompts_of_many_tokens_in_parts_and_without_room(monkeypatch):
    """None of these has a graph; all give the same."""
    model = build_tiny("llama", True).eval().requires_grad_(False).to(CUDA)
    few, many = random_prompts(9, 4, 7), random_prompts(*range(181, 201))
    expected = [Decoder(model, 20, 256).start(asked) for asked in (few, many)]
    decoder = Decoder(model, 20, 256)
    monkeypatch.setattr(prompts, "available", lambda _: 0)
    for _ in range(3):
        assert torch.equal(decoder.start(few), expected[0])
    assert torch.equal(decoder.start(many), expected[1])
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 3 * 200)
    assert relative(decoder.start(many), expected[1]) < 0.02
    assert not any(decoder.reader._graphs.values())

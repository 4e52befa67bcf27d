"""Prompts as a GPU reads them, here through the twins of the kernels, against transformers' own
forward pass over each prompt alone.
"""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import FUSED, build_tiny
from prompt_models import (
    HAS_ROOM,
    as_on_a_gpu,  # noqa: F401 (a fixture)
    check,
    errors,
    pack_linears,
    pack_vocabulary,
    random_prompts,
    tiny_model,
)
from transformers import DynamicCache

from common.kernels import inference
from common.kernels.inference import unpack
from common.running import decoding, prompts
from common.running.decoding import Decoder
from common.running.prompts import PromptReader

LENGTHS = 5, 12, 1, 20


@pytest.mark.parametrize("form", ["dense", "W4A16", "W8A16"])
@pytest.mark.parametrize(("architecture", "tied"), FUSED)
def test_logits_and_cache_are_those_of_transformers(architecture, tied, form):
    model = tiny_model(architecture, tied)
    plain = copy.deepcopy(model) if form == "dense" else pack_linears(model, form)
    decoder = Decoder(model, 5, 64)
    check(decoder, plain, random_prompts(*LENGTHS), 1e-5)


@pytest.mark.parametrize(("architecture", "tied"), FUSED)
def test_rounded_activations(architecture, tied):
    """Where an activation lies halfway between two codes, the order of a sum decides which it
    becomes, and a code more moves what follows by up to a hundredth. That happens in one of eight
    prompts in float32 and in one of two hundred in float64, whose norms are float32 still.
    """
    model = tiny_model(architecture, tied).double()
    plain = pack_linears(model, "W8A8")
    decoder = Decoder(model, 5, 64)
    found = []
    for seed in range(10):
        found += errors(decoder, plain, random_prompts(*LENGTHS, seed=seed))
    assert sorted(found)[-4] < 1e-6 and max(found) < 0.05, found


def test_biases_of_all_linears():
    model = build_tiny("llama", False, attention_bias=True, mlp_bias=True).float().eval()
    check(Decoder(model, 2, 64), copy.deepcopy(model), random_prompts(9, 3), 1e-5)


def test_packed_embedding_and_head():
    model = tiny_model("llama", True)
    plain = copy.deepcopy(model)
    rows = pack_vocabulary(model)
    plain.lm_head.weight.copy_(unpack(rows.codes, torch.float32))
    check(Decoder(model, 2, 64), plain, random_prompts(9, 3), 1e-5)


def test_what_was_read_before_is_not_seen():
    """A shorter prompt in the rows of a longer one, and the tokens that are written after it."""
    model = tiny_model("llama", True)
    plain = copy.deepcopy(model)
    decoder = Decoder(model, 4, 64)
    for asked in (random_prompts(*LENGTHS), random_prompts(3, 7, seed=4)):
        check(decoder, plain, asked, 1e-5)
        first = decoder.tokens[: len(asked)].tolist()
        written = decoder.run(len(asked)).T.tolist()
        for prompt, token, rest in zip(asked, first, written, strict=True):
            whole = torch.tensor([prompt + [token, *rest]])
            likeliest = plain(whole).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            assert likeliest == [token, *rest]


def test_parts_of_the_prompts_go_to_their_rows(monkeypatch):
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 2 * max(LENGTHS))
    read, original = [], PromptReader.read
    monkeypatch.setattr(
        PromptReader,
        "read",
        lambda self, part, first, prefix: (
            read.append((len(part), first)) or original(self, part, first, prefix)
        ),
    )
    model = tiny_model("qwen3", False)
    check(Decoder(model, 5, 64), copy.deepcopy(model), random_prompts(*LENGTHS, 2), 1e-5)
    assert read == [(2, 0), (2, 2), (1, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter shares keys
@pytest.mark.parametrize("form", ["dense", "W4A16"])
@pytest.mark.parametrize(("architecture", "tied"), FUSED)
def test_prompts_that_follow_a_prefix(monkeypatch, architecture, tied, form, dtype):
    """In two parts, before and after prompts without one; a second prefix is not the first."""
    monkeypatch.setattr(decoding, "PROMPT_TOKENS", 2 * max(LENGTHS))
    monkeypatch.setattr(decoding, "cache_after", None)  # not by transformers
    model = tiny_model(architecture, tied).to(dtype)
    plain = copy.deepcopy(model) if form == "dense" else pack_linears(model, form)
    decoder, bound = Decoder(model, 5, 64), 1e-5 if dtype == torch.float32 else 0.03
    for number, length in enumerate((7, 0, 31)):
        (begin,), prefix = random_prompts(length, seed=number), None
        if begin:
            prefix = DynamicCache()
            plain(torch.tensor([begin]), past_key_values=prefix, use_cache=True)
        check(decoder, plain, [begin + rest for rest in random_prompts(*LENGTHS)], bound, prefix)
        assert prefix is None or prefix.get_seq_length() == length


def test_lengths_that_prompts_are_padded_to(monkeypatch):
    model = tiny_model("llama", True)
    seen, original = [], prompts.read_prompts
    monkeypatch.setattr(
        prompts,
        "read_prompts",
        lambda model, tables, tokens, *rest: (
            seen.append(tuple(tokens.shape)) or original(model, tables, tokens, *rest)
        ),
    )
    decoder = Decoder(model, 40, 200)
    lengths = [(1,), (16,), (17, 3), (97, 128), (129,), (193, 1), (60,) * 40]
    for one in lengths:
        decoder.start(random_prompts(*one))
    # No longer than the cache, and as they are where there are too many for a graph.
    assert seen == [(1, 16), (1, 16), (2, 32), (2, 128), (1, 192), (2, 200), (40, 60)]


@pytest.mark.parametrize("most", [inference.UNPACKED_ELEMENTS, 128 * 64])
@pytest.mark.parametrize(
    ("form", "rows", "length", "inside"),
    [
        ("dense", 5, 16, "nothing"),
        ("W4A16", 4, 16, "sums"),  # so few are unpacked inside the product
        ("W4A16", 5, 16, "weights"),
        ("W8A16", 1, 96, "weights"),
        ("packed head", 70, 16, "weights"),
    ],
)
def test_memory_of_a_graph(monkeypatch, form, rows, length, inside, most):
    """Against what is unpacked and put out as prompts are read."""
    monkeypatch.setattr(inference, "UNPACKED_ELEMENTS", most)
    model = tiny_model("llama", True)
    if form == "packed head":
        pack_vocabulary(model)
    elif form != "dense":
        pack_linears(model, form)
    decoder = Decoder(model, rows, 100)
    sizes, original = [0], inference.unpack

    def unpacking(*asked):
        found = original(*asked)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(inference, "unpack", unpacking)
    logits = decoder.start([[7] * length] * rows)
    numbers = 3 * logits.numel()
    numbers += {
        "nothing": 0,
        "sums": rows * length * inference.PARTIAL_SUMS,
        "weights": max(sizes),
    }[inside]
    config = model.config
    numbers += rows * length * (8 * config.intermediate_size + 16 * config.hidden_size)
    assert decoder.reader.bytes_to_read(rows, length) == 4 * numbers
    for room, enough in ((8 * numbers, True), (8 * numbers - 1, False)):  # a half of it
        monkeypatch.setattr(prompts, "available", lambda _, room=room: room)
        assert HAS_ROOM(decoder.reader, rows, length) == enough


def test_a_decoder_is_gone_without_a_search_for_garbage():
    """Its graphs and its cache with it."""
    decoder = Decoder(tiny_model("llama", True), 2, 64)
    decoder.start(random_prompts(9, 4))
    decoder.run(2)
    left = weakref.ref(decoder), weakref.ref(decoder.reader)
    gc.disable()
    try:
        del decoder
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


class Recorded:
    """In the place of a captured graph: the same work, done again when it is replayed."""

    def __init__(self, work):
        self.work, self.logits, self.replays = work, work(), 0
        self.logits.zero_()  # a capture computes nothing

    def replay(self):
        self.logits.copy_(self.work())
        self.replays += 1


def test_graphs_are_captured_the_second_time(monkeypatch):
    graphs = []

    def capture(self, tokens):
        graphs.append(Recorded(lambda: self._read(tokens)))
        return graphs[-1], graphs[-1].logits

    monkeypatch.setattr(PromptReader, "_capture", capture)
    monkeypatch.setattr(PromptReader, "_has_room", lambda *_: True)
    model = tiny_model("qwen2", True)
    plain, decoder = copy.deepcopy(model), Decoder(model, 4, 64)
    for times, length in enumerate((9, 14, 3, 16)):
        check(decoder, plain, random_prompts(length, seed=length), 1e-5)
        assert [graph.replays for graph in graphs] == ([times] if times else [])
    # Other rows and other lengths have a graph of their own.
    for asked in (random_prompts(4, 9), random_prompts(8, 2), random_prompts(20)):
        check(decoder, plain, asked, 1e-5)
    assert [graph.replays for graph in graphs] == [3, 1]
    # What was put out before stays as it was.
    logits = decoder.start(random_prompts(7))
    before = logits.clone()
    decoder.start(random_prompts(8))
    assert torch.equal(logits, before)


def test_a_capture_without_memory_is_tried_once(monkeypatch):
    """Prompts of that shape are then read without a graph; other shapes are captured."""
    tried = []

    class Pool:
        def capture(self, work):
            work()  # writes where a graph would, but nothing is put out
            tried.append(work.args[0].shape)
            if len(tried) == 1:
                raise torch.cuda.OutOfMemoryError("no room")
            graph = Recorded(work)
            return graph, graph.logits

    monkeypatch.setattr(PromptReader, "_has_room", lambda *_: True)
    model = tiny_model("llama", True)
    plain, decoder = copy.deepcopy(model), Decoder(model, 4, 64)
    decoder.reader._pool = Pool()
    for lengths in ((20, 9), (30, 17), (18, 32), (12, 3), (4, 16), (5, 6)):
        check(decoder, plain, random_prompts(*lengths, seed=sum(lengths)), 1e-5)
    assert tried == [(2, 32), (2, 16)]
    assert not decoder.reader.has_graph(2, 20) and decoder.reader.has_graph(2, 16)


def test_lengths_that_are_not_padded_keep_no_graph(monkeypatch):
    """Three rows of 641 to 682 tokens would be too many for a graph once padded to 768."""
    decoder = Decoder(tiny_model("llama", True), 3, 700)
    captured = []
    monkeypatch.setattr(
        PromptReader, "_capture", lambda self, tokens: captured.append(tuple(tokens.shape))
    )
    monkeypatch.setattr(PromptReader, "_has_room", lambda *_: True)
    for length in (660, 660, 671, 671):
        decoder.reader.read([[5] * length] * 3, 0)
    assert not captured
    decoder.reader.read([[5] * 20] * 3, 0)
    assert (3, 32) in decoder.reader._graphs


@torch.inference_mode()
def test_steps_without_memory_for_a_graph_run_one_by_one(monkeypatch):
    """As if on a GPU, whose streams and pool are stood in for; nothing of the try is left."""
    model, asked = tiny_model("llama", True), random_prompts(9, 4, 7)
    expected = Decoder(model, 3, 100)
    expected.start(asked)
    decoder, tries = Decoder(model, 3, 100), []
    decoder.start(asked)

    class Pool:
        def capture(self, work):
            work()
            tries.append(work)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for name, stand_in in (
        ("Stream", Mock),
        ("current_stream", Mock),
        ("stream", lambda _: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    decoder.device, decoder._pool = torch.device("cuda"), Pool()
    for _ in range(3):
        assert torch.equal(decoder.run(3), expected.run(3))
    assert len(tries) == 1

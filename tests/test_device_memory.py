"""The limit on a GPU's memory, and what is sized by it; the GPU is played on the CPU."""

import re

import pytest
import torch
from conftest import ROOT, assert_user_error, build_tiny, run_script, tiny_tokenizer
from transformers import LlamaConfig

from common.base import device_memory
from common.base.errors import UserError
from common.checkpoint import tensors
from common.model import memory
from common.model.source import SourceModel
from common.model.tensors import TensorReader
from common.running import decoding, runtime, speed
from common.running.decoding import Decoder, can_decode
from common.solvers import vocabulary
from common.tasks import language_model, perplexity
from common.tasks.language_model import HarnessModel
from common.tasks.original import last_hidden_states, place_head
from common.text.windows import Windows
from common.walk import layers, streams
from common.walk.method import Method

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192),
    "3B": dict(hidden_size=3072, intermediate_size=8192),
    "8B": dict(hidden_size=4096, intermediate_size=14336),
}


class Gpu:
    """What torch says about a GPU of `total` bytes; others and this process hold some of it."""

    def __init__(self, monkeypatch, total: float):
        self.total, self.others, self.reserved, self.allocated, self.fraction = (
            int(total),
            0,
            0,
            0,
            None,
        )
        monkeypatch.setattr(device_memory, "_limits", {})
        for name, answer in (
            ("mem_get_info", lambda _: (self.total - self.others - self.reserved, self.total)),
            ("memory_reserved", lambda _: self.reserved),
            ("memory_allocated", lambda _: self.allocated),
            (
                "set_per_process_memory_fraction",
                lambda fraction, _: setattr(self, "fraction", fraction),
            ),
        ):
            monkeypatch.setattr(torch.cuda, name, answer)


@pytest.fixture
def card(monkeypatch) -> Gpu:
    return Gpu(monkeypatch, 8 * GIB)


def test_a_process_takes_what_is_free_when_it_begins(card):
    card.others = 2 * GIB  # desktop, and this process's context
    device_memory.limit(CARD)
    room = 6 * GIB - device_memory.LIBRARIES
    assert card.fraction == room / card.total and device_memory.available(CARD) == room
    card.reserved, card.allocated = 3 * GIB, 2 * GIB
    assert device_memory.available(CARD) == room - 2 * GIB  # what torch keeps can be used again
    card.others = 4 * GIB
    assert device_memory.available(CARD) == 2 * GIB  # another program has taken the rest
    device_memory.limit(CARD)  # what we hold is ours
    assert card.fraction == (4 * GIB - device_memory.LIBRARIES) / card.total


def test_the_first_question_sets_the_limit(card):
    assert device_memory.available(CARD) == 8 * GIB - device_memory.LIBRARIES and card.fraction < 1


@pytest.mark.parametrize("gib", [2, 6, 7.5])
def test_device_memory_counts_the_context(card, gib):
    device_memory.limit(CARD, gib)
    assert card.fraction * card.total == pytest.approx(
        gib * GIB - device_memory.CONTEXT - device_memory.LIBRARIES
    )
    device_memory.limit(CARD, 100)
    assert card.fraction * card.total == pytest.approx(8 * GIB - device_memory.LIBRARIES)


def test_next_to_nothing_is_refused(card):
    card.others = int(7.5 * GIB)
    for gib in (None, 1):
        with pytest.raises(UserError, match="0.50 GiB of memory free.*--device cpu"):
            device_memory.limit(CARD, gib)


def test_resolve_device_sets_the_limit(card, monkeypatch):
    from common.base import device

    facts = {
        "is_available": True,
        "device_count": 1,
        "get_arch_list": ["sm_80", "sm_90"],
        "get_device_name": "a card",
        "get_device_capability": (8, 9),
    }
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert device.resolve_device("cuda", 6) == CARD and card.fraction * 8 == pytest.approx(5)
    card.fraction = None
    assert (
        device.resolve_device("cpu", 6) == CPU
        and card.fraction is None
        and device_memory.available(CPU) == float("inf")
    )


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "much"])
def test_no_memory_is_a_mistake(tiny, given):
    result = run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--device-memory", given)
    assert_user_error(result, "--device-memory")


@pytest.mark.parametrize(
    ("most", "each", "room", "expected"),
    [
        (128, 1, 128, 128),
        (128, 1, 127, 64),
        (100, 3, 80, 25),
        (7, 10, 5, 1),
        (16, 1, float("inf"), 16),
        (1, 9, 0, 1),
    ],
)
def test_halved_to_fit(most, each, room, expected):
    assert device_memory.halved_to_fit(most, each, room) == expected


@pytest.mark.parametrize(
    ("shape", "gib"), [("1B", 6), ("3B", 8), ("8B", 12), ("8B", 140), ("8B", 3)]
)
def test_tokens_at_once_fit(monkeypatch, shape, gib):
    """Where there is room the usual chunks stay as they are: the caps change no result."""
    Gpu(monkeypatch, gib * GIB)
    config = LlamaConfig(**SHAPES[shape])
    chunk = memory.tokens_at_once(streams.CHUNK_TOKENS["cuda"], config, 2, CARD)
    assert (
        chunk == streams.CHUNK_TOKENS["cuda"]
        if gib > 3
        else 1024 <= chunk < streams.CHUNK_TOKENS["cuda"]
    )
    # Gate, up, their product and the residual stream: what a layer holds at the very least.
    least = (3 * config.intermediate_size + 2 * config.hidden_size) * 2
    assert chunk * least < 0.5 * gib * GIB
    size = memory.logits_at_once(1024, 128256, CARD)
    assert size * 128256 * (2 + 4 + 4) < 0.25 * gib * GIB


def test_nobody_asks_the_card_itself_and_nothing_is_pinned():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")]:
        found = set(
            re.findall(r"mem_get_info|pin_memory|non_blocking|total_memory", file.read_text())
        )
        allowed = {"device_memory.py": {"mem_get_info"}, "metadata.py": {"total_memory"}}
        assert found <= allowed.get(file.name, set()), file


# --- what is sized by it


def test_both_streams_are_kept_on_one_side_and_cut_alike(card, tiny, monkeypatch):
    third = device_memory.available(CARD) / 3
    assert (
        streams.home_of(int(third) - 1, CARD) == CARD
        and streams.home_of(int(third) + 1, CARD) == CPU
    )
    sizes, answers = [], iter([64, 32, 16, 8])
    monkeypatch.setattr(layers, "home_of", lambda size, device: sizes.append(size) or device)
    monkeypatch.setattr(memory, "tokens_at_once", lambda *_: next(answers))
    source = SourceModel(str(tiny), CPU, torch.float32)
    method = Method("gptq", lambda layer: {}, catch_up=0.5)
    begun = layers._start(
        source,
        method,
        torch.ones(8, 16, dtype=torch.long),
        torch.ones(1, 4, dtype=torch.long),
        lambda: None,
    )
    assert sizes == [2 * 8 * 16 * 64 * 4] and [len(chunk) for chunk in begun.hidden] == [4, 4]
    assert all(one is other for one, other in zip(begun.hidden, begun.originals, strict=True))


def test_choices_and_perplexity_in_slices(tiny, monkeypatch):
    model = build_tiny("llama", tied=True).float().eval()
    harness = HarnessModel(model, tiny_tokenizer())
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 320, (length,), generator=generator).tolist()

    requests = [
        (("", ""), context, ids(length)) for context in map(ids, (9, 4, 20)) for length in (1, 5, 3)
    ]
    windows = Windows(torch.tensor([ids(30), ids(30)]), "made up", None)
    original = SourceModel(str(tiny), CPU, torch.float32)
    references = last_hidden_states(original, windows.tokens)
    whole = (
        harness._loglikelihood_tokens(requests),
        perplexity.perplexity(model, windows, original, references),
    )
    asked = []
    for module in (language_model, perplexity):
        monkeypatch.setattr(module, "logits_at_once", lambda *question: asked.append(question) or 4)
    monkeypatch.setattr(language_model, "tokens_at_once", lambda *_: 40)
    cut = (
        harness._loglikelihood_tokens(requests),
        perplexity.perplexity(model, windows, original, references),
    )
    assert asked[0] == (256, 320, CPU)
    for (one, greedy), (other, same) in zip(whole[0], cut[0], strict=True):
        assert one == pytest.approx(other, abs=1e-4) and greedy == same
    for one, other in zip(whole[1][1], cut[1][1], strict=True):
        assert (
            one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            and len(one["kl"]) == len(other["kl"]) == 29
        )


def test_prompts_are_read_in_parts_that_fit(monkeypatch):
    model = build_tiny("llama", tied=True).float().eval()
    generator = torch.Generator().manual_seed(6)
    prompts = [
        torch.randint(2, 320, (length,), generator=generator).tolist() for length in (9, 4, 7, 1, 3)
    ]
    asked, original = [], Decoder._read
    monkeypatch.setattr(
        Decoder,
        "_read",
        lambda self, part, *rest: asked.append(len(part)) or original(self, part, *rest),
    )
    with torch.inference_mode():
        whole = Decoder(model, 8, 64).start(prompts)
        token = memory.token_bytes(model.config, 4)
        monkeypatch.setattr(decoding, "available", lambda _: 2.5 * 9 * token / memory.TOKENS_SHARE)
        parts = Decoder(model, 8, 64).start(prompts)
    assert asked[0] == 5 and set(asked[1:]) <= {1, 2} and sum(asked[1:]) == 5
    torch.testing.assert_close(parts, whole)


def test_rows_of_the_cache_fit(monkeypatch):
    harness = HarnessModel(build_tiny("llama", tied=True).float().eval(), tiny_tokenizer())
    row = 2 * 2 * 2 * 16 * 100 * 4  # layers, keys and values, heads, size, length
    monkeypatch.setattr(language_model, "available", lambda _: 9 * row / language_model.CACHE_SHARE)
    assert harness._rows_that_fit(100) == 8
    monkeypatch.setattr(language_model, "available", lambda _: 0)
    assert harness._rows_that_fit(100) == 1


def test_embedding_in_parts(tiny, tmp_path, monkeypatch):
    for rows in (10**6, 100):
        monkeypatch.setattr(vocabulary, "ROWS_AT_ONCE", rows)
        monkeypatch.setattr(tensors, "_ROWS_AT_ONCE", rows)
        result = run_script(
            ROOT / "quantize_hqq.py",
            "--model",
            tiny,
            "--output",
            tmp_path / str(rows),
            "--embedding-bits",
            8,
        )
        assert result.returncode == 0, result.stderr
    whole, parts = (TensorReader(tmp_path / str(rows)) for rows in (10**6, 100))
    assert set(whole) == set(parts) and all(
        torch.equal(whole.read(name), parts.read(name)) for name in whole
    )


# --- models that the GPU has no room for


def test_a_model_without_room_is_read_layer_by_layer(deep, monkeypatch, capsys):
    plain, _ = runtime.load_model(deep, CPU, torch.float32)
    size = sum(parameter.numel() for parameter in plain.model.layers[0].parameters()) * 4
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(2))
    for extra, resident in ((3.5, 2), (0, 0), (100, 7)):
        monkeypatch.setattr(
            runtime,
            "available",
            lambda _, extra=extra: memory.working_bytes(plain, 4) + extra * size,
        )
        model, _ = runtime.load_streamed(deep, CPU, torch.float32)
        here = [not next(layer.parameters()).is_meta for layer in model.model.layers]
        assert here == [True] * resident + [False] * (8 - resident)
        assert f"{8 - resident} of 8 layers" in capsys.readouterr().out
        with torch.inference_mode():
            for _ in range(2):
                torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
        assert [not next(layer.parameters()).is_meta for layer in model.model.layers] == here
        assert (
            not can_decode(model, 30)
            and can_decode(plain, 30)
            and runtime.kernels_of(model) == "streamed"
        )
        assert speed.weight_bytes(model) < speed.weight_bytes(plain)
    answer = HarnessModel(model, tiny_tokenizer())._generate([[5, 6, 7]], 0, None, [], 6)
    assert answer == HarnessModel(plain, tiny_tokenizer())._generate([[5, 6, 7]], 0, None, [], 6)


def test_who_has_room_is_asked_before_loading(tiny, deep, monkeypatch, capsys):
    loaded = []
    for name in ("load_streamed", "load_packed", "load_model"):
        monkeypatch.setattr(
            runtime,
            name,
            lambda *_, name=name: loaded.append(name) or (build_tiny("llama", True), None),
        )
    monkeypatch.setattr(runtime, "triton_works", lambda: False)
    needed = runtime.dense_bytes(deep, torch.bfloat16, working=True)
    assert (
        needed
        > runtime.dense_bytes(deep, torch.bfloat16)
        == sum(p.numel() for p in build_tiny("llama", True, layers=8).parameters()) * 2
    )
    for room in (needed, needed - 1):
        monkeypatch.setattr(runtime, "available", lambda _, room=room: room)
        runtime.load_for_running(deep, CARD, torch.bfloat16)
    assert loaded == ["load_model", "load_streamed"]
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "available", lambda _: GIB // 4)
    model, _ = runtime.load_model(tiny, CARD, torch.bfloat16)
    assert (
        next(model.parameters()).device == CPU and "it runs on the CPU" in capsys.readouterr().out
    )


def test_an_equal_head_is_shared(tiny, tiny_models):
    source = SourceModel(str(tiny), CPU, torch.float32)
    model, _ = runtime.load_model(tiny, CPU, torch.float32)
    place_head(source, model)
    assert source.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    other, _ = runtime.load_model(tiny_models["llama", False], CPU, torch.float32)
    place_head(source, other)
    assert source.model.lm_head.weight.data_ptr() != other.lm_head.weight.data_ptr()

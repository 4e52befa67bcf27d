"""Batched scoring and generation with shared prefixes against one sequence at a time."""

import itertools

import pytest
import torch
from conftest import WORDS, build_tiny, sampled, tiny_tokenizer

from common.base.errors import UserError
from common.model.architecture import let_head_finish_logits
from common.running.decoding import STEPS_AT_ONCE, Decoder
from common.running.runtime import load_model
from common.tasks.language_model import HarnessModel

FAMILIES = ["llama", "qwen3", "gemma3_text", "granite", "phi3", "smollm3"]


@pytest.fixture(scope="module", params=FAMILIES)
def harness(request):
    model = build_tiny(request.param, tied=False).float().eval()
    let_head_finish_logits(model)
    model.generation_config.eos_token_id = 1
    return HarnessModel(model, tiny_tokenizer())


def prompts(count, seed=0):
    import random

    rng = random.Random(seed)
    return [
        "the river runs past a town. " + " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        for _ in range(count)
    ]


def test_choices_side_by_side_score_as_if_alone(harness):
    requests = [
        ((p, c), harness.tok_encode(p), harness.tok_encode(" " + c))
        for p in prompts(9)
        for c in ("water", "seven boats", "build", "when water is high")
    ]
    found = harness._loglikelihood_tokens(requests)
    for (_, context, choice), (score, greedy) in zip(requests, found, strict=True):
        with torch.no_grad():
            logits = harness.model(torch.tensor([context + choice])).logits[0].double()
        scores = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
        assert score == pytest.approx(
            scores.gather(1, torch.tensor(choice).unsqueeze(1)).sum().item(), abs=1e-3
        )
        assert greedy == (scores.argmax(-1).tolist() == choice)


class Request:
    def __init__(self, *args):
        self.args = args


UNTIL = [[], ["b"], ["e ", "t"]]


@pytest.mark.parametrize(
    ("harness", "until"),
    # Each family with one way to stop.
    sampled(
        itertools.product(FAMILIES, UNTIL),
        lambda family, until: (FAMILIES.index(family) + UNTIL.index(until)) % 3 == 0,
    ),
    indirect=["harness"],
)
def test_generation_equals_greedy_generation_alone(harness, until):
    texts = prompts(7, seed=3)
    harness.batch_size = 3
    found = harness.generate_until(
        [Request(text, {"until": until, "max_gen_toks": 12}) for text in texts]
    )
    for text, answer in zip(texts, found, strict=True):
        ids = torch.tensor([harness.tok_encode(text)])
        with torch.no_grad():
            output = harness.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
        expected = harness.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        for stop in until:
            expected = expected.split(stop)[0]
        assert answer == expected


def test_decoding_in_rounds_gives_the_same_answers(tiny_models):
    """What runs on a GPU, on the CPU: several steps at once, rows that end leave, a shared
    prefix."""
    model, tokenizer = load_model(tiny_models["llama", True], torch.device("cpu"), torch.float32)
    harness = HarnessModel(model, tokenizer)
    generator = torch.Generator().manual_seed(9)
    prefix = torch.randint(2, 320, (6,), generator=generator).tolist()
    prompts = [
        torch.randint(2, 320, (length,), generator=generator).tolist() for length in (9, 4, 7, 1, 3)
    ]
    with torch.inference_mode():
        shared = harness._prefix_cache(prefix)
        for until, most in (([], 20), (["e"], 20), ([" the", "\n"], 3)):
            expected = harness._generate(prompts, len(prefix), shared, until, most)
            decoder = Decoder(model, 8, len(prefix) + 9 + 20 + STEPS_AT_ONCE)
            assert harness._decode(decoder, prompts, shared, until, most) == expected
            assert harness._decode(decoder, prompts[2:], shared, until, most) == expected[2:]


@pytest.mark.parametrize("at_once", [True, False])
def test_answers_that_overflow_are_one_line(tiny_models, at_once):
    """From the prompt's end on, or from the first token of the answer."""
    model, tokenizer = load_model(tiny_models["llama", False], torch.device("cpu"), torch.float32)
    harness, asked = HarnessModel(model, tokenizer), [[5, 6, 7], [8, 9]]
    decoder = Decoder(model, 2, 40)
    with torch.inference_mode():
        decoder.start(asked)
        broken = model.model.norm if at_once else model.model.embed_tokens
        broken.weight.data[... if at_once else decoder.tokens] = torch.inf
        most = 1 if at_once else 12
        for answers in (
            lambda: harness._decode(decoder, asked, None, [], most),
            lambda: harness._generate(asked, 0, None, [], most),
        ):
            with pytest.raises(UserError, match="answers: .* overflow in float32; check the"):
                answers()

"""How a loaded model runs: latency and tokens per second of single answers, and the memory they
take.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.base import host_memory
from common.base.progress import track
from common.running.decoding import STEPS_AT_ONCE, Decoder, decodes_faster
from common.running.runtime import kernels_of

PROMPT_TOKENS, NEW_TOKENS = 64, 32


REPEATS = {"cpu": 3, "cuda": 10}


# Tokens of context that `measure_memory` lets the model hold.
CONTEXT_TOKENS = 2048


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they lie in memory, shared ones once."""
    storages = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for tensor in [*model.parameters(), *model.buffers()]
        if not tensor.is_meta
    }
    return sum(storages.values())


@torch.inference_mode()
def measure_speed(model, vocabulary: int, seed: int = 0) -> dict:
    """Time single answers: a prompt of 64 random tokens, 32 new tokens or so, batch 1; medians over
    several runs.

    Returns:
        latency_seconds (whole answer), prefill_seconds, tokens_per_second (of decoding); under
        their names with _low and _high added what the slowest or fastest of several runs took.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=generator)
    fast = decodes_faster(model, PROMPT_TOKENS + 2 * NEW_TOKENS)
    answer = (
        _answer_by_decoder(model, prompt) if fast else _answer_by_forward(model, prompt.to(device))
    )
    # On a GPU a decoder captures its steps in its first answer and the prompt in its second.
    for _ in range(2 if fast and device.type == "cuda" else 1):
        answer()
    repeats = 1 if getattr(model, "streamed", 0) else REPEATS[device.type]
    runs = [answer() for _ in track(range(repeats), "speed", unit="runs")]
    measured = {
        "prefill_seconds": [first for first, _, _ in runs],
        "latency_seconds": [first + rest for first, rest, _ in runs],
        "tokens_per_second": [tokens / rest for _, rest, tokens in runs],
    }
    found = {name: statistics.median(values) for name, values in measured.items()}
    if len(runs) > 1:
        for name, values in measured.items():
            found |= {f"{name}_low": min(values), f"{name}_high": max(values)}
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": runs[0][2] + 1,
        "runs": len(runs),
        "kernels": kernels_of(model) + (", graph" if fast and device.type == "cuda" else ""),
        **found,
    }


@torch.inference_mode()
def measure_memory(
    model, vocabulary: int, context: int = CONTEXT_TOKENS, seed: int = 0
) -> int | None:
    """Bytes that running the model takes: its weights, a cache of 2,048 tokens (or what the model
    can read) and what is worked with while it reads a prompt and writes a few tokens, batch 1. To
    be called while the model is alone on its device.

    On a GPU this is what torch allocates at most. On a CPU it is the weights and by how much the
    process's resident memory grows; None where the system does not tell.
    """
    device, weights = next(model.parameters()).device, weight_bytes(model)
    context = min(context, model.config.max_position_embeddings)
    prompt = torch.randint(
        0, vocabulary, (1, context - STEPS_AT_ONCE), generator=torch.Generator().manual_seed(seed)
    )

    def answer() -> Callable[[], object]:
        if decodes_faster(model, context):
            return _answer_by_decoder(model, prompt, context, 1)
        return _answer_by_forward(model, prompt.to(device), STEPS_AT_ONCE)

    gc.collect()
    if device.type != "cuda":
        grown = host_memory.growth(lambda: answer()())
        return None if grown is None else weights + grown
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    ready = answer()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):  # the second time a prompt is read through a graph, which is captured first
        ready()
    return torch.cuda.max_memory_allocated(device) - before + weights


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _answer_by_forward(
    model, prompt: Tensor, new_tokens: int = NEW_TOKENS
) -> Callable[[], tuple[float, float, int]]:
    """A function that lets the model's own forward pass answer. Returns seconds until the first
    token, seconds of the rest and how many tokens that were.
    """

    def answer() -> tuple[float, float, int]:
        start = _now(prompt.device)
        output = model(prompt, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        middle = _now(prompt.device)
        for _ in range(new_tokens - 1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return middle - start, _now(prompt.device) - middle, new_tokens - 1

    return answer


def _answer_by_decoder(
    model,
    prompt: Tensor,
    length: int = PROMPT_TOKENS + 2 * NEW_TOKENS,
    rounds: int = NEW_TOKENS // STEPS_AT_ONCE,
) -> Callable[[], tuple[float, float, int]]:
    """The same by a `Decoder` for `length` tokens in all."""
    decoder = Decoder(model, 1, length)

    def answer() -> tuple[float, float, int]:
        start = _now(decoder.device)
        decoder.start(prompt.tolist())
        middle = _now(decoder.device)
        for _ in range(rounds):
            decoder.run(1)
        return middle - start, _now(decoder.device) - middle, rounds * STEPS_AT_ONCE

    return answer

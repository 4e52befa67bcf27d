"""Load a checkpoint to run it, and measure how it runs: latency, tokens per second, memory.

On CUDA a checkpoint runs on packed weights where there is a kernel for them (`packed`) and decodes through captured graphs
(`decoding`). On CPU, and where there is none, it runs on plain dense weights: transformers decompresses it at the first forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.decoding import STEPS_AT_ONCE, Decoder, can_decode
from common.errors import UserError
from common.fused import fuse_layers
from common.kernels import triton_works
from common.models import load_tokenizer
from common.online import attach_all, take_from_config
from common.packed import PackedLinear, can_be_packed, load_packed
from common.probe import check_finite, probe_tokens
from common.progress import track
from common.results import read_json

PROMPT_TOKENS, NEW_TOKENS = 64, 32
REPEATS = {"cpu": 3, "cuda": 10}


def load_for_running(folder: Path, device: torch.device, dtype: torch.dtype):
    """Model and tokenizer as `load_model` gives them, but on packed weights where the device has
    kernels for them.

    Raises:
        UserError: as `load_model`; or the model's activations, on a fixed text, overflow in float16.
    """
    model, tokenizer = _load_packed_or_dense(folder, device, dtype)
    if dtype == torch.float16:
        with torch.inference_mode():
            tokens = probe_tokens(tokenizer).to(device)
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        check_finite(hidden, str(folder), dtype)
    return model, tokenizer


def _load_packed_or_dense(folder: Path, device: torch.device, dtype: torch.dtype):
    if device.type != "cuda" or not (folder / "config.json").is_file() or not triton_works():
        return load_model(folder, device, dtype)
    if can_be_packed(read_json(folder / "config.json", "quantize or download it again")):
        model, tokenizer = load_packed(folder, device, dtype), load_tokenizer(folder)
    else:
        model, tokenizer = load_model(folder, device, dtype)
    fuse_layers(model)
    return model, tokenizer


def kernels_of(model) -> str:
    """How the model's matrix products run, in a few words."""
    linear = model.model.layers[0].mlp.down_proj
    if not isinstance(linear, PackedLinear):
        return "dense"
    return f"packed W{linear.codes.bits}A{linear.activation_bits or 16}"


def load_model(folder: Path, device: torch.device, dtype: torch.dtype):
    """Model and tokenizer of a checkpoint or a plain model folder, ready to run (decompressed).

    Raises:
        UserError: the folder holds no model that can be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model: it has no config.json")
    content = read_json(folder / "config.json", "quantize or download it again")
    tokenizer = load_tokenizer(folder)
    try:
        transforms = take_from_config(content)
        config = {} if transforms is None else {"config": AutoConfig.for_model(**content)}
        # No code from the folder is run, and no pickle read.
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, use_safetensors=True,
            trust_remote_code=False, **config)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged configuration can break the library anywhere
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be loaded: {first[:200]}") from None
    # transformers fills what it misses with random numbers and only warns.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(problem):
            raise UserError(f"{folder} does not load as it is: {problem.replace('_', ' ')} "
                            f"{', '.join(map(str, sorted(loading[problem])[:3]))}")
    model.to(device).eval().requires_grad_(False)
    try:
        with torch.inference_mode():                                            # decompresses packed weights
            model(torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # the same
        raise UserError(f"{folder}: its weights cannot be unpacked ({(str(error).splitlines() or [''])[0][:150]})") from None
    if transforms:
        attach_all(model, transforms)
    return model, tokenizer


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they lie in memory, shared ones once."""
    storages = {tensor.data_ptr(): tensor.numel() * tensor.element_size()
                for tensor in [*model.parameters(), *model.buffers()]}
    return sum(storages.values())


@torch.inference_mode()
def measure_speed(model, vocabulary: int, seed: int = 0) -> dict:
    """Time single answers: a prompt of 64 random tokens, 32 new tokens or so, batch 1; medians over several runs.

    Returns:
        latency_seconds (whole answer), prefill_seconds, tokens_per_second (of decoding).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=generator)
    graphs = device.type == "cuda" and can_decode(model, PROMPT_TOKENS + 2 * NEW_TOKENS)
    answer = _answer_by_graph(model, prompt) if graphs else _answer_by_forward(model, prompt.to(device))
    answer()
    runs = [answer() for _ in track(range(REPEATS[device.type]), "speed", unit="runs")]
    prefill = statistics.median(first for first, _, _ in runs)
    decode = statistics.median(rest for _, rest, _ in runs)
    return {"prompt_tokens": PROMPT_TOKENS, "new_tokens": runs[0][2] + 1, "runs": len(runs),
            "kernels": kernels_of(model) + (", graph" if graphs else ""), "prefill_seconds": prefill,
            "latency_seconds": statistics.median(first + rest for first, rest, _ in runs),
            "tokens_per_second": runs[0][2] / decode}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _answer_by_forward(model, prompt: Tensor) -> Callable[[], tuple[float, float, int]]:
    """A function that lets the model's own forward pass answer. Returns seconds until the first token, seconds of the rest
    and how many tokens that were.
    """
    def answer() -> tuple[float, float, int]:
        start = _now(prompt.device)
        output = model(prompt, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        middle = _now(prompt.device)
        for _ in range(NEW_TOKENS - 1):
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return middle - start, _now(prompt.device) - middle, NEW_TOKENS - 1

    return answer


def _answer_by_graph(model, prompt: Tensor) -> Callable[[], tuple[float, float, int]]:
    """The same by a `Decoder`."""
    decoder = Decoder(model, 1, PROMPT_TOKENS + 2 * NEW_TOKENS)
    rounds = NEW_TOKENS // STEPS_AT_ONCE

    def answer() -> tuple[float, float, int]:
        start = _now(decoder.device)
        decoder.start(prompt.tolist())
        middle = _now(decoder.device)
        for _ in range(rounds):
            decoder.run(1)
        return middle - start, _now(decoder.device) - middle, rounds * STEPS_AT_ONCE

    return answer

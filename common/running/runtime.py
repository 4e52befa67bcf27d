"""Load a checkpoint to run it, and measure how it runs: latency, tokens per second, memory.

On CUDA a checkpoint runs on packed weights where there is a kernel for them (`packed`) and decodes
through captured graphs (`decoding`). On CPU, and where there is none, it runs on plain dense
weights: transformers decompresses it at the first forward.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from common.base import host_memory
from common.base.device_memory import available, working_bytes
from common.base.errors import UserError
from common.base.progress import say, track
from common.kernels.dispatch import triton_works
from common.model.architecture import FAMILIES, FILLED_BY_CODE, let_head_finish_logits
from common.model.fused import fuse_layers
from common.model.online import attach_all, read_keys, take_from_config
from common.model.source import SourceModel, TensorReader, load_tokenizer, read_config
from common.numerics.grid import float16_holds
from common.running.decoding import STEPS_AT_ONCE, Decoder, can_decode
from common.running.packed import PackedLinear, can_be_packed, load_packed
from common.text.probe import check_finite, probe_tokens

PROMPT_TOKENS, NEW_TOKENS = 64, 32
REPEATS = {"cpu": 3, "cuda": 10}
# Beside unpacked weights: what a short text takes.
DENSE_ROOM = 512 << 20
# Tokens of context that `measure_memory` lets the model hold.
CONTEXT_TOKENS = 2048


def load_for_running(folder: Path, device: torch.device, dtype: torch.dtype):
    """Model and tokenizer as `load_model` gives them, but on packed weights where the device has
    kernels for them.

    Raises:
        UserError: as `load_model`; or the model's activations, on a fixed text, overflow in
            float16.
    """
    model, tokenizer = _load_packed_or_dense(folder, device, dtype)
    if dtype == torch.float16:
        with torch.inference_mode():
            tokens = probe_tokens(tokenizer).to(next(model.parameters()).device)
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        check_finite(hidden, str(folder), dtype)
    return model, tokenizer


def _load_packed_or_dense(folder: Path, device: torch.device, dtype: torch.dtype):
    if device.type != "cuda":
        return load_model(folder, device, dtype)
    content = read_config(folder)
    quantized = "quantization_config" in content
    if (
        content.get("model_type") in FAMILIES
        and not quantized
        and (dense_bytes(folder, dtype, working=True) > available(device))
    ):
        return load_streamed(folder, device, dtype)
    if quantized and triton_works() and can_be_packed(content, TensorReader(folder)):
        model, tokenizer = load_packed(folder, device, dtype), load_tokenizer(folder)
        let_head_finish_logits(model)
    else:
        model, tokenizer = load_model(folder, device, dtype)
    if triton_works() and next(model.parameters()).is_cuda:
        fuse_layers(model)
    return model, tokenizer


def dense_bytes(folder: Path, dtype: torch.dtype, working: bool = False) -> int:
    """Bytes of a checkpoint's or model's weights, unpacked, in `dtype`; with `working` and of what
    it takes to run it well. 0
    where its configuration is not understood: loading it says what is wrong.
    """
    content = read_config(folder)
    try:
        take_from_config(content)
        content.pop("quantization_config", None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), dtype=dtype)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return 0
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return weights + (working_bytes(model, dtype.itemsize) if working else 0)


def load_streamed(folder: Path, device: torch.device, dtype: torch.dtype):
    """Model and tokenizer of a 16-bit model that the device has no room for: the first decoder
    layers stay there, the others are read from the files for every forward pass and forgotten after
    it.
    """
    source = SourceModel(str(folder), device, dtype)
    model, layers = source.model, source.model.model.layers
    size = sum(parameter.numel() for parameter in layers[0].parameters()) * dtype.itemsize
    # One more comes and goes.
    resident = int((available(device) - working_bytes(model, dtype.itemsize)) // size) - 1
    resident = min(max(resident, 0), len(layers) - 1)
    for index, layer in enumerate(layers):
        if index < resident:
            source.load_layer(index)
        else:
            layer.register_forward_pre_hook(partial(_load, source, index))
            layer.register_forward_hook(partial(_release, source, index))
    let_head_finish_logits(model)
    model.streamed = len(layers) - resident
    say(
        f"{folder}: the GPU has no room for its weights, so {model.streamed} of {len(layers)} "
        f"layers are read anew "
        "for every forward pass, which makes answers slow; --tasks arc,perplexity does without "
        "them, --limit asks for fewer"
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, source.tokenizer


def _load(source: SourceModel, index: int, *_: object) -> None:
    source.load_layer(index)


def _release(source: SourceModel, index: int, *_: object) -> None:
    source.release_layer(index)


def kernels_of(model) -> str:
    """How the model's matrix products run, in a few words."""
    if getattr(model, "streamed", 0):
        return "streamed"
    linear = model.model.layers[0].mlp.down_proj
    if not isinstance(linear, PackedLinear):
        return "dense"
    return f"packed W{linear.codes.bits}A{linear.activation_bits or 16}"


def load_model(folder: Path, device: torch.device, dtype: torch.dtype):
    """Model and tokenizer of a checkpoint or a plain model folder, ready to run (decompressed). It
    runs on the CPU, and a line says so, where the device has no room for the weights.

    Raises:
        UserError: the folder holds no model that can be loaded.
    """
    content = read_config(folder)
    tokenizer = load_tokenizer(folder)
    device = _with_room(folder, device, dtype)
    if dtype == torch.float16:
        _check_scales(folder, content)
    try:
        transforms = take_from_config(content)
        config = {}
        if transforms:
            transforms.keys = read_keys(folder)
            config["config"] = AutoConfig.for_model(**content)
        # No code from the folder is run, and no pickle read.
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **config,
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged configuration can break the library anywhere
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be loaded: {first[:200]}") from None
    # transformers fills what it misses with random numbers and only warns.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = map(str, sorted(loading.get(problem) or []))
        names = [name for name in names if name not in FILLED_BY_CODE]
        if names:
            raise UserError(
                f"{folder} does not load as it is: {problem.replace('_', ' ')} "
                f"{', '.join(names[:3])}"
            )
    model.to(device).eval().requires_grad_(False)
    try:
        with torch.inference_mode():  # decompresses packed weights
            model(torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # the same
        raise UserError(
            f"{folder}: its weights cannot be unpacked "
            f"({(str(error).splitlines() or [''])[0][:150]})"
        ) from None
    if transforms:
        attach_all(model, transforms)
    let_head_finish_logits(model)
    return model, tokenizer


def _with_room(folder: Path, device: torch.device, dtype: torch.dtype) -> torch.device:
    """The device, or the CPU where it has no room for the unpacked weights and a little more."""
    if device.type == "cpu":
        return device
    needed, room = dense_bytes(folder, dtype), available(device)
    if needed + DENSE_ROOM <= room:
        return device
    say(
        f"{folder}: unpacked its weights take {needed / 2**30:.1f} GiB, and the GPU has "
        f"{room / 2**30:.1f} left; it runs on "
        "the CPU"
    )
    return torch.device("cpu")


def _check_scales(folder: Path, content: dict) -> None:
    """Refuse to load a checkpoint in float16 that does not hold its scales: transformers rounds
    them to the model's type.
    """
    if "quantization_config" not in content:
        return
    tensors = TensorReader(folder)
    for name in tensors.names():
        if name.endswith(".weight_scale") and not float16_holds(tensors.read(name)):
            raise UserError(
                f"{folder}: float16 does not hold the scales of "
                f"{name.removesuffix('.weight_scale')}; use "
                "--dtype bfloat16 or float32"
            )


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
        latency_seconds (whole answer), prefill_seconds, tokens_per_second (of decoding).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocabulary, (1, PROMPT_TOKENS), generator=generator)
    graphs = device.type == "cuda" and can_decode(model, PROMPT_TOKENS + 2 * NEW_TOKENS)
    answer = (
        _answer_by_graph(model, prompt) if graphs else _answer_by_forward(model, prompt.to(device))
    )
    answer()
    repeats = 1 if getattr(model, "streamed", 0) else REPEATS[device.type]
    runs = [answer() for _ in track(range(repeats), "speed", unit="runs")]
    prefill = statistics.median(first for first, _, _ in runs)
    decode = statistics.median(rest for _, rest, _ in runs)
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": runs[0][2] + 1,
        "runs": len(runs),
        "kernels": kernels_of(model) + (", graph" if graphs else ""),
        "prefill_seconds": prefill,
        "latency_seconds": statistics.median(first + rest for first, rest, _ in runs),
        "tokens_per_second": runs[0][2] / decode,
    }


@torch.inference_mode()
def measure_memory(
    model, vocabulary: int, context: int = CONTEXT_TOKENS, seed: int = 0
) -> int | None:
    """Bytes that running the model takes: its weights, a cache of 2,048 tokens (or what the model
    can read) and what is worked with while it reads a prompt and writes a few tokens, batch 1. To
    be called while the model is alone on its device.

    On a card this is what torch allocates at most. On a CPU it is the weights and by how much the
    process's resident memory grows; None where the system does not tell.
    """
    device, weights = next(model.parameters()).device, weight_bytes(model)
    context = min(context, model.config.max_position_embeddings)
    prompt = torch.randint(
        0, vocabulary, (1, context - STEPS_AT_ONCE), generator=torch.Generator().manual_seed(seed)
    )
    gc.collect()
    if device.type != "cuda":
        grown = host_memory.growth(_answer_by_forward(model, prompt, STEPS_AT_ONCE))
        return None if grown is None else weights + grown
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    if can_decode(model, context):
        answer = _answer_by_graph(model, prompt, context, 1)
    else:
        answer = _answer_by_forward(model, prompt.to(device), STEPS_AT_ONCE)
    torch.cuda.reset_peak_memory_stats(device)
    answer()
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


def _answer_by_graph(
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

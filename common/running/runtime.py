"""Load a checkpoint to run it, and measure how it runs: latency, tokens per second, memory.

On CUDA a checkpoint runs on packed weights where there is a kernel for them (`packed`) and decodes
through captured graphs (`decoding`). On a CPU it runs on packed weights where torch has products
for them (`kernels.processor`). Elsewhere it runs on plain dense weights: transformers decompresses
it at the first forward.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from common.base.device_memory import available
from common.base.errors import UserError, first_line
from common.base.progress import say
from common.checkpoint.foreign import runs_as_is
from common.checkpoint.format import unknown_form
from common.kernels import processor
from common.kernels.dispatch import triton_works
from common.model.architecture import FAMILIES, FILLED_BY_CODE, let_head_finish_logits
from common.model.fused import fuse_layers
from common.model.located import is_gguf
from common.model.memory import working_bytes
from common.model.online import attach_all, read_keys, take_from_config
from common.model.source import SourceModel, load_tokenizer, read_config
from common.model.tensors import TensorReader
from common.numerics.grid import float16_holds
from common.running.packed import (
    PackedLinear,
    can_be_packed,
    is_plain,
    load_packed,
    prepare_for_processor,
)
from common.text.probe import check_finite, probe_tokens

# Beside unpacked weights: what a short text takes, or, if that is more, what compressed-tensors
# takes for each code of a matrix while it unpacks it.
DENSE_ROOM, UNPACKING_BYTES = 512 << 20, 10


def load_for_running(folder: Path, device: torch.device, dtype: torch.dtype, tokenizer=None):
    """Model and tokenizer as `load_model` gives them, but on packed weights where the device has
    kernels for them.

    Raises:
        UserError: as `load_model`; or the model's activations, on a fixed text, overflow in
            float16.
    """
    tokenizer = tokenizer or load_tokenizer(folder)
    model = _load_packed_or_dense(folder, device, dtype, tokenizer)
    if dtype == torch.float16:
        with torch.inference_mode():
            tokens = probe_tokens(tokenizer).to(next(model.parameters()).device)
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        check_finite(hidden, str(folder), dtype)
    return model, tokenizer


def _load_packed_or_dense(folder: Path, device: torch.device, dtype: torch.dtype, tokenizer):
    if is_gguf(folder):
        return load_model(folder, device, dtype, tokenizer)[0]
    if device.type != "cuda":
        return _load_for_processor(folder, device, dtype, tokenizer)
    content = read_config(folder)
    quantized = "quantization_config" in content
    if (
        content.get("model_type") in FAMILIES
        and not quantized
        and (dense_bytes(folder, dtype, working=True) > available(device))
    ):
        return load_streamed(folder, device, dtype, tokenizer)[0]
    if quantized and triton_works() and can_be_packed(content, TensorReader(folder)):
        model = load_packed(folder, device, dtype)
        let_head_finish_logits(model)
    else:
        model = load_model(folder, device, dtype, tokenizer)[0]
    if triton_works() and next(model.parameters()).is_cuda:
        fuse_layers(model)
    return model


def _load_for_processor(folder: Path, device: torch.device, dtype: torch.dtype, tokenizer):
    content = read_config(folder)
    if "quantization_config" in content and processor.is_worth_it(dtype):
        names = TensorReader(folder)
        if can_be_packed(content, names):
            model = load_packed(folder, device, dtype)
            if prepare_for_processor(model):
                let_head_finish_logits(model)
                return model
        if not unknown_form(content, names):
            say(
                f"{folder} runs on dense weights, no smaller and no faster than the 16-bit model: "
                "on this CPU torch has no product of its form (it has 4 and 8 bits, groups of 32 "
                "and more)"
            )
    return load_model(folder, device, dtype, tokenizer)[0]


def dense_bytes(folder: Path, dtype: torch.dtype, working: bool = False) -> int:
    """Bytes of a checkpoint's or model's weights, unpacked, in `dtype`; with `working` and of what
    it takes to run it well. 0 where its configuration is not understood: loading it says what is
    wrong.
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


def load_streamed(folder: Path, device: torch.device, dtype: torch.dtype, tokenizer=None):
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
        "layers are read anew for every forward pass, which makes answers slow; --tasks "
        "arc,perplexity does without them, --limit asks for fewer"
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, tokenizer or source.tokenizer


def _load(source: SourceModel, index: int, *_: object) -> None:
    source.load_layer(index)


def _release(source: SourceModel, index: int, *_: object) -> None:
    source.release_layer(index)


def kernels_of(model) -> str:
    """How the model's matrix products run, in a few words."""
    if getattr(model, "streamed", 0):
        return "streamed"
    linear = model.model.layers[0].mlp.down_proj
    if isinstance(linear, PackedLinear):
        return f"packed W{linear.codes.bits}A{linear.activation_bits or 16}"
    return "dense" if is_plain(linear) else f"library's {type(linear).__name__}"


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, tokenizer=None):
    """Model and tokenizer of a checkpoint, a plain model folder or a GGUF file, ready to run:
    decompressed, but for those that run on another library's modules. It runs on the CPU, and a
    line says so, where the device has no room for the weights.

    Args:
        tokenizer: the model's, where it is there already; else that in the folder.
    Raises:
        UserError: there is no model that can be loaded.
    """
    tokenizer, transforms = tokenizer or load_tokenizer(folder), None
    if is_gguf(folder):
        model = _read(folder.parent, dtype, {"gguf_file": folder.name}, folder).to(device)
    elif runs_as_is(folder):
        model = _read(folder, dtype, {"device_map": {"": device}, "use_safetensors": True}, folder)
    else:
        content = read_config(folder)
        device = _with_room(folder, device, dtype)
        if dtype == torch.float16:
            _check_scales(folder, content)
        transforms = take_from_config(content)
        more: dict = {"use_safetensors": True}
        if transforms:
            transforms.keys = read_keys(folder)
            more["config"] = content
        model = _read(folder, dtype, more, folder).to(device)
    model.eval().requires_grad_(False)
    try:
        with torch.inference_mode():  # decompresses packed weights
            model(torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged checkpoint can break the library anywhere
        raise UserError(f"{folder}: its weights cannot be unpacked ({first_line(error)})") from None
    if transforms:
        attach_all(model, transforms)
    let_head_finish_logits(model)
    return model, tokenizer


def _read(folder: Path, dtype: torch.dtype, more: dict, named: Path):
    """What transformers makes of a folder, all of whose weights have to be there.

    Args:
        more: for its `from_pretrained`; config: as a dictionary.
        named: what an error calls the model.
    """
    try:
        if "config" in more:
            more["config"] = AutoConfig.for_model(**more["config"])
        # No code from the folder is run, and no pickle read.
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            trust_remote_code=False,
            **more,
        )
    except torch.cuda.OutOfMemoryError:
        raise
    # A damaged configuration can break the library anywhere, and auto-round ends the process where
    # it lacks something.
    except (Exception, SystemExit) as error:
        raise UserError(f"{named} cannot be loaded: {first_line(error)}") from None
    # transformers fills what it misses with random numbers and only warns.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = map(str, sorted(loading.get(problem) or []))
        names = [name for name in found if name not in FILLED_BY_CODE]
        if names:
            raise UserError(
                f"{named} does not load as it is: {problem.replace('_', ' ')} "
                f"{', '.join(names[:3])}"
            )
    return model


def _with_room(folder: Path, device: torch.device, dtype: torch.dtype) -> torch.device:
    """The device, or the CPU where it has no room for the unpacked weights and a little more."""
    if device.type == "cpu":
        return device
    needed, room = dense_bytes(folder, dtype), available(device)
    if needed + max(DENSE_ROOM, _unpacking_bytes(folder)) <= room:
        return device
    say(
        f"{folder}: unpacked its weights take {needed / 2**30:.1f} GiB, and the GPU has "
        f"{room / 2**30:.1f} left; it runs on the CPU"
    )
    return torch.device("cpu")


def _unpacking_bytes(folder: Path) -> int:
    """What unpacking the largest packed matrix of a checkpoint takes, which may be its lm_head."""
    tensors = TensorReader(folder)
    shapes = [tensors.read(name).tolist() for name in tensors if name.endswith(".weight_shape")]
    return max((UNPACKING_BYTES * math.prod(shape) for shape in shapes), default=0)


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
                f"{name.removesuffix('.weight_scale')}; use --dtype bfloat16 or float32"
            )

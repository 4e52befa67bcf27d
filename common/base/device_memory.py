"""How much of a GPU's memory this process may take, what of it is left, and how much work fits.

Under WSL the driver moves what a GPU has no room for into host memory, ten times slower, and
raises no error. So a process takes no more than what is free when it first uses the GPU, less what
does not pass through torch's allocator; beyond that torch itself raises the out-of-memory error
that makes chunks smaller. Nothing is kept in pinned host memory, of which WSL has little.
"""

from __future__ import annotations

import math

import torch

from common.base.errors import UserError

# Of a process, outside of torch's allocator: what CUDA takes at once, and the kernels that
# libraries and Triton load when they are first used.
CONTEXT, LIBRARIES = 512 << 20, 512 << 20
# With less the smallest models do not run.
LEAST = 256 << 20
# Share of what is left that one piece of work is sized for: a batch of tokens that passes through a
# layer, or a slice of logits.
TOKENS_SHARE, LOGITS_SHARE = 0.5, 0.25
# Of a position and an entry of the vocabulary: up to four numbers in float32 and two of 16 bits.
LOGIT_BYTES = 20

_limits: dict[int, int] = {}


def allocation(free: int, gib: float | None = None) -> int:
    """Bytes that torch's allocator may take.

    Args:
        free: bytes that are free on the GPU once the process's context is on it.
        gib: GiB that the whole process may take, its context included; None for all that is free.
    Raises:
        UserError: that is next to nothing.
    """
    room = free - LIBRARIES
    if gib is not None:
        room = min(room, int(gib * 2**30) - CONTEXT - LIBRARIES)
    if room < LEAST:
        asked, taken = "", LIBRARIES
        if gib is not None:
            asked, taken = f" and --device-memory allows {gib:g} GiB", CONTEXT + LIBRARIES
        raise UserError(
            f"the GPU has {free / 2**30:.2f} GiB of memory free{asked}, of which CUDA and its "
            f"libraries take {taken / 2**30:.1f}: too little to work with; close other programs on "
            "the GPU, or use --device cpu"
        )
    return room


def limit(device: torch.device, gib: float | None = None) -> None:
    """Let this process take no more of a GPU than is free now, or than `gib` GiB.

    Raises:
        UserError: that is next to nothing.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    room = allocation(free + torch.cuda.memory_reserved(device), gib)
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), _index(device))
    _limits[_index(device)] = room


def available(device: torch.device) -> float:
    """Bytes that this process can still allocate on a device; infinite for a CPU, which has no
    limit here.
    """
    if device.type != "cuda":
        return math.inf
    if _index(device) not in _limits:
        limit(device)
    allocated = torch.cuda.memory_allocated(device)
    # What torch keeps for later is ours; the rest may have been taken by others since.
    kept = torch.cuda.memory_reserved(device) - allocated
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(0, min(_limits[_index(device)] - allocated, free))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def halved_to_fit(most: int, bytes_each: float, room: float) -> int:
    """`most` things of `bytes_each`, halved until they fit into `room` bytes; at least one."""
    while most > 1 and most * bytes_each > room:
        most //= 2
    return most


def token_bytes(config, element: int) -> int:
    """About what a token takes while it passes through a decoder layer, all tensors on the way
    included.

    Args:
        config: the model's configuration; element: bytes of a number.
    """
    return (8 * config.intermediate_size + 16 * config.hidden_size) * element


def cache_bytes(model, element: int) -> int:
    """What a token takes in the key-value cache."""
    config, attention = model.config, model.model.layers[0].self_attn
    return 2 * config.num_hidden_layers * config.num_key_value_heads * attention.head_dim * element


def working_bytes(model, element: int) -> int:
    """What running a model takes beside its weights, at the least at which it runs well: four
    answers of 1,024 tokens, 2,048 tokens in a layer, logits of 256 positions.
    """
    logits = 256 * LOGIT_BYTES * model.config.vocab_size
    return 4096 * cache_bytes(model, element) + 2048 * token_bytes(model.config, element) + logits


def tokens_at_once(most: int, config, element: int, device: torch.device) -> int:
    """How many tokens pass through a layer at once: `most`, halved until the device has room."""
    return halved_to_fit(most, token_bytes(config, element), TOKENS_SHARE * available(device))


def logits_at_once(most: int, vocabulary: int, device: torch.device) -> int:
    """How many positions have logits computed at once: `most`, halved until the device has room."""
    return halved_to_fit(most, LOGIT_BYTES * vocabulary, LOGITS_SHARE * available(device))

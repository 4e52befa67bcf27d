"""Greedy decoding with a cache of fixed size, one captured CUDA graph per batch size, and packed or
dense weights.

On a GPU prompts are read by the same kernels (`running.prompts`). On a CPU they go through
transformers' own forward pass; what that leaves in the cache is copied over. From there each step
is the short list of operations in `kernels.inference`. Prompts of different lengths are padded at
their end: every row has its own position, and what the padding left in the cache is overwritten
before it is ever attended to.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from common.base.device_memory import available, halved_to_fit
from common.kernels.forms import Rotary, Rounded, Rounding, TwoBytes
from common.kernels.inference import add_rms_norm, attend, largest_index, row_matmul
from common.model.architecture import is_fused
from common.model.memory import TOKENS_SHARE, token_bytes
from common.running.graphs import GraphPool
from common.running.joined import JoinedLayer
from common.running.packed import PackedLinear, is_plain
from common.running.prompts import PromptReader

# Tokens of prompts that go through the model at once, and steps after which the host looks at what
# was generated.
PROMPT_TOKENS, STEPS_AT_ONCE = 16384, 8


def can_decode(model, length: int) -> bool:
    """Whether `Decoder` computes what the model's own forward pass does, for up to `length`
    tokens."""
    config = model.config
    if not is_fused(config):
        return False
    attention = model.model.layers[0].self_attn
    window, size = getattr(config, "sliding_window", None), attention.head_dim
    # Where transformers rounds inputs itself, inside its linears' forward pass.
    scheme = getattr(attention.q_proj, "quantization_scheme", None)
    rounds_inputs = scheme is not None and scheme.input_activations is not None
    return (
        config._attn_implementation == "sdpa"
        and size >= 16
        and size & (size - 1) == 0
        and config.hidden_act == "silu"
        and not rounds_inputs
        and (isinstance(attention.q_proj, PackedLinear) or is_plain(attention.q_proj))
        and not hasattr(attention, "online")
        and not getattr(model, "streamed", 0)
        and (window is None or length <= window)
        and _turns_alike(model, length)
    )


def _turns_alike(model, length: int) -> bool:
    """Whether the frequencies of the rotary embedding are the same for all texts of up to `length`
    tokens, so that one table holds what each of their tokens is turned by.
    """
    rotary = model.model.rotary_emb
    if "dynamic" in rotary.rope_type:
        return length < rotary.original_max_seq_len
    if rotary.rope_type == "longrope":
        return length <= model.config.rope_parameters["original_max_position_embeddings"]
    return True


def decodes_faster(model, length: int) -> bool:
    """Whether `Decoder` is the way to generate up to `length` tokens: on a GPU, and on packed
    weights.
    """
    packed = isinstance(model.model.layers[0].mlp.down_proj, PackedLinear)
    return (next(model.parameters()).is_cuda or packed) and can_decode(model, length)


def cache_after(prefix: DynamicCache | None, rows: int) -> DynamicCache:
    """A cache for `rows` prompts that all follow the tokens in `prefix` (of one row), if any."""
    cache = DynamicCache()
    for index, layer in enumerate(prefix.layers if prefix is not None else ()):
        cache.update(
            layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index
        )
    return cache


class Decoder:
    """Greedy generation for up to `rows` prompts at once and `length` tokens in all of each.

    Args:
        model: a causal LM of transformers for which `can_decode`; its linears become views of
            joined ones.
    """

    def __init__(self, model, rows: int, length: int):
        self.model, self.rows, self.length = model, rows, length
        # Joined once per model: a second decoder finds the first one's.
        if not hasattr(model, "joined_layers"):
            model.joined_layers = [JoinedLayer(module) for module in model.model.layers]
        self.layers = model.joined_layers
        norm = model.model.norm.weight
        self.device, dtype = norm.device, norm.dtype
        config, size = model.config, model.model.layers[0].self_attn.head_dim
        shape = (len(self.layers), 2, rows, config.num_key_value_heads, length, size)
        self.cache = torch.zeros(shape, device=self.device, dtype=dtype)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.written = torch.zeros(STEPS_AT_ONCE, rows, dtype=torch.long, device=self.device)
        positions = torch.arange(length, device=self.device)
        self.tables = [
            table[0].to(dtype).contiguous()
            for table in model.model.rotary_emb(norm, positions.unsqueeze(0))
        ]
        # None where there is no memory to capture one.
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._pool = GraphPool(self.device) if self.device.type == "cuda" else None
        self.reader = PromptReader(model, self.tables, self.cache, self.positions, self._pool)

    def step(self, rows: int, index: int = 0) -> None:
        """One token more for the first `rows` rows: reads tokens and positions, and replaces them;
        notes the new tokens.
        """
        tokens, positions = self.tokens[:rows], self.positions[:rows]
        epsilon = self.model.model.norm.variance_epsilon
        hidden, update = self.model.model.embed_tokens(tokens), None
        for layer, cache in zip(self.layers, self.cache[:, :, :rows], strict=True):
            attend_to_cache = partial(self._attend, layer, cache)
            if rows == 1 and layer.one_row:
                layer.run_one_row(hidden, attend_to_cache)
            else:
                update = layer.run(hidden, update, attend_to_cache)
        gain, head = self.model.model.norm.weight, self.model.lm_head
        if rows == 1 and update is None and isinstance(head, PackedLinear):
            logits = row_matmul(hidden, head.codes, (gain, epsilon))
        else:
            logits = head(add_rms_norm(hidden, update, gain, epsilon))
        found = largest_index(logits)
        self.written[index, :rows] = found
        torch.clamp(found, min=0, out=tokens)
        positions.add_(1).clamp_(max=self.length - 1)

    def _attend(
        self,
        layer: JoinedLayer,
        cache: Tensor,
        projected: Tensor,
        rounding: Rounding | None = None,
    ) -> Tensor | Rounded | TwoBytes:
        cosine, sine = self.tables
        keys, values = cache
        rotary = Rotary(cosine, sine, layer.norms)
        positions = self.positions[: len(projected)]
        return attend(projected, rotary, positions, keys, values, layer.scaling, rounding)

    def run(self, rows: int) -> Tensor:
        """Let the first `rows` rows go on by STEPS_AT_ONCE steps. Returns the new tokens [steps,
        rows]; -1 after logits that are not finite.
        """
        if self.device.type == "cuda" and rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        if graph := self._graphs.get(rows):
            graph.replay()
        else:
            self._steps(rows)
        return self.written[:, :rows]

    def _steps(self, rows: int) -> None:
        for index in range(STEPS_AT_ONCE):
            self.step(rows, index)

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph | None:
        """The steps as one graph; None without memory for it. Tokens and positions are put back."""
        kept = self.tokens.clone(), self.positions.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(rows)  # compiles what has to be
        torch.cuda.current_stream().wait_stream(stream)
        assert self._pool is not None
        try:
            graph, _ = self._pool.capture(partial(self._steps, rows))
        except torch.cuda.OutOfMemoryError:
            graph = None
        self.tokens.copy_(kept[0])
        self.positions.copy_(kept[1])
        return graph

    def start(self, prompts: list[list[int]], prefix: DynamicCache | None = None) -> Tensor:
        """Read prompts, that all follow the tokens in `prefix`, into the first rows. Returns the
        logits after each [rows, vocabulary], whose largest become the tokens that the next step
        reads.

        Raises:
            ValueError: the cache has no place for the longest and a token that follows.
        """
        before = prefix.get_seq_length() if prefix is not None else 0
        rows, longest = len(prompts), max(map(len, prompts))
        if before + longest >= self.length:
            raise ValueError(
                f"a cache of {self.length} tokens does not hold a prompt of {before + longest} and "
                "a token after it"
            )
        # Reading without transformers needs the lengths there.
        self.positions[:rows] = torch.tensor([before + len(prompt) for prompt in prompts])
        ready = prefix is None and self._reads_itself() and self.reader.has_graph(rows, longest)
        at_once = rows if ready else self._prompts_at_once(longest)
        logits = []
        for first in range(0, rows, at_once):
            part = slice(first, min(first + at_once, rows))
            logits.append(self._read(prompts[part], part, prefix, before))
        found = torch.cat(logits)
        torch.argmax(found, -1, out=self.tokens[:rows])
        return found

    def _reads_itself(self) -> bool:
        """Whether prompts are read without transformers."""
        return self.device.type == "cuda"

    def _prompts_at_once(self, length: int) -> int:
        """How many prompts of up to `length` tokens are read at once."""
        most = max(1, PROMPT_TOKENS // length)
        if min(most, self.rows) == 1:  # asking the GPU takes time
            return 1
        row = length * token_bytes(self.model.config, self.cache.element_size())
        return halved_to_fit(most, row, TOKENS_SHARE * available(self.device))

    def _read(
        self, prompts: list[list[int]], rows: slice, prefix: DynamicCache | None, before: int
    ) -> Tensor:
        if self._reads_itself():
            return self.reader.read(prompts, rows.start, prefix)
        length = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        cache = cache_after(prefix, len(prompts))
        positions = torch.arange(before, before + length, device=self.device).unsqueeze(0)
        hidden = self.model.model(
            tokens.to(self.device), position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        for index, layer in enumerate(cache.layers):
            self.cache[index, 0, rows, :, : before + length] = layer.keys
            self.cache[index, 1, rows, :, : before + length] = layer.values
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return self.model.lm_head(hidden[torch.arange(len(prompts), device=self.device), last])

    def keep(self, rows: list[int]) -> None:
        """Move the given rows to the front; the rest is forgotten."""
        chosen = torch.tensor(rows, device=self.device)
        for layer in self.cache:
            layer[:, : len(rows)] = layer[:, chosen]
        self.tokens[: len(rows)] = self.tokens[chosen]
        self.positions[: len(rows)] = self.positions[chosen]

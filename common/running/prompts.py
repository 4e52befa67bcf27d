"""How a decoder reads prompts on a GPU: by its own kernels, a third of the launches that
transformers' forward pass takes, and where tokens are few, so that launching is what takes the
time, through captured graphs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from common.base.device_memory import available
from common.kernels.forms import Rounded, Rounding, TwoBytes
from common.kernels.inference import add_rms_norm, product_bytes, rotate_heads, rounded
from common.model.fused import attend_causally
from common.model.memory import TOKENS_SHARE, token_bytes
from common.running.graphs import GraphPool
from common.running.joined import JoinedLayer
from common.running.packed import PackedLinear

# Lengths that prompts are padded to, so that graphs are few: short ones cost a GPU about the same,
# long ones are padded by little. A graph reads at most as many tokens, in all of its rows.
LENGTHS = (
    *(16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    *(640, 768, 896, 1024, 1280, 1536, 1792, 2048),
)
GRAPH_TOKENS = LENGTHS[-1]


def read_prompts(
    model, tables: list[Tensor], tokens: Tensor, lengths: Tensor, cache: Tensor, before: int = 0
) -> Tensor:
    """Read prompts by a model with `joined_layers`. Returns the logits after each [rows,
    vocabulary].

    Args:
        tables: cosine and sine of the rotary embedding, [before + length or more, head size].
        tokens: [rows, length], padded at their end: what is read after a prompt does not change it.
        lengths: [rows] of the prompts and what they follow.
        cache: keys and values [layers, 2, rows, key-value heads, before + length or more, head
            size] of what the prompts follow; takes theirs, and those of the padding, too.
        before: how many tokens the prompts follow.
    """
    rows, length = tokens.shape
    hidden, update = model.model.embed_tokens(tokens).flatten(0, 1), None
    for layer, kept in zip(model.joined_layers, cache[..., : before + length, :], strict=True):
        update = layer.run(hidden, update, partial(_attend, layer, tables, kept, before))
    assert update is not None  # there is a layer
    last = torch.arange(0, rows * length, length, device=tokens.device) + lengths - before - 1
    norm = model.model.norm
    # Norm and head of the last tokens alone.
    normed = add_rms_norm(hidden[last], update[last], norm.weight, norm.variance_epsilon)
    return model.lm_head(normed)


def _attend(
    layer: JoinedLayer,
    tables: list[Tensor],
    kept: Tensor,
    before: int,
    projected: Tensor,
    rounding: Rounding | None,
) -> Tensor | Rounded | TwoBytes:
    """Causal attention of prompts [tokens, heads * size], rounded if asked for.

    Args:
        kept: keys and values [2, rows, key-value heads, before + length, size]; takes those of the
            prompts.
        projected: [tokens, (heads + 2 * key-value heads) * size]; queries and keys are turned in
            place.
    """
    rows, key_heads, whole, size = kept.shape[1:]
    parts = projected.view(rows, whole - before, -1, size)
    queries = parts.shape[2] - 2 * key_heads
    cosine, sine = (table[before:whole].unsqueeze(0) for table in tables)
    rotate_heads(parts[:, :, : queries + key_heads], cosine, sine, layer.norms, queries)
    kept[..., before:, :] = (
        parts[:, :, queries:].unflatten(2, (2, key_heads)).permute(2, 0, 3, 1, 4)
    )
    query, key, value = parts.split([queries, key_heads, key_heads], dim=2)
    if before:
        key, value = kept.transpose(2, 3)
    attended = attend_causally(query, key, value, layer.scaling).flatten(0, 1)
    return rounded(attended, rounding)


class PromptReader:
    """Reads prompts into the rows of a decoder. Few tokens are read through a graph from the second
    time on that there are as many rows of as many tokens, padding included; the first time runs the
    same kernels one by one, which compiles them. What there is no memory to capture a graph for
    stays that way, and so does what follows a prefix.

    Args:
        cache: the decoder's [layers, 2, rows, key-value heads, length, head size].
        positions: [rows], which hold the lengths of the prompts while they are read.
        pool: for the graphs; None on a CPU, which has none.
    """

    def __init__(
        self, model, tables: list[Tensor], cache: Tensor, positions: Tensor, pool: GraphPool | None
    ):
        self.model, self.tables, self.cache, self.positions = model, tables, cache, positions
        self._pool = pool
        # What a graph reads.
        self._tokens = positions.new_zeros(GRAPH_TOKENS)
        # With the logits that they put out; None for what has been read once.
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        # Rows and tokens whose capture ran out of memory.
        self._too_large: set[tuple[int, int]] = set()

    def has_graph(self, rows: int, longest: int) -> bool:
        """Whether prompts, the longest of so many tokens, are read through a graph there is."""
        length = self._length_of_graph(rows, longest)
        return length is not None and self._graphs.get((rows, length)) is not None

    def read(
        self, prompts: list[list[int]], first: int, prefix: DynamicCache | None = None
    ) -> Tensor:
        """Read prompts, that all follow the tokens in `prefix` (of one row), into the rows from the
        `first` on. Returns the logits after each [rows, vocabulary].
        """
        rows, longest = len(prompts), max(map(len, prompts))
        padded = self._length_of_graph(rows, longest) if prefix is None else None
        shape = rows, padded or longest
        tokens = torch.tensor([prompt + [0] * (shape[1] - len(prompt)) for prompt in prompts])
        if first > 0 or padded is None:
            return self._read(tokens.to(self.cache.device), first, prefix)
        static = self._tokens[: tokens.numel()].view(shape)
        static.copy_(tokens)
        if shape not in self._graphs:
            self._graphs[shape] = None
            return self._read(static)
        found = self._graphs[shape]
        if found is None and shape not in self._too_large and self._has_room(*shape):
            found = self._graphs[shape] = self._capture(static)
        if found is None:
            return self._read(static)
        graph, logits = found
        graph.replay()
        return logits.clone()

    def _length_of_graph(self, rows: int, longest: int) -> int | None:
        """The length that prompts are padded to for a graph; None where that is too much for one.
        Unpadded lengths are many, and each would keep a graph's memory.
        """
        length = next((length for length in LENGTHS if length >= longest), longest)
        length = min(length, self.cache.shape[-2])
        return length if rows * length <= GRAPH_TOKENS else None

    def _has_room(self, rows: int, length: int) -> bool:
        """Whether a graph's memory, which it keeps, leaves enough."""
        # What idles in the pool is there for the next graph.
        idle = self._pool.idle if self._pool is not None else 0
        room = available(self.cache.device) + idle
        return self.bytes_to_read(rows, length) <= TOKENS_SHARE * room

    def bytes_to_read(self, rows: int, length: int) -> int:
        """About what reading prompts of so many tokens takes of memory."""
        tokens, element, head = rows * length, self.cache.element_size(), self.model.lm_head
        # All layers are alike. The head is given the last tokens alone.
        products = [(linear, tokens) for linear in self.model.joined_layers[0].linears]
        inside = max(
            product_bytes(inputs, linear.codes, element, linear.activation_bits is not None)
            if isinstance(linear, PackedLinear)
            else 0
            for linear, inputs in [*products, (head, rows)]
        )
        # Of a graph, as they are given out, and beside those of other prompts.
        logits = 3 * rows * self.model.config.vocab_size
        return tokens * token_bytes(self.model.config, element) + inside + logits * element

    def _read(self, tokens: Tensor, first: int = 0, prefix: DynamicCache | None = None) -> Tensor:
        rows, before = slice(first, first + len(tokens)), 0
        cache = self.cache[:, :, rows]
        if prefix is not None:
            before = prefix.get_seq_length()
            for (keys, values), layer in zip(cache, prefix.layers, strict=True):
                keys[:, :, :before], values[:, :, :before] = layer.keys, layer.values
        return read_prompts(self.model, self.tables, tokens, self.positions[rows], cache, before)

    def _capture(self, tokens: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        assert self._pool is not None
        try:
            return self._pool.capture(partial(self._read, tokens))
        except torch.cuda.OutOfMemoryError:
            rows, length = tokens.shape
            self._too_large.add((rows, length))
            return None

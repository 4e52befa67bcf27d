"""What the linears of a decoder layer read: sums over batches, and what is known in the end.

A linear group's linears share one input x, so there is one of each for a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Flag, auto

import torch
from torch import Tensor, nn

from common.base import parallel
from common.kernels.sums import channel_sums
from common.model.architecture import LinearGroup, family_of

# Inputs that are kept, of all batches, or a few more of many short sequences. Where a scale has to
# fit the largest values of tokens, 256 were too few for 4864 channels
# (docs/Quantization_Methods_Deep_Dive.md, SmoothQuant).
SAMPLES = 3072
# From each sequence at least so many.
FROM_EACH = 8
# What the first token of a sequence counts for in a sample, as a share of all drawn from it.
FIRST_TOKEN = 1 / 16


class Needs(Flag):
    """What a method has to know of the inputs of the linears, beside their mean squares.

    NOTHING: not even those, and no calibration text. GRAM: the Gram matrices. MAGNITUDES: largest
    and mean absolute values. SAMPLES: some of the inputs themselves.
    """

    NOTHING = 0
    GRAM = auto()
    MAGNITUDES = auto()
    SAMPLES = auto()


@dataclass(frozen=True)
class InputStatistics:
    """What is known of the input x [tokens, in] of a linear group, in float32.

    What the method's `Needs` did not name was not collected; to ask for it raises a LookupError.

    mean_square: [in], the weighted mean over tokens of x².
    lag: [hidden, in], the weighted mean of (lag of the residual stream) xᵀ; None without a lag.
    """

    mean_square: Tensor
    lag: Tensor | None = None
    _held: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gram(self) -> Tensor:
        """The weighted mean over tokens of x xᵀ, [in, in]."""
        return self._get("gram")

    @property
    def abs_max(self) -> Tensor:
        """The largest |x| of each channel, [in]."""
        return self._get("abs_max")

    @property
    def abs_mean(self) -> Tensor:
        """The mean |x| of each channel, [in]; all tokens count alike."""
        return self._get("abs_mean")

    @property
    def sample(self) -> Tensor:
        """Some of the inputs, evenly drawn from each sequence, [n, in], each times the root of its
        token's weight. A sequence's first token, on which all others rest much of their attention,
        is among them and counts FIRST_TOKEN of all.
        """
        return self._get("sample")

    def _get(self, name: str) -> Tensor:
        if name not in self._held:
            raise LookupError(f"{name} was not collected: the method's `needs` have to name it")
        return self._held[name]

    def divided(self, scale: Tensor) -> InputStatistics:
        """The statistics of x / scale, for a scale [in]."""
        held = {name: tensor / scale for name, tensor in self._held.items() if name != "gram"}
        if "gram" in self._held:
            # Into the divisor: a Gram matrix is large.
            divisor = scale.unsqueeze(1) * scale
            held["gram"] = torch.div(self.gram, divisor, out=divisor)
        lag = None if self.lag is None else self.lag / scale
        return InputStatistics(self.mean_square / scale.square(), lag, held)


class InputSums:
    """Sums over the input x [tokens, in] of a linear group, to make `InputStatistics` of."""

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        needs: Needs = Needs.GRAM,
        tokens: int = SAMPLES,
    ):
        """tokens: how many there will be in all, of which `InputStatistics.sample` is drawn."""
        self.in_features, self.needs = in_features, needs
        self._every = -(-tokens // SAMPLES)
        self._device = device
        self._tokens = 0
        self._weight = self._zeros()
        self._gram = self._zeros(in_features, in_features) if Needs.GRAM in needs else None
        # With a Gram matrix they are its diagonal.
        self._squares = self._zeros(in_features) if self._gram is None else None
        self._magnitudes: tuple[Tensor, Tensor] | None = None
        if Needs.MAGNITUDES in needs:
            self._magnitudes = self._zeros(in_features), self._zeros(in_features)
        self._samples: list[Tensor] = []
        self._lag: Tensor | None = None
        # Upper blocks of the Gram matrix that have storage of their own until all batches are in.
        self._parts: list[Tensor] = []
        self._block = max(128, -(-in_features // 4))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self._device)

    def add(
        self, inputs: Tensor, token_weights: Tensor | None = None, lag: Tensor | None = None
    ) -> None:
        """Take in one more batch [..., in].

        Args:
            token_weights: [...], how much each token counts in squares, the Gram matrix and the
                sample.
            lag: [..., hidden], by how much the stream that the group's output was added to falls
                short of the original model's.
        """
        rows = inputs.detach().reshape(-1, self.in_features)
        weights = None if token_weights is None else token_weights.reshape(-1)
        # All that needs memory comes first: when there is none left, nothing has been added.
        sums = drawn = None
        if Needs.SAMPLES in self.needs:
            drawn = _drawn(inputs.detach(), token_weights, self._every)
        if self._gram is None or self._magnitudes is not None:
            sums = channel_sums(rows, weights, squares=self._squares is not None)
        if self._gram is None:
            assert lag is None  # nothing can be made of it
            self._weight += len(rows) if weights is None else weights.sum()
        else:
            column = None if weights is None else weights.unsqueeze(1)
            lag = None if lag is None else lag.reshape(len(rows), -1)
            if rows.is_cuda and rows.dtype != torch.float32:
                self._add_products_of_halves(rows, column, lag)
            else:
                self._add_products(rows.float(), column, lag)
        self._tokens += len(rows)
        if self._squares is not None:
            self._squares += sums.squares
        if self._magnitudes is not None:
            largest, total = self._magnitudes
            torch.maximum(largest, sums.largest, out=largest)
            total += sums.magnitudes
        if drawn is not None:
            self._samples.append(drawn)

    def _starts(self) -> range:
        """Where the Gram matrix's blocks begin. It is symmetric: the upper ones suffice until all
        batches are in.
        """
        return range(0, self.in_features, self._block)

    def _add_products(self, rows: Tensor, weights: Tensor | None, lag: Tensor | None) -> None:
        weighted = rows if weights is None else rows * weights
        if lag is not None:
            self._add_lag(lag.float().T @ weighted)
        self._weight += len(rows) if weights is None else weights.sum()
        for start in self._starts():
            stop = start + self._block
            self._gram[start:stop, start:].addmm_(weighted[:, start:stop].T, rows[:, start:])

    def _add_products_of_halves(
        self, rows: Tensor, weights: Tensor | None, lag: Tensor | None
    ) -> None:
        """The same on tensor cores: products of 16-bit numbers are exact and summed in float32.

        The root of a token's weight goes into both factors of the Gram matrix, which so stays one
        of real vectors.
        """
        root = None if weights is None else root_weights(weights, rows, lag)
        scaled = rows if root is None else rows * root
        parts, product = [], None
        for i, start in enumerate(self._starts()):
            left, right = scaled[:, start : start + self._block].T, scaled[:, start:]
            if self._parts:
                parts.append(torch.addmm(self._parts[i], left, right, out_dtype=torch.float32))
            else:
                parts.append(torch.mm(left, right, out_dtype=torch.float32))
        if lag is not None:
            weighted = lag if root is None else lag * root
            product = torch.mm(weighted.T, scaled, out_dtype=torch.float32)
        self._parts = parts
        if product is not None:
            self._add_lag(product)
        self._weight += len(rows) if root is None else root.float().square().sum()

    def _add_lag(self, product: Tensor) -> None:
        self._lag = product if self._lag is None else self._lag.add_(product)

    def finish(self) -> InputStatistics:
        """Turn sums into means, once all batches are in; nothing can be added any more."""
        for i, part in enumerate(self._parts):
            self._gram[i * self._block : (i + 1) * self._block, i * self._block :] += part
        self._parts.clear()
        sample = torch.cat(self._samples) if self._samples else None
        self._samples.clear()
        sample = self._add_others(sample)
        held = {}
        if self._gram is not None:
            self._gram.triu_()
            self._gram += self._gram.triu(1).T.clone()
            self._gram /= self._weight
            held["gram"] = self._gram
            mean_square = self._gram.diagonal().clone()
        else:
            mean_square = self._squares / self._weight
        if self._magnitudes is not None:
            largest, total = self._magnitudes
            held |= {"abs_max": largest, "abs_mean": total / max(self._tokens, 1)}
        if sample is not None:
            held["sample"] = sample
        lag = None if self._lag is None else self._lag.div_(self._weight)
        return InputStatistics(mean_square, lag, held)

    def _add_others(self, sample: Tensor | None) -> Tensor | None:
        """Add the sums of the other processes, if there are any; returns the samples of all."""
        if parallel.size() == 1:
            return sample
        # A process whose chunks were halved may have taken a lag of zero where the others took
        # none.
        counts = parallel.gather((self._tokens, 0 if self._lag is None else len(self._lag)))
        self._tokens, rows = sum(tokens for tokens, _ in counts), max(rows for _, rows in counts)
        if rows and self._lag is None:
            self._lag = self._zeros(rows, self.in_features)
        parallel.add(self._squares if self._gram is None else self._gram)
        parallel.add(self._weight)
        if self._lag is not None:
            parallel.add(self._lag)
        if self._magnitudes is not None:
            largest, total = self._magnitudes
            parallel.largest(largest)
            parallel.add(total)
        return None if sample is None else parallel.join_rows(sample)


def add_in_parts(
    sums: InputSums, inputs: Tensor, token_weights: Tensor | None, lag: Tensor | None
) -> None:
    """`InputSums.add`; a batch [batch, ...] that the GPU has no room for is added in halves."""
    try:
        return sums.add(inputs, token_weights, lag)
    except torch.cuda.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(inputs) // 2
    for part in (slice(None, half), slice(half, None)):
        add_in_parts(
            sums,
            inputs[part],
            None if token_weights is None else token_weights[part],
            None if lag is None else lag[part],
        )


def root_weights(weights: Tensor, rows: Tensor, lag: Tensor | None) -> Tensor:
    """The roots [tokens, 1] of token weights, in the type of rows [tokens, in].

    A token whose hidden state is next to nothing has one that float16 does not hold, or not times
    its values or its lag [tokens, hidden]: it counts as much as it can.
    """
    root = weights.sqrt()
    if rows.dtype == torch.float16:
        for values in (rows, lag):
            if values is not None:
                largest = values.abs().amax(1, keepdim=True).float().clamp(min=1.0)
                root = torch.minimum(root, 0.5 * torch.finfo(torch.float16).max / largest)
    return root.to(rows.dtype)


def _drawn(inputs: Tensor, token_weights: Tensor | None, every: int) -> Tensor:
    """`InputStatistics.sample` of a batch [..., length, in] with token weights [..., length]."""
    every = max(1, min(every, inputs.shape[-2] // FROM_EACH))
    rows = inputs[..., ::every, :].to(torch.float32, copy=True)
    if token_weights is not None:
        rows *= token_weights[..., ::every, None].sqrt()
    rows[..., 0, :] *= (rows.shape[-2] * FIRST_TOKEN) ** 0.5
    return rows.reshape(-1, inputs.shape[-1])


@contextmanager
def group_inputs(
    layer: nn.Module,
    receive: Callable[[LinearGroup, Tensor], None],
) -> Iterator[None]:
    """While open, call `receive(group, input)` each time a linear group of `layer` is given its
    input.
    """
    handles = []
    for group in family_of(layer).groups:

        def hook(_module, arguments, group=group):
            receive(group, arguments[0])

        handles.append(layer.get_submodule(group.linears[0]).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def new_sums(
    layer: nn.Module,
    device: torch.device,
    needs: Needs,
    tokens: int = SAMPLES,
) -> dict[LinearGroup, InputSums]:
    """Empty sums for each linear group of a layer, for so many tokens."""
    return {
        group: InputSums(group.in_features(layer), device, needs, tokens)
        for group in family_of(layer).groups
    }

"""What the linears of a decoder layer saw: Gram matrix, and largest and mean absolute input per channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common import parallel
from common.architecture import LinearGroup, family_of

# Inputs of each batch that are kept as they are.
SAMPLES_PER_BATCH = 64


@dataclass
class InputStatistics:
    """Running statistics of the input x [tokens, in] of a linear group.

    gram [in, in] is the weighted mean over tokens of x xᵀ, in float32, mean_square [in] its diagonal. with_magnitudes:
    abs_max and abs_mean are [in], and sample [n, in] is some of the inputs themselves, evenly drawn. lag [hidden, in], where
    it was asked for, is the weighted mean of (lag of the residual stream) xᵀ.
    """

    in_features: int
    device: torch.device
    with_gram: bool = True
    with_magnitudes: bool = True
    tokens: int = 0
    gram: Tensor = field(init=False)
    mean_square: Tensor = field(init=False)
    abs_max: Tensor = field(init=False)
    abs_mean: Tensor = field(init=False)
    sample: Tensor = field(init=False)
    lag: Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        if self.with_gram:
            self.gram = torch.zeros(self.in_features, self.in_features, device=self.device)
        self.mean_square = torch.zeros(self.in_features, device=self.device)
        self.abs_max = torch.zeros(self.in_features, device=self.device)
        self.abs_mean = torch.zeros(self.in_features, device=self.device)
        self.weight = torch.zeros((), device=self.device)
        self._samples: list[Tensor] = []
        # Upper blocks of the Gram matrix that have storage of their own until all batches are in.
        self._parts: list[Tensor] = []
        self._block = max(128, -(-self.in_features // 4))

    def add(self, inputs: Tensor, token_weights: Tensor | None = None, lag: Tensor | None = None) -> None:
        """Take in one more batch [..., in].

        Args:
            token_weights: [...], how much each token counts in the Gram matrix.
            lag: [..., hidden], by how much the stream that the group's output was added to falls short of the original
                model's.
        """
        rows = inputs.detach().reshape(-1, self.in_features)
        weights = None if token_weights is None else token_weights.reshape(-1, 1)
        lag = None if lag is None else lag.reshape(len(rows), -1)
        # All that needs memory comes first: when there is none left, nothing has been added.
        magnitudes = rows.abs() if self.with_magnitudes else None
        if rows.is_cuda and rows.dtype != torch.float32:
            self._add_products_of_halves(rows, weights, lag)
        else:
            self._add_products(rows.float(), weights, lag)
        self.tokens += len(rows)
        if magnitudes is not None:
            torch.maximum(self.abs_max, magnitudes.amax(0), out=self.abs_max)
            self.abs_mean += magnitudes.sum(0, dtype=torch.float32)
            self._samples.append(rows[::max(1, len(rows) // SAMPLES_PER_BATCH)].float())

    def _add_products(self, rows: Tensor, weights: Tensor | None, lag: Tensor | None) -> None:
        weighted = rows if weights is None else rows * weights
        if lag is not None:
            self._add_lag(lag.float().T @ weighted)
        self.weight += len(rows) if weights is None else weights.sum()
        # The Gram matrix is symmetric: its upper blocks suffice until all batches are in.
        for start in range(0, self.in_features if self.with_gram else 0, self._block):
            stop = start + self._block
            self.gram[start:stop, start:].addmm_(weighted[:, start:stop].T, rows[:, start:])
        if not self.with_gram:
            self.mean_square += (weighted * rows).sum(0)

    def _add_products_of_halves(self, rows: Tensor, weights: Tensor | None, lag: Tensor | None) -> None:
        """The same on tensor cores: products of 16-bit numbers are exact and summed in float32.

        The root of a token's weight goes into both factors of the Gram matrix, which so stays one of real vectors.
        """
        root = None if weights is None else root_weights(weights, rows, lag)
        scaled = rows if root is None else rows * root
        parts, product = [], None
        for i, start in enumerate(range(0, self.in_features if self.with_gram else 0, self._block)):
            left, right = scaled[:, start:start + self._block].T, scaled[:, start:]
            if self._parts:
                parts.append(torch.addmm(self._parts[i], left, right, out_dtype=torch.float32))
            else:
                parts.append(torch.mm(left, right, out_dtype=torch.float32))
        if lag is not None:
            product = torch.mm((lag if root is None else lag * root).T, scaled, out_dtype=torch.float32)
        if not self.with_gram:
            self.mean_square += scaled.float().square().sum(0)
        self._parts = parts
        if product is not None:
            self._add_lag(product)
        self.weight += len(rows) if root is None else root.float().square().sum()

    def _add_lag(self, product: Tensor) -> None:
        self.lag = product if self.lag is None else self.lag.add_(product)

    def finish(self) -> InputStatistics:
        """Turn sums into means, once all batches are in."""
        if self.with_magnitudes:
            self.sample = torch.cat(self._samples)
            self._samples.clear()
        for i, part in enumerate(self._parts):
            self.gram[i * self._block:(i + 1) * self._block, i * self._block:] += part
        self._parts.clear()
        self._add_others()
        if self.with_gram:
            self.gram.triu_()
            self.gram += self.gram.triu(1).T.clone()
            self.gram /= self.weight
            self.mean_square = self.gram.diagonal().clone()
        else:
            self.mean_square /= self.weight
        if self.lag is not None:
            self.lag /= self.weight
        self.abs_mean /= max(self.tokens, 1)
        return self

    def _add_others(self) -> None:
        """Add the sums of the other processes, if there are any."""
        if parallel.size() == 1:
            return
        # A process whose chunks were halved may have taken a lag of zero where the others took none.
        counts = parallel.gather((self.tokens, 0 if self.lag is None else len(self.lag)))
        self.tokens, rows = sum(tokens for tokens, _ in counts), max(rows for _, rows in counts)
        if rows and self.lag is None:
            self.lag = torch.zeros(rows, self.in_features, device=self.device)
        for tensor in (self.gram if self.with_gram else self.mean_square, self.weight, self.abs_mean, self.lag):
            if tensor is not None:
                parallel.add(tensor)
        parallel.largest(self.abs_max)
        if self.with_magnitudes:
            self.sample = parallel.join_rows(self.sample)


def add_in_parts(statistics: InputStatistics, inputs: Tensor, token_weights: Tensor | None, lag: Tensor | None) -> None:
    """`InputStatistics.add`; a batch [batch, ...] that the card has no room for is added in halves."""
    try:
        return statistics.add(inputs, token_weights, lag)
    except torch.cuda.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(inputs) // 2
    for part in (slice(None, half), slice(half, None)):
        add_in_parts(statistics, inputs[part], None if token_weights is None else token_weights[part],
                     None if lag is None else lag[part])


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


@contextmanager
def group_inputs(layer: nn.Module, receive: Callable[[LinearGroup, Tensor], None]) -> Iterator[None]:
    """While open, call `receive(group, input)` each time a linear group of `layer` is given its input."""
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


def new_statistics(layer: nn.Module, device: torch.device, with_gram: bool, with_magnitudes: bool,
                   ) -> dict[LinearGroup, InputStatistics]:
    """Empty statistics for each linear group of a layer."""
    return {group: InputStatistics(group.in_features(layer), device, with_gram, with_magnitudes)
            for group in family_of(layer).groups}

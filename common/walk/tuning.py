"""The last step: with all codes fixed, the scales of the whole model are tuned together on what it
says of the next token.

Everything before looks at one linear or one layer. What the model as a whole makes of all errors
shows in its output alone. Codes stay, and there is one scale to tune for a group of weights, so a
calibration text is not learned by heart; and what does not help windows that were held out is not
kept. (Training all scales, after the codes: Chen et al. 2024, "EfficientQAT",
https://arxiv.org/abs/2407.11062, there on the next token; here towards the original model's
distribution of it, which needs no labels: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.base import parallel
from common.base.errors import UserError
from common.base.progress import say, track
from common.kernels.gradients import divergence_and_slope, scaled_weights
from common.model.memory import logits_at_once
from common.model.source import SourceModel
from common.numerics.grid import QuantizedLinear, round_scale, type_that_holds
from common.walk.finished import FinishedLayer, moved, set_weight
from common.walk.streams import run_layer

# Of Adam on the logarithms of the scales, for each root of a nat that the model is away from the
# original: divergence is quadratic in what is wrong with the weights, so its root says how large
# a step is worth taking. Rises over the first part of the steps, then falls to 0 along half a
# cosine. Chosen on the demo, looked at on a second model (docs/Quantization_Methods_Deep_Dive.md).
RATE, RISE = 6e-3, 0.25
_DECAY = (0.9, 0.95)
# Tokens of a step, of as many windows as that makes.
STEP_TOKENS = 8192
# One window of so many is held out of the tuning. The codes were fitted to it as to all others, so
# what is measured on it is below what other text shows.
HELD_OUT = 8
# Positions whose logits are made at once.
_POSITIONS = 512

NO_ROOM = "the GPU has no room to tune the model's scales on one calibration window"
T = TypeVar("T")


@dataclass(frozen=True)
class Tuned:
    """What the tuning found: codes by layer, and the divergence in nats from the original model, on
    the windows that were held out, before and after. `codes` are those given where that did not
    fall.
    """

    codes: list[dict[str, QuantizedLinear]]
    steps: int
    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether there are new scales."""
        return self.after < self.before  # not if it is NaN

    def describe(self) -> dict:
        """For the metadata."""
        return {
            "steps": self.steps,
            "held_out_divergence": {"before": self.before, "after": self.after},
            "kept": self.better,
        }


def tune_scales(
    source: SourceModel,
    layers: list[FinishedLayer],
    windows: Tensor,
    targets: list[Tensor],
    steps: int,
) -> Tuned | None:
    """The same codes with scales for which the model is nearer to the original one, by the mean
    over tokens of the divergence of the next token's distribution.

    None where nothing is tuned, and why is said: with one calibration window, as nothing can be
    held out, and where a GPU alone has no room; and where the divergence is not finite. The layers'
    linears are without weights afterwards.

    Args:
        source: embedding, last norm and head, which come to the device.
        windows: this process's tokens [samples, length].
        targets: the original model's hidden states after the last layer, in chunks [batch, length,
            hidden], of the same windows in the same order. They go through the same norm and head
            as the quantized model's.
    Raises:
        UserError: the GPU of one of several processes has no room for a single window.
    """
    codes = [layer.codes for layer in layers]
    try:
        source.move_vocabulary(source.device)
        tuning = _Tuning(source, layers, windows, targets)
        if not tuning.train:
            say("scales are not tuned: that takes two calibration windows or more")
            return None
        before = tuning.held_out_divergence()
        if not math.isfinite(before):
            return None  # the walk says where that comes from
        tuning.run(steps, RATE * math.sqrt(max(before, 0)))
        for layer, changes in zip(layers, tuning.changes, strict=True):
            layer.codes = _rescaled(layer.codes, changes, source.storage_dtype)
        tuning.forget_changes()
        after = tuning.held_out_divergence()
        found = Tuned([layer.codes for layer in layers], steps, before, after)
    except torch.cuda.OutOfMemoryError:
        if parallel.size() > 1:
            raise UserError(f"{NO_ROOM}; use --tune-scales 0, or lower --calib-length") from None
        say(f"{NO_ROOM}; they stay as they are (--tune-scales 0 spares the attempt)")
        found = None
    finally:
        for layer in layers:
            layer.clear()
    if found and found.better:
        say(f"tuned scales: divergence on held-out windows {before:.4g} -> {found.after:.4g} nats")
        return found
    for layer, old in zip(layers, codes, strict=True):
        layer.codes = old
    if found:
        say(f"tuned scales are no better ({before:.4g} nats on held-out windows): they stay")
    return found and replace(found, codes=codes)


class _Tuning:
    def __init__(
        self,
        source: SourceModel,
        layers: list[FinishedLayer],
        windows: Tensor,
        targets: list[Tensor],
    ):
        self.source, self.layers, self.windows, self.targets = source, layers, windows, targets
        self.device, self.dtype = source.device, source.dtype
        self.changes = [
            {
                name: torch.zeros_like(found.scale, dtype=torch.float32, device=self.device)
                for name, found in layer.codes.items()
            }
            for layer in layers
        ]
        self.forget_changes()
        # Where a window's target lies: its chunk, and its place there.
        self.places = [(i, row) for i, chunk in enumerate(targets) for row in range(len(chunk))]
        # Windows are counted through those of all processes, so that several do what one does.
        counts = parallel.gather(len(windows))
        first_own, every = sum(counts[: parallel.rank()]), range(sum(counts))
        self.own = {first_own + i: i for i in range(len(windows))}
        self.held_out = [i for i in every if i % HELD_OUT == 0]
        self.train = [i for i in every if i % HELD_OUT]
        # Windows of a step, and how many of them the GPU has room for at once.
        self.per_step = max(1, STEP_TOKENS // windows.shape[1])
        self.at_once = self.per_step
        # Counted without a way back, which takes as much again.
        self.positions = logits_at_once(_POSITIONS, 2 * source.config.vocab_size, self.device)

    def forget_changes(self) -> None:
        """Begin at the scales that the layers have."""
        for changes in self.changes:
            for change in changes.values():
                change.requires_grad_(False).zero_().requires_grad_(True)

    def run(self, steps: int, rate: float) -> None:
        """Adam on the logarithms of the scales, over the windows in a drawn order. Of each step's
        windows a process takes those it has.
        """
        changes = [change for layer in self.changes for change in layer.values()]
        optimiser = torch.optim.Adam(changes, lr=rate, betas=_DECAY)
        rise = max(1, round(RISE * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda step: min(1, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps)),
        )
        generator = torch.Generator().manual_seed(0)
        waiting: list[int] = []
        for _ in track(range(steps), "tuned scales", unit="steps"):
            if len(waiting) < self.per_step:
                order = torch.randperm(len(self.train), generator=generator).tolist()
                waiting += [self.train[i] for i in order]
            batch, waiting = waiting[: self.per_step], waiting[self.per_step :]

            def descend(batch: list[int] = batch) -> None:
                for change in changes:
                    change.grad = torch.zeros_like(change)
                for part in self.parts(batch):
                    self.descend(part)

            self.with_room(descend)
            for change in changes:
                parallel.add(cast(Tensor, change.grad))
            optimiser.step()
            schedule.step()

    def with_room(self, function: Callable[[], T]) -> T:
        """What a function returns, called again with fewer windows and then fewer logits at once,
        which from then on are the rule, where the GPU has no room.
        """
        while True:
            try:
                return function()
            except torch.cuda.OutOfMemoryError:
                # Nothing is done here, where the exception still holds what was allocated.
                pass
            torch.cuda.empty_cache()
            if self.at_once > 1:
                self.at_once //= 2
            elif self.positions > 32:
                self.positions //= 2
            else:
                raise torch.cuda.OutOfMemoryError(NO_ROOM)

    def parts(self, windows: list[int]) -> list[list[int]]:
        """Those of some windows that this process has, by its own count, as many as fit at once."""
        own = [self.own[i] for i in windows if i in self.own]
        return [own[i : i + self.at_once] for i in range(0, len(own), self.at_once)]

    @torch.enable_grad()
    def descend(self, part: list[int]) -> None:
        """Add to the gradients those of the divergence's sum over the tokens of some windows."""
        hidden = self.last_hidden(part)
        _, gradient = self.divergence(hidden, part, with_gradient=True)
        hidden.backward(gradient)

    def last_hidden(self, part: list[int]) -> Tensor:
        """[windows, length, hidden] after the last layer. Of each layer its input alone is kept for
        the way back.
        """
        hidden = self.source.embed(self.windows[part])
        for layer, changes in zip(self.layers, self.changes, strict=True):

            def run(hidden: Tensor, *factors: Tensor, layer: FinishedLayer = layer) -> Tensor:
                for (name, found), factor in zip(layer.codes.items(), factors, strict=True):
                    weight = scaled_weights(moved(found, self.device), factor, self.dtype)
                    set_weight(layer.module.get_submodule(name), weight)
                output = run_layer(layer.module, hidden, layer.arguments)
                layer.clear()  # autograd holds what it needs, of one layer at a time
                return output

            # The form that runs forward without autograd, and so with the fused kernels.
            hidden = checkpoint(
                run, hidden, *changes.values(), use_reentrant=True, preserve_rng_state=False
            )
        return hidden

    def divergence(
        self, hidden: Tensor, part: list[int], with_gradient: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The sum over tokens of the divergence from the original model, for last hidden states
        [windows, length, hidden] of some windows, and its gradient by them.
        """
        places = [self.places[i] for i in part]
        target = torch.stack([self.targets[i][row] for i, row in places]).to(self.device)
        rows, wanted = hidden.detach().flatten(0, -2), target.flatten(0, -2)
        total = torch.zeros((), device=self.device)
        gradients = []
        for own, other in zip(
            rows.split(self.positions), wanted.split(self.positions), strict=True
        ):
            with torch.no_grad():
                expected = self.source.head(other)
            with torch.set_grad_enabled(with_gradient):
                own.requires_grad_(with_gradient)
                logits = self.source.head(own)
            found, slope = divergence_and_slope(expected, logits.detach(), with_gradient)
            total += found.sum()
            if with_gradient:
                gradients += torch.autograd.grad(logits, own, slope)
        return total, torch.cat(gradients).view_as(hidden) if with_gradient else None

    @torch.no_grad()
    def held_out_divergence(self) -> float:
        """Nats per token on the windows that are held out, of all processes."""

        def measure() -> Tensor:
            found = [
                self.divergence(self.last_hidden(part), part)[0]
                for part in self.parts(self.held_out)
            ]
            return sum(found, torch.zeros((), device=self.device))

        total = parallel.add(self.with_room(measure))
        return total.item() / (len(self.held_out) * self.windows.shape[1])


def _rescaled(
    codes: dict[str, QuantizedLinear], changes: dict[str, Tensor], storage_dtype: torch.dtype
) -> dict[str, QuantizedLinear]:
    """The codes of a layer with scales multiplied by the exponential of their changes, rounded to
    the type that they are stored in.
    """
    found = {}
    for name, old in codes.items():
        scale = old.scale * changes[name].detach().exp().to(old.scale.device)
        dtype = type_that_holds(old.scale, storage_dtype)
        found[name] = replace(old, scale=round_scale(scale, dtype))
    return found

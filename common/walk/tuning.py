"""The last check of a quantized layer: with its codes fixed, their scales are tuned on the hidden
states that the layer puts out.

Everything before looks at one linear at a time. What the layer as a whole makes of its errors, and
what is left of the lag behind the original model, shows in its output alone. Codes stay, and there
is one scale to tune for a group of weights, so a calibration text is not learned by heart; and what
does not help windows that were held out is not kept. (Training scales alone, after the codes: Chen
et al. 2024, "EfficientQAT", https://arxiv.org/abs/2407.11062, there for the whole model at once.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from common.base import parallel
from common.base.errors import UserError
from common.base.progress import say
from common.numerics.grid import QuantizedLinear, grouped, round_scale
from common.walk.method import Layer

# Of Adam on the logarithms of the scales; falls to 0 along half a cosine. 2e-3 and 5e-3 are level
# (docs/Quantization_Methods_Deep_Dive.md, "Tuned scales").
RATE = 5e-3
_DECAY = (0.9, 0.95)
# Against gradients of about one: the loss is in units of what it starts from, for each scale.
_EPSILON = 0.1
_TINY = 1e-20
# Tokens of a step, of as many windows as that makes.
STEP_TOKENS = 8192
# One window of so many is held out.
HELD_OUT = 8

NO_ROOM = "the GPU has no room to tune a layer's scales on one calibration window"
# Of a window: its chunk, and its place there.
_Place = tuple[int, int]


def tune_scales(
    layer: Layer, codes: dict[str, QuantizedLinear], steps: int
) -> dict[str, QuantizedLinear]:
    """The same codes with scales for which the layer's output is nearer to the original model's:
    the mean over tokens of ‖output - target‖² / ‖target‖².

    The target is the hidden state of the original model after the layer (`Layer.targets`) or, where
    that is not known, what the layer puts out with the weights it has. The scales come back
    unchanged where that does not lower the error on the windows that were held out, and where there
    is one window alone, so that nothing can be held out; the note "tuned" is what is left of the
    error.

    Args:
        codes: of every linear of the layer, all rows; the layer holds the weights from before
            rounding, and does so afterwards.
    Raises:
        UserError: the GPU of one of several processes has no room for a single window. Alone, it
            is said, and the scales stay.
    """
    tuning = _Tuning(layer, codes)
    if not tuning.windows:
        if not layer.index:
            say("scales are not tuned: that takes two calibration windows or more")
        return codes
    try:
        before = tuning.held_out_error(codes).clamp(min=_TINY)
        tuning.run(steps, before)
        tuned = tuning.result()
        left = (tuning.held_out_error(tuned) / before).item()
    except _NoRoomError:
        if parallel.size() > 1:
            raise UserError(f"{NO_ROOM}; use --tune-scales 0, or lower --calib-length") from None
        say(f"{NO_ROOM}; they stay as they are (--tune-scales 0 spares the attempt)")
        tuned, left = codes, 1.0
    finally:
        tuning.put(tuning.originals)
    better = left < 1  # not if it is NaN
    layer.notes["tuned"] = left if better else 1.0
    return tuned if better else codes


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of ‖output - target‖² / ‖target‖²; both [..., hidden], float32."""
    size = target.square().mean(-1).clamp(min=1e-12)
    return ((output - target).square().mean(-1) / size).mean()


def set_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Put a tensor [out, in], which may carry a gradient, in the place of a linear's weights."""
    del linear.weight
    linear.weight = weight


class _NoRoomError(Exception):
    """The GPU has no room for a single window."""


class _Scaled(torch.autograd.Function):
    """Weights [out, in] of codes whose scales are multiplied by exp(change), change [out, groups].
    Nothing of the weights' size is kept beside them.
    """

    @staticmethod
    def forward(context, change: Tensor, quantized: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        weight = replace(quantized, scale=quantized.scale * change.exp()).dequantize(dtype)
        context.save_for_backward(weight)
        context.grid = quantized.grid
        return weight

    @staticmethod
    def backward(context, gradient: Tensor):
        # Each weight's derivative by its own change is the weight.
        product = gradient.float().mul_(context.saved_tensors[0])
        return grouped(product, context.grid).sum(-1), None, None


class _Tuning:
    def __init__(self, layer: Layer, codes: dict[str, QuantizedLinear]):
        self.layer, self.codes = layer, codes
        self.linears = {name: layer.module.get_submodule(name) for name in codes}
        self.originals = {name: linear.weight for name, linear in self.linears.items()}
        first = next(iter(self.originals.values()))
        self.device, self.dtype = first.device, first.dtype
        self.changes = {
            name: torch.zeros_like(found.scale, dtype=torch.float32).requires_grad_(True)
            for name, found in codes.items()
        }
        # Windows are counted through those of all processes, so that several do what one does.
        own = [(i, row) for i, chunk in enumerate(layer.inputs) for row in range(len(chunk))]
        counts = parallel.gather(len(own))
        first_own, every = sum(counts[: parallel.rank()]), range(sum(counts))
        self.own = {first_own + i: place for i, place in enumerate(own)}
        self.held_out = [i for i in every if i % HELD_OUT == 0]
        self.windows = [i for i in every if i % HELD_OUT]
        # Windows of a step, and how many of them the GPU has room for at once.
        self.per_step = max(1, STEP_TOKENS // layer.inputs[0].shape[1])
        self.at_once = self.per_step

    def put(self, weights: dict[str, Tensor]) -> None:
        """Let the layer have these weights [out, in]."""
        for name, linear in self.linears.items():
            set_weight(linear, weights[name])

    def weights(self) -> dict[str, Tensor]:
        """[out, in] by linear, with the scales as they are now."""
        return {
            name: cast(Tensor, _Scaled.apply(self.changes[name], found, self.dtype))
            for name, found in self.codes.items()
        }

    def result(self) -> dict[str, QuantizedLinear]:
        dtype = self.layer.scale_dtype
        return {
            name: replace(
                found, scale=round_scale(found.scale * self.changes[name].detach().exp(), dtype)
            )
            for name, found in self.codes.items()
        }

    def run(self, steps: int, unit: Tensor) -> None:
        """Adam on the logarithms of the scales, over the windows in a drawn order; `unit` is what
        the error is about at the start. Of each step's windows a process takes those it has.
        """
        changes = list(self.changes.values())
        optimiser = torch.optim.Adam(changes, lr=RATE, betas=_DECAY, eps=_EPSILON)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        generator = torch.Generator().manual_seed(self.layer.index)
        scales = sum(change.numel() for change in changes)
        waiting: list[int] = []
        for _ in range(steps):
            if len(waiting) < self.per_step:
                order = torch.randperm(len(self.windows), generator=generator).tolist()
                waiting += [self.windows[i] for i in order]
            batch, waiting = waiting[: self.per_step], waiting[self.per_step :]
            share = scales / len(batch)

            def descend(part: list[_Place], share: float = share) -> None:
                with torch.enable_grad():
                    error = self.error(part, self.weights())
                    loss = error / unit * share * len(part)
                    # All at once: what runs out of memory leaves nothing behind.
                    found = torch.autograd.grad(loss, changes)
                for change, gradient in zip(changes, found, strict=True):
                    change.grad += gradient

            for change in changes:
                change.grad = torch.zeros_like(change)
            self.in_parts(descend, batch)
            for change in changes:
                parallel.add(change.grad)
            optimiser.step()
            schedule.step()

    def in_parts(self, function: Callable, windows: list[int]) -> list:
        """What `function` makes of those of some windows that this process has; in smaller parts,
        which from then on are the rule, if the GPU has no room.
        """
        found, rest = [], [self.own[i] for i in windows if i in self.own]
        while rest:
            try:
                found.append(function(rest[: self.at_once]))
                rest = rest[self.at_once :]
                continue
            except torch.cuda.OutOfMemoryError:
                pass
            torch.cuda.empty_cache()
            tried = min(self.at_once, len(rest))
            if tried == 1:
                raise _NoRoomError
            self.at_once = tried // 2
        return found

    def target(self, places: list[_Place]) -> Tensor:
        """[windows, length, hidden] float32."""
        if self.layer.targets:
            return self.gather(self.layer.targets, places).float()
        self.put(self.originals)
        with torch.no_grad():
            return self.layer.forward(self.gather(self.layer.inputs, places)).float()

    def gather(self, chunks: list[Tensor], places: list[_Place]) -> Tensor:
        return torch.stack([chunks[i][row] for i, row in places]).to(self.device)

    def error(self, places: list[_Place], weights: dict[str, Tensor]) -> Tensor:
        """Mean over the tokens of some windows, with `weights` [out, in] in the layer."""
        target = self.target(places)
        self.put(weights)
        output = self.layer.forward(self.gather(self.layer.inputs, places)).float()
        return relative_error(output, target)

    @torch.no_grad()
    def held_out_error(self, codes: dict[str, QuantizedLinear]) -> Tensor:
        """The error on the windows that are held out, of all processes."""
        weights = {name: found.dequantize(self.dtype) for name, found in codes.items()}
        errors = self.in_parts(lambda part: self.error(part, weights) * len(part), self.held_out)
        return parallel.add(sum(errors, torch.zeros((), device=self.device))) / len(self.held_out)

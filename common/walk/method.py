"""What a method's author reads: what a method is asked for, and the layer it is given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from common.base import parallel
from common.model.architecture import Family, LinearGroup, family_of
from common.model.online import OnlineTransforms
from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear, round_per_token, scale_type
from common.walk.inputs import InputStatistics, Needs

# Codes for a group's stacked weights [out, in], out of those and of the group's statistics (None
# for a method that needs no calibration).
GroupQuantizer = Callable[[LinearGroup, Tensor, InputStatistics], QuantizedLinear]


@dataclass
class Layer:
    """A decoder layer in the course of being quantized.

    statistics: of each linear group; None for a method that needs no calibration.
    inputs: calibration hidden states before the layer, in chunks [batch, length, hidden].
    forward: runs the layer on one of them.
    targets: the original model's hidden states after the layer, in the same chunks; None where
        nothing catches up with them.
    notes: what a method wants to have recorded about the layer, such as the settled share of a
        learned rounding.
    """

    index: int
    module: nn.Module
    grid: Grid
    scale_dtype: torch.dtype
    statistics: dict[LinearGroup, InputStatistics] | None = None
    inputs: list[Tensor] | None = None
    forward: Callable[[Tensor], Tensor] | None = None
    targets: list[Tensor] | None = None
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return family_of(self.module)

    @property
    def config(self):
        """The model's configuration."""
        return self.module.self_attn.config

    def quantize_groups(self, quantize_group: GroupQuantizer) -> dict[str, QuantizedLinear]:
        """Codes of every linear, from what `quantize_group` makes of a group's stacked weights."""
        codes = {}
        for group, statistics in self.groups():
            whole = quantize_group(group, self.stacked_weight(group), statistics)
            codes.update(self._split(group, whole))
        return codes

    def groups(self) -> list[tuple[LinearGroup, InputStatistics | None]]:
        """The groups of linears and their statistics."""
        return [
            (group, self.statistics[group] if self.statistics else None)
            for group in self.family.groups
        ]

    def weight(self, name: str) -> Tensor:
        """The weights [out, in] of linear `name`, in float32."""
        return self.module.get_submodule(name).weight.float()

    def own_weight(self, name: str) -> Tensor:
        """The rows of them that this process rounds: all, unless there are several (`parallel`)."""
        return parallel.own_rows(self.module.get_submodule(name).weight).float()

    def stacked_weight(self, group: LinearGroup) -> Tensor:
        """The own weights of a group's linears, one under the other: they share the input."""
        return torch.cat([self.own_weight(name) for name in group.linears])

    def _split(self, group: LinearGroup, whole: QuantizedLinear) -> dict[str, QuantizedLinear]:
        """The linears of a group by name, out of what was found for their stacked weights."""
        sizes = [
            len(parallel.own_rows(self.module.get_submodule(name).weight)) for name in group.linears
        ]
        parts = zip(
            group.linears,
            whole.codes.split(sizes),
            whole.scale.split(sizes),
            whole.zero_point.split(sizes),
            strict=True,
        )
        return {
            name: QuantizedLinear(codes, scale, zero_point, whole.grid)
            for name, codes, scale, zero_point in parts
        }

    def choose_scale_type(self, storage_dtype: torch.dtype) -> None:
        """Set the type of the layer's scales, which its linears' weights as they are now decide
        (`grid.scale_type`).
        """
        weights = map(self.weight, self.family.linears)
        self.scale_dtype = scale_type(weights, self.grid, storage_dtype)

    def where(self, name: str) -> str:
        return f"model.layers.{self.index}.{name}"


@dataclass(frozen=True)
class Method:
    """A quantization method.

    name: that of its script, quantize_<name>.py, and of its configurations.
    quantize_layer: returns the codes of a layer's `own_weight` of every linear
        (`Layer.quantize_groups`). What it does to a row may not depend on the other rows.
    needs: what is collected of the inputs of the linears; NOTHING for a method without calibration.
    original_inputs: the inputs are those of the original layers, in one pass through them, for
        8-bit methods whose errors are small; not those that the quantized layers before leave.
    rewrite_model, rewrite_layer: change the model without changing its function before anything is
        measured, the small parts once and each layer when it is loaded, its inputs known and its
        statistics not (a rotation).
    prepare_layer: the same for a layer whose statistics are known (a scaling); has to keep them
        true.
    catch_up: share of the residual stream's lag behind the original model that o_proj and down_proj
        are made to recover before they are rounded (`rounding.catch_up`); needs GRAM, and a second
        pass through the original layers.
    tune_steps: steps in which the scales of the whole model are tuned at the end
        (`tuning.tune_scales`); 0 leaves them. Otherwise a second pass through the original layers.
    activation_bits: what the inputs of the linears are rounded to, per token as they come, by the
        walk and by a plain load; None leaves them as they are.
    online: what is done as the model runs and no plain load does; rewrite_layer attaches it.
    unties: rewrite_model gives a tied head weights of its own, where it is to be rounded alone.
    """

    name: str
    quantize_layer: Callable[[Layer], dict[str, QuantizedLinear]]
    needs: Needs = Needs.GRAM
    original_inputs: bool = False
    rewrite_model: Callable[[SourceModel], None] | None = None
    rewrite_layer: Callable[[Layer], None] | None = None
    prepare_layer: Callable[[Layer], None] | None = None
    catch_up: float = 0.0
    tune_steps: int = 0
    activation_bits: int | None = None
    online: OnlineTransforms | None = None
    unties: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is read."""
        return self.needs != Needs.NOTHING

    def catches_up(self, family: Family) -> bool:
        """Whether linears recover the stream's lag: not where what they add is normalised first."""
        return bool(self.catch_up) and not family.normalises_output

    @property
    def round_inputs(self) -> Callable[[Tensor], Tensor] | None:
        """What rounds inputs [..., in] to `activation_bits`; None where they stay as they are."""
        if self.activation_bits is None:
            return None
        return partial(round_per_token, bits=self.activation_bits)

    def install_rounding(self, linear: nn.Module) -> None:
        """Let a linear round its inputs from now on, if the method has them rounded."""
        if round_inputs := self.round_inputs:
            linear.register_forward_pre_hook(lambda _, arguments: round_inputs(arguments[0]))

    def as_original(self) -> AbstractContextManager:
        """A context in which layers compute what the original ones do: none rounds online."""
        return self.online.paused() if self.online else nullcontext()

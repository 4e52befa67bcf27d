"""A decoder layer as decoding and the reading of prompts run it: linears that share their input are
one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.kernels.forms import Rounded, Rounding, TwoBytes
from common.kernels.inference import add_rms_norm, row_matmul, silu_mul
from common.running.packed import PackedLinear, stack


class JoinedLayer:
    """A decoder layer of a causal LM for which `can_decode`."""

    def __init__(self, module: nn.Module):
        attention, mlp = module.self_attn, module.mlp
        self.input_norm, self.output_norm = module.input_layernorm, module.post_attention_layernorm
        self.epsilon = self.input_norm.variance_epsilon
        self.qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = attention.o_proj
        self.gate_up = _joined([mlp.gate_proj, mlp.up_proj])
        self.down = mlp.down_proj
        # Of the inputs of its linears, which are rounded as they come; None where they are not.
        self.bits = getattr(self.down, "activation_bits", None)
        self.linears = [self.qkv, self.output, self.gate_up, self.down]
        # Whether one row's norms, residual sums and gate can be part of its products.
        self.one_row = all(isinstance(linear, PackedLinear) for linear in self.linears) and all(
            linear.bias is None for linear in self.linears[1:]
        )
        self.scaling = attention.scaling
        self.norms = None
        if hasattr(attention, "q_norm"):
            norm = attention.q_norm
            self.norms = norm.weight, attention.k_norm.weight, norm.variance_epsilon

    def run(
        self,
        hidden: Tensor,
        update: Tensor | None,
        attend: Callable[..., Tensor | Rounded | TwoBytes],
    ) -> Tensor:
        """The layer for hidden [tokens, size], to which `update`, if any, is still to be added;
        that is done, and the output of attention added, in place. Returns the MLP's output [tokens,
        size], which is the next update.

        Args:
            attend: attention, from queries, keys and values, side by side [tokens, (heads + 2 *
                key-value heads) * head size], to [tokens, heads * head size]; as its second
                argument says, rounded or not.
        """
        qkv, output, gate_up, down = (_wanted_rounding(linear, hidden) for linear in self.linears)
        gain, epsilon = self.input_norm.weight, self.epsilon
        normed = add_rms_norm(hidden, update, gain, epsilon, qkv)
        update = self.output(attend(self.qkv(normed), output))
        normed = add_rms_norm(hidden, update, self.output_norm.weight, epsilon, gate_up)
        gate, up = self.gate_up(normed).chunk(2, -1)
        return self.down(silu_mul(gate, up, down))

    def run_one_row(self, hidden: Tensor, attend: Callable[..., Tensor]) -> None:
        """The layer, of packed linears, for a single row: hidden [1, size] becomes what leaves
        it.
        """
        projected = row_matmul(
            hidden, self.qkv.codes, (self.input_norm.weight, self.epsilon), bits=self.bits
        )
        if self.qkv.bias is not None:
            projected = projected + self.qkv.bias
        row_matmul(attend(projected), self.output.codes, added_to=hidden, bits=self.bits)
        gain = self.output_norm.weight
        gated = row_matmul(
            hidden, self.gate_up.codes, (gain, self.epsilon), gated=True, bits=self.bits
        )
        row_matmul(gated, self.down.codes, added_to=hidden, bits=self.bits)


def _wanted_rounding(linear: nn.Module, inputs: Tensor) -> Rounding | None:
    return linear.wanted_rounding(inputs) if isinstance(linear, PackedLinear) else None


def _joined(linears: list[nn.Module]) -> nn.Module:
    """One linear in place of several; they become views of its memory."""
    if isinstance(linears[0], PackedLinear):
        return stack(linears)
    sizes = [linear.out_features for linear in linears]
    with torch.device("meta"):
        whole = nn.Linear(linears[0].in_features, sum(sizes), bias=linears[0].bias is not None)
    for name in ("weight", "bias") if linears[0].bias is not None else ("weight",):
        tensor = torch.cat([getattr(linear, name).data for linear in linears])
        setattr(whole, name, nn.Parameter(tensor, requires_grad=False))
        for linear, part in zip(linears, tensor.split(sizes), strict=True):
            getattr(linear, name).data = part
    return whole

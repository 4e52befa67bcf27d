"""Parts of a decoder layer, and of what is tuned on a whole model, that gradients go through: on a
GPU each is a kernel forward and a kernel back, where autograd would run ten that read and write
everything; elsewhere its twin in plain torch.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from common.kernels import inference
from common.kernels.dispatch import triton_kernels
from common.kernels.forms import PackedWeight
from common.numerics.divergence import divergence_terms
from common.numerics.grid import QuantizedLinear


def rms_norm(hidden: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of hidden [rows, size] with a gain [size]."""
    return cast(Tensor, _RmsNorm.apply(hidden, gain, epsilon))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        context.save_for_backward(hidden, gain)
        context.epsilon = epsilon
        return cast(Tensor, inference.add_rms_norm(hidden, None, gain, epsilon))

    @staticmethod
    def backward(context, slope: Tensor):
        hidden, gain = context.saved_tensors
        by_hidden, by_gain = rms_norm_slopes(
            slope.contiguous(), hidden, gain, context.epsilon, context.needs_input_grad[1]
        )
        return by_hidden, by_gain, None


def rms_norm_slopes(
    slope: Tensor, hidden: Tensor, gain: Tensor, epsilon: float, with_gain: bool
) -> tuple[Tensor, Tensor | None]:
    """From the derivative by what `rms_norm` puts out [rows, size]: those by hidden [rows, size],
    and by the gain [size] if wanted.
    """
    if kernels := triton_kernels(hidden):
        return kernels.gradients.rms_norm_slopes(slope, hidden, gain, epsilon, with_gain)
    exact, inner = hidden.float(), slope.float() * gain.float()
    inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    normed = exact * inverse
    shared = (inner * normed).mean(-1, keepdim=True)
    by_hidden = ((inner - normed * shared) * inverse).to(hidden.dtype)
    return by_hidden, (slope * normed).sum(0).to(gain.dtype) if with_gain else None


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors [rows, size]."""
    return cast(Tensor, _SiluMul.apply(gate, up))


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(context, gate: Tensor, up: Tensor) -> Tensor:
        context.save_for_backward(gate, up)
        return cast(Tensor, inference.silu_mul(gate, up))

    @staticmethod
    def backward(context, slope: Tensor):
        return silu_mul_slopes(slope.contiguous(), *context.saved_tensors)


def silu_mul_slopes(slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """From the derivative by what `silu_mul` puts out: those by gate and up, all [rows, size]."""
    if kernels := triton_kernels(slope):
        return kernels.gradients.silu_mul_slopes(slope, gate.contiguous(), up.contiguous())
    exact, slope = gate.float(), slope.float()
    share = torch.sigmoid(exact)
    by_gate = slope * up.float() * share * (1 + exact * (1 - share))
    return by_gate.to(gate.dtype), (slope * exact * share).to(up.dtype)


def rotated_heads(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads [batch, length, heads, size] turned by the rotary embedding, whose cosine and sine
    [1 or batch, length, size] have two equal halves.
    """
    return cast(Tensor, _RotatedHeads.apply(heads, cosine, sine))


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(context, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        context.save_for_backward(cosine, sine)
        turned = heads.clone(memory_format=torch.contiguous_format)
        inference.rotate_heads(turned, cosine, sine)
        return turned

    @staticmethod
    def backward(context, slope: Tensor):
        # The derivative turns back.
        cosine, sine = context.saved_tensors
        turned = slope.clone(memory_format=torch.contiguous_format)
        inference.rotate_heads(turned, cosine, -sine)
        return turned, None, None


def scaled_weights(quantized: QuantizedLinear, change: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [out, in] in `dtype` of codes whose scales are multiplied by exp(change), change
    [out, groups]. Nothing of the weights' size is kept beside them.
    """
    return cast(Tensor, _ScaledWeights.apply(change, quantized, dtype))


class _ScaledWeights(torch.autograd.Function):
    @staticmethod
    def forward(context, change: Tensor, quantized: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        scale = quantized.scale * change.exp()
        packed = PackedWeight(quantized.codes, scale, quantized.zero_point, 8)
        weight = inference.unpack(packed, dtype)
        context.save_for_backward(weight)
        context.groups = scale.shape[1]
        return weight

    @staticmethod
    def backward(context, slope: Tensor):
        # Each weight's derivative by its own change is the weight.
        (weight,) = context.saved_tensors
        return sum_of_groups(slope.contiguous(), weight, context.groups), None, None


def sum_of_groups(one: Tensor, other: Tensor, groups: int) -> Tensor:
    """Sums over the groups of channels of the product of two tensors [out, in]: [out, groups],
    float32.
    """
    if kernels := triton_kernels(one):
        return kernels.gradients.sum_of_groups(one, other, groups)
    return (one.float() * other.float()).unflatten(1, (groups, -1)).sum(-1)


def divergence_and_slope(
    expected: Tensor, found: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """The Kullback-Leibler divergence, in nats, of what logits `found` say from what `expected`
    say, both [tokens, vocabulary]: [tokens], float32. And, if wanted, its derivative by `found`,
    in its type.
    """
    if kernels := triton_kernels(found):
        return kernels.gradients.divergence_and_slope(expected, found, with_slope)
    wanted, own = (torch.log_softmax(logits.float(), -1) for logits in (expected, found))
    divergence = divergence_terms(wanted, own).sum(-1)
    return divergence, own.exp_().sub_(wanted.exp_()).to(found.dtype) if with_slope else None

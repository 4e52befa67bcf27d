"""The Triton kernels behind `common.kernels.gradients`, which says what each computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.launch_triton import begin, launch

# Programs that share the rows of a norm, each with a sum of its own over them.
PROGRAMS = 1024
# Elements that a program of the other kernels takes at once.
BLOCK = 2048


def rms_norm_slopes(
    slope: Tensor, hidden: Tensor, gain: Tensor, epsilon: float, with_gain: bool
) -> tuple[Tensor, Tensor | None]:
    rows, size = hidden.shape
    programs = min(rows, PROGRAMS)
    by_hidden = torch.empty_like(hidden)
    by_gain = torch.empty(programs if with_gain else 0, size, device=hidden.device)
    _rms_norm_slopes[(programs,)](
        slope,
        hidden,
        gain,
        by_hidden,
        by_gain,
        rows,
        size,
        epsilon,
        WITH_GAIN=with_gain,
        BLOCK=triton.next_power_of_2(size),
        num_warps=8 if size > 2048 else 4,
        **launch(),
    )
    return by_hidden, by_gain.sum(0).to(gain.dtype) if with_gain else None


@triton.jit
def _rms_norm_slopes(
    slope,
    hidden,
    gain,
    by_hidden,
    by_gain,
    rows,
    size,
    epsilon,
    WITH_GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    first = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < size
    weight = tl.load(gain + column, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        place = row * tl.cast(size, tl.int64) + column
        exact = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
        outer = tl.load(slope + place, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(exact * exact, 0) / size + epsilon)
        normed = exact * inverse
        if WITH_GAIN:
            total += outer * normed
        inner = outer * weight
        result = (inner - normed * (tl.sum(inner * normed, 0) / size)) * inverse
        tl.store(by_hidden + place, result.to(by_hidden.dtype.element_ty), mask=mask)
    if WITH_GAIN:
        tl.store(by_gain + first * size + column, total, mask=mask)


def silu_mul_slopes(slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
    count = slope.numel()
    _silu_mul_slopes[(triton.cdiv(count, BLOCK),)](
        slope, gate, up, by_gate, by_up, count, BLOCK=BLOCK, num_warps=8, **launch()
    )
    return by_gate, by_up


@triton.jit
def _silu_mul_slopes(
    slope, gate, up, by_gate, by_up, count, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    begin(OVERLAP)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    outer = tl.load(slope + place, mask=mask, other=0.0).to(tl.float32)
    exact = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(exact)
    result = outer * factor * share * (1 + exact * (1 - share))
    tl.store(by_gate + place, result.to(by_gate.dtype.element_ty), mask=mask)
    tl.store(by_up + place, (outer * exact * share).to(by_up.dtype.element_ty), mask=mask)


def sum_of_groups(one: Tensor, other: Tensor, groups: int) -> Tensor:
    rows, channels = one.shape
    size = channels // groups
    result = torch.empty(rows, groups, device=one.device)
    lanes = triton.next_power_of_2(size)
    at_once = max(1, min(BLOCK // lanes, triton.next_power_of_2(groups)))
    _sum_of_groups[(rows, triton.cdiv(groups, at_once))](
        one,
        other,
        result,
        groups,
        size,
        GROUPS=at_once,
        LANES=lanes,
        num_warps=8 if lanes > BLOCK else 4,
        **launch(),
    )
    return result


@triton.jit
def _sum_of_groups(
    one,
    other,
    result,
    groups,
    size,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)
    mask = (group < groups)[:, None] & (lane < size)[None, :]
    place = row * groups * size + group[:, None] * size + lane[None, :]
    product = tl.load(one + place, mask=mask, other=0.0).to(tl.float32) * tl.load(
        other + place, mask=mask, other=0.0
    ).to(tl.float32)
    tl.store(result + row * groups + group, tl.sum(product, 1), mask=group < groups)


def divergence_and_slope(
    expected: Tensor, found: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    tokens, vocabulary = found.shape
    divergence = torch.empty(tokens, device=found.device)
    slope = torch.empty_like(found) if with_slope else found
    _divergence[(tokens,)](
        expected,
        found,
        divergence,
        slope,
        vocabulary,
        WITH_SLOPE=with_slope,
        BLOCK=2 * BLOCK,
        num_warps=8,
        **launch(),
    )
    return divergence, slope if with_slope else None


@triton.jit
def _divergence(
    expected,
    found,
    divergence,
    slope,
    vocabulary,
    WITH_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program reads the logits of a token once for the sums, which are relative to the largest
    logit so far, and once more for the derivative.
    """
    begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    low = float("-inf")
    wanted_top, own_top = low, low
    wanted_sum, own_sum, apart = 0.0, 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        mask = start + column < vocabulary
        place = token * vocabulary + start + column
        wanted = tl.load(expected + place, mask=mask, other=low).to(tl.float32)
        own = tl.load(found + place, mask=mask, other=low).to(tl.float32)
        top = tl.maximum(wanted_top, tl.max(wanted, 0))
        part, smaller = tl.exp(wanted - top), tl.exp(wanted_top - top)
        wanted_sum = wanted_sum * smaller + tl.sum(part, 0)
        difference = tl.where(mask, wanted, 0.0) - tl.where(mask, own, 0.0)
        apart = apart * smaller + tl.sum(part * difference, 0)
        wanted_top = top
        top = tl.maximum(own_top, tl.max(own, 0))
        own_sum = own_sum * tl.exp(own_top - top) + tl.sum(tl.exp(own - top), 0)
        own_top = top
    wanted_log, own_log = wanted_top + tl.log(wanted_sum), own_top + tl.log(own_sum)
    tl.store(divergence + token, apart / wanted_sum - (wanted_log - own_log))
    if WITH_SLOPE:
        for start in range(0, vocabulary, BLOCK):
            mask = start + column < vocabulary
            place = token * vocabulary + start + column
            wanted = tl.load(expected + place, mask=mask, other=low).to(tl.float32)
            own = tl.load(found + place, mask=mask, other=low).to(tl.float32)
            result = tl.exp(own - own_log) - tl.exp(wanted - wanted_log)
            tl.store(slope + place, result.to(slope.dtype.element_ty), mask=mask)

"""The integer grid against the definition written out in float64, and against
compressed-tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.base.errors import UserError
from common.checkpoint.tensors import compress, decompress, stored_codes
from common.kernels.rounding import search_range
from common.numerics.grid import (
    Grid,
    QuantizedLinear,
    dequantize,
    grouped,
    min_max,
    quantize,
    resolve_group_size,
)

GRIDS = [
    Grid(bits, size, symmetric)
    for bits in (2, 3, 4, 8)
    for size in (32, None)
    for symmetric in (False, True)
]


def by_definition(weight, scale, zero_point, grid):
    """Nearest point of the grid, element by element in float64."""
    weight, scale, zero_point = (t.double().numpy() for t in (weight, scale, zero_point))
    size = weight.shape[1] // scale.shape[1]
    result = np.empty_like(weight)
    codes = np.arange(grid.code_min, grid.code_max + 1)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            points = (codes - zero_point[row, column // size]) * scale[row, column // size]
            result[row, column] = points[np.abs(points - weight[row, column]).argmin()]
    return result


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_quantize_gives_the_nearest_point(grid, generator):
    weight = torch.randn(6, 64, generator=generator) * 0.1 + 0.02
    scale, zero_point = min_max(grouped(weight, grid), grid)
    codes = quantize(weight, scale, zero_point, grid)
    found = dequantize(codes, scale, zero_point, grid).double().numpy()
    nearest = by_definition(weight, scale, zero_point, grid)
    distance = np.abs(found - weight.double().numpy())
    assert (distance <= np.abs(nearest - weight.double().numpy()) + 1e-7).all()
    assert codes.min() >= grid.code_min and codes.max() <= grid.code_max


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_is_never_worse_than_the_full_range(grid, generator):
    weight = torch.randn(16, 64, generator=generator) ** 3
    importance = torch.rand(64, generator=generator) * 10 + 0.01

    def error(scale, zero_point):
        difference = (
            dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid) - weight
        )
        return grouped(difference.square() * importance, grid).sum(-1)

    searched = error(*search_range(weight, grid, importance))
    assert (searched <= error(*min_max(grouped(weight, grid), grid)) * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.integers(1, 7),
    groups=st.integers(1, 3),
    size=st.sampled_from([32, 64, None]),
    seed=st.integers(0, 2**31),
    magnitude=st.sampled_from([1e-4, 1.0, 300.0]),
    constant=st.booleans(),
)
def test_packing_gives_back_the_same_weights(
    bits, symmetric, rows, groups, size, seed, magnitude, constant
):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, size, symmetric)
    weight = torch.randn(rows, groups * (size or 32), generator=generator) * magnitude
    if constant:
        weight[0] = weight[0, 0]
    scale, zero_point = min_max(grouped(weight, grid), grid)
    linear = QuantizedLinear(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)
    state = compress(linear, torch.bfloat16)
    codes, zeros = stored_codes(state, grid)
    assert torch.equal(codes, linear.codes)
    assert zeros is None or torch.equal(zeros.float(), zero_point)
    assert torch.equal(decompress(state, grid), linear.dequantize())
    assert torch.isfinite(linear.dequantize()).all()


def test_zero_rows_stay_zero():
    grid = Grid(4, 32)
    weight = torch.zeros(2, 64)
    scale, zero_point = search_range(weight, grid)
    assert (scale > 0).all()
    assert (
        dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid).abs().max()
        == 0
    )


def test_group_size_that_does_not_divide_names_linears_and_ways_out():
    sizes = {"self_attn.q_proj": 576, "mlp.down_proj": 1536}
    assert resolve_group_size("auto", sizes) == 64
    assert resolve_group_size("channel", sizes) is None
    assert resolve_group_size("64", sizes) == 64
    with pytest.raises(
        UserError, match=r"group size 128 does not divide 576 \(q_proj\); use --group-size 64 or 32"
    ):
        resolve_group_size("128", sizes)
    with pytest.raises(UserError, match="channel"):
        resolve_group_size("auto", {"o_proj": 100})

"""Codes as GGUF's blocks: read back by the gguf package, against float64; rows of q and k."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from common.exporting.blocks import block_type, has_blocks, interleaved, minimum, pack, row_bytes
from common.numerics.grid import Grid


def some(grid, rows, columns, scale_dtype, generator):
    """Random codes over the whole range, scales and zero-points."""
    groups = grid.groups(columns)
    ends = grid.code_min, grid.code_max + 1
    codes = torch.randint(*ends, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0, :2] = torch.tensor([grid.code_min, grid.code_max], dtype=torch.int8)
    scale = torch.rand(rows, groups, generator=generator).mul_(0.02).add_(1e-4).to(scale_dtype)
    zero_point = torch.randint(*ends, (rows, groups), generator=generator, dtype=torch.int8)
    return codes, scale, None if grid.symmetric else zero_point


def reference(codes, scale, zero_point, grid):
    """What the codes stand for, in float64, one by one group."""
    columns, groups = codes.shape[1], scale.shape[1]
    size = columns // groups
    values = torch.empty(codes.shape, dtype=torch.float64)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        zero = 0 if zero_point is None else zero_point[:, group : group + 1].double()
        values[:, part] = (codes[:, part].double() - zero) * scale[:, group : group + 1].double()
    return values


GRIDS = [
    (Grid(4, 32), 96),
    (Grid(4, 64), 192),
    (Grid(4, 96), 288),
    (Grid(4, 128), 384),
    (Grid(4, None), 160),
    (Grid(4, 64, symmetric=True), 192),
    (Grid(4, None, symmetric=True), 32),
    (Grid(8, 32, symmetric=True), 96),
    (Grid(8, 128, symmetric=True), 256),
    (Grid(8, None, symmetric=True), 224),
]


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grid, columns", GRIDS, ids=str)
def test_blocks_read_back(grid, columns, scale_dtype, generator):
    """Exactly what the codes stand for, but for the minimum's last digit, and scales in float32
    that float16 does not hold.
    """
    codes, scale, zero_point = some(grid, 7, columns, scale_dtype, generator)
    kind = block_type(grid)
    blocks = pack(codes, scale, zero_point, grid)
    assert blocks.dtype == torch.uint8 and blocks.shape == (7, row_bytes(kind, columns))
    found = torch.from_numpy(quants.dequantize(blocks.numpy(), kind)).double()
    exact = reference(codes, scale, zero_point, grid)
    if grid.symmetric and scale_dtype != torch.float32:
        assert torch.equal(found, exact)
        return
    # Half a unit in float16's last place, of the minimum and of d, the second once for each step.
    steps = scale.double().repeat_interleave(columns // scale.shape[1], 1)
    levels = 2**grid.bits - 1
    places = levels * 2.0**-11 * (2 if scale_dtype == torch.float32 else 1)
    assert ((found - exact).abs() <= steps * places).all()
    if scale_dtype == torch.bfloat16:
        # Products with zero-points of at most three binary digits fit.
        short = ((zero_point.double() - grid.code_min) % 2 == 0).repeat_interleave(
            columns // scale.shape[1], 1
        )
        assert torch.equal(found[short], exact[short])


def test_against_the_package_s_own_layout(generator):
    """Weights that lie on the grid already are packed by the gguf package into the same bytes."""
    codes = torch.randint(0, 16, (5, 64), generator=generator, dtype=torch.int8) - 8
    for row in codes:  # the package takes the ends of each block for its range
        row[:2] = row[32:34] = torch.tensor([-8, 7])
    scale = torch.tensor([0.5, 0.25, 1.0, 2.0, 0.125]).view(5, 1)
    zero_point = torch.tensor([-3, 0, 2, 4, -8], dtype=torch.int8).view(5, 1)
    grid = Grid(4, None)
    weights = reference(codes, scale, zero_point, grid).float().numpy()
    expected = quants.quantize(weights, GGMLQuantizationType.Q4_1)
    assert np.array_equal(pack(codes.to(torch.int8), scale, zero_point, grid).numpy(), expected)


def test_minimum_is_the_lowest_code_s_weight(generator):
    grid = Grid(4, 32)
    _, scale, zero_point = some(grid, 6, 96, torch.bfloat16, generator)
    lowest = torch.full((6, 96), grid.code_min, dtype=torch.int8)
    exact = reference(lowest, scale, zero_point, grid)[:, ::32]
    assert torch.equal(minimum(scale, zero_point, grid).double(), exact)


def test_grids_without_blocks():
    """Odd widths, group sizes that 32 does not divide, and zero-points at 8 bits."""
    for grid in (Grid(4, 16), Grid(4, 48), Grid(3, 32), Grid(2, None), Grid(8, 32)):
        assert not has_blocks(grid)
    assert row_bytes(GGMLQuantizationType.Q4_1, 64) * 8 / 64 == 5.0
    assert row_bytes(GGMLQuantizationType.Q4_0, 64) * 8 / 64 == 4.5
    assert row_bytes(GGMLQuantizationType.Q8_0, 64) * 8 / 64 == 8.5


@pytest.mark.parametrize("heads, size", [(1, 2), (3, 8), (4, 16)])
def test_interleaved_rows_turn_alike(heads, size, generator):
    """Scores of rotated queries and keys are the same, whichever way channels are paired."""
    width, tokens = 24, 5
    query, key = torch.randn(2, heads * size, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(tokens), 0.3 ** torch.arange(size // 2)).double()

    def scores(query, key, halves):
        turned = []
        for weight in (query, key):
            heads_of = (inputs @ weight.T).view(tokens, heads, size)
            pairs = heads_of.view(tokens, heads, *((2, -1) if halves else (-1, 2)))
            first, second = pairs.unbind(2 if halves else 3)
            cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
            parts = first * cos - second * sin, second * cos + first * sin
            turned.append(torch.cat(parts, -1))
        return torch.einsum("qhd,khd->hqk", *turned)

    expected = scores(query, key, halves=True)
    moved = scores(interleaved(query, heads), interleaved(key, heads), halves=False)
    assert torch.allclose(moved, expected, rtol=1e-12, atol=1e-12)
    # Vectors, such as biases, move likewise.
    assert torch.equal(interleaved(query[:, 0], heads), interleaved(query, heads)[:, 0])

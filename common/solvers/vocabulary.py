"""Embedding and lm_head, the two matrices with a row for each entry of the vocabulary, rounded."""

from __future__ import annotations

import torch

from common.kernels.rounding import search_range
from common.model.source import SourceModel
from common.numerics.grid import Grid, QuantizedLinear, scale_type

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# Rows that are rounded at once.
ROWS_AT_ONCE = 16384


class VocabularyRounding:
    """Rounds embedding and head when it is called, if either is to be.

    codes: of what was rounded, by name.
    records: of the same, bits and relative_output_error, which is ‖Q - W‖ / ‖W‖ of the matrix.

    Args:
        embedding_bits, head_bits: None leaves the matrix as it is.
    """

    def __init__(self, source: SourceModel, embedding_bits: int | None, head_bits: int | None):
        self._source = source
        self._bits = {EMBEDDING: embedding_bits, HEAD: head_bits}
        self.codes: dict[str, QuantizedLinear] = {}
        self.records: dict[str, dict] = {}

    def __call__(self) -> None:
        for name, bits in self._bits.items():
            if bits:
                self.codes[name], error = round_rows(self._source, name, bits)
                self.records[name] = {"bits": bits, "relative_output_error": error}


def round_rows(source: SourceModel, name: str, bits: int) -> tuple[QuantizedLinear, float]:
    """Round the embedding or head to nearest, one symmetric scale per row of the vocabulary, and
    put the result in place. Returns the codes and the relative error of the matrix.
    """
    grid = Grid(bits, None, symmetric=True)
    parameter = source.model.get_submodule(name).weight
    # All of a large vocabulary at once would take gigabytes in float32.
    pieces = parameter.data.split(ROWS_AT_ONCE)
    scale_dtype = scale_type((rows.float() for rows in pieces), grid, source.storage_dtype)
    parts, values, squares = [], [], []
    for stored in pieces:
        rows = stored.float()
        ranges = search_range(rows, grid, scale_dtype=scale_dtype)
        part = QuantizedLinear.nearest(rows, *ranges, grid)
        values.append(part.dequantize(parameter.dtype))
        difference = values[-1].float() - rows
        squares.append(torch.stack([difference.square().sum(), rows.square().sum()]))
        parts.append((part.codes.cpu(), part.scale.cpu(), part.zero_point.cpu()))
    parameter.data = torch.cat(values)
    missed, whole = torch.stack(squares).sum(0).sqrt().tolist()
    codes, scale, zero_point = (torch.cat(column) for column in zip(*parts, strict=True))
    return QuantizedLinear(codes, scale, zero_point, grid), missed / max(whole, 1e-30)

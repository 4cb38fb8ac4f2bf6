"""How a gradient is cut into tiles, as a matrix whose rows or columns are added up by channel.

Everything is worked out from sizes, which may be symbolic but for the channels, and the dtype; without a GPU and
without triton. ``epilogue_backward`` says which matrices there are.
"""

import math
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fusion_backend.kernels.blocks import ENOUGH_PROGRAMS, VECTOR_BYTES
from fusion_backend.kernels.rounding import cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Bytes of a tile, warps of its program, and the tiles that a program adds up where it sums columns."""

    tile_bytes: int
    num_warps: int
    tiles: int


CONFIGS = (Config(4096, 4, 1), Config(16384, 8, 2), Config(16384, 8, 8))

# Contiguous rows shorter than this are not worth a row of a tile.
SHORT_ROW = 128

# A tile's columns at most where they are added up; the more rows it has, the fewer partial sums there are.
WIDEST = 256

# A tile's row is this long or longer, where the matrix has as many columns.
LEAST_ROW_BYTES = 128


def choose_config(total_bytes: int) -> Config:
    """The largest that still gives every multiprocessor of a GPU enough to do."""
    for config in reversed(CONFIGS):
        if guard_or_false(total_bytes >= ENOUGH_PROGRAMS * config.tile_bytes * config.tiles):
            return config
    return CONFIGS[0]


@dataclass(frozen=True)
class Tiling:
    """A matrix [rows, units] of units of ``width`` elements, cut into tiles; see ``_backward_kernel``."""

    rows: int
    units: int
    width: int
    by_row: bool
    tile_rows: int
    tile_units: int
    tiles: int
    num_warps: int

    @property
    def strips(self) -> int:
        return cdiv(self.rows, self.tile_rows * self.tiles)

    @property
    def blocks(self) -> int:
        return cdiv(self.units, self.tile_units)


def tiling_for(grad: torch.Tensor, channels_last: bool, config: Config | None = None) -> Tiling:
    """All but the channels may be symbolic."""
    N, C, *sizes = grad.shape
    C, S = int(C), math.prod(sizes)
    itemsize = grad.dtype.itemsize
    config = config or choose_config(grad.numel() * itemsize)

    by_row = not channels_last and guard_or_false(S >= SHORT_ROW)
    if by_row:
        rows, columns = N * C, S
    elif channels_last:
        rows, columns = N * S, C
    else:
        rows, columns = N, C * S

    width = VECTOR_BYTES // itemsize
    if not guard_or_false(columns % width == 0):
        width, config = 1, CONFIGS[0]

    # Where an element has an address or a sum of its own, it takes a register, as if all were fp32.
    elements = config.tile_bytes // (itemsize if by_row and width > 1 else 4)
    if by_row:
        tile_columns = _row_tile(columns, elements)
    else:
        tile_columns = _column_tile(C, LEAST_ROW_BYTES // itemsize) if channels_last else WIDEST
    return Tiling(
        rows,
        columns // width,
        width,
        by_row,
        elements // tile_columns,
        tile_columns // width,
        1 if by_row else config.tiles,
        config.num_warps,
    )


def _row_tile(S: int, elements: int) -> int:
    """The longest part of a tile that leaves at most an eighth of the tiles empty."""
    for columns in (elements, elements // 4):
        if guard_or_false(8 * cdiv(S, columns) * columns <= 9 * S):
            return columns
    return SHORT_ROW


def _column_tile(C: int, least: int) -> int:
    """The widest power of two that leaves at most a third of the tiles empty, or what leaves least."""
    candidates = [min(next_power_of_2(C), WIDEST)]
    while candidates[-1] > least:
        candidates.append(candidates[-1] // 2)
    padded = {columns: cdiv(C, columns) * columns for columns in candidates}
    good = [columns for columns in candidates if 2 * padded[columns] <= 3 * C]
    return good[0] if good else min(candidates, key=padded.__getitem__)

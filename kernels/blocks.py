"""How a pass over memory is cut into blocks: configurations, which is chosen, and how a block finds its channels.

Everything is worked out from sizes, which may be symbolic but for the channels, and the dtype; without a GPU and
without triton. See ``epilogue``, whose kernels are launched so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fusion_backend.kernels.rounding import next_power_of_2

VECTOR_BYTES = 16


@dataclass(frozen=True)
class Config:
    """Bytes that a program reads, and its warps. Telling caches that nothing is read twice costs a tenth: measured."""

    block_bytes: int
    num_warps: int

    def elements(self, dtype: torch.dtype) -> int:
        return self.block_bytes // dtype.itemsize


# Measured on an H200 (benchmarks/results/epilogue_nvidia-h200.json): the first reaches 0.97 to 1.00 of the speed of a
# copy, except where rows are no whole vectors and elements are read one by one: there that is the second.
FLAT_CONFIGS = (Config(4096, 4), Config(16384, 8))

# Where tiles are turned: few programs, and many.
TRANSPOSE_CONFIGS = (Config(8192, 4), Config(16384, 4))

# A tile's edge along the channels: 256 bytes of fp32, 128 of half precision.
TRANSPOSE_CHANNELS = 64

# Fewer programs than this leave multiprocessors idle while the last ones finish.
ENOUGH_PROGRAMS = 1024


def is_aligned(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> bool:
    """Whether the run of elements of one channel, or one pixel where channels are last, is whole vectors."""
    _, C, *sizes = shape
    return guard_or_false((C if channels_last else math.prod(sizes)) % (VECTOR_BYTES // dtype.itemsize) == 0)


def choose_config(transposing: bool, total_bytes: int, aligned: bool = True) -> Config:
    """The configuration for a tensor of ``total_bytes``; ``aligned`` as by ``is_aligned``."""
    small, large = TRANSPOSE_CONFIGS if transposing else FLAT_CONFIGS
    fills = guard_or_false(total_bytes >= ENOUGH_PROGRAMS * large.block_bytes)
    return large if fills and (transposing or not aligned) else small


@dataclass(frozen=True)
class Blocks:
    """A run of elements cut into blocks, and the lookup of their channels; ``_flat_kernel`` says what each means."""

    config: Config
    channels: int
    spatial: int
    whole_rows: bool
    whole_pixels: bool
    width: int


def blocks_for(
    shape: Sequence[int], dtype: torch.dtype, channels_last: bool, known_at_once: bool, config: Config
) -> Blocks:
    """``known_at_once``: no coefficient depends on the channel."""
    _, C, *sizes = shape
    S = math.prod(sizes)
    vector = VECTOR_BYTES // dtype.itemsize

    def is_whole_rows(config: Config) -> bool:
        return known_at_once or (not channels_last and guard_or_false(config.elements(dtype) <= S))

    # Where each element's channel is worked out by itself, large blocks need more registers than there are.
    aligned = is_aligned(shape, dtype, channels_last)
    if not aligned and not is_whole_rows(config):
        config = FLAT_CONFIGS[0]

    block = config.elements(dtype)
    if is_whole_rows(config):
        return Blocks(config, C, S, True, False, block)
    if channels_last:
        C = int(C)
        whole_pixels = vector <= C <= block and C & (C - 1) == 0
        width = C if whole_pixels else vector if aligned else 1
        return Blocks(config, C // width, 1, False, whole_pixels, width)
    width = vector if aligned else 1
    return Blocks(config, C, S // width, False, False, width)


@dataclass(frozen=True)
class Tiles:
    """Tiles of channels times pixels, and the units in which the two are counted; see ``_transpose_kernel``."""

    c_unit: int
    s_unit: int
    block_c: int
    block_s: int


def tiles_for(shape: Sequence[int], dtype: torch.dtype, config: Config) -> Tiles:
    _, C, *sizes = shape
    S = math.prod(sizes)
    vector = VECTOR_BYTES // dtype.itemsize
    C = int(C)
    c_unit = vector if C % vector == 0 else 1
    s_unit = vector if guard_or_false(S % vector == 0) else 1
    block_c = min(next_power_of_2(C), TRANSPOSE_CHANNELS)
    return Tiles(c_unit, s_unit, block_c, config.elements(dtype) // block_c)

"""How the transposed convolution is cut into programs: a table of configurations, and the rule that picks from it.

Everything is worked out from sizes, the dtype and a block's shared memory, without a GPU and without triton.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

from fusion_backend.kernels.problem import SMALLEST_EDGE, Problem
from fusion_backend.kernels.rounding import cdiv, next_power_of_2


@dataclass(frozen=True)
class Config:
    """Rows (positions), columns (phases times channels), bytes of C_in a step; warps, and steps in flight."""

    rows: int
    columns: int
    depth_bytes: int
    num_warps: int
    num_stages: int


# Each table goes from much work a program to little.
DOT_CONFIGS = (
    Config(128, 256, 128, 8, 4),
    Config(128, 128, 128, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(64, 128, 128, 4, 3),
    Config(128, 64, 128, 4, 3),
    Config(128, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(128, 32, 64, 4, 4),
    Config(128, 16, 128, 4, 3),
    Config(128, 16, 64, 4, 4),
)

# Exact fp32 has no tensor core: a thread multiplies and adds.
EXACT_CONFIGS = (
    Config(128, 64, 64, 8, 2),
    Config(64, 64, 64, 8, 3),
    Config(64, 32, 64, 4, 2),
    Config(64, 16, 64, 4, 2),
)

# One channel of C_in a step, no product.
CHANNEL_CONFIGS = (
    Config(32, 64, 0, 4, 1),
    Config(128, 16, 0, 4, 1),
    Config(256, 8, 0, 4, 1),
    Config(512, 4, 0, 4, 1),
    Config(1024, 2, 0, 4, 1),
    Config(1024, 1, 0, 4, 1),
)

FEW_WARPS = 4
SMALLEST_DEPTH = 64  # bytes
MOST_WIDE = 8  # phases along W that fill a 32-byte sector of fp32
MOST_JOINED = 4  # accumulators: more of them leave too few channels for each
MOST_CHANNELS_CONTIGUOUS = 4  # of a tile that is written along W, without a product
LEAST_CHANNELS_LAST = 16  # of a tile that is written along channels, without a product
NO_WASTE = 32  # channels in a tile, of which any number may be padding

# Of 255 registers a thread: accumulators, or half as many where x goes through registers, and then that x.
MOST_ACCUMULATORS = 128
MOST_INPUTS = 32

# Elements of a tile. In larger ones, 128x256, bits came out wrong on an H200 by triton 3.6, others in each launch, and
# the results beside them right.
LARGEST_WITH_BITS = 128 * 128

# Fewer programs than this leave multiprocessors idle: about two for each of a large GPU.
ENOUGH_PROGRAMS = 264


@dataclass(frozen=True)
class Tiling:
    """A configuration cut to a problem: its columns are joined * shared phases times block_c channels."""

    config: Config
    joined: int
    shared: tuple[int, int, int]
    block_c: int
    block_k: int
    programs: int  # symbolic where the problem's positions are


def configs_of(problem: Problem) -> tuple[Config, ...]:
    if not problem.dot:
        return CHANNEL_CONFIGS
    return EXACT_CONFIGS if problem.exact else DOT_CONFIGS


def choose_tiling(problem: Problem) -> Tiling:
    """The first configuration that fits and gives every multiprocessor something to do; else the last that fits.

    Where phases are joined on their way to a contiguous output, four warps are faster than eight: measured.
    """
    fitting = tuple(tilings(problem))
    joined = tuple(tiling for tiling in fitting if tiling.joined > 1 and not problem.exact)
    few_warps = tuple(tiling for tiling in joined if tiling.config.num_warps <= FEW_WARPS)
    for tiling in (*few_warps, *fitting):
        if guard_or_true(tiling.programs >= ENOUGH_PROGRAMS):
            return tiling
    return fitting[-1]


def tilings(problem: Problem) -> Iterator[Tiling]:
    """Every configuration that fits, cut to the problem. There is always one."""
    for config in configs_of(problem):
        tiling = tiling_for(problem, config)
        if tiling is not None:
            yield tiling


def tiling_for(problem: Problem, config: Config) -> Tiling | None:
    """None where columns or depth would be empty in part, or where registers or shared memory would not do."""
    return _product(problem, config) if problem.dot else _channels(problem, config)


def _product(problem: Problem, config: Config) -> Tiling | None:
    sharing_d, sharing_h, sharing_w = (axis.sharing for axis in problem.axes)
    joined = shared_w = 1
    if not problem.out_last:
        wide = min(next_power_of_2(problem.axes[2].stride), MOST_WIDE)
        shared_w = min(sharing_w, wide)
        joined = min(wide // shared_w, MOST_JOINED)
    columns = config.columns // joined
    if columns < SMALLEST_EDGE:
        return None
    block_c = min(next_power_of_2(problem.C_out), columns // shared_w)
    if problem.out_last:
        shared_w = min(sharing_w, columns // block_c)
    shared_h = min(sharing_h, columns // (block_c * shared_w))
    shared_d = min(sharing_d, columns // (block_c * shared_w * shared_h))
    phases = shared_d * shared_h * shared_w
    block_c = max(block_c, SMALLEST_EDGE // phases)
    block_k = max(SMALLEST_EDGE, min(next_power_of_2(problem.C_in), config.depth_bytes // problem.dtype.itemsize))

    padded = -(-problem.C_out // block_c) * block_c
    if phases * block_c != columns or (3 * padded > 4 * problem.C_out and block_c > NO_WASTE):
        return None
    if block_k * problem.dtype.itemsize < config.depth_bytes and config.depth_bytes > SMALLEST_DEPTH:
        return None
    threads = 32 * config.num_warps
    through_registers = problem.ahead or problem.prologue or problem.dtype == torch.float32
    if config.rows * config.columns > (MOST_ACCUMULATORS >> through_registers) * threads:
        return None
    if through_registers and config.rows * block_k > MOST_INPUTS * threads:
        return None
    if config.num_stages * (config.rows + columns) * block_k * problem.dtype.itemsize > problem.shared_limit:
        return None
    return _tiling(problem, config, joined, (shared_d, shared_h, shared_w), block_c, block_k)


def _channels(problem: Problem, config: Config) -> Tiling | None:
    channels = next_power_of_2(problem.C_out * problem.groups)
    if problem.out_last:
        joined, least, most = 1, min(channels, LEAST_CHANNELS_LAST), channels
    else:
        joined, least, most = min(next_power_of_2(problem.axes[2].stride), MOST_JOINED), 1, MOST_CHANNELS_CONTIGUOUS
    block_c = config.columns // joined
    if not least <= block_c <= most:
        return None
    return _tiling(problem, config, joined, (1, 1, 1), block_c, 1)


def _tiling(
    problem: Problem, config: Config, joined: int, shared: tuple[int, int, int], block_c: int, block_k: int
) -> Tiling:
    together = (shared[0], shared[1], shared[2] * joined)
    phases = math.prod(-(-axis.stride // size) for axis, size in zip(problem.axes, together, strict=True))
    runs, channels = (problem.groups, problem.C_out) if problem.dot else (1, problem.C_out * problem.groups)
    rows = cdiv(problem.positions, config.rows)
    return Tiling(config, joined, shared, block_c, block_k, rows * phases * runs * -(-channels // block_c))


def why_no_bits(problem: Problem, tiling: Tiling, W_out: int) -> str | None:
    """Why the kernel cannot write the gate's bits beside an output whose rows have W_out elements; None: it can.

    The 8 elements of a byte must be 8 neighbours in a row of one tile.
    """
    if tiling.config.rows * tiling.config.columns > LARGEST_WITH_BITS:
        return f"tiles of {tiling.config.rows} times {tiling.config.columns} elements are too large for right ones"
    if problem.out_last:
        channels = problem.C_out if problem.dot else problem.C_out * problem.groups
        if channels % 8 or tiling.block_c % 8:
            return f"{channels} channels, {tiling.block_c} a tile: they are not multiples of 8"
        return None
    axis = problem.axes[2]
    wide = tiling.joined * tiling.shared[2]
    if axis.stride % wide or (wide != axis.stride and wide % 8):
        return f"{wide} phases of stride {axis.stride} a program are neither all nor a multiple of 8"
    if tiling.config.rows * wide % 8:
        return f"{tiling.config.rows} positions of {wide} phases are not a multiple of 8"
    if not guard_or_false(W_out % 8 == 0) or not guard_or_false(cdiv(W_out, axis.stride) * wide % 8 == 0):
        return f"rows of {W_out} elements are not made of whole bytes"
    return None

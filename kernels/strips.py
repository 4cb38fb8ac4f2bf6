"""How a row march is cut into strips, segments and programs: what it takes, its configurations, and which is chosen.

Everything is worked out from sizes, the dtype and a block's shared memory, without a GPU and without triton. The limits
on shared memory and registers are where compilers were seen to spill; the choice is read off measurements on an H200,
benchmarks/results/conv_transpose-nvidia-h200-*.json.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import LARGE_SHARED_MEMORY, SMALLEST_EDGE, Problem
from fusion_backend.kernels.rounding import cdiv, next_power_of_2
from fusion_backend.kernels.tiling import ENOUGH_PROGRAMS, NO_WASTE


@dataclass(frozen=True)
class Config:
    """Columns of a strip and output channels of a program; its warps, and the rows of x in flight."""

    pixels: int
    channels: int
    num_warps: int
    num_stages: int


# From much work a program to little, and from many rows of x in flight to few.
CONFIGS = (
    Config(64, 64, 4, 3),
    Config(64, 64, 4, 2),
    Config(64, 32, 4, 3),
    Config(64, 32, 4, 2),
    Config(64, 16, 4, 3),
    Config(64, 16, 4, 2),
)

# Bytes of shared memory in which a warp turns a tile of pixels by channels, piece by piece.
TURNED = 2048

# Bytes of shared memory for whatever else a compiler puts there.
BARRIERS = 256

# What a multiprocessor keeps of its shared memory for each block.
RESERVED = 1024

# AMD's alone have so little; a thread of eight of their larger warps has too few registers.
LITTLE_SHARED_MEMORY = 64 * 1024

# Of tensor memory, for a step's accumulators of 64 pixels. What does not fit there is compiled to a trap.
TENSOR_COLUMNS = 384

# A segment of fewer rows spends too much on its halo and on the weight.
LEAST_ROWS = 8

# Where compilers were seen to run out of 255 registers, on the scale of ``_registers``. Where products read the weight
# from shared memory asynchronously they need fewer, but for each product its address. Not counted: rows of x whose
# length is odd, contiguous, which are loaded element by element.
MOST_REGISTERS = 188
MOST_REGISTERS_ASYNCHRONOUS = 216
MOST_PRODUCTS_ASYNCHRONOUS = 72


@dataclass(frozen=True)
class March:
    """A configuration cut to a problem: strips, in segments of ``length`` rows. All but ``config`` may be symbolic."""

    config: Config
    strips: int
    length: int
    programs: int


def why_not(problem: Problem) -> str | None:
    """Why the march does not take a problem, in words; None where it does."""
    if problem.groups > 1:
        return f"it has {problem.groups} groups, and a program of the march shares x among all its channels"
    if any(axis.dilation > 1 for axis in problem.axes):
        return "it is dilated"
    if problem.axes[:2] == (Axis(), Axis()):
        return "no dimension but W has a kernel, so there is none to march along"
    if not problem.dot:
        return f"{problem.C_in} times {problem.C_out} channels are too few for tensor cores"
    if problem.exact:
        return "float32 without TF32 has no tensor cores"
    if problem.prologue and problem.ahead:
        return "x that is loaded 2 bytes at a time leaves no registers for what is done to it first"
    if problem.tensor_memory and problem.dtype == torch.float32:
        return "float32, rounded to TF32 in registers, does not go into tensor memory without spills"
    if not configs_for(problem):
        taps = math.prod(axis.kernel for axis in problem.axes)
        return (
            f"{taps} taps times {problem.C_in} channels are too much for {problem.shared_limit} bytes of shared "
            "memory, or for the registers"
        )
    return None


def why_no_bits(problem: Problem, config: Config, W_out: int) -> str | None:
    """Why the march cannot write the gate's bits beside an output whose rows have W_out elements; None: it can.

    The 8 elements of a byte must be 8 neighbours in a row of one tile.
    """
    if problem.out_last:
        return f"{problem.C_out} channels are not a multiple of 8" if problem.C_out % 8 else None
    stride = problem.axes[2].stride
    if stride not in (1, 2, 4):
        return f"{stride} phases of a row are stored one by one"
    if config.pixels * stride % 8 or not guard_or_false(W_out % 8 == 0):
        return f"rows of {W_out} elements are not made of whole bytes"
    return None


def configs_for(problem: Problem) -> tuple[Config, ...]:
    """The configurations that fit; for a problem that the march takes there is one."""
    fitting = (config for config in CONFIGS if _fits(problem, config))
    return tuple(config for config in fitting if not problem.tensor_memory or _fits_tensor_memory(problem, config))


def choose_march(problem: Problem, shape: Sequence[int]) -> March:
    """For an x of ``shape``: the widest of those that keep all multiprocessors busy, else the narrowest.

    Three rows of x in flight, if that fits; but two where that lets a multiprocessor hold two blocks of float32, and
    there are as many.
    """
    fitting = configs_for(problem)
    for channels in sorted({config.channels for config in fitting}, reverse=True):
        deep, *shallow = (config for config in fitting if config.channels == channels)
        march = march_for(problem, shape, deep)
        if not guard_or_true(march.programs >= ENOUGH_PROGRAMS // 2):
            continue
        paired = [config for config in shallow if _resident_warps(problem, config) > _resident_warps(problem, deep)]
        if paired and problem.dtype.itemsize == 4 and guard_or_true(march.programs >= ENOUGH_PROGRAMS):
            return march_for(problem, shape, paired[0])
        return march
    narrowest = min(config.channels for config in fitting)
    return march_for(problem, shape, next(config for config in fitting if config.channels == narrowest))


def march_for(problem: Problem, shape: Sequence[int], config: Config, segments: int | None = None) -> March:
    """As many ``segments`` as give every multiprocessor two programs, if they are not given."""
    N, _, *sizes = shape
    along_r, along_m, along_w = zip(turned(problem, problem.axes), turned(problem, three_sizes(sizes)), strict=True)
    columns = N * math.prod(cdiv(axis.output_size(size), axis.stride) for axis, size in (along_m, along_w))
    strips = cdiv(columns, config.pixels)
    tiles = cdiv(problem.C_out, config.channels)
    axis, size = along_r
    rows = cdiv(axis.output_size(size) + axis.padding, axis.stride) - axis.padding // axis.stride
    if segments is None:
        few = ENOUGH_PROGRAMS // torch.sym_max(strips * tiles, 1)
        segments = torch.sym_max(torch.sym_min(few, rows // LEAST_ROWS), 1)
    length = cdiv(rows, segments)
    return March(config, strips, length, strips * cdiv(rows, length) * tiles)


def shared_memory(problem: Problem, config: Config) -> int:
    """Bytes: the weight, the rows of x in flight, and a tile of the output on its way to contiguous stores."""
    itemsize, depth = problem.dtype.itemsize, block_k_of(problem)
    taps = math.prod(axis.kernel for axis in problem.axes)
    # 16-bit x is still being read when the next row is copied; float32 is rounded in registers. With a prologue, any x.
    late = problem.prologue or (problem.dtype.itemsize == 2 and problem.shared_limit > LARGE_SHARED_MEMORY)
    in_flight = config.num_stages - (not late)
    narrow = _narrow_shifts(problem)
    weight = taps * depth * config.channels * itemsize
    x = ((_shifts(problem) - narrow) * in_flight + narrow) * config.pixels * depth * itemsize
    y = config.pixels * config.channels * itemsize
    if not problem.out_last:
        joined = {2: 2, 4: 4}.get(problem.axes[2].stride, 1)
        y = min(y * joined, TURNED * config.num_warps)
    return weight + x + y + BARRIERS


def has_room(problem: Problem, config: Config, tensors: int) -> bool:
    """For tiles of so many tensors of the output's shape: a step's outputs, for each row of x that is in flight."""
    steps = math.prod(axis.stride for axis in problem.axes)
    tile = steps * config.pixels * config.channels * problem.dtype.itemsize
    return shared_memory(problem, config) + tensors * tile * (config.num_stages - 1) <= problem.shared_limit


def _registers(problem: Problem, config: Config) -> int:
    """A measure of what a thread needs: accumulators, outputs, x, the addresses of narrow loads and of products."""
    threads = 32 * config.num_warps
    row, middle, column = turned(problem, problem.axes)
    acc = config.pixels * config.channels // threads
    x = config.pixels * block_k_of(problem) // threads
    begun = max((row.kernel - row.stride) * middle.stride, 1)
    return (
        begun * column.stride * acc
        + column.stride * acc * problem.dtype.itemsize // 4 * (1 + problem.kept)
        + _shifts(problem) * x
        + _narrow_shifts(problem) * x // 4
        + _products(problem)
    )


def _fits(problem: Problem, config: Config) -> bool:
    if config.channels > max(SMALLEST_EDGE, next_power_of_2(problem.C_out)):
        return False
    padded = cdiv(problem.C_out, config.channels) * config.channels
    if 3 * padded > 4 * problem.C_out and config.channels > NO_WASTE:
        return False
    if config.num_warps > 4 and problem.shared_limit <= LITTLE_SHARED_MEMORY:
        return False
    most = MOST_REGISTERS
    if problem.shared_limit > LARGE_SHARED_MEMORY:
        most = MOST_REGISTERS_ASYNCHRONOUS
        if _products(problem) > MOST_PRODUCTS_ASYNCHRONOUS:
            return False
    return has_room(problem, config, problem.tensors) and _registers(problem, config) <= most


def _fits_tensor_memory(problem: Problem, config: Config) -> bool:
    row, middle, column = turned(problem, problem.axes)
    accs = max(row.kernel, row.stride) * middle.stride * column.stride
    # One more row of x may be in flight.
    x = _shifts(problem) * config.pixels * block_k_of(problem) * problem.dtype.itemsize
    columns = accs * config.channels * config.pixels // 64
    return columns <= TENSOR_COLUMNS and shared_memory(problem, config) + x <= problem.shared_limit


def _resident_warps(problem: Problem, config: Config) -> int:
    """Of up to two blocks, which is what registers allow."""
    twice = 2 * (shared_memory(problem, config) + RESERVED) <= problem.shared_limit + RESERVED
    return config.num_warps * (2 if twice and config.num_warps == 4 else 1)


def _products(problem: Problem) -> int:
    """Of a step, each as deep as a tensor core takes it: 32 bytes."""
    taps = math.prod(axis.kernel for axis in problem.axes)
    return taps * block_k_of(problem) * problem.dtype.itemsize // 32


def _shifts(problem: Problem) -> int:
    """Tiles of x in a step."""
    _, *others = turned(problem, problem.axes)
    return math.prod(map(_shifts_along, others))


def _narrow_shifts(problem: Problem) -> int:
    """Those of them that start at odd addresses: 2 bytes at a time cannot be copied to shared memory asynchronously."""
    shifts, along = _shifts(problem), _shifts_along(problem.axes[2])
    return shifts - shifts // along if problem.ahead else 0


def _shifts_along(axis: Axis) -> int:
    """As many as there are multiples of the stride among all phase + padding - tap."""
    return (axis.padding + axis.stride - 1) // axis.stride + 1 + (axis.kernel - 1 - axis.padding) // axis.stride


def block_k_of(problem: Problem) -> int:
    return max(SMALLEST_EDGE, next_power_of_2(problem.C_in))


def along_d(problem: Problem) -> bool:
    return problem.axes[0] != Axis()


def turned(problem: Problem, values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """From D, H, W to the dimension of the march, the other one, and W."""
    D, H, W = values
    return (D, H, W) if along_d(problem) else (H, D, W)


def three_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (3 - len(sizes)) + tuple(sizes)

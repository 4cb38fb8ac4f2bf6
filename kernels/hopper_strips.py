"""How the march on Hopper is cut into strips and programs: what it takes, its configurations, and which is chosen.

A strip is ``pixels`` columns of x, dealt out over an image's row: pixel pair*p + j is the p-th of comb j. An output
needs x at a few shifts s, and x[pair*p + h + s] is the p-th of comb h + s, so all shifts together take only
shifts + pair - 1 combs of 32 pixels. Everything is worked out without a GPU and without triton.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.rounding import cdiv, next_power_of_2
from fusion_backend.kernels.strips import block_k_of, three_sizes, turned

COMB = 32  # pixels, 8 for each warp of a consumer


@dataclass(frozen=True)
class Config:
    """Pixels of a strip and channels of a program; strips that are walked side by side, and how."""

    pixels: int
    channels: int
    consumers: int  # warp groups of 4 warps, each with a strip
    slots: int  # rows of x in shared memory for each
    registers: int  # of a consumer's thread
    ahead: bool  # the next products run while a row is stored


@dataclass(frozen=True)
class Form:
    """What is compiled into a kernel. Triples are along the march, the other dimension, and W."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    growth: tuple[int, int, int]
    along_d: bool
    C_in: int
    C_out: int
    depth: int  # C_in, filled up to a power of two
    box: tuple[int, int, int]  # of a comb: images, rows along the other dimension, pixels
    whole: bool  # all strips are full, and no phase is short
    unit: int  # W counts units of so many pixels: the compiler sees only whether 16 divides a number
    x_last: bool
    out_last: bool
    tf32: bool
    kinds: tuple[int, int, int, int]  # scale, shift, lo, hi: 0 none, 1 a number, 2 a tensor
    pixels: int
    channels: int
    consumers: int
    slots: int
    registers: int
    ahead: bool

    @property
    def pair(self) -> int:
        return self.pixels // COMB

    @property
    def halo(self) -> int:
        """Rows that a march must begin early."""
        return (self.kernel[0] - 1) // self.stride[0]

    @property
    def carried(self) -> int:
        """Output rows that wait for more rows of x."""
        return max(self.kernel[0] - self.stride[0], 0)

    @property
    def phases(self) -> int:
        """Of an output row of the march."""
        return self.stride[1] * self.stride[2]

    @property
    def first(self) -> tuple[int, int]:
        """The lowest shift along the other dimension and along W."""
        _, m, w = (_shifts_along(*axis) for axis in self._axes)
        return m.start, w.start

    @property
    def shifts(self) -> tuple[int, int]:
        _, m, w = (_shifts_along(*axis) for axis in self._axes)
        return len(m), len(w)

    @property
    def combs(self) -> int:
        return self.shifts[1] + self.pair - 1

    @property
    def joined(self) -> int:
        """Phases along W that are interleaved before they are stored."""
        return self.stride[2] if not self.out_last and self.stride[2] in (2, 4) else 1

    @property
    def taps(self) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
        """For each row r that a step adds to, and each phase of it: pairs of a shift and a tap of the weight."""
        return tuple(
            tuple(self._taps(r, e_m, e_w) for e_m in range(self.stride[1]) for e_w in range(self.stride[2]))
            for r in range(self.stride[0] + self.carried)
        )

    @property
    def rows_fetched(self) -> int:
        """Of 32 pixels, for a step of one strip."""
        return self.shifts[0] * self.combs

    @property
    def _axes(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(zip(self.kernel, self.stride, self.padding, strict=True))

    def _taps(self, r: int, e_m: int, e_w: int) -> tuple[tuple[int, int], ...]:
        _, (kernel_m, stride_m, padding_m), (kernel_w, stride_w, padding_w) = self._axes
        first_m, first_w = self.first
        return tuple(
            (
                ((e_m + padding_m - k_m) // stride_m - first_m) * self.shifts[1]
                + (e_w + padding_w - k_w) // stride_w
                - first_w,
                (r * kernel_m + k_m) * kernel_w + k_w,
            )
            for k_m in range(kernel_m if r < self.kernel[0] else 0)
            for k_w in range(kernel_w)
            if (e_m + padding_m - k_m) % stride_m == 0 and (e_w + padding_w - k_w) % stride_w == 0
        )


def _shifts_along(kernel: int, stride: int, padding: int) -> range:
    """Of x for all phases: (phase + padding - tap) / stride, where that leaves no remainder."""
    return range(-((kernel - 1 - padding) // stride), (padding + stride - 1) // stride + 1)


@dataclass(frozen=True)
class March:
    """A configuration cut to a problem: ``groups`` of strips side by side, of ``rows`` steps each.

    A program walks ``length`` of all these rows, over the end of one group into the next.
    """

    config: Config
    box: tuple[int, int, int]
    whole: bool
    tiles: tuple[int, int]  # along the other dimension and along W
    rows: int
    total: int
    length: int
    grid: tuple[int, int]


def march_for(
    problem: Problem, shape: Sequence[int], config: Config, processors: int, length: int | None = None
) -> March:
    N, _, *sizes = shape
    along_r, along_m, along_w = zip(turned(problem, problem.axes), turned(problem, three_sizes(sizes)), strict=True)
    outputs = [axis.output_size(size) for axis, size in (along_r, along_m, along_w)]
    strides = [axis.stride for axis, _ in (along_r, along_m, along_w)]
    columns = (N, cdiv(outputs[1], strides[1]), cdiv(outputs[2], strides[2]))
    pair = config.pixels // COMB
    box = _box(columns, pair)
    tiles = tuple(cdiv(size, edge) for size, edge in zip(columns, (box[0], box[1], box[2] * pair), strict=True))
    groups = cdiv(math.prod(tiles), config.consumers)
    tiles_c = cdiv(problem.C_out, config.channels)
    whole = (
        all(size % edge == 0 for size, edge in zip(columns, (box[0], box[1], box[2] * pair), strict=True))
        and all(output % stride == 0 for output, stride in zip(outputs[1:], strides[1:], strict=True))
        and problem.C_out % config.channels == 0
        and math.prod(tiles) % config.consumers == 0
    )
    axis, _ = along_r
    rows = cdiv(outputs[0] + axis.padding, axis.stride) - axis.padding // axis.stride
    total = groups * rows
    if length is None:
        length = max(cdiv(total, max(processors // tiles_c, 1)), min(rows, LEAST_ROWS))
    return March(config, box, whole, tiles[1:], rows, total, length, (cdiv(total, length), tiles_c))


LEAST_ROWS = 2


def _box(columns: tuple[int, int, int], pair: int) -> tuple[int, int, int]:
    """Images, rows and pixels of a comb of 32, with few of them beyond the edges, and long runs along W."""
    N, M, W = columns
    best, box = math.inf, (1, 1, COMB)
    for w in (32, 16, 8, 4, 2, 1):
        for m in (1, 2, 4, 8, 16, 32):
            n = COMB // (w * m)
            if n == 0:
                continue
            cost = math.prod(cdiv(size, edge) * edge for size, edge in zip((N, M, W), (n, m, w * pair), strict=True))
            cost *= 1 + 1 / (4 * w)
            if cost < best:
                best, box = cost, (n, m, w)
    return box


def form_for(problem: Problem, march: March, unit: int, kinds: tuple[int, ...]) -> Form:
    config = march.config
    axes = turned(problem, problem.axes)
    return Form(
        kernel=tuple(axis.kernel for axis in axes),
        stride=tuple(axis.stride for axis in axes),
        padding=tuple(axis.padding for axis in axes),
        growth=tuple(axis.growth for axis in axes),
        along_d=problem.axes[0] != Axis(),
        C_in=problem.C_in,
        C_out=problem.C_out,
        depth=block_k_of(problem),
        box=march.box,
        whole=march.whole,
        unit=unit,
        x_last=problem.x_last,
        out_last=problem.out_last,
        tf32=problem.tf32,
        kinds=kinds,
        pixels=config.pixels,
        channels=config.channels,
        consumers=config.consumers,
        slots=config.slots,
        registers=config.registers,
        ahead=config.ahead,
    )


CONFIGS = tuple(
    Config(64, channels, 2, slots, registers, False)
    for channels in (64, 32, 16)
    for slots in (2, 1)
    for registers in (240, 192, 168)
)


def shared_memory(problem: Problem, config: Config) -> int:
    axes = turned(problem, problem.axes)
    taps = math.prod(axis.kernel for axis in problem.axes)
    depth = block_k_of(problem) * problem.dtype.itemsize
    _, m, w = (_shifts_along(axis.kernel, axis.stride, axis.padding) for axis in axes)
    combs = len(m) * (len(w) + config.pixels // COMB - 1)
    return taps * config.channels * depth + config.consumers * config.slots * combs * COMB * depth + 16 * config.channels + 512


def accumulators(problem: Problem, config: Config) -> int:
    row, middle, column = turned(problem, problem.axes)
    _, m, w = (_shifts_along(axis.kernel, axis.stride, axis.padding) for axis in (row, middle, column))
    carried = max(row.kernel - row.stride, 0) * middle.stride * column.stride
    live = max(carried, column.stride) * config.pixels * config.channels // 128
    depth = block_k_of(problem) * problem.dtype.itemsize
    combs = len(m) * (len(w) + config.pixels // COMB - 1)
    return live + combs * COMB * depth // 512


def configs_for(problem: Problem) -> list[Config]:
    want = 240 if problem.x_last else 192 if problem.dtype.itemsize == 4 else 168
    return [
        config
        for config in CONFIGS
        if config.registers == want
        and shared_memory(problem, config) <= problem.shared_limit
        and accumulators(problem, config) <= want - 76
        and (config.channels == 16 or config.channels < 2 * problem.C_out)
    ]

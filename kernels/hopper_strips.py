"""How the march on Hopper is cut into strips and programs: what it takes, its configurations, and which is chosen.

Everything is worked out from sizes, the dtype and a block's shared memory, without a GPU and without Gluon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from fusion_backend.kernels.hopper_form import COMB, CONSUMERS, STRIP, Form, shifts_along
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.strips import along_d, block_k_of, three_sizes, turned


@dataclass(frozen=True)
class Config:
    """Channels of a program, rows of x in shared memory for each of its strips, and the order of its work."""

    channels: int
    slots: int
    together: bool = False  # the products of a step's last row run with those that are carried, rather than before them
    burst: bool = False  # a contiguous x is loaded for all strips at once

    @property
    def name(self) -> str:
        """For example "hopper 64, 2 slots" or "hopper 64, 2 slots, together"."""
        order = ", together" if self.together else ", burst" if self.burst else ""
        return f"hopper {self.channels}, {self.slots} slots{order}"


@dataclass(frozen=True)
class March:
    """A configuration cut to a problem: strips in groups of CONSUMERS, and ``rows`` steps of each group.

    A program walks ``length`` of all these rows, past the end of one group into the next. ``box`` is a strip's extent:
    images, rows along the other dimension, pixels; ``tiles`` counts strips along the other dimension and along W.
    """

    config: Config
    flat: bool  # the other dimension has one row
    box: tuple[int, int, int]
    whole: bool  # all strips are full, and no phase is short
    tiles: tuple[int, int]
    rows: int
    total: int
    length: int
    grid: tuple[int, int]


# From much work a program to little. Which order is faster is not measured yet.
CONFIGS = tuple(
    Config(channels, slots, together, burst)
    for channels in (64, 32, 16)
    for slots in (2, 1)
    for together, burst in ((True, False), (False, False), (False, True))
)

# Of a multiprocessor, for each of as many threads as a warp group has, and of one thread.
ALL_REGISTERS = 504
MOST_REGISTERS = 240

# Of a consumer's thread besides accumulators and x: with fewer, ptxas makes products wait for each other, or spills.
# Beside a contiguous x, where there are more to arrange, and beside a channels_last one.
OTHER_REGISTERS = 64
OTHER_REGISTERS_LAST = 48

# Of a producer's thread besides x: with fewer than so many for each channel of x, it spills in its loop.
ADDRESS_REGISTERS = 3 / 8

# Bytes of shared memory for barriers, and for the coefficients of a channel.
BARRIERS = 512
COEFFICIENTS = 16

# A program that walks fewer rows spends too much on its halo and on the weight.
LEAST_ROWS = 2

# Offsets within the images of a strip have so many bits.
MOST_ELEMENTS = 2**31

# What a copy engine's addresses and strides are multiples of.
COPY_BYTES = 16


def why_not(problem: Problem) -> str | None:
    """Why the march does not take a problem, in words; None where it does."""
    if problem.groups > 1:
        return f"it has {problem.groups} groups, and a program of the march shares x among all its channels"
    if problem.tensors:
        return "a program reads a tensor of the result's shape"
    if problem.kept:
        return "a value is kept"
    if problem.prologue:
        return "something is done to x first, and the copy engine brings it as it is"
    if any(axis.dilation > 1 for axis in problem.axes):
        return "it is dilated"
    if problem.axes[:2] == (Axis(), Axis()):
        return "no dimension but W has a kernel, so there is none to march along"
    if not problem.dot:
        return f"{problem.C_in} times {problem.C_out} channels are too few for tensor cores"
    if problem.dtype == torch.float32 and not problem.tf32:
        return "float32 without TF32 has no tensor cores"
    if problem.x_last and problem.C_in * problem.dtype.itemsize % COPY_BYTES:
        return f"pixels of {problem.C_in} channels are not multiples of {COPY_BYTES} bytes, which are copied"
    if not configs_for(problem):
        taps = math.prod(axis.kernel for axis in problem.axes)
        return (
            f"{taps} taps times {problem.C_in} channels are too much for {problem.shared_limit} bytes of shared "
            "memory, or for the registers"
        )
    return None


def why_not_shape(problem: Problem, shape: Sequence[int], march: March) -> str | None:
    """The same for an x of ``shape``."""
    _, _, *sizes = shape
    out_sizes = [axis.output_size(size) for axis, size in zip(problem.axes, three_sizes(sizes), strict=True)]
    elements = max(problem.C_in * math.prod(sizes), problem.C_out * math.prod(out_sizes)) * march.box[0]
    if elements >= MOST_ELEMENTS:
        return f"the images of a strip have {elements} elements, and offsets have 31 bits"
    return None


def why_no_bits(problem: Problem, W_out: int) -> str | None:
    """Why the march cannot write the gate's bits beside an output whose rows have W_out elements; None: it can.

    The 8 elements of a byte must be 8 neighbours in a row of one tile, which ``march_for`` sees to.
    """
    if problem.out_last:
        return f"{problem.C_out} channels are not a multiple of 8" if problem.C_out % 8 else None
    stride = problem.axes[2].stride
    if stride not in (1, 2, 4):
        return f"{stride} phases of a row are stored one by one"
    return None if guard_or_false(W_out % 8 == 0) else f"rows of {W_out} elements are not made of whole bytes"


def has_room(problem: Problem, config: Config, columns: int) -> bool:
    """For so many vectors of a program."""
    return shared_memory(problem, config, columns) <= problem.shared_limit


def configs_for(problem: Problem) -> tuple[Config, ...]:
    """The configurations that fit; for a problem that the march takes there is one."""
    return tuple(
        config
        for config in CONFIGS
        if not (config.burst if problem.x_last else config.together)
        and (_carried(problem) or not config.together)
        and _fits_registers(problem, config)
        and has_room(problem, config, problem.columns)
        and (config.channels == 16 or config.channels < 2 * problem.C_out)
    )


def march_for(
    problem: Problem,
    shape: Sequence[int],
    config: Config,
    processors: int,
    length: int | None = None,
    bits: bool = False,
) -> March:
    """Every multiprocessor gets the same number of rows, if their ``length`` is not given. ``bits``: whole bytes."""
    N, _, *sizes = shape
    axes, along = turned(problem, problem.axes), turned(problem, three_sizes(sizes))
    outputs = [axis.output_size(size) for axis, size in zip(axes, along, strict=True)]
    columns = (N, cdiv(outputs[1], axes[1].stride), cdiv(outputs[2], axes[2].stride))
    box = _box(columns, max(8 // axes[2].stride, 2) if bits and not problem.out_last else 2)
    tiles = [cdiv(size, edge) for size, edge in zip(columns, box, strict=True)]
    strips, tiles_c = math.prod(tiles), cdiv(problem.C_out, config.channels)
    whole = (
        all(size % edge == 0 for size, edge in zip(columns, box, strict=True))
        and all(output % axis.stride == 0 for axis, output in zip(axes[1:], outputs[1:], strict=True))
        and problem.C_out % config.channels == 0
        and strips % CONSUMERS == 0
    )
    rows = cdiv(outputs[0] + axes[0].padding, axes[0].stride) - axes[0].padding // axes[0].stride
    total = cdiv(strips, CONSUMERS) * rows
    if length is None:
        length = max(cdiv(total, max(processors // tiles_c, 1)), min(rows, LEAST_ROWS))
    flat = along[1] == 1 and axes[1] == Axis()
    return March(config, flat, box, whole, (tiles[1], tiles[2]), rows, total, length, (cdiv(total, length), tiles_c))


def _box(columns: tuple[int, int, int], least: int) -> tuple[int, int, int]:
    """Images, rows and at least so many pixels of a strip, with few beyond the edges, and long runs along W."""

    def cost(box: tuple[int, int, int]) -> float:
        covered = math.prod(cdiv(size, edge) * edge for size, edge in zip(columns, box, strict=True))
        return covered * (1 + 1 / (2 * box[2]))

    powers = [1 << bit for bit in range(STRIP.bit_length())]
    boxes = ((STRIP // (m * w), m, w) for w in reversed(powers) for m in powers if w >= least and m * w <= STRIP)
    return min(boxes, key=cost)


def form_for(
    problem: Problem,
    march: March,
    unit: int,
    kinds: tuple[int, int, int, int],
    gate: tuple[bool, bool, bool] | None = None,
    program: str = "",
) -> Form:
    """What is compiled in: W is counted in units of ``unit``; the rest as in ``Form``."""
    config = march.config
    row, middle, column = turned(problem, problem.axes)
    return Form(
        kernel=(row.kernel, middle.kernel, column.kernel),
        stride=(row.stride, middle.stride, column.stride),
        padding=(row.padding, middle.padding, column.padding),
        growth=(row.growth, middle.growth, column.growth),
        along_d=along_d(problem),
        flat=march.flat,
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
        gate=gate,
        program=program,
        channels=config.channels,
        slots=config.slots,
        registers=registers_for(problem, config),
        together=config.together,
        burst=config.burst,
    )


def shared_memory(problem: Problem, config: Config, columns: int = 0) -> int:
    """Bytes: the weight, the rows of x, and small things, so many vectors of a program among them."""
    depth = block_k_of(problem) * problem.dtype.itemsize
    taps = math.prod(axis.kernel for axis in problem.axes)
    x = CONSUMERS * config.slots * _pixels(problem) * depth
    return taps * config.channels * depth + x + config.channels * (COEFFICIENTS + 4 * columns) + BARRIERS


def registers_for(problem: Problem, config: Config) -> int:
    """Of a consumer's thread: the copy engine needs none, while warps that load x need what consumers can spare."""
    if problem.x_last:
        return MOST_REGISTERS
    return -(-(_consumer_registers(problem, config) + OTHER_REGISTERS) // 8) * 8


def _fits_registers(problem: Problem, config: Config) -> bool:
    needed = _consumer_registers(problem, config)
    if problem.x_last:
        return needed + OTHER_REGISTERS_LAST <= MOST_REGISTERS
    registers = registers_for(problem, config)
    return registers <= MOST_REGISTERS and _producer_registers(problem) <= ALL_REGISTERS - CONSUMERS * registers


def _consumer_registers(problem: Problem, config: Config) -> int:
    """For accumulators, and for x at each of its shifts."""
    _, middle, column = turned(problem, problem.axes)
    carried = _carried(problem) * middle.stride * column.stride
    accumulators = max(carried, column.stride)
    if config.together:
        accumulators = max(accumulators, carried + column.stride)
    m, w = _shifts(problem)
    x = m * w * block_k_of(problem) * problem.dtype.itemsize // 4
    return STRIP * (accumulators * config.channels + x) // 128


def _carried(problem: Problem) -> int:
    """Output rows that wait for more rows of x."""
    row, *_ = turned(problem, problem.axes)
    return max(row.kernel - row.stride, 0)


def _producer_registers(problem: Problem) -> float:
    """For a row of x of each consumer, where combs beyond whole pixels take a register a value, and for addresses."""
    depth = block_k_of(problem)
    m, w = _shifts(problem)
    x = STRIP * depth * problem.dtype.itemsize // 4 + (w - 1) * COMB * depth
    return CONSUMERS * m * x / 128 + ADDRESS_REGISTERS * depth


def _pixels(problem: Problem) -> int:
    """Of x, in a step of a strip."""
    m, w = _shifts(problem)
    return m * w * STRIP if problem.x_last else m * (w + 1) * COMB


def _shifts(problem: Problem) -> tuple[int, int]:
    """Along the other dimension, and along W."""
    _, m, w = (len(shifts_along(axis.kernel, axis.stride, axis.padding)) for axis in turned(problem, problem.axes))
    return m, w

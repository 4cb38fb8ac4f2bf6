"""How the product on Hopper is cut into tiles and programs: what it takes, its configurations, and which is chosen.

Everything is worked out from sizes, the dtype and a block's shared memory, without a GPU and without Gluon.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.rounding import cdiv

CONSUMERS = 2  # warp groups of a program, each with rows of its own

DEPTH_BYTES = 128  # of a row of x or of the weight in a step: what the copy engine swizzles

# Positions of a contiguous result's row that a tile has at least: single ones are written at a tenth of the speed.
LEAST_ROW = 16

# Of 240 registers a thread of a consumer.
MOST_ACCUMULATORS = 128

MOST_SLOTS = 6
LEAST_SLOTS = 3

# Bytes of shared memory for barriers.
BARRIERS = 512

# What a copy engine's addresses and strides are multiples of, in bytes, and offsets within a tile's images: 31 bits.
COPY_BYTES = 16
MOST_ELEMENTS = 2**31


@dataclass(frozen=True)
class Config:
    """Positions of a consumer, and columns of a product, of a program's tile; ``joined`` products for each.

    A column is an output channel. A contiguous result has all phases along W in a tile, so that its rows are whole:
    those that read the same inputs (see ``Axis.sharing``) are columns of one product, the others are joined.
    """

    rows: int
    columns: int
    joined: int = 1

    @property
    def name(self) -> str:
        """For example "product 256x128" or, with two phases, "product 128x128x2"."""
        joined = f"x{self.joined}" if self.joined > 1 else ""
        return f"product {CONSUMERS * self.rows}x{self.columns}{joined}"


LEAST_ROWS = 64  # of a consumer, and all that a contiguous result has registers for
MOST_JOINED = 4
MOST_PHASES = 8  # of a row of a contiguous result

# From much work a program to little.
CONFIGS = (
    Config(128, 128),
    Config(64, 256),
    Config(64, 128),
    Config(128, 64),
    Config(64, 64),
    Config(64, 128, 2),
    Config(64, 64, 2),
    Config(64, 64, 4),
)


@dataclass(frozen=True)
class Product:
    """A configuration cut to a problem. ``box``: images, and positions along D, H and W, of a consumer's tile.

    ``boxes`` counts those that cover the output's positions, and ``total`` the tiles of all programs.
    """

    config: Config
    box: tuple[int, int, int, int]
    boxes: tuple[int, int, int, int]
    whole: bool  # no tile reaches beyond the output
    slots: int
    total: int
    grid: int


def why_not(problem: Problem) -> str | None:
    """Why the product does not take a problem, in words; None where it does."""
    if problem.groups > 1:
        return f"it has {problem.groups} groups"
    if problem.tensors:
        return "a program reads a tensor of the result's shape"
    if problem.prologue:
        return "something is done to x first, and the copy engine brings it as it is"
    if not problem.x_last:
        return "x is contiguous"
    joined, shared = phases_of(problem)
    if not problem.out_last and (joined * shared not in (2, 4, MOST_PHASES) or joined > MOST_JOINED):
        return f"{problem.axes[2].stride} phases of a row, {shared} of the same inputs, are none that a tile has"
    if problem.dtype.itemsize == 4 and not problem.tf32:
        return "float32 without TF32 has no tensor cores"
    row = problem.C_in * problem.dtype.itemsize
    if row % COPY_BYTES or row < DEPTH_BYTES:
        return f"pixels of {problem.C_in} channels are not {DEPTH_BYTES} bytes or more, in multiples of {COPY_BYTES}"
    if not configs_for(problem):
        return f"{problem.C_out} output channels are too few, or {problem.shared_limit} bytes of shared memory"
    return None


def why_not_shape(problem: Problem, shape: Sequence[int], cut: Product) -> str | None:
    """The same for an x of ``shape``."""
    elements = (
        max(problem.C_in * math.prod(shape[2:]), problem.C_out * math.prod(_outputs(problem, shape))) * cut.box[0]
    )
    if elements >= MOST_ELEMENTS:
        return f"the images of a tile have {elements} elements, and offsets have 31 bits"
    return None


def phases_of(problem: Problem) -> tuple[int, int]:
    """Products that are joined along W, and phases that share each."""
    axis = problem.axes[2]
    if problem.out_last:
        return 1, 1
    shared = axis.sharing if axis.stride % axis.sharing == 0 else 1
    return axis.stride // shared, shared


def configs_for(problem: Problem) -> tuple[Config, ...]:
    """The configurations that fit; for a problem that the product takes there is one."""
    joined, shared = phases_of(problem)
    return tuple(
        config
        for config in CONFIGS
        if config.joined == joined
        and (problem.out_last or config.rows == LEAST_ROWS)
        and config.columns < 2 * shared * problem.C_out
        and _slots(problem, config) >= LEAST_SLOTS
    )


def packed_shape(problem: Problem, config: Config) -> tuple[int, int]:
    """[C_out, C_in] of a tap, both filled up to whole blocks."""
    depth, channels = DEPTH_BYTES // problem.dtype.itemsize, config.columns // phases_of(problem)[1]
    return cdiv(problem.C_out, channels) * channels, cdiv(problem.C_in, depth) * depth


def product_for(problem: Problem, shape: Sequence[int], config: Config, processors: int) -> Product:
    """For an x of ``shape``. A program walks over as many tiles as there are for each multiprocessor."""
    outputs = _outputs(problem, shape)
    spans = (shape[0], *(cdiv(size, axis.stride) for size, axis in zip(outputs, problem.axes, strict=True)))
    box = _box(spans, config.rows, 1 if problem.out_last else LEAST_ROW)
    boxes = tuple(cdiv(span, edge) for span, edge in zip(spans, box, strict=True))
    strides = (1, *(axis.stride for axis in problem.axes))
    whole = (
        all(size % (edge * stride) == 0 for size, edge, stride in zip((shape[0], *outputs), box, strides, strict=True))
        and math.prod(boxes) % CONSUMERS == 0
    )
    shared = phases_of(problem)[1]
    phases = math.prod(strides) // (config.joined * shared)
    total = cdiv(math.prod(boxes), CONSUMERS) * phases * cdiv(shared * problem.C_out, config.columns)
    slots = _slots(problem, config)
    return Product(config, box, boxes, whole, slots, total, min(total, processors))  # type: ignore[arg-type]


def _box(spans: tuple[int, ...], rows: int, least_row: int) -> tuple[int, int, int, int]:
    """Powers of two whose product is ``rows``: as few boxes as can be, and long rows before tall boxes.

    None is shorter than ``least_row``, unless all are.
    """
    powers = [1 << bit for bit in range(rows.bit_length())]
    edges = [[power for power in powers if power < 2 * span] for span in spans[1:]]
    edges[2] = [power for power in edges[2] if power >= least_row] or edges[2][-1:]
    boxes = ((rows // (d * h * w), d, h, w) for d, h, w in product(*edges) if d * h * w <= rows)
    return min(
        boxes,
        key=lambda box: (math.prod(cdiv(span, edge) for span, edge in zip(spans, box, strict=True)), -box[3], -box[2]),
    )


def _slots(problem: Problem, config: Config) -> int:
    """Steps in shared memory at a time."""
    step = (CONSUMERS * config.rows + config.columns) * DEPTH_BYTES
    return min(MOST_SLOTS, (problem.shared_limit - BARRIERS) // step)


def _outputs(problem: Problem, shape: Sequence[int]) -> tuple[int, int, int]:
    sizes = (*(1,) * (5 - len(shape)), *shape[2:])
    D, H, W = (axis.output_size(size) for axis, size in zip(problem.axes, sizes, strict=True))
    return D, H, W


@dataclass(frozen=True)
class Form:
    """What is compiled into a kernel. Triples are along D, H and W."""

    rank: int
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    step: tuple[int, int, int]
    inverse: tuple[int, int, int]
    back: tuple[int, int, int]  # from tap to tap of a phase, in x
    growth: tuple[int, int, int]
    C_in: int
    C_out: int
    depth: int  # elements of a row in a step
    rows: int
    columns: int
    box: tuple[int, int, int, int]
    whole: bool
    slots: int
    out_last: bool
    joined: int
    shared: int
    tf32: bool
    neighbours: int
    present: tuple[bool, bool, bool, bool]  # scale, shift, lo, hi
    program: str
    kept: int | None

    @property
    def tile(self) -> tuple[int, ...]:
        """A consumer's x in a step, as the copy engine fetches it from [N, *spatial, C_in]."""
        return (self.box[0], *self.box[4 - self.rank :], self.depth)

    @property
    def blocks(self) -> int:
        """Steps of a tap."""
        return cdiv(self.C_in, self.depth)

    @property
    def channels(self) -> int:
        """Of a tile."""
        return self.columns // self.shared

    @property
    def tiles_C(self) -> int:
        return cdiv(self.C_out, self.channels)

    @property
    def wide(self) -> int:
        """Phases of a position that a tile has side by side along W."""
        return self.joined * self.shared


def neighbours_of(problem: Problem) -> int:
    """Groups of 8 columns of which a thread's values lie side by side: 16 bytes of channels_last, or shared phases."""
    return 8 // problem.dtype.itemsize if problem.out_last else max(1, phases_of(problem)[1] // 2)


def form_for(
    problem: Problem,
    rank: int,
    cut: Product,
    present: tuple[bool, bool, bool, bool],
    program: str,
    kept: int | None = None,
) -> Form:
    axes: tuple[Axis, ...] = problem.axes

    def along(name: str) -> tuple[int, int, int]:
        D, H, W = (int(getattr(axis, name)) for axis in axes)
        return D, H, W

    return Form(
        rank=rank,
        kernel=along("kernel"),
        stride=along("stride"),
        padding=along("padding"),
        dilation=along("dilation"),
        step=along("step"),
        inverse=along("inverse"),
        back=along("input_step"),
        growth=along("growth"),
        C_in=problem.C_in,
        C_out=problem.C_out,
        depth=DEPTH_BYTES // problem.dtype.itemsize,
        rows=cut.config.rows,
        columns=cut.config.columns,
        box=cut.box,
        whole=cut.whole,
        slots=cut.slots,
        out_last=problem.out_last,
        joined=cut.config.joined,
        shared=phases_of(problem)[1],
        tf32=problem.tf32,
        neighbours=neighbours_of(problem),
        present=present,
        program=program,
        kept=kept,
    )

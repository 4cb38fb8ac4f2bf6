"""y = min(max(a * conv_transpose(x, w) + b, lo), hi) on Hopper: the march of ``row_march``, for its copy engine.

The equation and the march are those of ``row_march``. A program keeps a tile of the weight, [taps, channels, C_in], in
shared memory and walks down rows of strips with three or more warp groups:

    producer     fetches rows of x, a channels_last one by the copy engine, once for each shift; a contiguous one goes
                 through registers, a row ahead, and is turned on its way (see ``hopper_form``)
    consumers    each walk a strip of their own. x is the left operand of their products, from registers, where float32
                 is rounded to TF32; the accumulators are [pixels, channels] and go from registers to memory, 16 bytes a
                 thread: contiguous, since a thread holds neighbouring pixels and all phases of a row; channels_last,
                 since ``pack`` permutes the weight's columns

All rows of all strips are one run, dealt out evenly to the multiprocessors. y is written once, and rounded once. Beyond
its edge x counts as zero, so a weight that is not finite makes NaN there. ``hopper`` has the operator.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusion_backend.kernels import packing
from fusion_backend.kernels.coefficients import Coefficients
from fusion_backend.kernels.gate import EVERYTHING, Gate
from fusion_backend.kernels.hopper_form import Form
from fusion_backend.kernels.hopper_launch import descriptor, gluon_language, launched
from fusion_backend.kernels.hopper_strips import Config, March, form_for
from fusion_backend.kernels.launching import unit_of
from fusion_backend.kernels.packing import Packing
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.program import NO_PROGRAM, Program
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.strips import block_k_of, three_sizes, turned


@functools.cache
def _kernel() -> Any:
    """The kernel."""
    from fusion_backend.kernels.hopper_kernel import hopper_march_kernel

    return hopper_march_kernel


def pack(weight: torch.Tensor, problem: Problem, config: Config) -> torch.Tensor:
    """[taps * C_out, C_in], both filled up to whole blocks, and rounded where the product is TF32.

    For a channels_last output, columns are permuted so that a thread's are neighbours: of a product's column
    8*i + 2*t + j, lane t holds the values.
    """
    C_out = cdiv(problem.C_out, config.channels) * config.channels
    neighbours = min(8 // problem.dtype.itemsize, config.channels // 8) if problem.out_last else 1
    return packing.pack(weight, 1, Packing(C_out, block_k_of(problem), True, neighbours, problem.tf32))


@dataclass(frozen=True)
class Prepared:
    """What launches of one kind have in common. ``compiled``: the kernel for each alignment of their tensors."""

    form: Form
    weight_layout: Any
    x_layout: Any
    x_shape: tuple[int, ...]  # as the copy engine sees a channels_last x
    x_strides: tuple[int, ...]
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    compiled: dict[Any, Any]

    def launch(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        packed: torch.Tensor,
        tensors: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
        vectors: torch.Tensor | None = None,
        bits: torch.Tensor | None = None,
    ) -> Any:
        """Fill ``out``, which is not empty. Returns the compiled kernel."""
        form = self.form
        weight = descriptor(packed, packed.shape, (form.depth, 1), (form.channels, form.depth), self.weight_layout)
        copied = descriptor(x, self.x_shape, self.x_strides, form.tile, self.x_layout) if form.x_last else None
        given = (*tensors, vectors, *self.sizes, *numbers, self.x_layout, form)
        args = (out, bits, None if form.x_last else x, copied, weight, *given)
        return launched(_kernel, self.grid, args, self.compiled, (out, bits, x, packed, *tensors, vectors))


@functools.lru_cache(maxsize=256)
def prepare(
    problem: Problem,
    march: March,
    shape: tuple[int, ...],
    kinds: tuple[int, int, int, int],
    gate: tuple[bool, bool, bool] | None,
    program: str,
) -> Prepared:
    """For an x of ``shape``, coefficients of these ``kinds``, and bits of a gate where there is one."""
    gl = gluon_language()
    N, _, *sizes = shape
    R, M, W = turned(problem, three_sizes(sizes))
    unit = unit_of(W)
    form = form_for(problem, march, unit, kinds, gate, program)
    element = getattr(gl, str(problem.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for
    C = problem.C_in
    x_shape: tuple[int, ...] = (N, R, M, W, C)
    x_strides: tuple[int, ...] = (R * M * W * C, *((M * W * C, W * C) if form.along_d else (W * C, R * W * C)), C, 1)
    if form.flat:
        x_shape, x_strides = x_shape[:2] + x_shape[3:], x_strides[:2] + x_strides[3:]
    return Prepared(
        form,
        layout([form.channels, form.depth], element),
        layout(list(form.tile), element),
        x_shape,
        x_strides,
        (*march.grid, 1),
        (N, R, M, W // unit, march.rows, *march.tiles, march.total, march.length),
        {},
    )


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    problem: Problem,
    march: March,
    coefficients: Coefficients,
    bits: torch.Tensor | None = None,
    gate: Gate = EVERYTHING,
    program: Program = NO_PROGRAM,
) -> Any:
    """Fill ``out`` from ``x``, both dense, that is contiguous or channels_last, and from what ``pack`` returns.

    A channels_last x begins at a multiple of 16 bytes. ``bits`` are filled too where they are given, for which
    ``hopper_strips.why_no_bits`` must have nothing to say, and ``march`` is one for bits. A program has no tensors, and
    ``hopper_strips.has_room`` for its vectors. Returns the compiled kernel.
    """
    if out.numel() == 0:
        return None
    flags = None if bits is None else (gate.lo_open, gate.hi_open, gate.passes_nan)
    prepared = prepare(problem, march, tuple(x.shape), coefficients.kinds, flags, program.text)
    return prepared.launch(out, x, packed, coefficients.tensors, coefficients.numbers, program.vectors, bits)

"""The transposed convolution as a product of matrices, on Hopper: for many channels.

Each phase of the output (see ``phases``) is a matrix product over its taps and C_in. The copy engine fetches a tile of
x for each tap, shifted by it and zero beyond x's edges, and that tap's part of the weight, several steps ahead; two
warp groups multiply, each its own half of the tile's positions. A program walks over tiles, and x of the next is on its
way while a tile is stored. x and the result are channels_last; a pass of its own turns what is not.

x is rounded to TF32 in registers, where the product is that, and the weight as it is packed.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusion_backend.kernels import hopper_blocks, packing
from fusion_backend.kernels.coefficients import Coefficients
from fusion_backend.kernels.hopper_blocks import Config, Form, Product, form_for
from fusion_backend.kernels.hopper_launch import descriptor, gluon_language, launched
from fusion_backend.kernels.packing import Packing
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.program import NO_PROGRAM, Program
from fusion_backend.kernels.strips import three_sizes


@functools.cache
def _kernel() -> Any:
    from fusion_backend.kernels.hopper_product_kernel import hopper_product_kernel

    return hopper_product_kernel


def pack(weight: torch.Tensor, problem: Problem, config: Config) -> torch.Tensor:
    """[taps / shared * C_out * shared, C_in], both filled up to whole blocks, and rounded where the product is TF32.

    Phases that share a product have taps side by side. Columns are permuted so that a thread's are neighbours: lane t
    holds a product's columns 8*i + 2*t and the next.
    """
    C_out, C_in = hopper_blocks.packed_shape(problem, config)
    neighbours, (_, shared) = hopper_blocks.neighbours_of(problem), hopper_blocks.phases_of(problem)
    return packing.pack(weight, 1, Packing(C_out, C_in, True, neighbours, problem.tf32, shared))


@dataclass(frozen=True)
class Prepared:
    """What launches of one kind have in common. ``compiled``: the kernel for each alignment of their tensors."""

    form: Form
    weight_layout: Any
    x_layout: Any
    x_shape: tuple[int, ...]
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
        kept: torch.Tensor | None = None,
    ) -> Any:
        """Fill ``out``, which is not empty, and ``kept`` where the program keeps one. Returns the compiled kernel."""
        form, shape = self.form, packed.shape
        weight = descriptor(packed, shape, (shape[1], 1), (form.columns, form.depth), self.weight_layout)
        copied = descriptor(x, self.x_shape, self.x_strides, form.tile, self.x_layout)
        args = (out, kept, copied, weight, *tensors, vectors, *self.sizes, *numbers, self.x_layout, form)
        return launched(_kernel, self.grid, args, self.compiled, (out, kept, packed, *tensors, vectors))


@functools.lru_cache(maxsize=256)
def prepare(
    problem: Problem,
    cut: Product,
    shape: tuple[int, ...],
    kinds: tuple[int, int, int, int],
    gate: tuple[bool, bool, bool] | None,
    program: str,
    kept: int | None = None,
) -> Prepared:
    """For an x of ``shape``, coefficients of these ``kinds`` and the program's value that is kept; for no ``gate``."""
    assert gate is None, "the product writes no bits"
    gl = gluon_language()
    N, C, *sizes = shape
    scale, shift, lo, hi = (kind != 0 for kind in kinds)
    form = form_for(problem, len(sizes), cut, (scale, shift, lo, hi), program, kept)
    element = getattr(gl, str(problem.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for
    x_shape = (N, *sizes, C)
    return Prepared(
        form,
        layout([form.columns, form.depth], element),
        layout(list(form.tile), element),
        x_shape,
        tuple(math.prod(x_shape[i + 1 :]) for i in range(len(x_shape))),
        (cut.grid, 1, 1),
        (N, *three_sizes(sizes), *cut.boxes[1:], cut.total),
        {},
    )


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    problem: Problem,
    cut: Product,
    coefficients: Coefficients,
    program: Program = NO_PROGRAM,
    kept: torch.Tensor | None = None,
) -> Any:
    """Fill ``out`` from a channels_last ``x`` and from what ``pack`` returns.

    x begins at a multiple of 16 bytes. A program has no tensors; where it keeps a value ``kept`` is filled too, laid
    out as ``out``. Returns the compiled kernel.
    """
    if out.numel() == 0:
        return None
    prepared = prepare(problem, cut, tuple(x.shape), coefficients.kinds, None, program.text, program.kept)
    return prepared.launch(out, x, packed, coefficients.tensors, coefficients.numbers, program.vectors, kept)

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
its edge x counts as zero, so a weight that is not finite makes NaN there.

Inductor writes the source of user kernels out again as plain Triton, which Gluon is not. So this kernel has an operator
of its own that is opaque to Inductor, and costs the host more than a kernel does; ``conv_transpose`` calls it for plans
called "hopper ...", with the weight packed where Inductor sees that. ``hopper_march_training`` has one that writes the
bits of a gate as well.

Gluon is an experimental part of triton: it is imported at the first launch, and where that, the compilation or the
launch fails, the operator says so once and goes on with ``conv_transpose``'s other kernels.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusion_backend.kernels import hopper_strips, packing
from fusion_backend.kernels.arguments import axes_for, check_inputs
from fusion_backend.kernels.coefficients import Coefficients, Numbers, Tensors, check_coefficients, coefficients_for
from fusion_backend.kernels.gate import EVERYTHING, Gate
from fusion_backend.kernels.hopper_form import Form
from fusion_backend.kernels.hopper_strips import (
    CONFIGS,
    Config,
    March,
    configs_for,
    form_for,
    has_room,
    march_for,
    why_no_bits,
    why_not_shape,
)
from fusion_backend.kernels.launching import unit_of
from fusion_backend.kernels.layout import empty, is_channels_last
from fusion_backend.kernels.packing import Packing
from fusion_backend.kernels.problem import Problem, is_hopper, problem_for
from fusion_backend.kernels.program import NO_PROGRAM, Program, check_program
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.strips import block_k_of, three_sizes, turned

log = logging.getLogger(__name__)


@functools.cache
def _gluon() -> tuple[Any, Any, Any]:
    """The kernel, Gluon's language and the copy engine's descriptors."""
    from triton.experimental.gluon import language
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fusion_backend.kernels.hopper_kernel import hopper_march_kernel

    return hopper_march_kernel, language, TensorDescriptor


def why_not(problem: Problem) -> str | None:
    """Why the march does not take a problem on a Hopper GPU, in words; None where it does."""
    try:
        _gluon()
    except Exception as raised:  # whatever an experimental interface raises when it has changed
        return f"this triton has no Gluon that the kernel knows: {raised}"
    return hopper_strips.why_not(problem)


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


@functools.lru_cache(maxsize=256)
def _prepare(
    problem: Problem,
    march: March,
    shape: tuple[int, ...],
    kinds: tuple[int, int, int, int],
    gate: tuple[bool, bool, bool] | None,
    program: str,
) -> Prepared:
    _, gl, _ = _gluon()
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
    prepared = _prepare(problem, march, tuple(x.shape), _kinds(coefficients), flags, program.text)
    form = prepared.form
    weight = _descriptor(packed, packed.shape, (form.depth, 1), (form.channels, form.depth), prepared.weight_layout)
    copied = None
    if form.x_last:
        copied = _descriptor(x, prepared.x_shape, prepared.x_strides, form.tile, prepared.x_layout)
    args = (
        out,
        bits,
        None if form.x_last else x,
        copied,
        weight,
        *coefficients.tensors,
        program.vectors,
        *prepared.sizes,
        *coefficients.numbers,
        prepared.x_layout,
        form,
    )
    # The launcher of triton's own works out what it compiles for at each call, which takes longer than a small site.
    tensors = (out, bits, x, packed, *coefficients.tensors, program.vectors)
    key = (out.device.index, *(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors))
    compiled = prepared.compiled.get(key)
    if compiled is None:
        kernel, *_ = _gluon()
        compiled = prepared.compiled[key] = kernel[prepared.grid](*args, num_warps=4)
    else:
        compiled[prepared.grid](*args)
    return compiled


def _descriptor(
    base: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int], layout: Any
) -> Any:
    """What the copy engine is told of a tensor; without the checks of the class, which take long."""
    descriptor = object.__new__(_gluon()[2])
    descriptor.base = base
    descriptor.shape = list(shape)
    descriptor.strides = list(strides)
    descriptor.block_shape = list(block_shape)
    descriptor.layout = layout
    descriptor.padding = "zero"
    return descriptor


def _kinds(coefficients: Coefficients) -> tuple[int, int, int, int]:
    scale, shift, lo, hi = (
        (2 if tensor is not None else 1) if there else 0
        for tensor, there in zip(coefficients.tensors, coefficients.present, strict=True)
    )
    return scale, shift, lo, hi


@dataclass(frozen=True)
class Call:
    """What a call works out from everything but values, kept because a small site takes less time than that."""

    shape: tuple[int, ...]
    out_last: bool
    problem: Problem
    march: March


# For each kind of call; None where ``conv_transpose`` takes it.
_calls: dict[Any, Call | None] = {}
MOST_CALLS = 1024
UNKNOWN: Any = object()

# Why Gluon is given up for the rest of the process.
_broken: list[str] = []


def _call(
    x: torch.Tensor,
    weight: torch.Tensor,
    axes_of: tuple[Any, ...],
    out_last: bool,
    allow_tf32: bool,
    plan: str,
    bits: bool,
    columns: int,
) -> Call | None:
    """None where the march does not take it. Raises as ``conv_transpose`` does. ``columns``: of a program's vectors."""
    check_inputs(x, weight, 1)
    axes = axes_for(x.dim() - 2, weight.shape[2:], *axes_of)
    sizes = [axis.output_size(size) for axis, size in zip(axes, x.shape[2:], strict=True)]
    if not is_hopper(x.device) or min(sizes) < 1:
        return None
    problem = problem_for(x, weight, axes, 1, out_last, allow_tf32)
    reason = why_not(problem)
    if reason is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        config = _config(problem, plan)
        if config is None:
            log.debug("not for the march on Hopper: %r is for an x of another layout", plan)
            return None
        march = march_for(problem, x.shape, config, processors, bits=bits)
        reason = why_not_shape(problem, x.shape, march)
        if reason is None and bits:
            reason = why_no_bits(problem, sizes[-1])
        if reason is None and not has_room(problem, config, columns):
            reason = f"there is no room for {columns} vectors"
    if reason is not None:
        log.debug("not for the march on Hopper: %s", reason)
        return None
    return Call((x.shape[0], problem.C_out, *sizes), out_last, problem, march)


def _config(problem: Problem, plan: str) -> Config | None:
    """The one of that name or, where x has another layout than that is for, one that reads the same packed weight.

    None where there is none of those.
    """
    named = next((config for config in CONFIGS if config.name == plan), None)
    fitting = configs_for(problem)
    alike = [config for config in fitting if named and config.channels == named.channels]
    if named in configs_for(replace(problem, x_last=not problem.x_last)) and not alike:
        return None
    if named is None or not alike:
        raise ValueError(f"plan is {plan!r}; allowed for this convolution are {[config.name for config in fitting]}")
    return named if named in alike else alike[0]


def _give_up(raised: Exception) -> None:
    _broken.append(f"{type(raised).__name__}: {raised}")
    first = " ".join(str(raised).split())[:200]
    log.warning("the Gluon kernel does not run here, from now on others do: %s: %s", type(raised).__name__, first)


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    axes_of: tuple[tuple[int, ...], ...],
    tensors: Tensors,
    numbers: Numbers,
    channels_last: bool,
    allow_tf32: bool,
    plan: str,
    gate: Gate | None = None,
    program: Program = NO_PROGRAM,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """What ``conv_transpose`` returns and, with a gate, its bits; None where the march cannot run after all."""
    x_last = is_channels_last(x)
    if x_last is None:
        x, x_last = x.clone(memory_format=torch.contiguous_format), False
    columns = 0 if program.vectors is None else int(program.vectors.shape[-1])
    given = (x.shape, x.dtype, x.device, x_last, weight.shape, weight.dtype, weight.device)
    key = (*given, axes_of, channels_last, allow_tf32, plan, gate is None, columns)
    call = _calls.get(key, UNKNOWN)
    if call is UNKNOWN:
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        rest = (channels_last, allow_tf32, plan, gate is not None, columns)
        call = _calls[key] = _call(x, weight, axes_of, *rest)
    if call is None or _broken or (x_last and x.data_ptr() % hopper_strips.COPY_BYTES):
        return None
    check_coefficients(call.problem.C_out, x.device, tensors)
    if program.text:
        check_program(program, call.problem.C_out, x.device)
    out = empty(call.shape, x, channels_last)
    bits = None if gate is None else out.new_empty(cdiv(out.numel(), 8), dtype=torch.uint8)
    coefficients = coefficients_for(out, tensors, numbers)
    try:
        packed = packed.contiguous()
        launch(out, x, packed, call.problem, call.march, coefficients, bits, gate or EVERYTHING, program)
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:  # an experimental interface: anything may have changed
        _give_up(raised)
        return None
    return out, bits


def _conv_transpose_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    scale_number: float,
    shift_number: float,
    lo_number: float | None,
    hi_number: float | None,
    channels_last: bool,
    allow_tf32: bool,
    plan: str,
    program: str = "",
    vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """What ``conv_transpose`` computes with the plan of this name, one of ``configs_for``, and without groups.

    ``packed`` is what ``pack`` returns for it; ``program`` reads no tensors. Where the march cannot run after all,
    ``conv_transpose`` does by its own rule, and packs ``weight``; arguments, result and errors are those of
    ``conv_transpose``. Inductor may give any of the tensors in another layout than it was traced with.
    """
    tensors: Tensors = (scale, shift, lo, hi)
    numbers = (scale_number, shift_number, lo_number, hi_number)
    axes_of = tuple(tuple(sizes) for sizes in (stride, padding, output_padding, dilation))
    vectors = None if vectors is None else vectors.contiguous()
    steps = Program(program, vectors) if program else NO_PROGRAM
    ran = run(x, weight, packed, axes_of, tensors, numbers, channels_last, allow_tf32, plan, None, steps)
    if ran is not None:
        return ran[0]
    return torch.ops.fused_post.conv_transpose.default(
        x, weight, *axes_of, 1, *tensors, *numbers, channels_last, allow_tf32, None, program, vectors
    )


def fake(
    x: torch.Tensor, weight: torch.Tensor, axes_of: Sequence[Sequence[int]], tensors: Tensors, channels_last: bool
) -> torch.Tensor:
    """A result without values."""
    check_inputs(x, weight, 1)
    C_out = weight.shape[1]
    check_coefficients(C_out, x.device, tensors)
    axes = axes_for(x.dim() - 2, weight.shape[2:], *axes_of)
    sizes = [axis.output_size(size) for axis, size in zip(axes, x.shape[2:], strict=True)]
    return empty((x.shape[0], C_out, *sizes), x, channels_last)


# Not by custom_op, whose layers take the host longer than everything here.
NAME = "fused_post::conv_transpose_hopper"
SCHEMA = torch.library.infer_schema(_conv_transpose_hopper, mutates_args=())
torch.library.define(NAME, SCHEMA, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
torch.library.impl(NAME, "default", _conv_transpose_hopper)
conv_transpose_hopper = torch.ops.fused_post.conv_transpose_hopper.default


@torch.library.register_fake(NAME)
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    scale_number: float,
    shift_number: float,
    lo_number: float | None,
    hi_number: float | None,
    channels_last: bool,
    allow_tf32: bool,
    plan: str,
    program: str = "",
    vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    check_program(Program(program, vectors), weight.shape[1], x.device)
    return fake(x, weight, (stride, padding, output_padding, dilation), (scale, shift, lo, hi), channels_last)

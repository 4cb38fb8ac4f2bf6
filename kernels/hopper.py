"""The operator of the kernels that only a Hopper runs: ``hopper_march`` and ``hopper_product``.

Inductor writes the source of user kernels out again as plain Triton, which Gluon is not. So these kernels have an
operator of their own that is opaque to Inductor, and costs the host more than a kernel does; ``conv_transpose`` calls
it for plans called "hopper ..." and "product ...", with the weight packed where Inductor sees that. ``hopper_training``
has one that writes the bits of a gate as well.

Gluon is an experimental part of triton: it is imported at the first launch, and where that, the compilation or the
launch fails, the operator says so once and goes on with ``conv_transpose``'s other kernels.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusion_backend.kernels import hopper_blocks, hopper_march, hopper_product, hopper_strips
from fusion_backend.kernels.arguments import axes_for, check_inputs
from fusion_backend.kernels.coefficients import Numbers, Tensors, check_coefficients, coefficients_for
from fusion_backend.kernels.gate import EVERYTHING, Gate
from fusion_backend.kernels.hopper_blocks import Product, product_for
from fusion_backend.kernels.hopper_descriptor import why_no_gluon
from fusion_backend.kernels.hopper_strips import CONFIGS, Config, March, configs_for, has_room, march_for
from fusion_backend.kernels.layout import empty, is_channels_last
from fusion_backend.kernels.problem import Problem, is_hopper, problem_for
from fusion_backend.kernels.program import NO_PROGRAM, Program, check_program
from fusion_backend.kernels.rounding import cdiv

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """What a call works out from everything but values, kept because a small site takes less time than that."""

    shape: tuple[int, ...]
    out_last: bool
    problem: Problem
    cut: March | Product


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
    """None where no kernel here takes it. Raises as ``conv_transpose`` does. ``columns``: of a program's vectors."""
    check_inputs(x, weight, 1)
    axes = axes_for(x.dim() - 2, weight.shape[2:], *axes_of)
    sizes = [axis.output_size(size) for axis, size in zip(axes, x.shape[2:], strict=True)]
    if not is_hopper(x.device) or min(sizes) < 1:
        return None
    problem = problem_for(x, weight, axes, 1, out_last, allow_tf32)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    cut = why_no_gluon()
    if cut is None and plan in {config.name for config in hopper_blocks.CONFIGS}:
        cut = _product(problem, x.shape, plan, bits, processors)
    elif cut is None:
        cut = _march(problem, x.shape, sizes[-1], plan, bits, columns, processors)
    if isinstance(cut, str):
        log.debug("not for a kernel on Hopper: %s", cut)
        return None
    return Call((x.shape[0], problem.C_out, *sizes), out_last, problem, cut)


def _product(problem: Problem, shape: Sequence[int], plan: str, bits: bool, processors: int) -> Product | str:
    """Or why it cannot be."""
    reason = "it writes no bits" if bits else hopper_blocks.why_not(problem)
    if reason is not None:
        return reason
    fitting = hopper_blocks.configs_for(problem)
    config = next((config for config in fitting if config.name == plan), None)
    if config is None:
        raise ValueError(f"plan is {plan!r}; allowed for this convolution are {[config.name for config in fitting]}")
    cut = product_for(problem, shape, config, processors)
    return hopper_blocks.why_not_shape(problem, shape, cut) or cut


def _march(
    problem: Problem, shape: Sequence[int], W_out: int, plan: str, bits: bool, columns: int, processors: int
) -> March | str:
    """Or why it cannot be."""
    reason = hopper_strips.why_not(problem)
    if reason is not None:
        return reason
    config = _config(problem, plan)
    if config is None:
        return f"{plan!r} is for an x of another layout"
    if not has_room(problem, config, columns):
        return f"there is no room for {columns} vectors"
    march = march_for(problem, shape, config, processors, bits=bits)
    if bits and (reason := hopper_strips.why_no_bits(problem, W_out)):
        return reason
    return hopper_strips.why_not_shape(problem, shape, march) or march


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
    """What ``conv_transpose`` returns and, with a gate, its bits; None where it cannot run after all."""
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
        given = (out, x, packed.contiguous(), call.problem)
        if isinstance(call.cut, Product):
            hopper_product.launch(*given, call.cut, coefficients, program)
        else:
            hopper_march.launch(*given, call.cut, coefficients, bits, gate or EVERYTHING, program)
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
    """What ``conv_transpose`` computes with the configuration of this name, and without groups.

    ``packed`` is what its ``pack`` returns; ``program`` reads no tensors. Where it cannot run after all,
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

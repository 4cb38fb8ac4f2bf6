"""The operator of the kernels that only a Hopper runs: ``hopper_march`` and ``hopper_product``.

Inductor writes the source of user kernels out again as plain Triton, which Gluon is not. So these kernels have an
operator of their own that is opaque to Inductor, and costs the host more than a kernel does; ``conv_transpose`` calls
it for plans called "hopper ..." and "product ...", with the weight packed where Inductor sees that. ``hopper_training``
has one that writes the bits of a gate as well, and ``hopper_keeping`` one that writes a value of the program.

Gluon is an experimental part of triton: it is imported at the first launch, and where that, the compilation or the
launch fails, the operator says so once and goes on with ``conv_transpose``'s other kernels.
"""

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fusion_backend.kernels import hopper_blocks, hopper_march, hopper_product, hopper_strips
from fusion_backend.kernels.arguments import axes_for, check_inputs
from fusion_backend.kernels.coefficients import Numbers, Tensors, check_coefficients, coefficients_for
from fusion_backend.kernels.hopper_blocks import Product, product_for
from fusion_backend.kernels.hopper_launch import why_no_gluon
from fusion_backend.kernels.hopper_strips import CONFIGS, Config, March, configs_for, has_room, march_for
from fusion_backend.kernels.layout import empty, is_channels_last
from fusion_backend.kernels.problem import Problem, is_hopper, problem_for
from fusion_backend.kernels.program import Program, check_program
from fusion_backend.kernels.rounding import cdiv

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """What a call is asked for besides tensors. An operator takes it as one text: each argument costs the host time.

    That is JSON with other quotation marks: Inductor writes it into a string in C++ as it is.
    """

    axes: tuple[tuple[int, ...], ...]  # stride, padding, output padding and dilation, as ``axes_for`` takes them
    numbers: Numbers
    channels_last: bool
    allow_tf32: bool
    plan: str
    program: str = ""
    gate: tuple[bool, bool, bool] | None = None  # lo_open, hi_open, passes_nan
    kept: int | None = None

    @property
    def text(self) -> str:
        return json.dumps(asdict(self)).replace('"', "'")


@functools.lru_cache(maxsize=1024)
def call_of(text: str) -> Call:
    read: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text.replace("'", '"')).items()
    }
    return Call(**read | {"axes": tuple(map(tuple, read["axes"]))})


@dataclass(frozen=True)
class Ready:
    """What a call works out from everything but values, kept because a small site takes less time than that.

    ``prepared``: launches and their numbers, for each set of coefficients that are tensors.
    """

    call: Call
    shape: tuple[int, ...]
    problem: Problem
    cut: March | Product
    prepared: dict[tuple[bool, ...], tuple[hopper_march.Prepared | hopper_product.Prepared, tuple[float, ...]]]


# For each kind of call; None where ``conv_transpose`` takes it.
_ready: dict[Any, Ready | None] = {}
MOST_CALLS = 1024
UNKNOWN: Any = object()

# Why Gluon is given up for the rest of the process.
_broken: list[str] = []


def _get_ready(x: torch.Tensor, weight: torch.Tensor, call: Call, columns: int) -> Ready | None:
    """None where no kernel here takes it. Raises as ``conv_transpose`` does. ``columns``: of a program's vectors."""
    check_inputs(x, weight, 1)
    axes = axes_for(x.dim() - 2, weight.shape[2:], *call.axes)
    sizes = [axis.output_size(size) for axis, size in zip(axes, x.shape[2:], strict=True)]
    if not is_hopper(x.device) or min(sizes) < 1:
        return None
    problem = problem_for(x, weight, axes, 1, call.channels_last, call.allow_tf32)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    cut: March | Product | str | None = why_no_gluon()
    if cut is None and call.plan in {config.name for config in hopper_blocks.CONFIGS}:
        # An x that is in both layouts at once counts as contiguous elsewhere.
        problem = replace(problem, x_last=x.movedim(1, -1).is_contiguous())
        cut = _product(problem, x.shape, call, processors)
    elif cut is None:
        cut = _march(problem, x.shape, sizes[-1], call, columns, processors)
    if isinstance(cut, str):
        log.debug("not for a kernel on Hopper: %s", cut)
        return None
    assert cut is not None, "why_no_gluon has nothing to say"
    return Ready(call, (x.shape[0], problem.C_out, *sizes), problem, cut, {})


def _product(problem: Problem, shape: Sequence[int], call: Call, processors: int) -> Product | str:
    """Or why it cannot be."""
    reason = "it writes no bits" if call.gate else hopper_blocks.why_not(problem)
    if reason is not None:
        return reason
    fitting = hopper_blocks.configs_for(problem)
    config = next((config for config in fitting if config.name == call.plan), None)
    if config is None:
        known = [config.name for config in fitting]
        raise ValueError(f"plan is {call.plan!r}; allowed for this convolution are {known}")
    cut = product_for(problem, shape, config, processors)
    return hopper_blocks.why_not_shape(problem, shape, cut) or cut


def _march(
    problem: Problem, shape: Sequence[int], W_out: int, call: Call, columns: int, processors: int
) -> March | str:
    """Or why it cannot be."""
    reason = hopper_strips.why_not(replace(problem, kept=call.kept is not None))
    if reason is not None:
        return reason
    config = _config(problem, call.plan)
    if config is None:
        return f"{call.plan!r} is for an x of another layout"
    if not has_room(problem, config, columns):
        return f"there is no room for {columns} vectors"
    march = march_for(problem, shape, config, processors, bits=call.gate is not None)
    if call.gate and (reason := hopper_strips.why_no_bits(problem, W_out)):
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
    tensors: Tensors,
    vectors: torch.Tensor | None,
    text: str,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """What ``conv_transpose`` returns and beside it, with a gate, its bits, or the value that is kept.

    None where it cannot run after all.
    """
    if is_channels_last(x) is None:
        x = x.clone(memory_format=torch.contiguous_format)
    columns = 0 if vectors is None else vectors.shape[-1]
    key = (text, x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.dtype, weight.device, columns)
    ready = _ready.get(key, UNKNOWN)
    if ready is UNKNOWN:
        if len(_ready) >= MOST_CALLS:
            _ready.clear()
        ready = _ready[key] = _get_ready(x, weight, call_of(text), columns)
    if ready is None or _broken or (ready.problem.x_last and x.data_ptr() % hopper_strips.COPY_BYTES):
        return None
    call = ready.call
    check_coefficients(ready.problem.C_out, x.device, tensors)
    if call.program or vectors is not None:
        check_program(Program(call.program, vectors, kept=call.kept), ready.problem.C_out, x.device)
    out = empty(ready.shape, x, call.channels_last)
    second = None if call.gate is None else out.new_empty(cdiv(out.numel(), 8), dtype=torch.uint8)
    if call.kept is not None:
        second = empty(ready.shape, x, call.channels_last)
    if out.numel() == 0:
        return out, second
    try:
        prepared, tensors, numbers = _prepared(ready, x, out, tensors)
        prepared.launch(out, x, packed.contiguous(), tensors, numbers, vectors, second)
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:  # an experimental interface: anything may have changed
        _give_up(raised)
        return None
    return out, second


def _prepared(ready: Ready, x: torch.Tensor, out: torch.Tensor, tensors: Tensors) -> tuple[Any, Tensors, Any]:
    """The launch, and its coefficients. Kept, unless a number that a kernel cannot be told becomes a tensor."""
    given = tuple(tensor is None for tensor in tensors)
    if given in ready.prepared:
        prepared, numbers = ready.prepared[given]
        return prepared, tensors, numbers
    call, coefficients = ready.call, coefficients_for(out, tensors, ready.call.numbers)
    of_call = (ready.problem, ready.cut, tuple(x.shape), coefficients.kinds, call.gate, call.program)
    prepare: Any = hopper_march.prepare
    if isinstance(ready.cut, Product):
        prepare, of_call = hopper_product.prepare, (*of_call, call.kept)  # type: ignore[assignment]
    prepared = prepare(*of_call)
    if given == tuple(tensor is None for tensor in coefficients.tensors):
        ready.prepared[given] = prepared, coefficients.numbers
    return prepared, coefficients.tensors, coefficients.numbers  # type: ignore[return-value]


def _conv_transpose_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    vectors: torch.Tensor | None,
    call: str,
) -> torch.Tensor:
    """What ``conv_transpose`` computes of these tensors, without groups, for the text of a ``Call``.

    ``packed`` is what the ``pack`` of the plan's kernel returns; the program reads no tensors. Where the kernel cannot
    run after all, ``conv_transpose`` does by its own rule, and packs ``weight``; arguments, result and errors are those
    of ``conv_transpose``. Inductor may give any of the tensors in another layout than it was traced with.
    """
    tensors: Tensors = (scale, shift, lo, hi)
    vectors = None if vectors is None else vectors.contiguous()
    ran = run(x, weight, packed, tensors, vectors, call)
    if ran is not None:
        return ran[0]
    asked = call_of(call)
    how = (asked.channels_last, asked.allow_tf32, None, asked.program, vectors)
    return torch.ops.fused_post.conv_transpose.default(x, weight, *asked.axes, 1, *tensors, *asked.numbers, *how)


def fake(
    x: torch.Tensor, weight: torch.Tensor, tensors: Tensors, vectors: torch.Tensor | None, call: Call
) -> torch.Tensor:
    """A result without values."""
    check_inputs(x, weight, 1)
    C_out = weight.shape[1]
    check_coefficients(C_out, x.device, tensors)
    check_program(Program(call.program, vectors, kept=call.kept), C_out, x.device)
    axes = axes_for(x.dim() - 2, weight.shape[2:], *call.axes)
    sizes = [axis.output_size(size) for axis, size in zip(axes, x.shape[2:], strict=True)]
    return empty((x.shape[0], C_out, *sizes), x, call.channels_last)


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
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    vectors: torch.Tensor | None,
    call: str,
) -> torch.Tensor:
    return fake(x, weight, (scale, shift, lo, hi), vectors, call_of(call))

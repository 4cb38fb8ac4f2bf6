"""grad_x = where(p, a * grad, 0): back through y = min(max(a*x + b, lo), hi), with the sums that b, lo and hi ask for.

p is the bit of an element that the forward has written (see ``gate``), a is a number or one value per channel:

    passed[c]  = sum of grad over the elements of channel c that pass       the gradient of b
    blocked[c] = sum of grad over those that do not                         of lo, or of hi

Where a program leads back (see ``program_backward``), grad is what it makes of the gradient and of what was kept. All
of it in one pass, computed in fp32, and rounded once. ``where`` and not a product: NaN and infinity in a blocked
element end there.

    bytes moved = (2 * itemsize + 1/8) * numel        (the partial sums are a few thousandths of that)
                = 3 * itemsize * numel                with a program and the value that it reads

A program adds up what it has read, writes that down, and one ``sum`` over these partial sums follows. No program waits
for or adds to another, so the same input gives the same bits on every run. Memory is a matrix of which a program has
tiles, and its sums are those of the rows or of the columns:

    contiguous                 [N * C, S]      a row is one channel's
    channels_last              [N * S, C]      a column is one channel's
    contiguous, short rows     [N, C * S]      a column is one pixel of one channel

Where the first result is to be channels_last and grad is not, ``epilogue_backward_turned`` has the kernel.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from fusion_backend.kernels.coefficients import check_coefficients, coefficients_for, load_coefficient
from fusion_backend.kernels.epilogue_backward_turned import launch_turned
from fusion_backend.kernels.gate import in_channels_last_order, unpack
from fusion_backend.kernels.launching import runs
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.matrix import Tiling, tiling_for
from fusion_backend.kernels.program import Program, check_program, load_vectors, reads, run_back
from fusion_backend.kernels.program import reference as run_program
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.support import DTYPES


@dataclass(frozen=True)
class Back:
    """A program that leads back, its v0, its vectors, and its t1; these are None where it does not read them."""

    text: str = ""
    value: torch.Tensor | None = None
    vectors: torch.Tensor | None = None
    tensor: torch.Tensor | None = None


NOTHING = Back()

# The gradient and the sums of what passes and of what does not; None for a sum that is not asked for.
Result = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def reference(
    grad: torch.Tensor,
    bits: torch.Tensor | None,
    scale: torch.Tensor | float | None,
    channels_last: bool,
    sum_passed: bool,
    sum_blocked: bool,
    to_channels_last: bool | None = None,
    back: Back = NOTHING,
) -> Result:
    """The same in plain PyTorch. In float64 for a float64 grad, else in float32; grad_x is rounded once."""
    to_last = channels_last if to_channels_last is None else to_channels_last
    g = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if back.text:
        value = g if back.value is None else back.value.to(g.dtype)  # where it is None, nothing reads it
        g = run_program(value, Program(back.text, back.vectors, (grad, back.tensor)))
    factor = scale.view(-1, *(1,) * (grad.dim() - 2)) if isinstance(scale, torch.Tensor) else scale
    dims = (0, *range(2, grad.dim()))
    if bits is None:
        grad_x = (g * (1.0 if factor is None else factor)).to(grad.dtype)
        blocked = g.new_zeros(grad.shape[1]) if sum_blocked else None
        return _laid_out(grad_x, to_last), g.sum(dims) if sum_passed else None, blocked
    passing = unpack(bits, grad.shape, channels_last)
    grad_x = torch.where(passing, g if factor is None else g * factor, 0.0).to(grad.dtype)
    passed = torch.where(passing, g, 0.0).sum(dims) if sum_passed else None
    blocked = torch.where(passing, 0.0, g).sum(dims) if sum_blocked else None
    return _laid_out(grad_x, to_last), passed, blocked


def _laid_out(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    if (x.movedim(1, -1) if channels_last else x).is_contiguous():
        return x
    return empty(x.shape, x, channels_last).copy_(x)


@triton.jit
def _backward_kernel(
    grad_x_ptr,
    passed_ptr,
    blocked_ptr,
    grad_ptr,
    bits_ptr,
    scale_ptr,
    value_ptr,
    vectors_ptr,
    tensor_ptr,
    rows,
    units,
    channels,
    spatial,
    tiles,
    scale,
    HAS_SCALE: tl.constexpr,
    PROGRAM: tl.constexpr,
    BY_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Some tiles, one below the other, of ROWS rows and UNITS units of WIDTH elements, of a matrix [rows, units].

    Their number is no constexpr: compilers would unroll the loop, and run out of registers. A unit is what one access
    reads, and its bits lie in one byte. BY_ROW: the channel of a row is row % channels, and passed and blocked are
    [rows, blocks of units]. Else that of a column is column // spatial, and they are [columns, blocks of rows]: sums of
    neighbours in memory, which Inductor adds up in one kernel where they are few.
    """
    blocks = tl.cdiv(units, UNITS)
    block = tl.program_id(0) % blocks
    strip = tl.program_id(0) // blocks
    place = tl.arange(0, WIDTH)[None, :]
    lane = tl.arange(0, ROWS * UNITS)
    unit = block * UNITS + lane % UNITS
    first = strip.to(tl.int64) * (ROWS * tiles)

    if BY_ROW:
        channel = ((first % channels).to(tl.int32) + lane // UNITS)[:, None] % channels
    else:
        channel = tl.minimum((unit[:, None] * WIDTH + place) // spatial, channels - 1)
    scale = load_coefficient(scale_ptr, scale, channel, None, None)
    vectors = load_vectors(vectors_ptr, channel, None, None, PROGRAM)

    passed = tl.zeros((ROWS * UNITS, WIDTH), tl.float32)
    blocked = tl.zeros((ROWS * UNITS, WIDTH), tl.float32)
    for tile in range(tiles):
        row = first + tile * ROWS + lane // UNITS
        inside = (row < rows) & (unit < units)
        offset = (row * units + unit) * WIDTH
        grad = tl.load(grad_ptr + offset[:, None] + place, mask=inside[:, None], other=0.0)
        g = grad.to(tl.float32)
        if PROGRAM != "":
            at = offset[:, None] + place
            g = run_back(g, value_ptr, tensor_ptr, vectors, at, inside[:, None], PROGRAM)
        grad_x = g * scale if HAS_SCALE else g
        if bits_ptr is None:
            passed += g
        else:
            byte = tl.load(bits_ptr + (offset >> 3), mask=inside, other=0).to(tl.int32)
            passing = ((byte >> (offset & 7).to(tl.int32))[:, None] >> place) & 1 != 0
            grad_x = tl.where(passing, grad_x, 0.0)
            passed += tl.where(passing, g, 0.0)
            blocked += tl.where(passing, 0.0, g)
        tl.store(grad_x_ptr + offset[:, None] + place, grad_x.to(grad.dtype), mask=inside[:, None])

    if BY_ROW:
        row = first + tl.arange(0, ROWS)
        sums = row * blocks + block  # [ROWS]
        known = row < rows
        if passed_ptr is not None:
            tl.store(passed_ptr + sums, tl.sum(tl.reshape(tl.sum(passed, 1), (ROWS, UNITS)), 1), mask=known)
        if blocked_ptr is not None:
            tl.store(blocked_ptr + sums, tl.sum(tl.reshape(tl.sum(blocked, 1), (ROWS, UNITS)), 1), mask=known)
    else:
        unit = block * UNITS + tl.arange(0, UNITS)
        strips = tl.num_programs(0) // blocks
        sums = (unit.to(tl.int64)[:, None] * WIDTH + place) * strips + strip  # [UNITS, WIDTH]
        known = (unit < units)[:, None]
        if passed_ptr is not None:
            tl.store(passed_ptr + sums, tl.sum(tl.reshape(passed, (ROWS, UNITS, WIDTH)), 0), mask=known)
        if blocked_ptr is not None:
            tl.store(blocked_ptr + sums, tl.sum(tl.reshape(blocked, (ROWS, UNITS, WIDTH)), 0), mask=known)


def launch(
    grad: torch.Tensor,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_number: float,
    channels_last: bool,
    sum_passed: bool,
    sum_blocked: bool,
    tiling: Tiling,
    back: Back = NOTHING,
) -> Result:
    """``reference`` by one kernel and a sum of its partial sums.

    grad is dense in the given layout, as are the tensors of ``back``, and not empty.
    """
    N, C, *sizes = grad.shape
    S = math.prod(sizes)
    if bits is None and sum_blocked:
        grad_x, passed, _ = launch(grad, bits, scale, scale_number, channels_last, sum_passed, False, tiling, back)
        return grad_x, passed, grad.new_zeros(C, dtype=torch.float32)

    given = coefficients_for(grad, (scale, None, None, None), (scale_number, 0.0, None, None))
    spatial = 1 if channels_last else S
    parts, dims = ((N, C, tiling.blocks), (0, 2)) if tiling.by_row else ((C, spatial, tiling.strips), (1, 2))
    grad_x = empty(grad.shape, grad, channels_last)
    passed = _empty_parts(parts, grad) if sum_passed else None
    blocked = _empty_parts(parts, grad) if sum_blocked else None
    kernel: Any = wrap_triton(_backward_kernel) if isinstance(_backward_kernel, JITFunction) else _backward_kernel
    kernel[(tiling.strips * tiling.blocks,)](
        grad_x,
        passed,
        blocked,
        grad,
        bits,
        given.tensors[0],
        back.value,
        back.vectors,
        back.tensor,
        tiling.rows,
        tiling.units,
        C,
        spatial,
        tiling.tiles,
        given.numbers[0],
        HAS_SCALE=given.present[0],
        PROGRAM=back.text,
        BY_ROW=tiling.by_row,
        WIDTH=tiling.width,
        ROWS=tiling.tile_rows,
        UNITS=tiling.tile_units,
        num_warps=tiling.num_warps,
    )
    return grad_x, None if passed is None else passed.sum(dims), None if blocked is None else blocked.sum(dims)


def _empty_parts(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _check(grad: torch.Tensor, bits: torch.Tensor | None, scale: torch.Tensor | None, back: Back) -> None:
    if not 3 <= grad.dim() <= 5:
        raise ValueError(
            f"grad has rank {grad.dim()} (shape {tuple(grad.shape)}); allowed are ranks 3 to 5: [N, C, *spatial]"
        )
    allowed = (*DTYPES, torch.float64)
    if grad.dtype not in allowed:
        raise TypeError(f"grad has dtype {grad.dtype}; allowed are {', '.join(map(str, allowed))}")
    compute = torch.promote_types(grad.dtype, torch.float32)
    check_coefficients(int(grad.shape[1]), grad.device, (scale, None, None, None), compute, "grad")
    program = Program(back.text, back.vectors, (grad if back.text else None, back.tensor))
    check_program(program, grad.shape[1], grad.device, compute)
    for name, tensor in (("value", back.value), ("tensor", back.tensor)):
        if tensor is not None and (tensor.shape != grad.shape or tensor.dtype != grad.dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; allowed is what grad is, {grad.dtype} "
                f"{tuple(grad.shape)}"
            )
    if back.value is None and reads(back.text, "v0"):
        raise ValueError(f"program {back.text!r} reads v0, and value is None")
    if bits is None:
        return
    if bits.dtype != torch.uint8:
        raise TypeError(f"bits has dtype {bits.dtype}; allowed is torch.uint8")
    if bits.dim() not in (1, 2) or bits.shape[-1] != cdiv(grad.numel(), 8) or (bits.dim() == 2 and bits.shape[0] != 1):
        raise ValueError(
            f"bits has shape {tuple(bits.shape)}; allowed is one bit an element, [ceil({grad.numel()} / 8)] = "
            f"({cdiv(grad.numel(), 8)},), or with a 1 before that in channels_last order"
        )
    if bits.device != grad.device:
        raise ValueError(f"bits is on {bits.device}; allowed is grad's device, {grad.device}")
    if not bits.is_contiguous():
        raise ValueError(f"bits has stride {bits.stride(-1)}; allowed is 1: call .contiguous() on it")


def _backward(
    grad: torch.Tensor,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_number: float,
    channels_last: bool,
    sum_passed: bool,
    sum_blocked: bool,
    to_channels_last: bool | None,
    back: Back = NOTHING,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    to_last = channels_last if to_channels_last is None else to_channels_last
    _check(grad, bits, scale, back)
    compute = torch.promote_types(grad.dtype, torch.float32)
    wanted = (sum_passed, sum_blocked)
    if grad.numel() == 0:
        passed, blocked = (grad.new_zeros(grad.shape[1] if each else 0, dtype=compute) for each in wanted)
        return empty(grad.shape, grad, to_last), passed, blocked
    if runs(_backward_kernel, grad):
        grad = _laid_out(grad, channels_last)
        value, tensor = (None if t is None else _laid_out(t, channels_last) for t in (back.value, back.tensor))
        back = replace(back, value=value, tensor=tensor)
        bits_last = bits is not None and in_channels_last_order(bits, channels_last)
        if (to_last or bits_last) and not channels_last:
            grad_x, *sums = launch_turned(
                grad, bits, scale, scale_number, *wanted, back.text, back.value, back.vectors, back.tensor
            )
            grad_x = _laid_out(grad_x, to_last)
        else:
            tiling = tiling_for(grad, channels_last)
            grad_x, *sums = launch(grad, bits, scale, scale_number, channels_last, *wanted, tiling, back)
            grad_x = _laid_out(grad_x, to_last)
    else:
        factor = scale if scale is not None else scale_number if scale_number != 1.0 else None
        grad_x, *sums = reference(grad, bits, factor, channels_last, *wanted, to_last, back)
    passed, blocked = (grad.new_empty(0, dtype=compute) if each is None else each for each in sums)
    return grad_x, passed, blocked


# The body comes first: where triton_op registers an operator it looks for the kernels behind it, for compile caches.


@triton_op("fused_post::epilogue_backward", mutates_args=())
def epilogue_backward(
    grad: torch.Tensor,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_number: float,
    channels_last: bool,
    sum_passed: bool,
    sum_blocked: bool,
    to_channels_last: bool | None = None,
    program: str = "",
    value: torch.Tensor | None = None,
    vectors: torch.Tensor | None = None,
    tensor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """where(bit, scale * grad, 0), and per channel the sums of grad where the bit is set, and where it is not.

    ``grad``: [N, C, *spatial], rank 3 to 5, float32, float16, bfloat16, or (without a kernel) float64, of any strides.
    ``bits``: uint8 [ceil(numel / 8)] in the order of memory of the layout that ``channels_last`` names, which the first
    result has too, unless ``to_channels_last`` names another for it; or [1, ceil(numel / 8)] in channels_last order in
    any case; None: every element passes. ``scale``: a
    contiguous float32 tensor [C] on grad's device (float64 for a float64 grad) or, where that is None, the number. The
    sums are float32 [C] (float64 for float64), or [0] where they are not asked for; they are of grad as it came,
    without the scale. Equal inputs give equal bits on every run. ``program``: grad is the result of this one, of which
    t0 is the grad that is given, v0 is ``value`` and t1 is ``tensor``, both as grad is, and ``vectors`` as in
    ``epilogue`` (float64 for float64).
    There is no second derivative. Raises ValueError or TypeError for anything else.
    """
    back = Back(program, value, vectors, tensor)
    return _backward(grad, bits, scale, scale_number, channels_last, sum_passed, sum_blocked, to_channels_last, back)


def _no_second_derivative(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise RuntimeError(
        "fused_post's training operators have no second derivative; for a double backward compile the model with "
        'torch.compile(model, backend="inductor")'
    )


epilogue_backward.register_autograd(_no_second_derivative)

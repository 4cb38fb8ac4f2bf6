"""y = min(max(a * conv_transpose(x, w) + b, lo), hi) for training: with its gradients, and one bit an element saved.

Forward, beside y: p, whether z = a * conv_transpose(x, w) + b passes the gradient, one bit an element (see ``gate``).
For the backward x, w, the coefficients and these bits are kept, and nothing else of the output's size. With g the
gradient of y:

    g_conv     = a * p * g            for the convolution's own backward, which PyTorch does
    g_b        = sum of p * g         per channel, in the same pass over memory as g_conv
    g_lo, g_hi = sum of (1 - p) * g   the same; of two bounds neither can be learned, since one bit does not tell them,
                                      and a NaN that does not pass counts here, as it does not in eager
    g_a        = sum of w * g_w / a   over the taps and inputs of a channel

The last is <p * g, conv_transpose(x, w)>. That is linear in w, hence equal to <w, its own gradient>, and the
convolution's value need not be kept. Where a is learned, g_w / a is computed, and a may be zero. A bias that is left to
the convolution is one more weight, of an input that is one everywhere.

With a ``program`` behind the scale and the shift, y = program(u) with u = a * conv_transpose(x, w) + b, there are no
bits. The gradient of u is another program (see ``program_backward``), of g and of the smallest of these:

    y                          where that tells the derivative, as behind a tanh: it is there anyway
    nothing                    where u has no part in it, as behind a sum
    conv_transpose(x, w)       which PyTorch's convolution has written, and the epilogue kernel has read; or
    x and w                    where the fused kernel never writes it: it computes u once more, and the gradient from it

From the gradient of u on it is as above, but that a is multiplied into w, where it is not one (``program_training``).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.library import triton_op

from fusion_backend.kernels import conv_transpose, epilogue
from fusion_backend.kernels.arguments import axes_for, check_inputs
from fusion_backend.kernels.coefficients import (
    Numbers,
    Tensors,
    check_coefficients,
    coefficients_for,
    gated_reference,
    reference,
)
from fusion_backend.kernels.epilogue_backward import epilogue_backward
from fusion_backend.kernels.gate import Gate
from fusion_backend.kernels.layout import is_channels_last
from fusion_backend.kernels.problem import SMALLEST_EDGE
from fusion_backend.kernels.program import NO_PROGRAM, Program, check_program
from fusion_backend.kernels.program_backward import of_result
from fusion_backend.kernels.program_training import backward, forward, takes
from fusion_backend.kernels.support import DTYPES

# Of a large batch, in the backward: so that each part keeps a GPU busy, in bytes of the gradient.
PARTS = 4
LEAST_PART = 2**28


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sizes: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
    tensors: Tensors,
    numbers: Numbers,
    gate: Gate | None,
    fused: bool,
    layout: tuple[bool | None, bool],
    plan: str | None,
    program: Program = NO_PROGRAM,
    learned: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    check_inputs(x, weight, groups, (*DTYPES, torch.float64))
    axes_for(x.dim() - 2, weight.shape[2:], *sizes)
    compute = _compute(x)
    check_coefficients(int(weight.shape[1]) * groups, x.device, tensors, compute)
    check_program(program, int(weight.shape[1]) * groups, x.device, compute)
    if program.text and gate is not None:
        raise ValueError(f"program is {program.text!r}, and there are bounds; allowed are bounds inside the program")
    if bias is not None and (bias.shape != (int(weight.shape[1]) * groups,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; allowed is [C_out] = "
            f"({int(weight.shape[1]) * groups},) of x's dtype, {x.dtype}"
        )
    if fused and bias is None and epilogue.runs_kernel(x):
        # Bits in channels_last order are for the backward that reads them so in any case.
        turned = gate is not None and _is_faster_turned(x, weight, groups)
        ran = conv_transpose.run(
            x, weight, *sizes, groups, tensors, numbers, *layout, gate, plan, program, turned_bits=turned
        )
        if ran is not None:
            return ran

    stride, padding, output_padding, dilation = sizes
    y = torch.convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)
    if is_channels_last(y) is None:
        y = y.contiguous()
    if program.text:
        again = fused and bias is None and x.dtype in DTYPES
        wanted = ["t0", *(f"c{column}" for column in learned)]  # at most
        return forward(y, tensors, numbers, program, not again and takes(program.text, "v0", wanted))
    if epilogue.runs_kernel(y):
        return y, epilogue.gated_(y, tensors, numbers, gate)
    coefficients = coefficients_for(y, tensors, numbers)
    if gate is None:
        return reference(y, *coefficients.values), y.new_empty(0, dtype=torch.uint8)
    return gated_reference(y, coefficients, gate, bool(is_channels_last(y)))


# The body comes first: where triton_op registers an operator it looks for the kernels behind it, for compile caches.


@triton_op("fused_post::conv_transpose_training", mutates_args=())
def conv_transpose_training(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    scale_number: float = 1.0,
    shift_number: float = 0.0,
    lo_number: float | None = None,
    hi_number: float | None = None,
    lo_open: bool = False,
    hi_open: bool = False,
    passes_nan: bool = True,
    fused: bool = False,
    channels_last: bool | None = None,
    allow_tf32: bool = True,
    plan: str | None = None,
    program: str = "",
    vectors: torch.Tensor | None = None,
    tensor_0: torch.Tensor | None = None,
    learned: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(max(scale * conv_transpose(x, weight, bias) + shift, lo), hi) of x's dtype, and one bit an element.

    ``x``: [N, C_in, *spatial], rank 3 to 5, float32, float16, bfloat16, or (without a kernel) float64; ``weight``:
    [C_in, C_out / groups, *kernel] and ``bias``: [C_out] or None, of the same dtype. PyTorch adds this bias, in half
    precision before it rounds; where that takes a pass of its own, put it into ``shift`` instead. ``stride``,
    ``padding``, ``output_padding`` and ``dilation`` hold one number, or one a dimension. Each coefficient is a
    contiguous tensor [C_out] on x's device, float32 (float64 for a float64 x) or, where that is None, the number; a
    bound that is None or infinite on its own side is none. ``lo_open`` and ``hi_open``: a value on the bound itself
    passes no gradient; ``passes_nan``: a NaN does.

    The second result is uint8 [ceil(numel / 8)], or [1, ceil(numel / 8)] in channels_last order (see ``gate``), or [0]
    where everything passes. ``fused``: by the kernel of
    ``conv_transpose``, where that runs, can write the bits, and there is no ``bias``; ``channels_last``, ``allow_tf32``
    and ``plan`` are for it: the march on Hopper where that is None and it can write bits, or else the rule's. Else
    PyTorch does the convolution, and the epilogue kernel the rest, in place.

    ``program``, ``vectors`` (float64 for a float64 x) and ``tensor_0`` as in ``conv_transpose``; then there are no
    bounds beside it, and the second result is of x's dtype: the convolution's value, or [0] where that is not kept.

    Differentiable with respect to x, weight, bias, tensor_0, the columns of vectors that ``learned`` names (None: all),
    and the coefficients that are tensors, a bound only where it is the only one. There is no second derivative. Raises
    ValueError or TypeError for anything else.
    """
    bounded = _is_bound(lo, lo_number) or _is_bound(hi, hi_number)
    gate = Gate(lo_open, hi_open, passes_nan) if bounded or not passes_nan else None
    tensors, numbers = (scale, shift, lo, hi), (scale_number, shift_number, lo_number, hi_number)
    sizes, layout = (stride, padding, output_padding, dilation), (channels_last, allow_tf32)
    steps, columns = Program(program, vectors, (tensor_0, None)), _columns(vectors, learned)
    return _forward(x, weight, bias, sizes, int(groups), tensors, numbers, gate, fused, layout, plan, steps, columns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, *ctx.convolution = inputs[:8]
    scale, shift, lo, hi, ctx.scale_number, ctx.shift_number, lo_number, hi_number = inputs[8:16]
    ctx.allow_tf32, _, ctx.program, vectors, tensor, learned = inputs[21:27]
    y, second = output
    kept = second if second.numel() else None
    ctx.channels_last = bool(is_channels_last(y))
    two_bounds = _is_bound(lo, lo_number) and _is_bound(hi, hi_number)
    if two_bounds and any(bound is not None and bound.requires_grad for bound in (lo, hi)):
        raise ValueError("lo and hi are both given and one of them requires a gradient; allowed is one bound then")
    if not ctx.program:
        ctx.save_for_backward(x, weight, bias, scale, kept)
        return
    ctx.learned = _columns(vectors, learned) if vectors is not None and vectors.requires_grad else ()
    wanted = [f"c{column}" for column in ctx.learned]
    wanted += ["t0"] if tensor is not None and tensor.requires_grad else []
    if of_result(ctx.program) is not None:
        kept = y
    elif not takes(ctx.program, "v0", wanted):
        kept = None
    tensor = tensor if takes(ctx.program, "t1", wanted) else None
    ctx.save_for_backward(x, weight, bias, scale, kept, shift, vectors, tensor)


def _columns(vectors: torch.Tensor | None, learned: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(range(0 if vectors is None else vectors.shape[1]) if learned is None else learned)


def _is_bound(tensor: torch.Tensor | None, number: float | None) -> bool:
    return tensor is not None or not (number is None or math.isinf(number))


def _backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused_post::conv_transpose_training has no second derivative, and create_graph=True asks for one; "
            "leave the model, or this part of it, uncompiled"
        )
    x, weight, bias, scale, bits = ctx.saved_tensors[:5]
    stride, padding, output_padding, dilation, groups = ctx.convolution
    needs = (*ctx.needs_input_grad, *(False,) * len(_ARGUMENTS))  # the dispatcher leaves defaults at the end out
    needs_x, needs_weight, needs_bias = needs[:3]
    needs_scale, needs_shift, needs_lo, needs_hi = needs[8:12]

    # Where the scale is learned, or a program stands behind it, the convolution's gradients are taken without it.
    without = needs_scale or bool(ctx.program)
    factor, number = (None, 1.0) if without else (scale, ctx.scale_number)
    by = (ctx.scale_number if scale is None else scale) if without else 1.0
    scaled = not (isinstance(by, float) and by == 1.0)
    turned = _is_faster_turned(x, weight, groups) and not ctx.channels_last
    wanted = [needs_x, needs_weight or needs_scale, bias is not None and (needs_bias or needs_scale)]
    used = _by_channel(weight, by, groups) if scaled else weight
    sizes = (stride, padding, dilation, True, output_padding, groups)
    lengths = None if bias is None else bias.shape

    def of_convolution(x: torch.Tensor, grad_conv: torch.Tensor) -> tuple[Any, Any, Any]:
        """Gradients of x, weight and bias."""
        if not any(wanted):
            return None, None, None
        of_x = _turned(x, True, grad_conv) if turned else x
        gradients = torch.ops.aten.convolution_backward(grad_conv, of_x, used, lengths, *sizes, wanted)
        grad_x, grad_weight, grad_bias = gradients
        if turned:
            grad_x = _turned(grad_x, False) if wanted[0] else None
            grad_weight = grad_weight.contiguous() if wanted[1] else None
        return grad_x, grad_weight, grad_bias

    grad_vectors: torch.Tensor | None = None
    grad_tensor: torch.Tensor | None = None
    passed: torch.Tensor | None
    blocked: torch.Tensor | None = None
    grad_scale = None
    if ctx.program:
        grad_conv, passed, grad_vectors, grad_tensor = backward(ctx, grad, turned, needs_shift, *needs[24:26])
        grad_x, grad_weight, grad_bias = of_convolution(x, _turned(grad_conv, True) if turned else grad_conv)
    elif bits is None and factor is None and number == 1.0:
        passed = grad.sum((0, *range(2, grad.dim())), dtype=_compute(grad))
        blocked = torch.zeros_like(passed)
        grad_x, grad_weight, grad_bias = of_convolution(x, _turned(grad, True) if turned else grad)
    else:
        of_sums = (factor, number, ctx.channels_last, needs_shift, needs_lo or needs_hi, True if turned else None)
        found: list[tuple[Any, ...]] = []
        for part_x, part_grad, part_bits in _parts(x, grad, bits):
            grad_conv, passed, blocked = epilogue_backward(part_grad, part_bits, *of_sums)
            found.append((*of_convolution(part_x, grad_conv), passed, blocked))
        grads_x, *others = zip(*found, strict=True)
        grad_x = _together(torch.cat, grads_x)
        grad_weight, grad_bias, passed, blocked = (_together(_sum, parts) for parts in others)
    if needs_scale:
        product = (weight.to(scale.dtype) * grad_weight.to(scale.dtype)).unflatten(0, (groups, -1))
        grad_scale = product.sum((1, *range(3, product.dim()))).flatten()
        if bias is not None:
            grad_scale = grad_scale + bias.to(scale.dtype) * grad_bias.to(scale.dtype)
    if scaled and wanted[1]:
        grad_weight = _by_channel(grad_weight, by, groups)
    if scaled and wanted[2]:
        grad_bias = (grad_bias * by).to(bias.dtype)
    return (
        grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias if needs_bias else None,
        *(None,) * 5,
        grad_scale, passed if needs_shift else None, blocked if needs_lo else None, blocked if needs_hi else None,
        *(None,) * 12, grad_vectors, grad_tensor, None,
    )  # fmt: skip


def _parts(
    x: torch.Tensor, grad: torch.Tensor, bits: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The batch, where it is large in ``PARTS`` parts: the gradient of the convolution is there for one at a time."""
    N = grad.shape[0]
    large = guard_or_false(grad.numel() * grad.dtype.itemsize >= PARTS * LEAST_PART)
    if bits is None or not large or not epilogue.runs_kernel(grad) or not guard_or_false(N % PARTS == 0):
        return [(x, grad, bits)]
    if grad.numel() % (8 * PARTS):
        return [(x, grad, bits)]
    return list(zip(x.chunk(PARTS), grad.chunk(PARTS), bits.chunk(PARTS, -1), strict=True))


def _together(put: Any, parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else put(parts)


def _sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """In float32 at least, in the order that they have; rounded once."""
    compute = _compute(parts[0])
    return functools.reduce(torch.add, (part.to(compute) for part in parts)).to(parts[0].dtype)


def _compute(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_faster_turned(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether cuDNN is to have a contiguous x channels_last, for which it has the faster backward.

    Then the gradient is turned, too, and bits may be in that order for nothing.

    Measured on an H200: half the time and less, where tensor cores are filled (benchmarks/results/training_*.json).
    """
    filled = min(weight.shape[0], weight.shape[1]) >= SMALLEST_EDGE
    image = x.dim() > 3 and epilogue.runs_kernel(x) and is_channels_last(x) is False
    return image and filled and groups == 1 and torch.version.hip is None


def _turned(x: torch.Tensor, channels_last: bool, after: torch.Tensor | None = None) -> torch.Tensor:
    """x itself where it is laid out so."""
    return x if is_channels_last(x) is channels_last else epilogue.turned(x, after, channels_last)


def _by_channel(weight: torch.Tensor, scale: torch.Tensor | float, groups: int) -> torch.Tensor:
    """weight [C_in, C_out / groups, *kernel] times scale [C_out], or a number, in weight's dtype."""
    if isinstance(scale, float):
        return weight * scale
    factor = scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return (weight.unflatten(0, (groups, -1)) * factor).flatten(0, 1).to(weight.dtype)


_ARGUMENTS = torch.ops.fused_post.conv_transpose_training.default._schema.arguments
conv_transpose_training.register_autograd(_backward, setup_context=_save)

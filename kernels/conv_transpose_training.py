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
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
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
from fusion_backend.kernels.support import DTYPES


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
) -> tuple[torch.Tensor, torch.Tensor]:
    check_inputs(x, weight, groups, (*DTYPES, torch.float64))
    axes_for(x.dim() - 2, weight.shape[2:], *sizes)
    compute = torch.promote_types(x.dtype, torch.float32)
    check_coefficients(int(weight.shape[1]) * groups, x.device, tensors, compute)
    if bias is not None and (bias.shape != (int(weight.shape[1]) * groups,) or bias.dtype != x.dtype):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; allowed is [C_out] = "
            f"({int(weight.shape[1]) * groups},) of x's dtype, {x.dtype}"
        )
    if fused and bias is None and epilogue.runs_kernel(x):
        ran = conv_transpose.run(x, weight, *sizes, groups, tensors, numbers, *layout, gate, plan)
        if ran is not None:
            return ran

    stride, padding, output_padding, dilation = sizes
    y = torch.convolution(x, weight, bias, stride, padding, dilation, True, output_padding, groups)
    if is_channels_last(y) is None:
        y = y.contiguous()
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(max(scale * conv_transpose(x, weight, bias) + shift, lo), hi) of x's dtype, and one bit an element.

    ``x``: [N, C_in, *spatial], rank 3 to 5, float32, float16, bfloat16, or (without a kernel) float64; ``weight``:
    [C_in, C_out / groups, *kernel] and ``bias``: [C_out] or None, of the same dtype. PyTorch adds this bias, in half
    precision before it rounds; where that takes a pass of its own, put it into ``shift`` instead. ``stride``,
    ``padding``, ``output_padding`` and ``dilation`` hold one number, or one a dimension. Each coefficient is a
    contiguous tensor [C_out] on x's device, float32 (float64 for a float64 x) or, where that is None, the number; a
    bound that is None or infinite on its own side is none. ``lo_open`` and ``hi_open``: a value on the bound itself
    passes no gradient; ``passes_nan``: a NaN does.

    The second result is uint8 [ceil(numel / 8)], or [0] where everything passes. ``fused``: by the kernel of
    ``conv_transpose``, where that runs, can write the bits, and there is no ``bias``; ``channels_last``, ``allow_tf32``
    and ``plan`` are for it: the march on Hopper where that is None and it can write bits, or else the rule's. Else
    PyTorch does the convolution, and the epilogue kernel the rest, in place.

    Differentiable with respect to x, weight, bias and the coefficients that are tensors; a bound only where it is the
    only one. There is no second derivative. Raises ValueError or TypeError for anything else.
    """
    bounded = _is_bound(lo, lo_number) or _is_bound(hi, hi_number)
    gate = Gate(lo_open, hi_open, passes_nan) if bounded or not passes_nan else None
    tensors, numbers = (scale, shift, lo, hi), (scale_number, shift_number, lo_number, hi_number)
    sizes, layout = (stride, padding, output_padding, dilation), (channels_last, allow_tf32)
    return _forward(x, weight, bias, sizes, int(groups), tensors, numbers, gate, fused, layout, plan)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, *convolution = inputs[:8]
    scale, _, lo, hi, scale_number, _, lo_number, hi_number = inputs[8:16]
    y, bits = output
    ctx.convolution = convolution
    ctx.scale_number = scale_number
    ctx.channels_last = bool(is_channels_last(y))
    two_bounds = _is_bound(lo, lo_number) and _is_bound(hi, hi_number)
    if two_bounds and any(bound is not None and bound.requires_grad for bound in (lo, hi)):
        raise ValueError("lo and hi are both given and one of them requires a gradient; allowed is one bound then")
    ctx.save_for_backward(x, weight, bias, scale, bits if bits.numel() else None)


def _is_bound(tensor: torch.Tensor | None, number: float | None) -> bool:
    return tensor is not None or not (number is None or math.isinf(number))


def _backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused_post::conv_transpose_training has no second derivative, and create_graph=True asks for one; "
            "leave the model, or this part of it, uncompiled"
        )
    x, weight, bias, scale, bits = ctx.saved_tensors
    stride, padding, output_padding, dilation, groups = ctx.convolution
    needs = (*ctx.needs_input_grad, *(False,) * len(_ARGUMENTS))  # the dispatcher leaves defaults at the end out
    needs_x, needs_weight, needs_bias = needs[:3]
    needs_scale, needs_shift, needs_lo, needs_hi = needs[8:12]

    # Where the scale is learned, the convolution's gradients are taken without it.
    factor, number = (None, 1.0) if needs_scale else (scale, ctx.scale_number)
    turned = _is_faster_turned(x, weight, groups) and not ctx.channels_last
    if bits is None and factor is None and number == 1.0:
        grad_conv = _turned(grad, True) if turned else grad
        passed = grad.sum((0, *range(2, grad.dim())), dtype=torch.promote_types(grad.dtype, torch.float32))
        blocked = torch.zeros_like(passed)
    else:
        sums = (needs_shift, needs_lo or needs_hi)
        to_last = True if turned else None
        grad_conv, passed, blocked = epilogue_backward(grad, bits, factor, number, ctx.channels_last, *sums, to_last)

    wanted = [needs_x, needs_weight or needs_scale, bias is not None and (needs_bias or needs_scale)]
    grad_x: Any = None
    grad_weight: Any = None
    grad_bias: Any = None
    grad_scale = None
    if any(wanted):
        used = _by_channel(weight, scale, groups) if needs_scale else weight
        sizes = (stride, padding, dilation, True, output_padding, groups)
        lengths = None if bias is None else bias.shape
        of_x = _turned(x, True, grad_conv) if turned else x
        gradients = torch.ops.aten.convolution_backward(grad_conv, of_x, used, lengths, *sizes, wanted)
        grad_x, grad_weight, grad_bias = gradients
        if turned:
            grad_x = _turned(grad_x, False) if wanted[0] else None
            grad_weight = grad_weight.contiguous() if wanted[1] else None
    if needs_scale:
        product = (weight.to(scale.dtype) * grad_weight.to(scale.dtype)).unflatten(0, (groups, -1))
        grad_scale = product.sum((1, *range(3, product.dim()))).flatten()
        grad_weight = _by_channel(grad_weight, scale, groups)
        if bias is not None:
            grad_scale = grad_scale + bias.to(scale.dtype) * grad_bias.to(scale.dtype)
            grad_bias = (grad_bias * scale).to(bias.dtype)
    return (
        grad_x if needs_x else None, grad_weight if needs_weight else None, grad_bias if needs_bias else None,
        *(None,) * 5,
        grad_scale, passed if needs_shift else None, blocked if needs_lo else None, blocked if needs_hi else None,
        *(None,) * (len(_ARGUMENTS) - 12),
    )  # fmt: skip


def _is_faster_turned(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether cuDNN is to have a contiguous x channels_last, for which it has the faster backward.

    Measured on an H200: half the time and less, where tensor cores are filled (benchmarks/results/training_*.json).
    """
    filled = min(weight.shape[0], weight.shape[1]) >= SMALLEST_EDGE
    image = x.dim() > 3 and epilogue.runs_kernel(x) and is_channels_last(x) is False
    return image and filled and groups == 1 and torch.version.hip is None


def _turned(x: torch.Tensor, channels_last: bool, after: torch.Tensor | None = None) -> torch.Tensor:
    """x itself where it is laid out so."""
    return x if is_channels_last(x) is channels_last else epilogue.turned(x, after, channels_last)


def _by_channel(weight: torch.Tensor, scale: torch.Tensor, groups: int) -> torch.Tensor:
    """weight [C_in, C_out / groups, *kernel] times scale [C_out], in weight's dtype."""
    factor = scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return (weight.unflatten(0, (groups, -1)) * factor).flatten(0, 1).to(weight.dtype)


_ARGUMENTS = torch.ops.fused_post.conv_transpose_training.default._schema.arguments
conv_transpose_training.register_autograd(_backward, setup_context=_save)

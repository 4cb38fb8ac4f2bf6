"""y = min(max(a*x + b, lo), hi): the coefficients as operators take them and as kernels get them, and the formula.

Each is a number or one value per channel. Where lo > hi the result is hi; a NaN goes through; infinities clamp.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fusion_backend.kernels.gate import Gate, pack, passes

Coefficient = torch.Tensor | float | None

# scale, shift, lo and hi, in this order. A tensor wins over the number beside it; a bound of None is no bound.
Tensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
Numbers = tuple[float, float, float | None, float | None]


@dataclass(frozen=True)
class Coefficients:
    """What the kernels are told: pointers or None, numbers, and which coefficients there are at all."""

    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[float, ...]
    present: tuple[bool, ...]

    @property
    def kinds(self) -> tuple[int, int, int, int]:
        """What a kernel is compiled for, of each: 0 none, 1 a number, 2 a tensor."""
        scale, shift, lo, hi = (
            (2 if tensor is not None else 1) if there else 0
            for tensor, there in zip(self.tensors, self.present, strict=True)
        )
        return scale, shift, lo, hi

    @property
    def values(self) -> list[Coefficient]:
        """What a reference is told: None for a coefficient that is not there."""
        together = zip(self.tensors, self.numbers, self.present, strict=True)
        return [(number if tensor is None else tensor) if there else None for tensor, number, there in together]


def coefficients_for(x: torch.Tensor, tensors: Tensors, numbers: Numbers) -> Coefficients:
    """Drop the identities, and turn a number that is infinite or NaN in fp32 into a tensor: source cannot spell it.

    For a float64 x, which no kernel takes, numbers keep all their digits.
    """
    identities = (1.0, 0.0, -math.inf, math.inf)
    compute = torch.promote_types(x.dtype, torch.float32)
    all_tensors, all_numbers, present = [], [], []
    for tensor, number, identity in zip(tensors, numbers, identities, strict=True):
        number = identity if number is None else number
        if compute == torch.float32:
            number = ctypes.c_float(number).value
        is_number = tensor is None and number != identity
        if is_number and not math.isfinite(number):
            tensor = x.new_full((x.shape[1],), number, dtype=compute)
        all_tensors.append(tensor)
        all_numbers.append(number if is_number and tensor is None else 0.0)
        present.append(is_number or tensor is not None)
    return Coefficients(tuple(all_tensors), tuple(all_numbers), tuple(present))


def check_coefficients(
    C: int, device: torch.device, tensors: Tensors, dtype: torch.dtype = torch.float32, beside: str = "x"
) -> None:
    """Raise where a tensor is not a contiguous [C] of ``dtype`` on the device of the tensor called ``beside``."""
    for name, tensor in zip(("scale", "shift", "lo", "hi"), tensors, strict=True):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] != C:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is [C] = ({C},), or a number")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; allowed is {dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; allowed is {beside}'s device, {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has stride {tensor.stride(0)}; allowed is 1: call .contiguous() on it")


def reference(
    x: torch.Tensor,
    scale: Coefficient = None,
    shift: Coefficient = None,
    lo: Coefficient = None,
    hi: Coefficient = None,
) -> torch.Tensor:
    """The same in plain PyTorch. In float64 for a float64 x, else in float32; rounded once; x's memory format."""
    z = _affine(x, scale, shift)
    return _clamped(z, *_bounds(x, lo, hi)).to(x.dtype)


def gated_reference(
    x: torch.Tensor, coefficients: Coefficients, gate: Gate, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference`` and its bits (see ``gate``) in the order of memory of the given layout."""
    scale, shift, *bounds = coefficients.values
    z = _affine(x, scale, shift)
    lo, hi = _bounds(x, *bounds)
    return _clamped(z, lo, hi).to(x.dtype), pack(passes(z, lo, hi, gate), channels_last)


def _affine(x: torch.Tensor, scale: Coefficient, shift: Coefficient) -> torch.Tensor:
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        z = z * _per_channel(scale, x)
    return z if shift is None else z + _per_channel(shift, x)


def _clamped(z: torch.Tensor, lo: Coefficient, hi: Coefficient) -> torch.Tensor:
    z = z if lo is None else torch.clamp(z, min=lo)
    return z if hi is None else torch.clamp(z, max=hi)


def _bounds(x: torch.Tensor, lo: Coefficient, hi: Coefficient) -> tuple[Coefficient, Coefficient]:
    return None if lo is None else _per_channel(lo, x), None if hi is None else _per_channel(hi, x)


def _per_channel(value: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor | float:
    return value.view(-1, *(1,) * (x.dim() - 2)) if isinstance(value, torch.Tensor) else value


@triton.jit
def load_coefficient(value_ptr, number, channel, next_channel, beyond):
    """The number where there is no pointer; else the channel's value, and the next channel's for elements beyond."""
    if value_ptr is None:
        value = tl.cast(number, tl.float32)  # Inductor hands numbers over in float64
    else:
        value = tl.load(value_ptr + channel)
        if beyond is not None:
            value = tl.where(beyond, tl.load(value_ptr + next_channel), value)
    return value


@triton.jit
def apply_coefficients(
    x,
    scale,
    shift,
    lo,
    hi,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
):
    y = x.to(tl.float32)
    if HAS_SCALE:
        y = y * scale
    if HAS_SHIFT:
        y = y + shift
    if HAS_LO:
        y = tl.maximum(y, lo, propagate_nan=tl.PropagateNan.ALL)
    if HAS_HI:
        y = tl.minimum(y, hi, propagate_nan=tl.PropagateNan.ALL)
    return y.to(x.dtype)

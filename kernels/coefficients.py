"""y = min(max(a*x + b, lo), hi): the coefficients as operators take them and as kernels get them, and the formula.

Each is a number or one value per channel. Where lo > hi the result is hi; a NaN goes through; infinities clamp.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

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
    def values(self) -> list[Coefficient]:
        """What a reference is told: None for a coefficient that is not there."""
        together = zip(self.tensors, self.numbers, self.present, strict=True)
        return [(number if tensor is None else tensor) if there else None for tensor, number, there in together]


def coefficients_for(x: torch.Tensor, tensors: Tensors, numbers: Numbers) -> Coefficients:
    """Drop the identities, and turn a number that is infinite or NaN in fp32 into a tensor: source cannot spell it."""
    identities = (1.0, 0.0, -math.inf, math.inf)
    all_tensors, all_numbers, present = [], [], []
    for tensor, number, identity in zip(tensors, numbers, identities, strict=True):
        number = identity if number is None else ctypes.c_float(number).value
        is_number = tensor is None and number != identity
        if is_number and not math.isfinite(number):
            tensor = x.new_full((x.shape[1],), number, dtype=torch.float32)
        all_tensors.append(tensor)
        all_numbers.append(number if is_number and tensor is None else 0.0)
        present.append(is_number or tensor is not None)
    return Coefficients(tuple(all_tensors), tuple(all_numbers), tuple(present))


def check_coefficients(C: int, device: torch.device, tensors: Tensors) -> None:
    for name, tensor in zip(("scale", "shift", "lo", "hi"), tensors, strict=True):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] != C:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is [C] = ({C},), or a number")
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; allowed is torch.float32")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; allowed is x's device, {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has stride {tensor.stride(0)}; allowed is 1: call .contiguous() on it")


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

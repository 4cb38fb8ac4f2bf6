"""What every launcher asks of its tensors: does the kernel run on them, and what may it be told of their sizes?"""

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true
from triton.runtime.jit import JITFunction

from fusion_backend.kernels.support import DTYPES

# From so many elements on, offsets take 64 bits.
LONG = 2**31


def runs(kernel: Any, x: torch.Tensor) -> bool:
    """On GPUs, but not for float64; under TRITON_INTERPRET=1 everywhere, though not on the fake tensors of a tracer."""
    if x.dtype not in DTYPES:
        return False
    if isinstance(kernel, JITFunction):
        return x.device.type in ("cuda", "hip")
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def takes_long_offsets(*tensors: torch.Tensor) -> bool:
    return any(guard_or_true(tensor.numel() >= LONG) for tensor in tensors)


def unit_of(size: int) -> int:
    """A power of two that divides ``size``: triton by itself sees only whether 16 does."""
    return next(unit for unit in (8, 4, 2, 1) if guard_or_false(size % unit == 0))

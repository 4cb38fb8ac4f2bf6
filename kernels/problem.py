"""A transposed convolution as the choice of a kernel and of its configuration sees it, read off its tensors."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusion_backend.kernels.layout import is_channels_last
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.rounding import cdiv

SMALLEST_EDGE = 16  # of a product on the tensor cores

HOPPER = 9  # major compute capability

GLUON = "triton.experimental.gluon.nvidia.hopper"

# GPUs with more than this read the operands of a product from there, asynchronously.
LARGE_SHARED_MEMORY = 192 * 1024

# What every GPU gives to a block.
LEAST_SHARED_MEMORY = 64 * 1024


@dataclass(frozen=True)
class Problem:
    """What the choice depends on. Channels are a group's; ``positions``, N * Q_d * Q_h * Q_w, may be symbolic."""

    axes: tuple[Axis, ...]  # three: D, H, W
    C_in: int
    C_out: int
    groups: int
    positions: int
    dtype: torch.dtype
    x_last: bool
    out_last: bool
    tf32: bool
    exact: bool  # float32 that no tensor core may touch
    shared_limit: int
    tensor_memory: bool = False  # products are made in a memory of their own
    hopper: bool = False  # the GPU is one, and triton has the language for what it alone has
    prologue: bool = False  # something is done to x as it is loaded
    tensors: int = 0  # of the result's shape, that a program reads
    columns: int = 0  # of a program's vectors
    kept: bool = False  # a value of a program is stored beside the result

    @property
    def dot(self) -> bool:
        """Whether tensor cores pay, which pad C_in and C_out to 16 each."""
        return self.C_in * self.C_out > SMALLEST_EDGE

    @property
    def ahead(self) -> bool:
        """Whether x is loaded into registers, one step ahead: 2 bytes at a time is too little for a copy past them."""
        return self.dot and self.dtype.itemsize == 2 and not self.x_last and self.axes[2].moves

    def waits(self, prologue: bool) -> bool:
        """Whether products must end within their step of a loop: Hopper's, of an x that is in registers."""
        asynchronous = self.shared_limit > LARGE_SHARED_MEMORY and not self.tensor_memory
        return asynchronous and self.dot and (self.tf32 or prologue)


def problem_for(
    x: torch.Tensor,
    weight: torch.Tensor,
    axes: Sequence[Axis],
    groups: int,
    out_last: bool,
    allow_tf32: bool,
    compiled: bool = True,
) -> Problem:
    """Unless ``compiled``, for the interpreter, which has no TF32."""
    N, C_in, *sizes = x.shape
    spans = (cdiv(axis.output_size(size), axis.stride) for axis, size in zip(axes, sizes, strict=True))
    nvidia = torch.version.hip is None
    fp32 = x.dtype == torch.float32
    return Problem(
        axes=(Axis(),) * (3 - len(axes)) + tuple(axes),
        C_in=int(C_in) // groups,
        C_out=int(weight.shape[1]),
        groups=groups,
        positions=N * math.prod(spans),
        dtype=x.dtype,
        x_last=bool(is_channels_last(x)),
        out_last=out_last,
        tf32=fp32 and allow_tf32 and nvidia and compiled,
        exact=fp32 and not allow_tf32 and nvidia,
        shared_limit=shared_memory_limit(x.device),
        tensor_memory=has_tensor_memory(x.device),
        hopper=is_hopper(x.device) and importlib.util.find_spec(GLUON) is not None,
    )


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on ``device``; where that is not at hand, on the smallest GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return LEAST_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or LEAST_SHARED_MEMORY


def has_tensor_memory(device: torch.device) -> bool:
    """As from compute capability 10.0 to 11."""
    return _capability(device) in (10, 11)


def is_hopper(device: torch.device) -> bool:
    return _capability(device) == HOPPER


def _capability(device: torch.device) -> int | None:
    """The major one; None for what is no NVIDIA GPU."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0]

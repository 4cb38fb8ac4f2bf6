"""Launches on Hopper: what its copy engine is told of a tensor, and Gluon, both of which not every triton has."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch


@functools.cache
def gluon_language() -> Any:
    from triton.experimental.gluon import language

    return language


@functools.cache
def _descriptor_class() -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor


def why_no_gluon() -> str | None:
    """Why no kernel in Gluon runs here, in words; None where they may."""
    try:
        _descriptor_class(), gluon_language()
    except Exception as raised:  # whatever an experimental interface raises when it has changed
        return f"this triton has no Gluon that the kernels know: {raised}"
    return None


def descriptor(
    base: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: Sequence[int], layout: Any
) -> Any:
    """A descriptor without the checks of its class, which take long."""
    made = object.__new__(_descriptor_class())
    made.base = base
    made.shape = list(shape)
    made.strides = list(strides)
    made.block_shape = list(block_shape)
    made.layout = layout
    made.padding = "zero"
    return made


def launched(
    kernel: Callable[[], Any],
    grid: tuple[int, int, int],
    args: Sequence[Any],
    compiled: dict[Any, Any],
    tensors: Sequence[torch.Tensor | None],
) -> Any:
    """The kernel for these addresses of ``tensors``, launched: one of ``compiled``, or else a new one.

    The launcher of triton's own works out what it compiles for at each call, which takes longer than a small site.
    """
    device = args[0].device.index
    key = (device, *[tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors])
    found = compiled.get(key)
    if found is None:
        found = compiled[key] = kernel()[grid](*args, num_warps=4)
    else:
        found[grid](*args, stream=torch._C._cuda_getCurrentRawStream(device))
    return found

"""What Hopper's copy engine is told of a tensor, and Gluon's language, both of which not every triton has."""

import functools
from collections.abc import Sequence
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

"""The two memory layouts that the kernels read and write, for tensors [N, C, *spatial] of rank 3 to 5."""

from collections.abc import Sequence

import torch


def is_channels_last(x: torch.Tensor) -> bool | None:
    """False: contiguous, True: channels_last, None: neither. Tensors that are both count as contiguous."""
    if x.is_contiguous():
        return False
    return True if x.movedim(1, -1).is_contiguous() else None


def empty(shape: Sequence[int], like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """By strides and not by memory_format: that one Inductor would fill first, in a pass of its own."""
    order = (0, *range(2, len(shape)), 1) if channels_last else tuple(range(len(shape)))
    return torch.empty_permuted(shape, order, dtype=like.dtype, device=like.device)

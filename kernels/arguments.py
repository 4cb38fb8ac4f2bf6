"""What the operators of a transposed convolution take: checked, with an error that names what is wrong and allowed."""

from collections.abc import Sequence

import torch

from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.support import DTYPES


def axes_for(
    rank: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Axis, ...]:
    """One for each spatial dimension, from lists of one number for all of them or one for each."""
    columns = [[int(size) for size in kernel]]
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("output_padding", output_padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) not in (1, rank):
            raise ValueError(f"{name} is {list(values)}; allowed is one number, or one for each of {rank} dimensions")
        if min(values) < least:
            raise ValueError(f"{name} is {list(values)}; allowed are numbers from {least}")
        columns.append([int(value) for value in values] * (rank // len(values)))
    axes = tuple(Axis(*values) for values in zip(*columns, strict=True))
    for axis in axes:
        if axis.output_padding >= max(axis.stride, axis.dilation):
            raise ValueError(
                f"output_padding is {axis.output_padding}; allowed are numbers below stride {axis.stride} or "
                f"dilation {axis.dilation}"
            )
    return axes


def check_inputs(x: torch.Tensor, weight: torch.Tensor, groups: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"x has rank {x.dim()} (shape {tuple(x.shape)}); allowed are ranks 3 to 5: [N, C_in, *spatial]"
        )
    if x.dtype not in dtypes:
        raise TypeError(f"x has dtype {x.dtype}; allowed are {', '.join(map(str, dtypes))}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}; allowed is x's, {x.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; allowed is x's device, {x.device}")
    if weight.dim() != x.dim() or weight.shape[0] != x.shape[1] or weight.numel() == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; allowed is [C_in, C_out / groups, *kernel] of rank {x.dim()} "
            f"with C_in = {x.shape[1]}, not empty"
        )
    if groups < 1 or x.shape[1] % groups != 0:
        raise ValueError(f"groups is {groups}; allowed are divisors of C_in = {x.shape[1]}")

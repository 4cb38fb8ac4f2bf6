"""The weight as a kernel reads it: a row of C_in for each output channel and tap, filled up with zeros.

It is packed in each call, since nothing tells whether a parameter has changed. A small weight is packed by PyTorch's
own operations, for which Inductor writes the kernel; that is 0.4 us faster on an H200. With Inductor's option
``freezing`` every weight is, since those Inductor can fold.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._inductor import config as inductor_config
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

from fusion_backend.kernels.launching import runs
from fusion_backend.kernels.layout import is_channels_last
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.tf32 import round_to_tf32, rounded_to_tf32

BLOCK = 64  # rows, and channels, of a program

LEAST = 2**17  # elements that the kernel is launched for
MOST_GROUPS = 2**16 - 1  # along the last dimension of a grid


@dataclass(frozen=True)
class Packing:
    """Of a group: rows for ``C_out`` channels of ``depth`` numbers each, whatever the weight has.

    ``by_tap``: rows are ordered [taps, C_out], else [C_out, taps]; or [taps / ``shared``, C_out, ``shared``].
    ``neighbours``: of 8 * ``neighbours`` rows of a tap, or of shared ones, the one that is [4, ``neighbours``, 2] comes
    at [``neighbours``, 4, 2]. ``rounded``: to TF32.
    """

    C_out: int
    depth: int
    by_tap: bool
    neighbours: int = 1
    rounded: bool = False
    shared: int = 1  # divides the kernel's last dimension


def pack(weight: torch.Tensor, groups: int, packing: Packing) -> torch.Tensor:
    """[groups * rows, depth] of a weight [C_in, C_out / groups, *kernel], whose layout may be any."""
    weight_last = is_channels_last(weight)
    small = weight.numel() < LEAST or groups > MOST_GROUPS
    if weight_last is None or small or inductor_config.freezing or not runs(_pack_kernel, weight):
        return _spelt_out(weight, groups, packing)
    C_in, C_out, *kernel = weight.shape
    taps = math.prod(kernel)
    rows = packing.C_out * taps
    packed = weight.new_empty(groups * rows, packing.depth)
    launcher: Any = wrap_triton(_pack_kernel) if isinstance(_pack_kernel, JITFunction) else _pack_kernel
    launcher[(cdiv(rows, BLOCK), cdiv(packing.depth, BLOCK), groups)](
        packed,
        weight,
        C_in // groups,
        C_out,
        packing.C_out,
        packing.depth,
        taps,
        LAST=weight_last,
        BY_TAP=packing.by_tap,
        NEIGHBOURS=packing.neighbours,
        TF32=packing.rounded,
        SHARED=packing.shared,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return packed


def _spelt_out(weight: torch.Tensor, groups: int, packing: Packing) -> torch.Tensor:
    C_out, shared = weight.shape[1], packing.shared
    if packing.by_tap:
        taps = math.prod(weight.shape[2:])
        packed = weight.reshape(groups, -1, C_out, taps // shared, shared).permute(0, 3, 2, 4, 1).flatten(2, 3)
    else:  # as one transposition
        packed = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    packed = packed.clone(memory_format=torch.contiguous_format)
    if packing.rounded:
        packed = round_to_tf32(packed)
    missing = (packing.depth - packed.shape[-1], (packing.C_out - C_out) * shared)
    if any(missing):
        packed = F.pad(packed, (0, missing[0], 0, missing[1] if packing.by_tap else 0))
    if packing.neighbours > 1:
        packed = packed.view(-1, 4, packing.neighbours, 2, packing.depth).transpose(1, 2)
    return packed.reshape(-1, packing.depth)


@triton.jit
def _pack_kernel(
    packed_ptr,
    weight_ptr,
    C_in,
    C_out,
    channels,
    depth,
    taps,
    LAST: tl.constexpr,
    BY_TAP: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    TF32: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK rows times BLOCK input channels of a group, read in the weight's order and written in the rows'."""
    group = tl.program_id(2)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        tap, channel = at // channels, at % channels
        source = tap * C_out + channel
        there = (channel < C_out) & (tap < taps)
    else:
        channel, tap = at // taps, at % taps
        source = at
        there = at < C_out * taps
    line = (group * C_in + k) * (C_out * taps)
    values = tl.load(weight_ptr + line[:, None] + source[None, :], mask=(k < C_in)[:, None] & there[None, :], other=0.0)
    if TF32:
        values = rounded_to_tf32(values)
    exists = (channel < channels) & (tap < taps)
    channel = channel * SHARED + tap % SHARED
    tap = tap // SHARED
    if NEIGHBOURS > 1:
        block, rest = channel // (8 * NEIGHBOURS), channel % (8 * NEIGHBOURS)
        lane, neighbour = rest // (2 * NEIGHBOURS), rest // 2 % NEIGHBOURS
        channel = ((block * NEIGHBOURS + neighbour) * 4 + lane) * 2 + rest % 2
    row = group * channels * taps
    row += tap * (channels * SHARED) + channel if BY_TAP else channel * taps + tap
    tl.store(packed_ptr + row[None, :] * depth + k[:, None], values, mask=(k < depth)[:, None] & exists[None, :])

"""Which elements pass a gradient back through the bounds of a tail: one bit each, 8 to a byte.

z = scale*x + shift passes it between lo and hi. An open end blocks it on the bound itself, and ``passes_nan`` says what
a NaN does; bounds that are not there block nothing. z is taken as computed, neither clamped nor rounded yet. The bits
stand in the order of memory of the tail's result, the first element's being the lowest of the first byte, so that a
kernel that writes a run of elements writes a run of bytes. The last byte is filled up with zeros:

    [bytes]       bytes = ceil(numel / 8)
    [1, bytes]    in channels_last order whatever the result's is: where they are written before it is turned

So the shape says in which order they are, to whoever reads them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import statically_known_true

Bound = torch.Tensor | float | None


@dataclass(frozen=True)
class Gate:
    lo_open: bool = False
    hi_open: bool = False
    passes_nan: bool = True


EVERYTHING = Gate()  # passes, where there are no bounds


def passes(z: torch.Tensor, lo: Bound, hi: Bound, gate: Gate) -> torch.Tensor:
    """Whether each element of z passes the gradient, as bool; the bounds broadcast."""
    blocks = []
    if lo is not None:
        blocks.append(z <= lo if gate.lo_open else z < lo)
    if hi is not None:
        blocks.append(z >= hi if gate.hi_open else z > hi)
    if not gate.passes_nan:
        blocks.append(z.isnan())
    blocked = torch.zeros_like(z, dtype=torch.bool)
    for block in blocks:
        blocked = blocked | block
    return ~blocked


def pack(passing: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """uint8 [ceil(numel / 8)] from bool [N, C, *spatial], in the order of memory of the given layout."""
    flat = (passing.movedim(1, -1) if channels_last else passing).reshape(-1).to(torch.uint8)
    missing = -flat.shape[0] % 8
    if not statically_known_true(missing == 0):
        flat = F.pad(flat, (0, missing))
    # Bit 8 * i of 8 bools goes to bit 56 + i, and no other product reaches the last byte.
    return (flat.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def in_channels_last_order(bits: torch.Tensor, channels_last: bool) -> bool:
    """Of the bits of a result whose layout ``channels_last`` names."""
    return channels_last or bits.dim() == 2


def unpack(bits: torch.Tensor, shape: Sequence[int], channels_last: bool) -> torch.Tensor:
    """bool [N, C, *spatial] of ``shape`` from what ``pack`` returned, for a result of the given layout."""
    N, C, *spatial = shape
    channels_last = in_channels_last_order(bits, channels_last)
    ordered = (N, *spatial, C) if channels_last else (N, C, *spatial)
    # Each byte 8 times, and of the i-th copy bit i.
    copies = bits.flatten().to(torch.int64) * 0x0101010101010101 & (0x8040201008040201 - 2**64)
    flat = copies.view(torch.uint8)[: math.prod(ordered)].view(ordered) != 0
    return flat.movedim(-1, 1) if channels_last else flat


@triton.jit
def passes_gate(
    z,
    lo,
    hi,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    LO_OPEN: tl.constexpr,
    HI_OPEN: tl.constexpr,
    PASSES_NAN: tl.constexpr,
):
    """``passes``, in a kernel. No bound blocks a NaN, since no comparison with one holds."""
    blocked = z != z
    if PASSES_NAN:
        blocked = blocked & False
    if HAS_LO:
        blocked = blocked | ((z <= lo) if LO_OPEN else (z < lo))
    if HAS_HI:
        blocked = blocked | ((z >= hi) if HI_OPEN else (z > hi))
    return ~blocked


@triton.jit
def pack_bits(passing, BLOCK: tl.constexpr):
    """uint8 [BLOCK / 8] from a block of BLOCK bools of any shape."""
    rows = tl.reshape(passing.to(tl.int32), (BLOCK // 8, 8))
    return tl.sum(rows << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def store_bits(bits_ptr, row, along, passing, exists, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """A byte for each 8 neighbours of a tile [ROWS, LENGTH], whose elements are row[i] + along[j] from the first.

    Each 8 of ``along`` are 8 neighbours in memory, the first of them at a multiple of 8; they exist together.
    """
    passing = tl.reshape(passing.to(tl.int32), (ROWS, LENGTH // 8, 8))
    byte = tl.sum(passing << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
    exists = tl.broadcast_to(exists, (ROWS, LENGTH)).to(tl.int32)
    exists = tl.max(tl.reshape(exists, (ROWS, LENGTH // 8, 8)), 2) != 0
    first = tl.min(tl.reshape(along, (LENGTH // 8, 8)), 1)
    tl.store(bits_ptr + (row[:, None] + first[None, :]) // 8, byte, mask=exists)

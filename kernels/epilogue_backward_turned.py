"""``epilogue_backward`` for a contiguous gradient, its first result written channels_last, in the same one pass.

For that layout cuDNN has the faster kernels: a convolution's backward takes half the time there, and what stands before
it reads and writes the gradient anyway. A program turns one tile of channels times pixels, and writes down its sums.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

from fusion_backend.kernels.blocks import Tiles, choose_config, tiles_for
from fusion_backend.kernels.coefficients import coefficients_for, load_coefficient
from fusion_backend.kernels.gate import in_channels_last_order
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.program import load_vectors, run_back
from fusion_backend.kernels.rounding import cdiv


@triton.jit
def _passing(
    bits_ptr, image, first, pixel, inside, C, S, BITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """The bits of a tile: of channels from ``first`` on, times pixels.

    BITS: "channels" or "pixels", of which there are 8 to a byte, all in one tile: a byte is read once then. Else the
    order, "last" or "contiguous", in which a byte is read for each element.
    """
    if BITS == "channels":
        unit = first // 8 + tl.arange(0, BLOCK_C // 8)[:, None]
        exists = (unit < C // 8) & (pixel < S)
        byte = tl.load(bits_ptr + (image * S + pixel) * (C // 8) + unit, mask=exists, other=0).to(tl.int32)
        bit = tl.reshape(byte[:, None, :] >> tl.arange(0, 8)[None, :, None], (BLOCK_C, BLOCK_S))
    elif BITS == "pixels":
        channel = first + tl.arange(0, BLOCK_C)[:, None]
        unit = tl.min(tl.reshape(pixel, (BLOCK_S // 8, 8)), 1)[None, :] // 8
        exists = (channel < C) & (unit < S // 8)
        byte = tl.load(bits_ptr + (image * C + channel) * (S // 8) + unit, mask=exists, other=0).to(tl.int32)
        bit = tl.reshape(byte[:, :, None] >> tl.arange(0, 8)[None, None, :], (BLOCK_C, BLOCK_S))
    else:
        channel = first + tl.arange(0, BLOCK_C)[:, None]
        at = (image * S + pixel) * C + channel if BITS == "last" else (image * C + channel) * S + pixel
        bit = tl.load(bits_ptr + (at >> 3), mask=inside, other=0).to(tl.int32) >> (at & 7).to(tl.int32)
    return bit & 1 != 0


@triton.jit
def _turned_backward_kernel(
    grad_x_ptr,
    passed_ptr,
    blocked_ptr,
    grad_ptr,
    bits_ptr,
    scale_ptr,
    value_ptr,
    vectors_ptr,
    tensor_ptr,
    channels,
    spatial,
    scale,
    HAS_SCALE: tl.constexpr,
    PROGRAM: tl.constexpr,
    BITS: tl.constexpr,
    C_UNIT: tl.constexpr,
    S_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile; ``channels`` and ``spatial`` count units, as in ``epilogue``. passed and blocked are [C, strips]."""
    C = channels * C_UNIT
    S = tl.cast(spatial, tl.int64) * S_UNIT

    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_s = tl.cdiv(S, BLOCK_S)
    strip = tl.program_id(0) // blocks_c
    image = strip // blocks_s
    first = (tl.program_id(0) % blocks_c) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    pixel = (strip % blocks_s) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    inside = (channel < C)[:, None] & (pixel < S)

    by_channel = image * S * C + channel[:, None].to(tl.int64) * S + pixel
    by_pixel = image * S * C + pixel * C + channel[:, None]
    grad = tl.load(grad_ptr + by_channel, mask=inside, other=0.0)
    g = grad.to(tl.float32)
    known = tl.minimum(channel, C - 1)[:, None]
    if PROGRAM != "":
        vectors = load_vectors(vectors_ptr, known, None, None, PROGRAM)
        g = run_back(g, value_ptr, tensor_ptr, vectors, by_channel, inside, PROGRAM)
    grad_x = g
    if HAS_SCALE:
        grad_x = g * load_coefficient(scale_ptr, scale, known, None, None)
    passing = inside
    if bits_ptr is not None:
        passing = inside & _passing(bits_ptr, image, first, pixel, inside, C, S, BITS, BLOCK_C, BLOCK_S)
        grad_x = tl.where(passing, grad_x, 0.0)
    tl.store(grad_x_ptr + by_pixel, grad_x.to(grad.dtype), mask=inside)

    sums = channel.to(tl.int64) * (tl.num_programs(0) // blocks_c) + strip
    if passed_ptr is not None:
        tl.store(passed_ptr + sums, tl.sum(tl.where(passing, g, 0.0), 1), mask=channel < C)
    if blocked_ptr is not None:
        tl.store(blocked_ptr + sums, tl.sum(tl.where(passing, 0.0, g), 1), mask=channel < C)


def _order(bits: torch.Tensor, C: int, S: int, tiles: Tiles) -> str:
    """As the kernel reads them."""
    last = in_channels_last_order(bits, False)
    if guard_or_false((C if last else S) % 8 == 0) and (tiles.block_c if last else tiles.block_s) % 8 == 0:
        return "channels" if last else "pixels"
    return "last" if last else "contiguous"


def launch_turned(
    grad: torch.Tensor,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_number: float,
    sum_passed: bool,
    sum_blocked: bool,
    program: str = "",
    value: torch.Tensor | None = None,
    vectors: torch.Tensor | None = None,
    tensor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """grad is contiguous and not empty; value and tensor, too, and the bits are in its order or in channels_last's."""
    N, C, *sizes = grad.shape
    S = math.prod(sizes)
    config = choose_config(True, grad.numel() * grad.dtype.itemsize)
    tiles = tiles_for(grad.shape, grad.dtype, config)
    strips = N * cdiv(S, tiles.block_s)
    given = coefficients_for(grad, (scale, None, None, None), (scale_number, 0.0, None, None))
    grad_x = empty(grad.shape, grad, True)
    passed, blocked = (
        torch.empty((C, strips), dtype=torch.float32, device=grad.device) if wanted else None
        for wanted in (sum_passed, sum_blocked)
    )
    kernel: Any = _turned_backward_kernel
    if isinstance(_turned_backward_kernel, JITFunction):
        kernel = wrap_triton(_turned_backward_kernel)
    kernel[(strips * cdiv(int(C), tiles.block_c),)](
        grad_x,
        passed,
        blocked,
        grad,
        bits,
        given.tensors[0],
        value,
        vectors,
        tensor,
        int(C) // tiles.c_unit,
        S // tiles.s_unit,
        given.numbers[0],
        HAS_SCALE=given.present[0],
        PROGRAM=program,
        BITS="" if bits is None else _order(bits, C, S, tiles),
        C_UNIT=tiles.c_unit,
        S_UNIT=tiles.s_unit,
        BLOCK_C=tiles.block_c,
        BLOCK_S=tiles.block_s,
        num_warps=config.num_warps,
    )
    return grad_x, None if passed is None else passed.sum(1), None if blocked is None else blocked.sum(1)

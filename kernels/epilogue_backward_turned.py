"""``epilogue_backward`` for a contiguous gradient, its first result written channels_last, in the same one pass.

For that layout cuDNN has the faster kernels: a convolution's backward takes half the time there, and what stands before
it reads and writes the gradient anyway. A program turns one tile of channels times pixels, and writes down its sums.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

from fusion_backend.kernels.blocks import choose_config, tiles_for
from fusion_backend.kernels.coefficients import coefficients_for, load_coefficient
from fusion_backend.kernels.gate import in_channels_last_order
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.program import load_vectors, run_back
from fusion_backend.kernels.rounding import cdiv


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
    BITS_LAST: tl.constexpr,
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
    channel = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
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
        bit = by_pixel if BITS_LAST else by_channel
        byte = tl.load(bits_ptr + (bit >> 3), mask=inside, other=0).to(tl.int32)
        passing = (byte >> (bit & 7).to(tl.int32)) & 1 != 0
        grad_x = tl.where(passing, grad_x, 0.0)
    tl.store(grad_x_ptr + by_pixel, grad_x.to(grad.dtype), mask=inside)

    sums = channel.to(tl.int64) * (tl.num_programs(0) // blocks_c) + strip
    if passed_ptr is not None:
        tl.store(passed_ptr + sums, tl.sum(tl.where(passing, g, 0.0), 1), mask=channel < C)
    if blocked_ptr is not None:
        tl.store(blocked_ptr + sums, tl.sum(tl.where(passing, 0.0, g), 1), mask=channel < C)


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
        BITS_LAST=bits is not None and in_channels_last_order(bits, False),
        C_UNIT=tiles.c_unit,
        S_UNIT=tiles.s_unit,
        BLOCK_C=tiles.block_c,
        BLOCK_S=tiles.block_s,
        num_warps=config.num_warps,
    )
    return grad_x, None if passed is None else passed.sum(1), None if blocked is None else blocked.sum(1)

"""y = min(max(a*x + b, lo), hi): the tail of a convolution, in one pass over memory.

x is [N, C, *spatial] of rank 3 to 5; a, b, lo and hi are each a number or one value per channel. Whatever else a tail
does to y, activations and so on, is a ``program``. Read once, computed in
fp32, rounded once, written once:

    bytes moved = 2 * numel * itemsize        (the 4 * C values of the coefficients stay in cache)
                + numel / 8                   (with the bits, which say where a gradient passes; see ``gate``)

So the kernels are about bandwidth: 16-byte accesses, several of them in flight per thread, and no work per element
to find its channel. Two kernels:

    flat        x and y in the same layout, be it contiguous or channels_last: memory is one run of elements, cut into
                blocks. One of three lookups finds the channels of a block (see ``_flat_kernel``)
    transpose   from contiguous to channels_last or back: a tile of channels times pixels, turned in shared memory

NaN goes through and infinities clamp as in ``torch.clamp``; where lo > hi the result is hi, which is torch's rule too.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from fusion_backend.kernels.blocks import Config, blocks_for, choose_config, is_aligned, tiles_for
from fusion_backend.kernels.coefficients import (
    Coefficients,
    Numbers,
    Tensors,
    apply_coefficients,
    check_coefficients,
    coefficients_for,
    gated_reference,
    load_coefficient,
    reference,
)
from fusion_backend.kernels.gate import EVERYTHING, Gate, pack_bits, passes_gate
from fusion_backend.kernels.launching import runs
from fusion_backend.kernels.layout import empty, is_channels_last
from fusion_backend.kernels.program import (
    NO_PROGRAM,
    Program,
    apply_program,
    check_program,
    laid_out_as,
    load_tensors,
    load_vectors,
)
from fusion_backend.kernels.program import reference as run_program
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.support import DTYPES


@triton.jit
def _flat_kernel(
    out_ptr,
    bits_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    lo_ptr,
    hi_ptr,
    vectors_ptr,
    tensor_0_ptr,
    tensor_1_ptr,
    numel,
    channels,
    spatial,
    scale,
    shift,
    lo,
    hi,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    LO_OPEN: tl.constexpr,
    HI_OPEN: tl.constexpr,
    PASSES_NAN: tl.constexpr,
    PROGRAM: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WHOLE_PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of BLOCK consecutive elements, seen as [BLOCK / WIDTH, WIDTH]. In place where x_ptr is None.

    Where there is a bits_ptr, also the block's BLOCK / 8 bytes of bits; blocks begin on whole bytes.

    The channels of a block, cheapest first:
        WHOLE_ROWS     contiguous, a row of ``spatial`` elements is no shorter than a block: at most two channels
        WHOLE_PIXELS   channels_last, WIDTH == C: the block's columns are the channels
        else           ``channels`` and ``spatial`` count units of WIDTH elements, and a unit's channel is worked out:
                       one for all its elements, or for CHANNELS_LAST WIDTH consecutive ones (there ``spatial`` is 1)
    """
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    outs_ptr = out_ptr + begin + index
    xs_ptr = (out_ptr if x_ptr is None else x_ptr) + begin + index

    # A mask would narrow the accesses where numel is odd, so only the last block has one.
    inside = numel - begin
    if inside >= BLOCK:
        x = tl.load(xs_ptr)
    else:
        x = tl.load(xs_ptr, mask=index < inside)

    next_channel = None
    beyond = None
    if WHOLE_PIXELS:
        channel = tl.arange(0, WIDTH)[None, :]
    elif WHOLE_ROWS:
        row = begin // spatial
        channel = row.to(tl.int32) % channels
        next_channel = tl.where(channel + 1 < channels, channel + 1, 0)
        beyond = index >= tl.minimum(spatial - (begin - row * spatial), BLOCK).to(tl.int32)
    else:
        unit = begin // WIDTH
        row = unit // spatial
        first = (unit - row * spatial).to(tl.int32) + tl.arange(0, BLOCK // WIDTH)
        channel = ((row % channels).to(tl.int32) + first // spatial) % channels
        channel = channel[:, None]
        if CHANNELS_LAST:
            channel = channel * WIDTH + tl.arange(0, WIDTH)[None, :]

    scale = load_coefficient(scale_ptr, scale, channel, next_channel, beyond)
    shift = load_coefficient(shift_ptr, shift, channel, next_channel, beyond)
    lo = load_coefficient(lo_ptr, lo, channel, next_channel, beyond)
    hi = load_coefficient(hi_ptr, hi, channel, next_channel, beyond)
    z = apply_coefficients(x.to(tl.float32), scale, shift, lo, hi, HAS_SCALE, HAS_SHIFT, False, False)
    y = apply_coefficients(z, scale, shift, lo, hi, False, False, HAS_LO, HAS_HI)
    vectors = load_vectors(vectors_ptr, channel, next_channel, beyond, PROGRAM)
    tensors = load_tensors(tensor_0_ptr, tensor_1_ptr, begin + index, index < inside, PROGRAM)
    y = apply_program(y, vectors, tensors, PROGRAM).to(x.dtype)

    if inside >= BLOCK:
        tl.store(outs_ptr, y)
    else:
        tl.store(outs_ptr, y, mask=index < inside)

    if bits_ptr is not None:
        passing = passes_gate(z, lo, hi, HAS_LO, HAS_HI, LO_OPEN, HI_OPEN, PASSES_NAN)
        byte = tl.arange(0, BLOCK // 8)
        bytes_ptr = bits_ptr + begin // 8 + byte
        if inside >= BLOCK:
            tl.store(bytes_ptr, pack_bits(passing, BLOCK))
        else:
            tl.store(bytes_ptr, pack_bits(passing & (index < inside), BLOCK), mask=byte * 8 < inside)


@triton.jit
def _transpose_kernel(
    out_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    lo_ptr,
    hi_ptr,
    vectors_ptr,
    tensor_0_ptr,
    tensor_1_ptr,
    channels,
    spatial,
    scale,
    shift,
    lo,
    hi,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    PROGRAM: tl.constexpr,
    TO_CHANNELS_LAST: tl.constexpr,
    C_UNIT: tl.constexpr,
    S_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile of BLOCK_C channels times BLOCK_S pixels, read along one and written along the other.

    ``channels`` and ``spatial`` count units of C_UNIT and S_UNIT elements, which tells the compiler what divides them.
    """
    C = channels * C_UNIT
    S = tl.cast(spatial, tl.int64) * S_UNIT

    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_s = tl.cdiv(S, BLOCK_S)
    strip = tl.program_id(0) // blocks_c
    image = strip // blocks_s
    channel = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    pixel = (strip % blocks_s) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    inside = (channel < C) & (pixel < S)

    by_channel = image * S * C + channel.to(tl.int64) * S + pixel
    by_pixel = image * S * C + pixel * C + channel
    x = tl.load(x_ptr + (by_channel if TO_CHANNELS_LAST else by_pixel), mask=inside)

    known = tl.minimum(channel, C - 1)
    scale = load_coefficient(scale_ptr, scale, known, None, None)
    shift = load_coefficient(shift_ptr, shift, known, None, None)
    lo = load_coefficient(lo_ptr, lo, known, None, None)
    hi = load_coefficient(hi_ptr, hi, known, None, None)
    y = apply_coefficients(x.to(tl.float32), scale, shift, lo, hi, HAS_SCALE, HAS_SHIFT, HAS_LO, HAS_HI)
    vectors = load_vectors(vectors_ptr, known, None, None, PROGRAM)
    at = by_pixel if TO_CHANNELS_LAST else by_channel
    tensors = load_tensors(tensor_0_ptr, tensor_1_ptr, at, inside, PROGRAM)
    y = apply_program(y, vectors, tensors, PROGRAM).to(x.dtype)

    tl.store(out_ptr + at, y, mask=inside)


def launch(
    out: torch.Tensor,
    x: torch.Tensor | None,
    coefficients: Coefficients,
    config: Config | None = None,
    bits: torch.Tensor | None = None,
    gate: Gate = EVERYTHING,
    program: Program = NO_PROGRAM,
) -> None:
    """Fill ``out`` from ``x``, or in place where x is None. Both are dense: contiguous or channels_last.

    ``bits`` are filled too where they are given; then both are in the same layout.
    """
    if out.numel() == 0:
        return
    source = out if x is None else x
    transposing = is_channels_last(source) != is_channels_last(out)
    aligned = is_aligned(out.shape, out.dtype, bool(is_channels_last(out)))
    config = config or choose_config(transposing, out.numel() * out.dtype.itemsize, aligned)
    if transposing:
        assert bits is None
        _launch_transpose(out, source, coefficients, config, program)
    else:
        _launch_flat(out, x, coefficients, config, bits, gate, program)


def _launch_flat(
    out: torch.Tensor,
    x: torch.Tensor | None,
    coefficients: Coefficients,
    config: Config,
    bits: torch.Tensor | None,
    gate: Gate,
    program: Program,
) -> None:
    channels_last = bool(is_channels_last(out))
    known_at_once = all(tensor is None for tensor in (*coefficients.tensors, program.vectors))
    blocks = blocks_for(out.shape, out.dtype, channels_last, known_at_once, config)
    config = blocks.config
    block = config.elements(out.dtype)

    numel = out.numel()
    kernel: Any = wrap_triton(_flat_kernel) if isinstance(_flat_kernel, JITFunction) else _flat_kernel
    kernel[(cdiv(numel, block),)](
        out,
        bits,
        x,
        *coefficients.tensors,
        program.vectors,
        *program.tensors,
        numel,
        blocks.channels,
        blocks.spatial,
        *coefficients.numbers,
        *coefficients.present,
        LO_OPEN=gate.lo_open,
        HI_OPEN=gate.hi_open,
        PASSES_NAN=gate.passes_nan,
        PROGRAM=program.text,
        WHOLE_ROWS=blocks.whole_rows,
        WHOLE_PIXELS=blocks.whole_pixels,
        CHANNELS_LAST=channels_last,
        WIDTH=blocks.width,
        BLOCK=block,
        num_warps=config.num_warps,
    )


def _launch_transpose(
    out: torch.Tensor, x: torch.Tensor, coefficients: Coefficients, config: Config, program: Program
) -> None:
    N, C, *sizes = out.shape
    S = math.prod(sizes)
    C = int(C)
    tiles = tiles_for(out.shape, out.dtype, config)
    kernel: Any = wrap_triton(_transpose_kernel) if isinstance(_transpose_kernel, JITFunction) else _transpose_kernel
    kernel[(N * cdiv(C, tiles.block_c) * cdiv(S, tiles.block_s),)](
        out,
        x,
        *coefficients.tensors,
        program.vectors,
        *program.tensors,
        C // tiles.c_unit,
        S // tiles.s_unit,
        *coefficients.numbers,
        *coefficients.present,
        PROGRAM=program.text,
        TO_CHANNELS_LAST=bool(is_channels_last(out)),
        C_UNIT=tiles.c_unit,
        S_UNIT=tiles.s_unit,
        BLOCK_C=tiles.block_c,
        BLOCK_S=tiles.block_s,
        num_warps=config.num_warps,
    )


def _check(x: torch.Tensor, tensors: Tensors) -> None:
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x has rank {x.dim()} (shape {tuple(x.shape)}); allowed are ranks 3 to 5: [N, C, *spatial]")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    check_coefficients(x.shape[1], x.device, tensors)


def runs_kernel(x: torch.Tensor) -> bool:
    return runs(_flat_kernel, x)


def _out_of_place(
    x: torch.Tensor,
    tensors: Tensors,
    numbers: Numbers,
    channels_last: bool | None,
    program: Program = NO_PROGRAM,
) -> torch.Tensor:
    _check(x, tensors)
    check_program(program, x.shape[1], x.device)
    coefficients = coefficients_for(x, tensors, numbers)
    if is_channels_last(x) is None:
        x = x.contiguous()
    out = torch.empty_like(x) if channels_last is None else empty(x.shape, x, channels_last)
    program = laid_out_as(out, program)
    if runs_kernel(x):
        launch(out, x, coefficients, program=program)
    else:
        out.copy_(_reference(x, coefficients, program))
    return out


def _in_place(x: torch.Tensor, tensors: Tensors, numbers: Numbers, program: Program = NO_PROGRAM) -> None:
    _check(x, tensors)
    check_program(program, x.shape[1], x.device)
    coefficients = coefficients_for(x, tensors, numbers)
    if not runs_kernel(x):
        x.copy_(_reference(x, coefficients, program))
    elif is_channels_last(x) is None:
        dense = x.contiguous()
        launch(dense, None, coefficients, program=laid_out_as(dense, program))
        x.copy_(dense)
    else:
        launch(x, None, coefficients, program=laid_out_as(x, program))


def _reference(x: torch.Tensor, coefficients: Coefficients, program: Program) -> torch.Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return run_program(reference(exact, *coefficients.values), program).to(x.dtype)


def gated_(y: torch.Tensor, tensors: Tensors, numbers: Numbers, gate: Gate | None) -> torch.Tensor:
    """``epilogue_`` on a dense y (contiguous or channels_last) that also returns the gate's bits of it.

    They are uint8 [ceil(numel / 8)] in y's order of memory (see ``gate``); without a gate every element passes, and
    there are none: [0]. For the bodies of operators, which check what they are given.
    """
    coefficients = coefficients_for(y, tensors, numbers)
    channels_last = is_channels_last(y)
    if channels_last is None:
        raise ValueError(f"y has strides {y.stride()} for shape {tuple(y.shape)}; allowed: contiguous or channels_last")
    bits = y.new_empty(cdiv(y.numel(), 8) if gate else 0, dtype=torch.uint8)
    if runs_kernel(y):
        launch(y, None, coefficients, None, bits if gate else None, gate or EVERYTHING)
    elif gate:
        result, bits = gated_reference(y, coefficients, gate, channels_last)
        y.copy_(result)
    else:
        y.copy_(reference(y, *coefficients.values))
    return bits


# triton_op registers the operators as their own fakes: on fake tensors a wrapped kernel is noted down, not launched. It
# also looks for the kernels behind them at this point, for the keys of compile caches, so the bodies come first.


@triton_op("fused_post::epilogue", mutates_args=())
def epilogue(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    scale_number: float = 1.0,
    shift_number: float = 0.0,
    lo_number: float | None = None,
    hi_number: float | None = None,
    channels_last: bool | None = None,
    program: str = "",
    vectors: torch.Tensor | None = None,
    tensor_0: torch.Tensor | None = None,
    tensor_1: torch.Tensor | None = None,
) -> torch.Tensor:
    """min(max(scale * x + shift, lo), hi), per channel, as a new tensor of x's shape and dtype.

    ``x``: [N, C, *spatial], rank 3 to 5, float32, float16 or bfloat16. Each coefficient is a contiguous float32 tensor
    [C] on x's device or, where that is None, the number; a bound that is None or infinite on its own side is no bound.
    ``channels_last`` chooses the memory format of the result (strides (C*L, 1, C) for rank 3); None keeps x's own. An x
    in neither format is made contiguous first. ``program``: what is done to that value before it is rounded, written
    as in ``kernels/program.py``, ``vectors`` the contiguous float32 [C, k] that it names, on x's device, and
    ``tensor_0`` and ``tensor_1`` what it names t0 and t1, of the result's shape, dtype and device; in another memory
    format they are copied. Raises ValueError or TypeError for anything else.
    """
    numbers = (scale_number, shift_number, lo_number, hi_number)
    steps = Program(program, vectors, (tensor_0, tensor_1))
    return _out_of_place(x, (scale, shift, lo, hi), numbers, channels_last, steps)


@triton_op("fused_post::epilogue_", mutates_args={"x"})
def epilogue_(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    scale_number: float = 1.0,
    shift_number: float = 0.0,
    lo_number: float | None = None,
    hi_number: float | None = None,
    program: str = "",
    vectors: torch.Tensor | None = None,
    tensor_0: torch.Tensor | None = None,
    tensor_1: torch.Tensor | None = None,
) -> None:
    """``epilogue``, written over x. An x neither contiguous nor channels_last goes through a contiguous copy."""
    steps = Program(program, vectors, (tensor_0, tensor_1))
    _in_place(x, (scale, shift, lo, hi), (scale_number, shift_number, lo_number, hi_number), steps)


@triton_op("fused_post::turned", mutates_args=())
def turned(x: torch.Tensor, after: torch.Tensor | None, channels_last: bool) -> torch.Tensor:
    """``x`` [N, C, *spatial] as a new tensor of its values, contiguous or channels_last, at about a copy's speed.

    ``after``: any tensor on x's device; its values do not matter, and one of fewer than C elements does nothing. What
    AOTAutograd can compute from the inputs of a model alone it computes in forward, and keeps; not what waits for a
    gradient.
    """
    if is_channels_last(x) is None:
        x = x.contiguous()
    out = empty(x.shape, x, channels_last)
    if not runs_kernel(x) or bool(is_channels_last(x)) == channels_last or out.numel() == 0:
        return out.copy_(x)
    config = choose_config(True, out.numel() * out.dtype.itemsize)
    if after is not None and not guard_or_false(after.numel() >= x.shape[1]):
        after = None
    _launch_transpose(out, x, Coefficients((after, None, None, None), (0.0,) * 4, (False,) * 4), config, NO_PROGRAM)
    return out

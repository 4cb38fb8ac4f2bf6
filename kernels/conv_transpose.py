"""y = min(max(a * conv_transpose(x, w) + b, lo), hi): a transposed convolution with its tail inside.

x is [N, C_in, *spatial] of rank 3 to 5, w [C_in, C_out / groups, *kernel]; a, b, lo and hi are each a number or one
value per output channel. Whatever else the tail does to y, activations and so on, is a ``program``. What is done to x
first is another one, the ``prologue``. The accumulator never leaves the chip: y is written once, and rounded once.

Each phase of the output (see ``phases``) is a dense convolution, hence a matrix product over its own taps and C_in:

    [positions of the phase, taps * C_in] @ [taps * C_in, C_out]

so no multiply-add is spent on a hole. A program computes BLOCK_M positions times COLUMNS columns; more than one phase a
program, so that stores are contiguous and x is read less often, comes in two ways:

    shared    neighbouring phases that read the same inputs (kernel == stride, kernel 16 with stride 8, ...) lie side by
              side in the columns of one product
    joined    neighbouring phases along W of a contiguous output have an accumulator each, and are interleaved

Groups are separate products. Where one has too few channels for the tensor cores (depthwise), the same kernel
multiplies and adds one channel at a time in fp32 instead: there TF32 does not apply, and the memory is the limit.

The weight is packed for each call as [groups, C_out / groups, taps, C_in / groups] (see ``packing``). Beyond its edge x
counts as zero, so a weight that is not finite makes NaN there.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.fx.experimental.symbolic_shapes import guard_or_true
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from fusion_backend.kernels import (
    epilogue,
    hopper,
    hopper_blocks,
    hopper_keeping,
    hopper_march,
    hopper_product,
    hopper_strips,
    hopper_training,
    packing,
    row_march,
    strips,
)
from fusion_backend.kernels.arguments import axes_for, check_inputs
from fusion_backend.kernels.coefficients import (
    Coefficient,
    Coefficients,
    Numbers,
    Tensors,
    apply_coefficients,
    check_coefficients,
    coefficients_for,
    load_coefficient,
)
from fusion_backend.kernels.coefficients import reference as pointwise
from fusion_backend.kernels.gate import EVERYTHING, Gate, passes_gate, store_bits
from fusion_backend.kernels.launching import runs, takes_long_offsets, unit_of
from fusion_backend.kernels.layout import empty, is_channels_last
from fusion_backend.kernels.packing import Packing
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.plans import Plan, choose_plan, plan_named, plans_for, plans_for_bits, why_no_bits
from fusion_backend.kernels.problem import Problem, problem_for
from fusion_backend.kernels.products import waited_for
from fusion_backend.kernels.program import (
    NO_PROGRAM,
    Program,
    apply_keeping,
    apply_program,
    apply_prologue,
    check_program,
    laid_out_as,
    load_tensors,
    load_vectors,
    reference_values,
    tensors_of,
)
from fusion_backend.kernels.program import reference as run_program
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.taps import taps_of
from fusion_backend.kernels.tf32 import rounded_to_tf32
from fusion_backend.kernels.tiling import Tiling, choose_tiling, tiling_for, tilings

# In an image, of x or of the output: pixels, also those that fill a row of phases up, are counted in 32 bits.
MOST_PIXELS = 2**30

# As the arguments of a transposed convolution are called, in their order.
AXIS = ("stride", "padding", "output_padding", "dilation")

NO_COEFFICIENTS = Coefficients((None,) * 4, (0.0,) * 4, (False,) * 4)

CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    axes: Sequence[Axis],
    groups: int = 1,
    scale: Coefficient = None,
    shift: Coefficient = None,
    lo: Coefficient = None,
    hi: Coefficient = None,
    *,
    program: Program = NO_PROGRAM,
    prologue: Program = NO_PROGRAM,
) -> torch.Tensor:
    """The same in plain PyTorch. In float64 for a float64 x, else in float32; rounded once, and so is the prologue."""
    return references(x, weight, axes, groups, scale, shift, lo, hi, program=program, prologue=prologue)[-1].to(x.dtype)


def references(
    x: torch.Tensor,
    weight: torch.Tensor,
    axes: Sequence[Axis],
    groups: int = 1,
    scale: Coefficient = None,
    shift: Coefficient = None,
    lo: Coefficient = None,
    hi: Coefficient = None,
    *,
    program: Program = NO_PROGRAM,
    prologue: Program = NO_PROGRAM,
) -> list[torch.Tensor]:
    """The program's values, v0 and the result included, not rounded yet."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = CONV_TRANSPOSE[x.dim()](
        run_program(x.to(compute), prologue).to(x.dtype).to(compute),
        weight.to(compute),
        None,
        [axis.stride for axis in axes],
        [axis.padding for axis in axes],
        [axis.output_padding for axis in axes],
        groups,
        [axis.dilation for axis in axes],
    )
    return reference_values(pointwise(y, scale, shift, lo, hi), program)


@triton.jit
def _within(
    outputs, along_row, along_column, SIZE, phase, STRIDE: tl.constexpr, GROWTH: tl.constexpr, SHARED: tl.constexpr
):
    """Narrow a mask to the outputs that exist, given the position of a tile's rows and columns along one dimension."""
    if GROWTH % STRIDE != 0:
        outputs = outputs & (along_row + along_column < SIZE)
    if STRIDE % SHARED != 0:
        outputs = outputs & (phase + along_column < STRIDE)
    return outputs


@triton.jit
def _inputs_of(
    step,
    q,
    inside,
    sizes,
    offsets,
    counts,
    BACK: tl.constexpr,
    MOVES: tl.constexpr,
    C_IN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of the inputs of one step: their first channel, their distance from q in pixels, and which of them are in x.

    BACK: from tap to tap.
    """
    BLOCKS_K: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    q_d, q_h, q_w = q
    D, H, W = sizes
    offset_d, offset_h, offset_w = offsets
    _, count_h, count_w = counts
    tap = step // BLOCKS_K
    k_0 = step % BLOCKS_K * BLOCK_K

    distance = 0
    if MOVES[0]:
        move_d = offset_d - tap // (count_w * count_h) * BACK[0]
        inside = inside & (q_d + move_d >= 0) & (q_d + move_d < D)
        distance += move_d * (H * W)
    if MOVES[1]:
        move_h = offset_h - tap // count_w % count_h * BACK[1]
        inside = inside & (q_h + move_h >= 0) & (q_h + move_h < H)
        distance += move_h * W
    if MOVES[2]:
        move_w = offset_w - tap % count_w * BACK[2]
        inside = inside & (q_w + move_w >= 0) & (q_w + move_w < W)
        distance += move_w
    exists = inside[:, None]
    if C_IN % BLOCK_K != 0:
        exists = exists & (k_0 + tl.arange(0, BLOCK_K) < C_IN)[None, :]
    return k_0, distance, exists


@triton.jit
def _x_tile(
    xs_ptr,
    step,
    per_channel,
    q,
    inside,
    sizes,
    offsets,
    counts,
    BACK: tl.constexpr,
    MOVES: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    C_IN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """The inputs of one step, zero where they are beyond x. ``xs_ptr`` points to those at q."""
    k_0, distance, exists = _inputs_of(step, q, inside, sizes, offsets, counts, BACK, MOVES, C_IN, BLOCK_K)
    return tl.load(xs_ptr + (tl.cast(distance, OFFSET) * PER_PIXEL + k_0 * per_channel), mask=exists, other=0.0)


@triton.jit
def _along_w(tile, PHASES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_M, columns] -> [phases along D and H times channels, positions times phases along W]."""
    tile = tile.reshape(BLOCK_M, PHASES[0], PHASES[1], BLOCK_C, PHASES[2])
    return tile.permute(1, 3, 0, 4, 2).reshape(PHASES[0] * BLOCK_C, BLOCK_M * PHASES[2] * PHASES[1])


@triton.jit
def _conv_transpose_kernel(
    out_ptr,
    bits_ptr,
    kept_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    lo_ptr,
    hi_ptr,
    vectors_ptr,
    tensor_0_ptr,
    tensor_1_ptr,
    prologue_vectors_ptr,
    N,
    D,
    H,
    width,
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
    KEPT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    X_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    W_UNIT: tl.constexpr,
    KERNEL_D: tl.constexpr,
    STRIDE_D: tl.constexpr,
    PADDING_D: tl.constexpr,
    DILATION_D: tl.constexpr,
    STEP_D: tl.constexpr,
    INVERSE_D: tl.constexpr,
    GROWTH_D: tl.constexpr,
    MOVES_D: tl.constexpr,
    SHARED_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    STRIDE_H: tl.constexpr,
    PADDING_H: tl.constexpr,
    DILATION_H: tl.constexpr,
    STEP_H: tl.constexpr,
    INVERSE_H: tl.constexpr,
    GROWTH_H: tl.constexpr,
    MOVES_H: tl.constexpr,
    SHARED_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_W: tl.constexpr,
    INVERSE_W: tl.constexpr,
    GROWTH_W: tl.constexpr,
    MOVES_W: tl.constexpr,
    SHARED_W: tl.constexpr,
    JOINED: tl.constexpr,
    DOT: tl.constexpr,
    TF32: tl.constexpr,
    WAITS: tl.constexpr,
    AHEAD: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_M positions q of N * Q_d * Q_h * Q_w, times BLOCK_C channels of JOINED * SHARED phases.

    C_IN and C_OUT are a group's channels. Without DOT a tile's channels are of any groups, and a step is one of C_in.
    AHEAD loads x one step ahead, for inputs that cannot be copied to shared memory asynchronously. LONG: a tensor has
    so many elements that offsets take 64 bits. ``width`` counts units of W_UNIT elements: the compiler sees only
    whether 16 divides a number.
    """
    OFFSET: tl.constexpr = tl.int64 if LONG else tl.int32
    # Then a program runs where y is written, as its tensors are read, and what is kept is written.
    LATE: tl.constexpr = tensors_of(PROGRAM) > 0 or kept_ptr is not None
    CHANNELS: tl.constexpr = C_OUT if DOT else C_OUT * GROUPS  # that one run of tiles covers
    ALL_IN: tl.constexpr = C_IN * GROUPS
    ALL_OUT: tl.constexpr = C_OUT * GROUPS
    COLUMNS: tl.constexpr = SHARED_D * SHARED_H * SHARED_W * BLOCK_C
    WIDE: tl.constexpr = JOINED * SHARED_W  # phases along W in this program
    BLOCKS_K: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    ROW_K: tl.constexpr = BLOCKS_K * BLOCK_K  # C_in as the weight is packed
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    W = width * W_UNIT

    # Programs that read the same inputs are neighbours: channels, then phases, then groups, then positions.
    TILES_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    TILES_W: tl.constexpr = (STRIDE_W + WIDE - 1) // WIDE
    TILES_H: tl.constexpr = (STRIDE_H + SHARED_H - 1) // SHARED_H
    TILES_D: tl.constexpr = (STRIDE_D + SHARED_D - 1) // SHARED_D
    tile = tl.program_id(0)
    channel_0 = tile % TILES_C * BLOCK_C
    tile = tile // TILES_C
    phase_w = tile % TILES_W * WIDE
    tile = tile // TILES_W
    phase_h = tile % TILES_H * SHARED_H
    tile = tile // TILES_H
    phase_d = tile % TILES_D * SHARED_D
    tile = tile // TILES_D
    group = 0
    if DOT:
        group = tile % GROUPS
        tile = tile // GROUPS

    # Positions: 64 bits find the first one, the others are near.
    Q_D = D + ((GROWTH_D + STRIDE_D - 1) // STRIDE_D - 1)
    Q_H = H + ((GROWTH_H + STRIDE_H - 1) // STRIDE_H - 1)
    Q_W = W + ((GROWTH_W + STRIDE_W - 1) // STRIDE_W - 1)
    image = Q_D * Q_H * Q_W
    begin = tile.to(tl.int64) * BLOCK_M
    first_n = begin // image
    first_q = (begin - first_n * image).to(tl.int32)
    first_n = first_n.to(OFFSET)

    # [BLOCK_M]
    m = first_q + tl.arange(0, BLOCK_M)
    n = first_n + m // image
    q_w = m % Q_W
    q_h = m // Q_W % Q_H
    q_d = m // (Q_W * Q_H) % Q_D
    inside = n < N

    # [COLUMNS]: shared phases times channels
    column = tl.arange(0, COLUMNS)
    channel = channel_0 + column % BLOCK_C
    known = tl.minimum(channel, CHANNELS - 1)
    e_w = column // BLOCK_C % SHARED_W
    e_h = column // (BLOCK_C * SHARED_W) % SHARED_H
    e_d = column // (BLOCK_C * SHARED_W * SHARED_H)

    plane = tl.cast(D * H * W, OFFSET)
    pixel = (q_d * H + q_h) * W + q_w
    PER_PIXEL: tl.constexpr = ALL_IN if X_LAST else 1
    per_channel = 1 if X_LAST else plane
    row = (n * plane + pixel) * ALL_IN if X_LAST else n * (ALL_IN * plane) + pixel
    k = tl.arange(0, BLOCK_K)
    c_in = group * C_IN + k if DOT else known // C_OUT * C_IN
    xs_ptr = x_ptr + (row[:, None] + (c_in * per_channel)[None, :])
    q = (q_d, q_h, q_w)
    sizes = (D, H, W)
    MOVES: tl.constexpr = (MOVES_D, MOVES_H, MOVES_W)
    BACK: tl.constexpr = (
        DILATION_D * STEP_D // STRIDE_D,
        DILATION_H * STEP_H // STRIDE_H,
        DILATION_W * STEP_W // STRIDE_W,
    )

    first_d, offset_d, count_d = taps_of(phase_d, KERNEL_D, STRIDE_D, PADDING_D, DILATION_D, STEP_D, INVERSE_D)
    first_h, offset_h, count_h = taps_of(phase_h, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, STEP_H, INVERSE_H)

    # A phase that is there only to fill a power of two up takes the weights of the last one.
    shared_d = tl.minimum(e_d, STRIDE_D - 1 - phase_d)
    shared_h = tl.minimum(e_h, STRIDE_H - 1 - phase_h)
    for joined in tl.static_range(JOINED):
        phase = phase_w + joined * SHARED_W
        first_w, offset_w, count_w = taps_of(phase, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, STEP_W, INVERSE_W)
        if STRIDE_W % WIDE != 0:
            count_w = tl.where(phase < STRIDE_W, count_w, 0)
        shared_w = tl.maximum(tl.minimum(e_w, STRIDE_W - 1 - phase), 0)
        shared = (shared_d * KERNEL_H + shared_h) * KERNEL_W + shared_w
        ws_ptr = weight_ptr + ((group * C_OUT + known).to(OFFSET) * TAPS + shared) * ROW_K
        if DOT:
            ws_ptr = ws_ptr[None, :] + k[:, None]  # [BLOCK_K, COLUMNS]

        counts = (count_d, tl.maximum(count_h, 1), tl.maximum(count_w, 1))  # there to divide by
        offsets = (offset_d, offset_h, offset_w)
        steps = count_d * count_h * count_w * BLOCKS_K
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        if AHEAD:
            x_next = _x_tile(
                xs_ptr, 0, per_channel, q, inside, sizes, offsets, counts, BACK, MOVES, PER_PIXEL, C_IN, BLOCK_K, OFFSET
            )
        for step in tl.range(0, steps, num_stages=STAGES):
            x = _x_tile(
                xs_ptr,
                step + AHEAD,
                per_channel,
                q,
                inside,
                sizes,
                offsets,
                counts,
                BACK,
                MOVES,
                PER_PIXEL,
                C_IN,
                BLOCK_K,
                OFFSET,
            )
            if AHEAD:
                x, x_next = x_next, x
            if PROLOGUE != "":
                k_0, _, exists = _inputs_of(step, q, inside, sizes, offsets, counts, BACK, MOVES, C_IN, BLOCK_K)
                in_channel = tl.minimum(c_in + k_0, ALL_IN - 1)[None, :]
                before = load_vectors(prologue_vectors_ptr, in_channel, None, None, PROLOGUE)
                x = apply_prologue(x, before, exists, PROLOGUE)
            tap = step // BLOCKS_K
            tap_d = first_d + tap // (count_w * count_h) * STEP_D
            tap_h = first_h + tap // count_w % count_h * STEP_H
            tap_w = first_w + tap % count_w * STEP_W
            tap = (tap_d * KERNEL_H + tap_h) * KERNEL_W + tap_w
            w = tl.load(ws_ptr + (tap * ROW_K + step % BLOCKS_K * BLOCK_K))
            if DOT:
                if TF32:
                    x = rounded_to_tf32(x)
                acc = tl.dot(x, w, acc, input_precision="tf32" if TF32 else "ieee")
                if WAITS:
                    acc = waited_for(acc, step < steps)
            else:
                acc += x.to(tl.float32) * w.to(tl.float32)[None, :]

        out_channel = (group * C_OUT + known)[None, :]
        a = load_coefficient(scale_ptr, scale, out_channel, None, None)
        b = load_coefficient(shift_ptr, shift, out_channel, None, None)
        low = load_coefficient(lo_ptr, lo, out_channel, None, None)
        high = load_coefficient(hi_ptr, hi, out_channel, None, None)
        z = apply_coefficients(acc, a, b, low, high, HAS_SCALE, HAS_SHIFT, False, False)
        y = apply_coefficients(z, a, b, low, high, False, False, HAS_LO, HAS_HI)
        if not LATE:
            vectors = load_vectors(vectors_ptr, out_channel, None, None, PROGRAM)
            y = apply_program(y, vectors, (), PROGRAM).to(out_ptr.dtype.element_ty)
        passing = y
        if bits_ptr is not None:
            passing = passes_gate(z, low, high, HAS_LO, HAS_HI, LO_OPEN, HI_OPEN, PASSES_NAN).to(tl.int8)
        if joined == 0:
            y_0, passing_0 = y, passing
        elif joined == 1:
            y_1, passing_1 = y, passing
        elif joined == 2:
            y_2, passing_2 = y, passing
        else:
            y_3, passing_3 = y, passing

    O_D = D * STRIDE_D + (GROWTH_D - STRIDE_D)
    O_H = H * STRIDE_H + (GROWTH_H - STRIDE_H)
    O_W = W * STRIDE_W + (GROWTH_W - STRIDE_W)
    plane = tl.cast(O_D * O_H * O_W, OFFSET)
    if OUT_LAST:
        o_d = q_d * STRIDE_D + phase_d
        o_h = q_h * STRIDE_H + phase_h
        o_w = q_w * STRIDE_W + phase_w
        row = (n * plane + (o_d * O_H + o_h) * O_W + o_w) * ALL_OUT
        along = tl.cast((e_d * O_H + e_h) * O_W + e_w, OFFSET) * ALL_OUT + group * C_OUT + channel
        exists = inside[:, None] & (channel < CHANNELS)[None, :]
        exists = _within(exists, o_d[:, None], e_d[None, :], O_D, phase_d, STRIDE_D, GROWTH_D, SHARED_D)
        exists = _within(exists, o_h[:, None], e_h[None, :], O_H, phase_h, STRIDE_H, GROWTH_H, SHARED_H)
        exists = _within(exists, o_w[:, None], e_w[None, :], O_W, phase_w, STRIDE_W, GROWTH_W, SHARED_W)
        offset = row[:, None] + along[None, :]
        if LATE:
            vectors = load_vectors(vectors_ptr, (group * C_OUT + known)[None, :], None, None, PROGRAM)
            tensors = load_tensors(tensor_0_ptr, tensor_1_ptr, offset, exists, PROGRAM)
            y_0 = apply_keeping(y_0, vectors, tensors, kept_ptr, offset, exists, PROGRAM, KEPT)
            y_0 = y_0.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, y_0, mask=exists)
        if bits_ptr is not None:
            store_bits(bits_ptr, row, along, passing_0, exists, BLOCK_M, COLUMNS)
    else:
        PHASES: tl.constexpr = (SHARED_D * SHARED_H, SHARED_W, JOINED)
        ROWS: tl.constexpr = SHARED_D * SHARED_H * BLOCK_C
        if JOINED == 2:
            y_0 = tl.join(y_0, y_1)
        elif JOINED == 4:
            y_0 = tl.join(tl.join(y_0, y_2), tl.join(y_1, y_3))
        y = _along_w(y_0, PHASES, BLOCK_M, BLOCK_C)

        row = tl.arange(0, ROWS)
        channel = channel_0 + row % BLOCK_C
        e_h = row // BLOCK_C % SHARED_H
        e_d = row // (BLOCK_C * SHARED_H)

        m = first_q * WIDE + tl.arange(0, BLOCK_M * WIDE)
        n = first_n + m // (image * WIDE)
        o_w = m % (Q_W * WIDE)
        o_h = m // (Q_W * WIDE) % Q_H * STRIDE_H + phase_h
        o_d = m // (Q_W * WIDE * Q_H) % Q_D * STRIDE_D + phase_d
        exists = n < N
        if WIDE != STRIDE_W:
            e_w = o_w % WIDE
            exists = exists & (phase_w + e_w < STRIDE_W)
            o_w = o_w // WIDE * STRIDE_W + phase_w + e_w
        if GROWTH_W % STRIDE_W != 0:
            exists = exists & (o_w < O_W)
        exists = exists[None, :] & (channel < CHANNELS)[:, None]
        exists = _within(exists, o_d[None, :], e_d[:, None], O_D, phase_d, STRIDE_D, GROWTH_D, SHARED_D)
        exists = _within(exists, o_h[None, :], e_h[:, None], O_H, phase_h, STRIDE_H, GROWTH_H, SHARED_H)
        row = (group * C_OUT + channel) * plane + (e_d * O_H + e_h) * O_W
        along = n * (ALL_OUT * plane) + (o_d * O_H + o_h) * O_W + o_w
        offset = row[:, None] + along[None, :]
        if LATE:
            known = group * C_OUT + tl.minimum(channel, CHANNELS - 1)
            vectors = load_vectors(vectors_ptr, known[:, None], None, None, PROGRAM)
            tensors = load_tensors(tensor_0_ptr, tensor_1_ptr, offset, exists, PROGRAM)
            y = apply_keeping(y, vectors, tensors, kept_ptr, offset, exists, PROGRAM, KEPT)
            y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset, y, mask=exists)
        if bits_ptr is not None:
            if JOINED == 2:
                passing_0 = tl.join(passing_0, passing_1)
            elif JOINED == 4:
                passing_0 = tl.join(tl.join(passing_0, passing_2), tl.join(passing_1, passing_3))
            passing = _along_w(passing_0, PHASES, BLOCK_M, BLOCK_C)
            store_bits(bits_ptr, row, along, passing, exists, ROWS, BLOCK_M * WIDE)


def pack(weight: torch.Tensor, problem: Problem, tiling: Tiling) -> torch.Tensor:
    """[groups * C_out * taps, C_in], C_in filled up to whole blocks, and rounded where the product is TF32."""
    depth = cdiv(problem.C_in, tiling.block_k) * tiling.block_k
    rounded = problem.tf32 and problem.dot
    return packing.pack(weight, problem.groups, Packing(problem.C_out, depth, by_tap=False, rounded=rounded))


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    problem: Problem,
    tiling: Tiling,
    coefficients: Coefficients,
    bits: torch.Tensor | None = None,
    gate: Gate = EVERYTHING,
    program: Program = NO_PROGRAM,
    prologue: Program = NO_PROGRAM,
    kept: torch.Tensor | None = None,
) -> None:
    """Fill ``out`` from ``x``, both dense, that is contiguous or channels_last, and from what ``pack`` returns.

    ``bits`` are filled too where they are given, for which ``why_no_bits`` must have nothing to say; and ``kept``, laid
    out as ``out``, where the program keeps a value.
    """
    if out.numel() == 0:
        return
    N, _, *sizes = x.shape
    D, H, W = (1,) * (3 - len(sizes)) + tuple(sizes)
    unit = unit_of(W)
    axes = {
        f"{name}_{letter}": value
        for letter, axis, shared in zip("DHW", problem.axes, tiling.shared, strict=True)
        for name, value in (
            ("KERNEL", axis.kernel),
            ("STRIDE", axis.stride),
            ("PADDING", axis.padding),
            ("DILATION", axis.dilation),
            ("STEP", axis.step),
            ("INVERSE", axis.inverse),
            ("GROWTH", axis.growth),
            ("MOVES", axis.moves),
            ("SHARED", shared),
        )
    }
    kernel: Any = _conv_transpose_kernel
    if isinstance(_conv_transpose_kernel, JITFunction):
        kernel = wrap_triton(_conv_transpose_kernel)
    kernel[(tiling.programs,)](
        out,
        bits,
        kept,
        x,
        packed,
        *coefficients.tensors,
        program.vectors,
        *program.tensors,
        prologue.vectors,
        N,
        D,
        H,
        W // unit,
        *coefficients.numbers,
        *coefficients.present,
        *(gate.lo_open, gate.hi_open, gate.passes_nan),
        PROGRAM=program.text,
        KEPT=program.kept,
        PROLOGUE=prologue.text,
        C_IN=problem.C_in,
        C_OUT=problem.C_out,
        GROUPS=problem.groups,
        X_LAST=problem.x_last,
        OUT_LAST=problem.out_last,
        W_UNIT=unit,
        **axes,
        JOINED=tiling.joined,
        DOT=problem.dot,
        TF32=problem.tf32,
        WAITS=problem.waits(prologue.text != ""),
        AHEAD=problem.ahead,
        LONG=takes_long_offsets(x, out, packed),
        BLOCK_M=tiling.config.rows,
        BLOCK_C=tiling.block_c,
        BLOCK_K=tiling.block_k,
        STAGES=tiling.config.num_stages,
        num_warps=tiling.config.num_warps,
    )


def run(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    tensors: Tensors,
    numbers: Numbers,
    channels_last: bool | None,
    allow_tf32: bool,
    gate: Gate | None = None,
    plan_name: str | None = None,
    program: Program = NO_PROGRAM,
    prologue: Program = NO_PROGRAM,
    turned_bits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What ``conv_transpose`` returns and beside it, with a gate, its bits; then None where no kernel can write these.

    Where the program keeps a value, that is beside it.

    There are no bits behind a program. They are written by the march on Hopper, where that can. That takes no prologue.
    ``turned_bits``: of a contiguous result that no kernel can write them beside, they may be in channels_last order.
    """
    groups = int(groups)
    check_inputs(x, weight, groups)
    C_out = int(weight.shape[1]) * groups
    check_coefficients(C_out, x.device, tensors)
    check_program(program, C_out, x.device)
    check_program(prologue, int(x.shape[1]), x.device)
    axes = axes_for(x.dim() - 2, weight.shape[2:], stride, padding, output_padding, dilation)
    if is_channels_last(x) is None:
        x = x.clone(memory_format=torch.contiguous_format)
    out_last = bool(is_channels_last(x)) if channels_last is None else channels_last
    sizes = [axis.output_size(size) for axis, size in zip(axes, x.shape[2:], strict=True)]
    if not all(guard_or_true(size > 0) for size in sizes):
        raise ValueError(
            f"the output would have sizes {sizes}; allowed are sizes from 1: x is too small or padding too large"
        )
    indexable = all(guard_or_true(math.prod(plane) < MOST_PIXELS) for plane in (x.shape[2:], sizes))
    plan = None
    if runs(_conv_transpose_kernel, x) and indexable:
        compiled = isinstance(_conv_transpose_kernel, JITFunction)
        problem = problem_for(x, weight, axes, groups, out_last, allow_tf32, compiled)
        tensors_read = sum(tensor is not None for tensor in program.tensors)
        columns = 0 if program.vectors is None else int(program.vectors.shape[1])
        problem = replace(
            problem,
            hopper=problem.hopper and not tensors_read,
            prologue=bool(prologue.text),
            kept=program.kept is not None,
        )
        candidates = _general(problem)
        if gate is not None and plan_name is None:
            candidates = plans_for_bits(problem, x.shape, turned_bits)
        elif compiled:
            candidates = itertools.chain([_plan(problem, x, plan_name, tensors_read, columns)], candidates)
        runnable = (each for each in candidates if compiled or not each.is_march)
        plan = next((each for each in runnable if gate is None or not why_no_bits(each, problem, sizes[-1])), None)
    if gate is not None and plan is None:
        return None

    if plan is not None and plan.is_hopper:
        packed = pack_for(plan, weight, problem)
        if plan.turned:
            x = turned_by(x, True, prologue)
        axes_of = tuple(tuple(int(getattr(axis, name)) for axis in axes) for name in AXIS)
        flags = None if gate is None else (gate.lo_open, gate.hi_open, gate.passes_nan)
        name = replace(plan, turned=False, back=False).name
        asked = (axes_of, numbers, out_last or plan.back, allow_tf32, name, program.text, flags, program.kept)
        call = hopper.Call(*asked).text
        if gate is not None:
            y, bits = hopper_training.conv_transpose_hopper_training(x, weight, packed, *tensors, call)
            return (turned_by(y, False), bits.unsqueeze(0)) if plan.back else (y, bits)
        if program.kept is not None:
            assert not plan.back, "what is kept would have to be turned back, too"
            return hopper_keeping.conv_transpose_hopper_keeping(x, weight, packed, *tensors, program.vectors, call)
        y = hopper.conv_transpose_hopper(x, weight, packed, *tensors, program.vectors, call)
        return turned_by(y, False) if plan.back else y, y.new_empty(0, dtype=torch.uint8)
    out = empty((x.shape[0], C_out, *sizes), x, out_last)
    bits = out.new_empty(0 if gate is None else cdiv(out.numel(), 8), dtype=torch.uint8)
    coefficients = coefficients_for(out, tensors, numbers)
    program = laid_out_as(out, program)
    kept = None if program.kept is None else empty(out.shape, x, out_last)
    if plan is None:
        values = references(x, weight, axes, groups, *coefficients.values, program=program, prologue=prologue)
        out.copy_(values[-1])
        if kept is not None and program.kept is not None:
            kept.copy_(values[program.kept])
    else:
        packed = pack_for(plan, weight, problem)
        written = None if gate is None else bits
        launch_plan(out, x, packed, problem, plan, coefficients, written, gate or EVERYTHING, program, prologue, kept)
    if kept is not None:
        return out, kept
    return out, bits.unsqueeze(0) if gate is not None and plan is not None and plan.back else bits


def _general(problem: Problem) -> Iterator[Plan]:
    """Those of the general kernel, the rule's first; only for the asking, as the rule guards on sizes that vary."""
    yield Plan(choose_tiling(problem).config)
    yield from (Plan(each.config) for each in tilings(problem))


def _plan(problem: Problem, x: torch.Tensor, name: str | None, tensors: int = 0, columns: int = 0) -> Plan:
    """The plan of that name; the rule's where there is none, or where x has another layout than the name is for.

    Tracers do not always agree on the strides of what an operation returns. Where a march has no room for what a
    program reads, so many tensors and columns of vectors, a march that has, or else the general kernel; these tensors
    are the result's, and no workspace's.
    """
    plan = choose_plan(problem, x.shape) if name is None else plan_named(problem, name)
    if plan is None and name is not None and plan_named(replace(problem, x_last=not problem.x_last), name):
        plan = choose_plan(problem, x.shape)
    if plan is None:
        known = [each.name for each in plans_for(problem)]
        raise ValueError(f"plan is {name!r}; allowed for this convolution are {known}")
    if isinstance(plan.config, hopper_strips.Config) and not hopper_strips.has_room(problem, plan.config, columns):
        plan = choose_plan(problem, x.shape)
    if plan.back and tensors:
        plan = Plan(choose_tiling(Plan(plan.config, plan.turned).problem(problem)).config, plan.turned)
    rest = plan.problem(problem)
    if isinstance(plan.config, strips.Config) and not strips.has_room(rest, plan.config, tensors):
        configs = (config for config in strips.configs_for(rest) if strips.has_room(rest, config, tensors))
        plan = replace(plan, config=next(configs, None) or choose_tiling(rest).config)
    return plan


def pack_for(plan: Plan, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The weight as the plan's kernel reads it."""
    problem = plan.problem(problem)
    if isinstance(plan.config, hopper_strips.Config):
        return hopper_march.pack(weight, problem, plan.config)
    if isinstance(plan.config, hopper_blocks.Config):
        return hopper_product.pack(weight, problem, plan.config)
    if isinstance(plan.config, strips.Config):
        return row_march.pack(weight, problem, plan.config)
    tiling = tiling_for(problem, plan.config)
    assert tiling is not None, "a plan fits"
    return pack(weight, problem, tiling)


def launch_plan(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    problem: Problem,
    plan: Plan,
    coefficients: Coefficients,
    bits: torch.Tensor | None = None,
    gate: Gate = EVERYTHING,
    program: Program = NO_PROGRAM,
    prologue: Program = NO_PROGRAM,
    kept: torch.Tensor | None = None,
) -> None:
    """Fill ``out``, and ``bits`` and ``kept`` where given, from ``x`` and what ``pack_for`` returns; all are dense.

    Not for those on Hopper, which are opaque. A pass that turns x does the prologue, too. Where the result is turned
    back the bits are in channels_last order.
    """
    if out.numel() == 0:
        return
    assert not isinstance(plan.config, (hopper_strips.Config, hopper_blocks.Config)), "it has an operator of its own"
    if plan.turned:
        x, prologue = turned_by(x, True, prologue), NO_PROGRAM
    problem = plan.problem(problem)
    if plan.back:
        assert kept is None, "it would have to be turned back, too"
        turned = empty(out.shape, out, True)
        launch_plan(turned, x, packed, problem, Plan(plan.config), coefficients, bits, gate, program, prologue)
        epilogue.launch(out, turned, NO_COEFFICIENTS)
        return
    if isinstance(plan.config, strips.Config):
        march = strips.march_for(problem, x.shape, plan.config)
        row_march.launch(out, x, packed, problem, march, coefficients, bits, gate, program, prologue, kept)
        return
    tiling = tiling_for(problem, plan.config)
    assert tiling is not None, "a plan fits"
    launch(out, x, packed, problem, tiling, coefficients, bits, gate, program, prologue, kept)


def turned_by(x: torch.Tensor, channels_last: bool, program: Program = NO_PROGRAM) -> torch.Tensor:
    """A copy of x in the other layout, with what the program makes of it."""
    turned = empty(x.shape, x, channels_last)
    epilogue.launch(turned, x, NO_COEFFICIENTS, program=program)
    return turned


# The body comes first: where triton_op registers an operator it looks for the kernels behind it, for compile caches.


@triton_op("fused_post::conv_transpose", mutates_args=())
def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    scale_number: float = 1.0,
    shift_number: float = 0.0,
    lo_number: float | None = None,
    hi_number: float | None = None,
    channels_last: bool | None = None,
    allow_tf32: bool = True,
    plan: str | None = None,
    program: str = "",
    vectors: torch.Tensor | None = None,
    tensor_0: torch.Tensor | None = None,
    tensor_1: torch.Tensor | None = None,
    prologue: str = "",
    prologue_vectors: torch.Tensor | None = None,
) -> torch.Tensor:
    """min(max(scale * conv_transpose(x, weight) + shift, lo), hi), as [N, C_out, *spatial] of x's dtype.

    ``x``: [N, C_in, *spatial], rank 3 to 5, float32, float16 or bfloat16; ``weight``: [C_in, C_out / groups, *kernel]
    of the same dtype. ``stride``, ``padding``, ``output_padding`` and ``dilation`` hold one number, or one a dimension,
    and mean what they mean in ``torch.nn.functional.conv_transpose2d``. Each coefficient is a contiguous float32 tensor
    [C_out] on x's device or, where that is None, the number; a bound that is None or infinite on its own side is none.
    ``channels_last`` chooses the memory format of the result (strides (C*L, 1, C) for rank 3); None keeps x's own. An x
    in neither format is made contiguous first. ``allow_tf32``: on NVIDIA's tensor cores float32 x and weight are
    rounded to TF32. Images of 2**30 pixels or more are left to PyTorch's own convolution. ``plan`` is the name of one
    of ``plans_for``, and None the rule's. ``program``: what is done to that value before it is rounded, written as in
    ``kernels/program.py``, ``vectors`` the contiguous float32 [C_out, k] that it names, on x's device, and ``tensor_0``
    and ``tensor_1`` what it names t0 and t1, of the result's shape, dtype and device; in another memory format they are
    copied. ``prologue``: what is done to x first, rounded to x's dtype, written in the same way but without tensors;
    ``prologue_vectors`` is [C_in, k]. Raises ValueError or TypeError for anything else.
    """
    numbers = (scale_number, shift_number, lo_number, hi_number)
    sizes = (stride, padding, output_padding, dilation)
    tensors = (scale, shift, lo, hi)
    steps = Program(program, vectors, (tensor_0, tensor_1))
    before = Program(prologue, prologue_vectors)
    ran = run(x, weight, *sizes, groups, tensors, numbers, channels_last, allow_tf32, None, plan, steps, before)
    assert ran is not None, "None is for gates"
    return ran[0]


@triton_op("fused_post::conv_transpose_keeping", mutates_args=())
def conv_transpose_keeping(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    scale_number: float = 1.0,
    shift_number: float = 0.0,
    lo_number: float | None = None,
    hi_number: float | None = None,
    channels_last: bool | None = None,
    allow_tf32: bool = True,
    plan: str | None = None,
    program: str = "",
    vectors: torch.Tensor | None = None,
    tensor_0: torch.Tensor | None = None,
    tensor_1: torch.Tensor | None = None,
    prologue: str = "",
    prologue_vectors: torch.Tensor | None = None,
    kept: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``conv_transpose``, and the program's value v<kept>, which stands in front of the result; both are new tensors.

    By the same kernel, which writes each of them once.
    """
    numbers = (scale_number, shift_number, lo_number, hi_number)
    sizes = (stride, padding, output_padding, dilation)
    tensors = (scale, shift, lo, hi)
    steps = Program(program, vectors, (tensor_0, tensor_1), kept)
    before = Program(prologue, prologue_vectors)
    ran = run(x, weight, *sizes, groups, tensors, numbers, channels_last, allow_tf32, None, plan, steps, before)
    assert ran is not None, "None is for gates"
    return ran

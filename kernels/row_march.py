"""y = min(max(a * conv_transpose(x, w) + b, lo), hi), for weights that fit in shared memory: a march along rows of x.

Behind that, a ``program``, and before it a ``prologue``, as in ``conv_transpose``.

Along one dimension tap k carries input i to output o = stride*i - padding + k. With u = o + padding, input i reaches
u = stride*i + k for k < kernel: the first ``stride`` of these no later input reaches, the other kernel - stride wait
for the inputs to come. So a program takes a strip, BLOCK_P columns of x, and walks down its rows:

    for each row i of the strip
        acc[k] = carried[k] where k < kernel - stride, else 0      k < max(kernel, stride)
        acc[k] += x[i, q + shift] @ w[k, tap]                      for the taps of each phase along the row, see phases
        store acc[k] as output row stride*i - padding + k          k < stride
        carried = acc[stride:]

The taps' weights, [taps, C_in, BLOCK_C], stay on the chip, and a row of x is read once for each distinct shift instead
of once for each tap: kernel 3 with stride 2 reads two tiles for nine products. The accumulators never leave the chip,
y is written once, and rounded once.

x is [N, C_in, *spatial] of rank 4 or 5, contiguous or channels_last, and so is y. The march runs along the outermost
dimension with a kernel, D or H; the columns of a strip run on through images, the other of these dimensions, and W.
Where there are too few strips they are cut into segments, each of which walks through a halo of
ceil(kernel / stride) - 1 rows first. Beyond its edge x counts as zero, so a weight that is not finite makes NaN there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

from fusion_backend.kernels import packing
from fusion_backend.kernels.coefficients import Coefficients, apply_coefficients, load_coefficient
from fusion_backend.kernels.gate import EVERYTHING, Gate, passes_gate, store_bits
from fusion_backend.kernels.launching import takes_long_offsets, unit_of
from fusion_backend.kernels.packing import Packing
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.products import waited_for
from fusion_backend.kernels.program import (
    NO_PROGRAM,
    Program,
    append,
    apply_keeping,
    apply_program,
    apply_prologue,
    load_tensors,
    load_vectors,
    tensors_of,
)
from fusion_backend.kernels.rounding import cdiv
from fusion_backend.kernels.strips import Config, March, along_d, block_k_of, three_sizes, turned
from fusion_backend.kernels.tf32 import rounded_to_tf32


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    accs = ()
    for _ in tl.static_range(COUNT):
        accs = append(accs, tl.zeros((BLOCK_P, BLOCK_C), tl.float32))
    return accs


@triton.jit
def _x_tiles(
    xs_ptr,
    at,
    exists,
    q,
    sizes,
    per_middle,
    vectors,
    PROLOGUE: tl.constexpr,
    FIRST: tl.constexpr,
    SHIFTS: tl.constexpr,
    MOVES: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    C_IN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr,
):
    """A row of the strip once for each shift, zero beyond x. The pixels at q are ``at`` from the channels' pointers.

    ``vectors`` are the prologue's.
    """
    q_m, q_w = q
    M, W = sizes
    xs = ()
    for shift_m in tl.static_range(FIRST[0], FIRST[0] + SHIFTS[0]):
        for shift_w in tl.static_range(FIRST[1], FIRST[1] + SHIFTS[1]):
            here = exists
            if MOVES[0]:
                here = here & (q_m + shift_m >= 0) & (q_m + shift_m < M)
            if MOVES[1]:
                here = here & (q_w + shift_w >= 0) & (q_w + shift_w < W)
            here = here[:, None]
            if C_IN != BLOCK_K:
                here = here & (tl.arange(0, BLOCK_K) < C_IN)[None, :]
            shifted = at + (shift_m * per_middle + shift_w) * PER_PIXEL
            x = tl.load(xs_ptr[None, :] + shifted[:, None], mask=here, other=0.0)
            if PROLOGUE != "":
                x = apply_prologue(x, vectors, here, PROLOGUE)
            xs = append(xs, rounded_to_tf32(x) if TF32 else x)
    return xs


@triton.jit
def _add_taps(
    acc,
    xs,
    ws,
    ROW: tl.constexpr,
    PHASE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FIRST: tl.constexpr,
    SHIFTS: tl.constexpr,
    TF32: tl.constexpr,
):
    """acc plus what tap ROW of the march and all taps of a phase along the other dimensions add to it."""
    for k_m in tl.static_range(KERNEL[1] if KERNEL[0] > ROW else 0):
        for k_w in tl.static_range(KERNEL[2]):
            if (PHASE[0] + PADDING[1] - k_m) % STRIDE[1] == 0 and (PHASE[1] + PADDING[2] - k_w) % STRIDE[2] == 0:
                x = xs[
                    ((PHASE[0] + PADDING[1] - k_m) // STRIDE[1] - FIRST[0]) * SHIFTS[1]
                    + (PHASE[1] + PADDING[2] - k_w) // STRIDE[2]
                    - FIRST[1]
                ]
                w = ws[(ROW * KERNEL[1] + k_m) * KERNEL[2] + k_w]
                acc = tl.dot(x, w, acc, input_precision="tf32" if TF32 else "ieee")
    return acc


@triton.jit
def _joined(phases, e, JOINED: tl.constexpr, LAST: tl.constexpr):
    """Phases e to e + JOINED of a row, each [BLOCK_P, BLOCK_C], as they are stored: channels first unless LAST."""
    y = phases[e]
    if JOINED == 2:
        y = tl.join(y, phases[e + 1])
    elif JOINED == 4:
        y = tl.join(tl.join(y, phases[e + 2]), tl.join(phases[e + 1], phases[e + 3]))
    if not LAST:
        y = y.reshape(y.shape[0], y.shape[1], JOINED).permute(1, 0, 2).reshape(y.shape[1], y.shape[0] * JOINED)
    return y


@triton.jit
def _store_row(
    out_ptr,
    bits_ptr,
    kept_ptr,
    channel_at,
    at,
    exists,
    o_w,
    O_W,
    known,
    phases,
    gates,
    vectors,
    tensor_0_ptr,
    tensor_1_ptr,
    PROGRAM: tl.constexpr,
    KEPT: tl.constexpr,
    STRIDE: tl.constexpr,
    GROWTH: tl.constexpr,
    PER_OUT: tl.constexpr,
    ALL_KNOWN: tl.constexpr,
    LAST: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Phases along the row, each [BLOCK_P, BLOCK_C]: one by one, or JOINED of them interleaved."""
    for e in tl.static_range(0, STRIDE, JOINED):
        here = exists
        if GROWTH % STRIDE != 0:
            here = here & (o_w + e < O_W)
        y = _joined(phases, e, JOINED, LAST)
        pixel_at = at + e * PER_OUT
        if LAST:
            mask = here[:, None]
            y_ptr = (out_ptr + channel_at)[None, :] + pixel_at[:, None]
            offset = channel_at[None, :] + pixel_at[:, None]
            known_here = known[None, :]
        else:
            mask = here[None, :]
            y_ptr = (out_ptr + channel_at)[:, None] + pixel_at[None, :]
            offset = channel_at[:, None] + pixel_at[None, :]
            known_here = known[:, None]
        if not ALL_KNOWN:
            mask = mask & known_here
        if tensors_of(PROGRAM) > 0 or kept_ptr is not None:
            tensors = load_tensors(tensor_0_ptr, tensor_1_ptr, offset, mask, PROGRAM)
            y = apply_keeping(y, vectors, tensors, kept_ptr, offset, mask, PROGRAM, KEPT)
            y = y.to(out_ptr.dtype.element_ty)
        tl.store(y_ptr, y, mask=mask)
        if bits_ptr is not None:
            passing = _joined(gates, e, JOINED, LAST)
            if LAST:
                store_bits(bits_ptr, pixel_at, channel_at, passing, mask, y.shape[0], y.shape[1])
            else:
                store_bits(bits_ptr, channel_at, pixel_at, passing, mask, y.shape[0], y.shape[1])


@triton.jit
def _row_march_kernel(
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
    strips,
    length,
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
    X_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    W_UNIT: tl.constexpr,
    ALONG_D: tl.constexpr,
    KERNEL_R: tl.constexpr,
    STRIDE_R: tl.constexpr,
    PADDING_R: tl.constexpr,
    GROWTH_R: tl.constexpr,
    KERNEL_M: tl.constexpr,
    STRIDE_M: tl.constexpr,
    PADDING_M: tl.constexpr,
    GROWTH_M: tl.constexpr,
    MOVES_M: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_W: tl.constexpr,
    GROWTH_W: tl.constexpr,
    MOVES_W: tl.constexpr,
    TF32: tl.constexpr,
    WAITS: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_P of N * Q_m * Q_w columns, ``length`` rows of each, times BLOCK_C channels.

    R is the dimension of the march, D where ALONG_D and else H; M is the other one. LONG: a tensor has so many
    elements that offsets take 64 bits. ``width`` counts units of W_UNIT elements: the compiler sees only whether 16
    divides a number.
    """
    OFFSET: tl.constexpr = tl.int64 if LONG else tl.int32
    KERNEL: tl.constexpr = (KERNEL_R, KERNEL_M, KERNEL_W)
    STRIDE: tl.constexpr = (STRIDE_R, STRIDE_M, STRIDE_W)
    PADDING: tl.constexpr = (PADDING_R, PADDING_M, PADDING_W)
    MOVES: tl.constexpr = (MOVES_M, MOVES_W)
    FIRST: tl.constexpr = (-((KERNEL_M - 1 - PADDING_M) // STRIDE_M), -((KERNEL_W - 1 - PADDING_W) // STRIDE_W))
    SHIFTS: tl.constexpr = (
        (PADDING_M + STRIDE_M - 1) // STRIDE_M + 1 - FIRST[0],
        (PADDING_W + STRIDE_W - 1) // STRIDE_W + 1 - FIRST[1],
    )
    CARRIED: tl.constexpr = KERNEL_R - STRIDE_R if KERNEL_R > STRIDE_R else 0
    JOINED: tl.constexpr = STRIDE_W if not OUT_LAST and (STRIDE_W == 2 or STRIDE_W == 4) else 1
    TILES_C: tl.constexpr = (C_OUT + BLOCK_C - 1) // BLOCK_C
    PER_PIXEL: tl.constexpr = C_IN if X_LAST else 1
    PER_OUT: tl.constexpr = C_OUT if OUT_LAST else 1
    W = width * W_UNIT

    # Programs that read the same inputs are neighbours: channels, then strips, then segments.
    k = tl.arange(0, BLOCK_K)
    channel = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    strip = tl.program_id(0) // TILES_C % strips
    segment = tl.program_id(0) // TILES_C // strips

    known = channel < C_OUT
    clamped = tl.minimum(channel, C_OUT - 1)[None, :]
    scale = load_coefficient(scale_ptr, scale, clamped, None, None)
    shift = load_coefficient(shift_ptr, shift, clamped, None, None)
    lo = load_coefficient(lo_ptr, lo, clamped, None, None)
    hi = load_coefficient(hi_ptr, hi, clamped, None, None)
    # Tensors of a program are read, and what is kept is stored, where y is written; so then the program runs there.
    LATE: tl.constexpr = tensors_of(PROGRAM) > 0 or kept_ptr is not None
    vectors = load_vectors(vectors_ptr, clamped if OUT_LAST or not LATE else clamped.trans(), None, None, PROGRAM)

    in_vectors = load_vectors(prologue_vectors_ptr, tl.minimum(k, C_IN - 1)[None, :], None, None, PROLOGUE)

    ws = ()
    for tap in tl.static_range(KERNEL_R * KERNEL_M * KERNEL_W):
        w_ptr = weight_ptr + ((tap * TILES_C * BLOCK_C + channel) * BLOCK_K)[None, :] + k[:, None]
        ws = append(ws, tl.load(w_ptr))  # [BLOCK_K, BLOCK_C]

    O_R = (D if ALONG_D else H) * STRIDE_R + (GROWTH_R - STRIDE_R)
    O_M = (H if ALONG_D else D) * STRIDE_M + (GROWTH_M - STRIDE_M)
    O_W = W * STRIDE_W + (GROWTH_W - STRIDE_W)
    if ALONG_D:
        R, M, per_row, per_middle, per_out_row, per_out_middle = D, H, H * W, W, O_M * O_W, O_W
    else:
        R, M, per_row, per_middle, per_out_row, per_out_middle = H, D, W, H * W, O_W, O_R * O_W
    Q_M = M + ((GROWTH_M + STRIDE_M - 1) // STRIDE_M - 1)
    Q_W = W + ((GROWTH_W + STRIDE_W - 1) // STRIDE_W - 1)
    plane = tl.cast(D * H * W, OFFSET)
    out_plane = tl.cast(O_R * O_M * O_W, OFFSET)
    per_middle = tl.cast(per_middle, OFFSET)

    # Columns: 64 bits find the first one, the others are near.
    columns = Q_M * Q_W
    begin = strip.to(tl.int64) * BLOCK_P
    first_n = begin // columns
    first_q = (begin - first_n * columns).to(tl.int32)
    first_n = first_n.to(OFFSET)

    # [BLOCK_P]
    m = first_q + tl.arange(0, BLOCK_P)
    n = first_n + m // columns
    q_w = m % Q_W
    q_m = m // Q_W % Q_M
    xs_ptr = x_ptr + (k if X_LAST else k * plane)
    x_at = n * (C_IN * plane) + (q_m * per_middle + q_w) * PER_PIXEL

    # [BLOCK_P * JOINED]: a column's outputs, those of JOINED phases, or of the first of phases that are stored in turn
    m = first_q * JOINED + tl.arange(0, BLOCK_P * JOINED)
    out_n = first_n + m // (columns * JOINED)
    o_w = m % (Q_W * JOINED) * (STRIDE_W // JOINED)
    o_m = m // (Q_W * JOINED) % Q_M * STRIDE_M
    channel_at = channel if OUT_LAST else channel * out_plane
    out_at = out_n * (C_OUT * out_plane) + (tl.cast(o_m, OFFSET) * per_out_middle + o_w) * PER_OUT

    first_row = PADDING_R // STRIDE_R + segment * length
    end_row = tl.minimum(first_row + length, (O_R + PADDING_R + STRIDE_R - 1) // STRIDE_R)
    halo_row = tl.maximum(first_row - (KERNEL_R - 1) // STRIDE_R, 0)

    carried = _zeros(CARRIED * STRIDE_M * STRIDE_W, BLOCK_P, BLOCK_C)
    for row in tl.range(halo_row, end_row, num_stages=STAGES):
        xs = _x_tiles(
            xs_ptr,
            x_at + tl.cast(row * per_row, OFFSET) * PER_PIXEL,
            (n < N) & (row < R),
            (q_m, q_w),
            (M, W),
            per_middle,
            in_vectors,
            PROLOGUE,
            FIRST,
            SHIFTS,
            MOVES,
            PER_PIXEL,
            C_IN,
            BLOCK_K,
            TF32,
        )

        begun = ()
        for r in tl.static_range(STRIDE_R + CARRIED):
            for e_m in tl.static_range(STRIDE_M):
                phases = _zeros(0, BLOCK_P, BLOCK_C)
                gates = phases
                for e_w in tl.static_range(STRIDE_W):
                    if r < CARRIED:
                        acc = carried[(r * STRIDE_M + e_m) * STRIDE_W + e_w]
                    else:
                        acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
                    acc = _add_taps(acc, xs, ws, r, (e_m, e_w), KERNEL, STRIDE, PADDING, FIRST, SHIFTS, TF32)
                    if r >= STRIDE_R and WAITS:
                        acc = waited_for(acc, row < end_row)
                    if r < STRIDE_R:
                        acc = apply_coefficients(acc, scale, shift, lo, hi, HAS_SCALE, HAS_SHIFT, False, False)
                        if bits_ptr is not None:
                            passing = passes_gate(acc, lo, hi, HAS_LO, HAS_HI, LO_OPEN, HI_OPEN, PASSES_NAN)
                            gates = append(gates, passing.to(tl.int8))
                        acc = apply_coefficients(acc, scale, shift, lo, hi, False, False, HAS_LO, HAS_HI)
                        if not LATE:
                            acc = apply_program(acc, vectors, (), PROGRAM).to(out_ptr.dtype.element_ty)
                    phases = append(phases, acc)

                # Masked, since the pipeliner takes no branch between the products.
                if r < STRIDE_R:
                    o_r = row * STRIDE_R + (r - PADDING_R)
                    exists = (out_n < N) & (row >= first_row) & (o_r >= 0) & (o_r < O_R)
                    if GROWTH_M % STRIDE_M != 0:
                        exists = exists & (o_m + e_m < O_M)
                    at = out_at + (tl.cast(o_r * per_out_row, OFFSET) + e_m * per_out_middle) * PER_OUT
                    _store_row(
                        out_ptr,
                        bits_ptr,
                        kept_ptr,
                        channel_at,
                        at,
                        exists,
                        o_w,
                        O_W,
                        known,
                        phases,
                        gates,
                        vectors,
                        tensor_0_ptr,
                        tensor_1_ptr,
                        PROGRAM,
                        KEPT,
                        STRIDE_W,
                        GROWTH_W,
                        PER_OUT,
                        C_OUT % BLOCK_C == 0,
                        OUT_LAST,
                        JOINED,
                    )
                else:
                    begun = begun + phases
        carried = begun


def pack(weight: torch.Tensor, problem: Problem, config: Config) -> torch.Tensor:
    """[taps * C_out, C_in], both filled up to whole blocks, and rounded where the product is TF32."""
    C_out = cdiv(problem.C_out, config.channels) * config.channels
    return packing.pack(weight, 1, Packing(C_out, block_k_of(problem), by_tap=True, rounded=problem.tf32))


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    problem: Problem,
    march: March,
    coefficients: Coefficients,
    bits: torch.Tensor | None = None,
    gate: Gate = EVERYTHING,
    program: Program = NO_PROGRAM,
    prologue: Program = NO_PROGRAM,
    kept: torch.Tensor | None = None,
) -> None:
    """Fill ``out`` from ``x``, both dense, that is contiguous or channels_last, and from what ``pack`` returns.

    ``bits`` are filled too where they are given, for which ``strips.why_no_bits`` must have nothing to say; then there
    is no program; and ``kept``, laid out as ``out``, where the program keeps a value. For a program with tensors
    ``strips.has_room`` must hold.
    """
    if out.numel() == 0:
        return
    N, _, *sizes = x.shape
    D, H, W = three_sizes(sizes)
    unit = unit_of(W)
    row, middle, column = turned(problem, problem.axes)
    kernel: Any = _row_march_kernel
    if isinstance(_row_march_kernel, JITFunction):
        kernel = wrap_triton(_row_march_kernel)
    kernel[(march.programs,)](
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
        march.strips,
        march.length,
        *coefficients.numbers,
        *coefficients.present,
        *(gate.lo_open, gate.hi_open, gate.passes_nan),
        PROGRAM=program.text,
        KEPT=program.kept,
        PROLOGUE=prologue.text,
        C_IN=problem.C_in,
        C_OUT=problem.C_out,
        X_LAST=problem.x_last,
        OUT_LAST=problem.out_last,
        W_UNIT=unit,
        ALONG_D=along_d(problem),
        KERNEL_R=row.kernel,
        STRIDE_R=row.stride,
        PADDING_R=row.padding,
        GROWTH_R=row.growth,
        KERNEL_M=middle.kernel,
        STRIDE_M=middle.stride,
        PADDING_M=middle.padding,
        GROWTH_M=middle.growth,
        MOVES_M=middle.moves,
        KERNEL_W=column.kernel,
        STRIDE_W=column.stride,
        PADDING_W=column.padding,
        GROWTH_W=column.growth,
        MOVES_W=column.moves,
        TF32=problem.tf32,
        WAITS=problem.waits(prologue.text != ""),
        LONG=takes_long_offsets(x, out, packed),
        BLOCK_P=march.config.pixels,
        BLOCK_C=march.config.channels,
        BLOCK_K=block_k_of(problem),
        STAGES=march.config.num_stages,
        num_warps=march.config.num_warps,
    )

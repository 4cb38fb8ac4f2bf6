"""The Gluon kernel of the march on Hopper: see ``hopper_march``. Importing this file needs a triton with Gluon."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusion_backend.kernels.gate import passes_gate
from fusion_backend.kernels.hopper_producer import produce
from fusion_backend.kernels.hopper_tiles import (
    append,
    begin_of,
    comb_layout,
    corner_of,
    joined_columns,
    known,
    rounded_to_tf32,
    stacked,
    tile_layout,
)
from fusion_backend.kernels.program import apply_program, columns_of


@gluon.jit
def _read(xs, at, OPERAND: gl.constexpr, FORM: gl.constexpr):
    """The tiles of a step as they are read: combs, or x at each shift as the products' left operand."""
    COMB: gl.constexpr = comb_layout(FORM.depth, xs.dtype.primitive_bitwidth)
    tiles = ()
    for j in gl.static_range(known(FORM.all_tiles)):
        tile = xs.index(at * FORM.all_tiles + j)
        if FORM.x_last:
            tiles = append(tiles, tile.reshape([64, FORM.depth]).load(OPERAND))
        else:
            tiles = append(tiles, tile.reshape([32, FORM.depth]).load(COMB))
    return tiles


@gluon.jit
def _operands(tiles, OPERAND: gl.constexpr, FORM: gl.constexpr):
    """x at each shift, rounded. Row 16*warp + 8*h + lane of a comb's operand is pixel 2*(8*warp + lane) + h."""
    rounded = ()
    for j in gl.static_range(known(FORM.all_tiles)):
        rounded = append(rounded, rounded_to_tf32(tiles[j]) if FORM.tf32 else tiles[j])
    operands = rounded
    if not FORM.x_last:
        operands = ()
        for s_m in gl.static_range(known(FORM.shifts[0])):
            for s_w in gl.static_range(known(FORM.shifts[1])):
                x = gl.join(rounded[s_m * FORM.tiles + s_w], rounded[s_m * FORM.tiles + s_w + 1])
                x = x.reshape([4, 8, FORM.depth, 2]).permute([0, 3, 1, 2]).reshape([64, FORM.depth])
                operands = append(operands, gl.convert_layout(x, OPERAND, assert_trivial=False))
    return operands


@gluon.jit
def _add_taps(acc, xs, ws, z, FRESH: gl.constexpr, TAPS: gl.constexpr):
    """acc plus all products of a phase, on their way."""
    for i in gl.static_range(len(TAPS)):
        w = ws.index(TAPS[i][1] + z).permute([1, 0])
        if FRESH and i == 0:
            acc = warpgroup_mma(xs[known(TAPS[i][0])], w, acc, use_acc=False, is_async=True)
        else:
            acc = warpgroup_mma(xs[known(TAPS[i][0])], w, acc, is_async=True)
    return acc


@gluon.jit
def _add(carried, zero, xs, ws, z, R: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, FORM: gl.constexpr):
    """Phases FIRST to FIRST + COUNT of output row R of the step."""
    accs = ()
    for e in gl.static_range(FIRST, FIRST + COUNT):
        if FORM.carried > R:
            acc = _add_taps(carried[R * FORM.phases + e], xs, ws, z, False, known(FORM.taps[R][e]))
        else:
            acc = _add_taps(zero, xs, ws, z, True, known(FORM.taps[R][e]))
        accs = append(accs, acc)
    return accs


@gluon.jit
def _per_channel(cs, INDEX: gl.constexpr, layout: gl.constexpr, FORM: gl.constexpr):
    if FORM.out_last:
        value = gl.expand_dims(cs.index(INDEX).load(gl.SliceLayout(0, layout)), 0)
    else:
        value = gl.expand_dims(cs.index(INDEX).load(gl.SliceLayout(1, layout)), 1)
    return value


@gluon.jit
def _coefficient(cs, INDEX: gl.constexpr, number, layout: gl.constexpr, FORM: gl.constexpr):
    if FORM.kinds[INDEX] == 2:
        value = _per_channel(cs, INDEX, layout, FORM)
    else:
        value = number
    return value


@gluon.jit
def _passes(z, lo, hi, FORM: gl.constexpr):
    """``passes_gate``. A bound that is a number is finite, so that comparing with it blocks a NaN, at no cost."""
    HAS_LO: gl.constexpr = FORM.kinds[2] != 0
    HAS_HI: gl.constexpr = FORM.kinds[3] != 0
    LO_OPEN: gl.constexpr = FORM.gate[0]
    HI_OPEN: gl.constexpr = FORM.gate[1]
    if FORM.gate[2] or (FORM.kinds[2] != 1 and FORM.kinds[3] != 1):
        passing = passes_gate(z, lo, hi, HAS_LO, HAS_HI, LO_OPEN, HI_OPEN, FORM.gate[2])
    elif FORM.kinds[2] == 1:
        passing = (z > lo) if LO_OPEN else (z >= lo)
        passing = passing & passes_gate(z, lo, hi, False, HAS_HI, LO_OPEN, HI_OPEN, True)
    else:
        passing = (z < hi) if HI_OPEN else (z <= hi)
        passing = passing & passes_gate(z, lo, hi, HAS_LO, False, LO_OPEN, HI_OPEN, True)
    return passing


@gluon.jit
def _tail(y, cs, numbers, layout: gl.constexpr, FORM: gl.constexpr):
    """What becomes of a tile, and whether its elements pass the gradient."""
    scale, shift, lo, hi = numbers
    if FORM.kinds[0] != 0:
        y = y * _coefficient(cs, 0, scale, layout, FORM)
    if FORM.kinds[1] != 0:
        y = y + _coefficient(cs, 1, shift, layout, FORM)
    passing = y
    if FORM.writes_bits:
        low = _coefficient(cs, 2, lo, layout, FORM)
        high = _coefficient(cs, 3, hi, layout, FORM)
        passing = _passes(y, low, high, FORM)
    if FORM.kinds[2] != 0:
        y = gl.maximum(y, _coefficient(cs, 2, lo, layout, FORM), propagate_nan=tl.PropagateNan.ALL)
    if FORM.kinds[3] != 0:
        y = gl.minimum(y, _coefficient(cs, 3, hi, layout, FORM), propagate_nan=tl.PropagateNan.ALL)
    PROGRAM: gl.constexpr = FORM.program
    vectors = ()
    for column in gl.static_range(columns_of(PROGRAM)):
        vectors = append(vectors, _per_channel(cs, 4 + column, layout, FORM))
    return apply_program(y, vectors, (), PROGRAM), passing


@gluon.jit
def _pixels(pixel, per_middle, plane, FORM: gl.constexpr):
    """Of a tile's pixels, from the strip's first: elements in memory, and along W, the other dimension and images."""
    BOX_W: gl.constexpr = FORM.box[2] * FORM.joined
    in_row = pixel % BOX_W * (FORM.stride[2] // FORM.joined)
    in_m = pixel // BOX_W % FORM.box[1] * FORM.stride[1]
    image = pixel // (BOX_W * FORM.box[1])
    if FORM.box[0] == 1 and FORM.box[1] == 1:
        at = pixel * (FORM.stride[2] // FORM.joined)
    elif FORM.out_last:
        at = image * plane + in_m * per_middle + in_row
    else:
        at = image * (FORM.C_out * plane) + in_m * per_middle + in_row
    return at, in_row, in_m, image


@gluon.jit
def _spread(of_pixels, of_channels, FORM: gl.constexpr):
    """Both along their dimensions of a tile."""
    if FORM.out_last:
        both = of_pixels[:, None], of_channels[None, :]
    else:
        both = of_pixels[None, :], of_channels[:, None]
    return both


@gluon.jit
def _store_row(
    accs, out_ptr, bits_ptr, corner, o_r, e_m: gl.constexpr, sizes, z, channel_0, cs, numbers, FORM: gl.constexpr
):
    """Phases along W of an output row, each [pixels, channels]."""
    N, R, M, W = sizes
    n, m, w = corner
    BITS: gl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth
    O_R = R * FORM.stride[0] + (FORM.growth[0] - FORM.stride[0])
    O_M = M * FORM.stride[1] + (FORM.growth[1] - FORM.stride[1])
    O_W = W * FORM.stride[2] + (FORM.growth[2] - FORM.stride[2])
    if FORM.along_d:
        per_row, per_middle = O_M * O_W, O_W
    else:
        per_row, per_middle = O_W, O_R * O_W
    # z keeps what follows from it inside the loop, and not in registers all the time; 16 of it divide what 16 divides.
    plane = O_R * O_M * O_W + z * 16
    PER_PIXEL: gl.constexpr = FORM.C_out if FORM.out_last else 1
    PIXELS: gl.constexpr = 64 * FORM.joined
    JOINED: gl.constexpr = joined_columns(BITS, FORM.channels)
    LAYOUT: gl.constexpr = tile_layout(FORM, BITS)
    ends = (N, O_M, O_W)

    first = n.to(gl.int64) * (FORM.C_out * (O_R * O_M * O_W))
    first += (o_r * per_row + (m * FORM.stride[1] + e_m) * per_middle + w * FORM.stride[2]) * PER_PIXEL
    if FORM.out_last:
        first += channel_0
        per_channel = 1
    else:
        first += channel_0 * (O_R * O_M * O_W)
        per_channel = plane
    channel = gl.arange(0, FORM.channels, layout=gl.SliceLayout(1 - FORM.out_last, LAYOUT))
    pixel = gl.arange(0, PIXELS, layout=gl.SliceLayout(FORM.out_last, LAYOUT))
    at, in_row, in_m, image = _pixels(pixel, per_middle, plane, FORM)
    at, channel_at = _spread(at * PER_PIXEL, channel * per_channel, FORM)

    for e in gl.static_range(0, known(FORM.stride[2]), known(FORM.joined)):
        y = accs[e]
        if FORM.out_last:
            y = y.reshape([4, 2, 8, FORM.channels // (8 * JOINED), JOINED, 4, 2])
            if FORM.x_last:
                y = y.permute([0, 1, 2, 3, 5, 4, 6])
            else:
                y = y.permute([0, 2, 1, 3, 5, 4, 6])
            y = y.reshape([64, FORM.channels])
        else:
            if FORM.joined == 2:
                y = gl.join(y, accs[e + 1])
            elif FORM.joined == 4:
                y = gl.join(gl.join(y, accs[e + 2]), gl.join(accs[e + 1], accs[e + 3]))
            y = y.reshape([4, 2, 8, FORM.channels, FORM.joined])
            if FORM.x_last:
                y = y.permute([3, 0, 1, 2, 4])
            else:
                y = y.permute([3, 0, 2, 1, 4])
            y = y.reshape([FORM.channels, PIXELS])
        y = gl.convert_layout(y, LAYOUT, assert_trivial=False)
        y, passing = _tail(y, cs, numbers, LAYOUT, FORM)
        y_ptr = out_ptr + (first + e * PER_PIXEL) + (at + channel_at)
        if FORM.whole:
            gl.store(y_ptr, y.to(out_ptr.dtype.element_ty))
        else:
            exists = _exist(corner, e_m, e, in_row, in_m, image, ends, FORM)
            exists, named = _spread(exists, channel_0 + channel < FORM.C_out, FORM)
            gl.store(y_ptr, y.to(out_ptr.dtype.element_ty), mask=exists & named)
        if FORM.writes_bits:
            strides = (per_middle, plane, per_channel)
            _store_bits(passing, bits_ptr, first + e * PER_PIXEL, corner, e_m, e, strides, ends, channel_0, FORM)


@gluon.jit
def _exist(corner, e_m: gl.constexpr, e: gl.constexpr, in_row, in_m, image, ends, FORM: gl.constexpr):
    n, m, w = corner
    N, O_M, O_W = ends
    o_m = m * FORM.stride[1] + e_m + in_m
    return (n + image < N) & (o_m < O_M) & (w * FORM.stride[2] + e + in_row < O_W)


@gluon.jit
def _store_bits(
    passing, bits_ptr, first, corner, e_m: gl.constexpr, e: gl.constexpr, strides, ends, channel_0, FORM: gl.constexpr
):
    """A byte for each 8 neighbours in memory; they exist together, and the first of them is at a multiple of 8."""
    per_middle, plane, per_channel = strides
    ROWS: gl.constexpr = passing.shape[0]
    BYTES: gl.constexpr = passing.shape[1] // 8
    passing = passing.reshape([ROWS, BYTES, 8])
    EIGHT: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, passing.type.layout))
    bit = (1 << gl.arange(0, 8, layout=EIGHT))[None, None, :]
    byte = gl.sum(gl.where(passing, bit, 0), 2)
    LAYOUT: gl.constexpr = byte.type.layout
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    along = gl.arange(0, BYTES, layout=gl.SliceLayout(0, LAYOUT)) * 8
    if FORM.out_last:
        pixel, channel = row, along
    else:
        pixel, channel = along, row
    at, in_row, in_m, image = _pixels(pixel, per_middle, plane, FORM)
    if FORM.out_last:
        at = at * FORM.C_out
    at, channel_at = _spread(at, channel * per_channel, FORM)
    byte_ptr = bits_ptr + (first >> 3) + (at + channel_at >> 3)
    if FORM.whole:
        gl.store(byte_ptr, byte.to(gl.uint8))
    else:
        exists = _exist(corner, e_m, e, in_row, in_m, image, ends, FORM)
        exists, named = _spread(exists, channel_0 + channel < FORM.C_out, FORM)
        gl.store(byte_ptr, byte.to(gl.uint8), mask=exists & named)


@gluon.jit
def _next(carried, zero, x, ws, z, INDEX: gl.constexpr, FORM: gl.constexpr):
    """The products of the INDEX-th row that a step stores; behind the last, or with it, of all that are carried."""
    accs = ()
    if FORM.stored > INDEX:
        R: gl.constexpr = INDEX // FORM.stride[1]
        FIRST: gl.constexpr = INDEX % FORM.stride[1] * FORM.stride[2]
        accs = _add(carried, zero, x, ws, z, R, FIRST, FORM.stride[2], FORM)
    if INDEX + FORM.together == FORM.stored:
        for r in gl.static_range(known(FORM.stride[0]), known(FORM.stride[0] + FORM.carried)):
            more = _add(carried, zero, x, ws, z, r, 0, FORM.phases, FORM)
            # So many at a time that the compiler does not run out of registers, and makes each wait for the one before.
            if r < FORM.stride[0] + FORM.carried - 1:
                more = warpgroup_mma_wait(0, deps=more + x)[: FORM.phases]
            accs = accs + more
    return accs


@gluon.jit
def _consume(INDEX: gl.constexpr, shared, FORM: gl.constexpr):
    """The march along one strip after the other."""
    out_ptr, bits_ptr, xs, full, empty, ws, loaded, cs, sizes, tiles, work, length, channel_0, numbers = shared
    CHANNELS: gl.constexpr = FORM.channels
    BITS: gl.constexpr = xs.dtype.primitive_bitwidth
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FORM.channels, 256 // BITS])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 32 // BITS)
    R = sizes[1]
    begin, end, rows = work
    O_R = R * FORM.stride[0] + (FORM.growth[0] - FORM.stride[0])
    zero = gl.zeros([64, CHANNELS], gl.float32, layout=PRODUCT)
    slot = 0
    phase = 0
    mbarrier.wait(loaded, 0)
    for group in range(begin // rows, (end + rows - 1) // rows):
        row_0, first, last = begin_of(group, work, FORM)
        corner = corner_of(2 * group + INDEX, tiles, FORM)
        carried = ()
        for _ in gl.static_range(known(FORM.carried * FORM.phases)):
            carried = append(carried, gl.zeros([64, CHANNELS], gl.float32, layout=PRODUCT))
        for row in range(row_0, last):
            # Always 0, but the compiler does not know that, and it changes: otherwise the addresses of all taps are
            # worked out before the loop and do not fit into registers.
            z = (row + length) >> 28
            at = INDEX * FORM.slots + slot
            mbarrier.wait(full.index(at), phase)
            x_tiles = _read(xs, at, OPERAND, FORM)
            # Without the fence the copy engine may overwrite what is still being loaded.
            fence_async_shared()
            mbarrier.arrive(empty.index(at), count=1)
            slot += 1
            if slot == FORM.slots:
                slot = 0
                phase ^= 1

            x = _operands(x_tiles, OPERAND, FORM)
            accs = _next(carried, zero, x, ws, z, 0, FORM)
            for index in gl.static_range(known(FORM.stored)):
                done = warpgroup_mma_wait(0, deps=accs + x)
                x = done[len(accs) :]
                if FORM.together and index == FORM.stored - 1:
                    carried = done[FORM.stride[2] : len(accs)]
                o_r = row * FORM.stride[0] + (index // FORM.stride[1] - FORM.padding[0])
                if (row >= first) & (o_r >= 0) & (o_r < O_R):
                    e_m: gl.constexpr = index % FORM.stride[1]
                    _store_row(done, out_ptr, bits_ptr, corner, o_r, e_m, sizes, z, channel_0, cs, numbers, FORM)
                accs = _next(carried, zero, x, ws, z, index + 1, FORM)
            if FORM.carried > 0 and not FORM.together:
                done = warpgroup_mma_wait(0, deps=accs + x)
                carried = done[: len(accs)]


@gluon.jit
def hopper_march_kernel(
    out_ptr,
    bits_ptr,
    x_ptr,
    x,
    weight,
    scale_ptr,
    shift_ptr,
    lo_ptr,
    hi_ptr,
    vectors_ptr,
    N,
    R,
    M,
    width,
    rows,
    tiles_m,
    tiles_w,
    total,
    length,
    scale,
    shift,
    lo,
    hi,
    X_LAYOUT: gl.constexpr,
    FORM: gl.constexpr,
):
    """``length`` of ``total`` rows of groups of strips, times FORM.channels channels.

    x is a channels_last x and ``weight`` what ``pack`` returns, as the copy engine takes them; x_ptr is a contiguous x.
    """
    dtype: gl.constexpr = weight.dtype
    TAPS: gl.constexpr = FORM.kernel[0] * FORM.kernel[1] * FORM.kernel[2]
    BARRIERS: gl.constexpr = 2 * FORM.slots
    COLUMNS: gl.constexpr = columns_of(FORM.program)
    channel_0 = gl.program_id(1) * FORM.channels
    tiles_c = gl.num_programs(1)

    ws = gl.allocate_shared_memory(dtype, [TAPS, FORM.channels, FORM.depth], weight.layout)
    xs = gl.allocate_shared_memory(dtype, stacked(BARRIERS * FORM.all_tiles, FORM.tile), X_LAYOUT)
    cs = gl.allocate_shared_memory(gl.float32, [4 + COLUMNS, FORM.channels], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())

    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    channel = gl.minimum(channel_0 + gl.arange(0, FORM.channels, layout=FLAT), FORM.C_out - 1)
    if scale_ptr is not None:
        cs.index(0).store(gl.load(scale_ptr + channel))
    if shift_ptr is not None:
        cs.index(1).store(gl.load(shift_ptr + channel))
    if lo_ptr is not None:
        cs.index(2).store(gl.load(lo_ptr + channel))
    if hi_ptr is not None:
        cs.index(3).store(gl.load(hi_ptr + channel))
    for column in gl.static_range(COLUMNS):
        cs.index(4 + column).store(gl.load(vectors_ptr + channel * COLUMNS + column))

    for i in gl.static_range(BARRIERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(loaded, count=1)
    mbarrier.expect(loaded, TAPS * FORM.channels * FORM.depth * (dtype.primitive_bitwidth // 8))
    for tap in gl.static_range(TAPS):
        tma.async_copy_global_to_shared(weight, [tap * (tiles_c * FORM.channels) + channel_0, 0], loaded, ws.index(tap))

    sizes = (N, R, M, width * FORM.unit)
    tiles = (tiles_m, tiles_w)
    begin = gl.program_id(0) * length
    work = (begin, gl.minimum(begin + length, total), rows)
    numbers = (scale, shift, lo, hi)
    source = (x_ptr, x, xs, full, empty, sizes, tiles, work, length)
    rest = (out_ptr, bits_ptr, xs, full, empty, ws, loaded, cs, sizes, tiles, work, length, channel_0, numbers)
    gl.warp_specialize(
        [(produce, (source, FORM)), (_consume, (0, rest, FORM)), (_consume, (1, rest, FORM))],
        [4, 4],
        [FORM.registers, FORM.registers],
    )

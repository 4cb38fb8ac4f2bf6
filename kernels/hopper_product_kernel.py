"""The Gluon kernel of the product on Hopper: see ``hopper_product``. Importing this file needs a triton with Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusion_backend.kernels.coefficients import apply_coefficients, load_coefficient
from fusion_backend.kernels.hopper_tiles import append, known, product_layout, rounded_to_tf32, stacked
from fusion_backend.kernels.program import instructions_of, load_vectors, values_of
from fusion_backend.kernels.taps import taps_of


@gluon.jit
def _tile_of(tile, FORM: gl.constexpr):
    """Its first channel and phase, and the pair of boxes that it covers. Neighbours read the same x."""
    TILES_W: gl.constexpr = FORM.stride[2] // FORM.wide
    channel_0 = tile % FORM.tiles_C * FORM.channels
    tile = tile // FORM.tiles_C
    phase_w = tile % TILES_W * FORM.wide
    tile = tile // TILES_W
    phase_h = tile % FORM.stride[1]
    tile = tile // FORM.stride[1]
    phase_d = tile % FORM.stride[0]
    return channel_0, (phase_d, phase_h, phase_w), tile // FORM.stride[0]


@gluon.jit
def _corner_of(index, boxes, FORM: gl.constexpr):
    """A box's first image and position."""
    boxes_d, boxes_h, boxes_w = boxes
    w = index % boxes_w * FORM.box[3]
    index = index // boxes_w
    h = index % boxes_h * FORM.box[2]
    index = index // boxes_h
    d = index % boxes_d * FORM.box[1]
    return index // boxes_d * FORM.box[0], d, h, w


@gluon.jit
def _taps_along(phase, DIM: gl.constexpr, FORM: gl.constexpr):
    return taps_of(
        phase,
        FORM.kernel[DIM],
        FORM.stride[DIM],
        FORM.padding[DIM],
        FORM.dilation[DIM],
        FORM.step[DIM],
        FORM.inverse[DIM],
    )


@gluon.jit
def _steps_of(phase, FORM: gl.constexpr):
    phase_d, phase_h, phase_w = phase
    _, _, count_d = _taps_along(phase_d, 0, FORM)
    _, _, count_h = _taps_along(phase_h, 1, FORM)
    _, _, count_w = _taps_along(phase_w, 2, FORM)
    return count_d * count_h * count_w * known(FORM.blocks)


@gluon.jit
def _fetch(x, corner, offset, k_0, full, tile, FORM: gl.constexpr):
    n, d, h, w = corner
    offset_d, offset_h, offset_w = offset
    if FORM.rank == 1:
        tma.async_copy_global_to_shared(x, [n, w + offset_w, k_0], full, tile)
    elif FORM.rank == 2:
        tma.async_copy_global_to_shared(x, [n, h + offset_h, w + offset_w, k_0], full, tile)
    else:
        tma.async_copy_global_to_shared(x, [n, d + offset_d, h + offset_h, w + offset_w, k_0], full, tile)


@gluon.jit
def _produce(shared, FORM: gl.constexpr):
    """x, shifted by a tap, for each consumer, and the weight of that tap, as long as there are slots."""
    x, weight, xs, ws, full, empty, boxes, total = shared
    BYTES: gl.constexpr = (2 * FORM.rows + FORM.columns) * FORM.depth * (xs.dtype.primitive_bitwidth // 8)
    slot = 0
    turn = 1
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        channel_0, phase, pair = _tile_of(tile, FORM)
        phase_d, phase_h, phase_w = phase
        first_d, offset_d, count_d = _taps_along(phase_d, 0, FORM)
        first_h, offset_h, count_h = _taps_along(phase_h, 1, FORM)
        corner_0 = _corner_of(2 * pair, boxes, FORM)
        corner_1 = _corner_of(2 * pair + 1, boxes, FORM)
        for joined in gl.static_range(known(FORM.joined)):
            first_w, offset_w, count_w = _taps_along(phase_w + joined * FORM.shared, 2, FORM)
            for i_d in range(count_d):
                for i_h in range(count_h):
                    for i_w in range(count_w):
                        move_d, move_h, move_w = i_d * FORM.back[0], i_h * FORM.back[1], i_w * FORM.back[2]
                        offset = (offset_d - move_d, offset_h - move_h, offset_w - move_w)
                        tap = (first_d + i_d * FORM.step[0]) * FORM.kernel[1] + first_h + i_h * FORM.step[1]
                        tap = tap * FORM.kernel[2] + first_w + i_w * FORM.step[2]
                        row = tap // FORM.shared * (FORM.tiles_C * FORM.columns) + channel_0 * FORM.shared
                        for block in range(known(FORM.blocks)):
                            k_0 = block * FORM.depth
                            mbarrier.wait(empty.index(slot), turn)
                            mbarrier.expect(full.index(slot), BYTES)
                            _fetch(x, corner_0, offset, k_0, full.index(slot), xs.index(2 * slot), FORM)
                            _fetch(x, corner_1, offset, k_0, full.index(slot), xs.index(2 * slot + 1), FORM)
                            tma.async_copy_global_to_shared(weight, [row, k_0], full.index(slot), ws.index(slot))
                            slot += 1
                            if slot == FORM.slots:
                                slot = 0
                                turn ^= 1


@gluon.jit
def _along(of_rows, of_channels, FORM: gl.constexpr):
    """Both along their dimensions of a tile as it is stored."""
    if FORM.out_last:
        both = of_rows[:, None], of_channels[None, :]
    else:
        both = of_rows[None, :], of_channels[:, None]
    return both


@gluon.jit
def _in_order(accs, FORM: gl.constexpr):
    """[rows, columns] or, contiguous, [channels, rows * wide] of the tile, in registers as they lie in memory."""
    ROWS: gl.constexpr = FORM.rows
    COLUMNS: gl.constexpr = FORM.columns
    JOINED: gl.constexpr = FORM.joined
    NEIGHBOURS: gl.constexpr = FORM.neighbours
    y = accs[0]
    if FORM.out_last:
        y = y.reshape([ROWS, COLUMNS // (8 * NEIGHBOURS), NEIGHBOURS, 4, 2])
        y = y.permute([0, 1, 3, 2, 4]).reshape([ROWS, COLUMNS])
    else:
        if JOINED == 2:
            y = gl.join(y, accs[1])
        elif JOINED == 4:
            y = gl.join(gl.join(y, accs[2]), gl.join(accs[1], accs[3]))
        if FORM.shared == 1:
            y = y.reshape([ROWS, COLUMNS, JOINED]).permute([1, 0, 2])
        else:
            y = y.reshape([ROWS, COLUMNS // (8 * NEIGHBOURS), NEIGHBOURS, 4, 2, JOINED]).permute([1, 3, 0, 5, 2, 4])
        y = y.reshape([FORM.channels, ROWS * FORM.wide])
    return gl.convert_layout(y, product_layout(FORM), assert_trivial=False)


@gluon.jit
def _put(out_ptr, offset, y, exists, named, FORM: gl.constexpr):
    """A value of a tile, rounded."""
    y = y.to(out_ptr.dtype.element_ty)
    if FORM.C_out % FORM.channels != 0:
        gl.store(out_ptr + offset, y, mask=exists & named)
    elif not FORM.whole:
        gl.store(out_ptr + offset, y, mask=exists)
    else:
        gl.store(out_ptr + offset, y)


@gluon.jit
def _store(accs, out_ptr, kept_ptr, corner, phase, channel_0, sizes, pointers, numbers, FORM: gl.constexpr):
    """A tile with its tail, and the value of that which is kept."""
    N, D, H, W = sizes
    n, d, h, w = corner
    phase_d, phase_h, phase_w = phase
    scale_ptr, shift_ptr, lo_ptr, hi_ptr, vectors_ptr = pointers
    scale, shift, lo, hi = numbers
    ROWS: gl.constexpr = FORM.rows * FORM.wide
    CHANNELS: gl.constexpr = FORM.channels
    LAYOUT: gl.constexpr = product_layout(FORM)
    y = _in_order(accs, FORM)

    channel = channel_0 + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1 - FORM.out_last, LAYOUT))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(FORM.out_last, LAYOUT))
    within = channel
    if FORM.C_out % FORM.channels != 0:
        within = gl.minimum(channel, FORM.C_out - 1)
    _, within = _along(row, within, FORM)
    a = load_coefficient(scale_ptr, scale, within, None, None)
    b = load_coefficient(shift_ptr, shift, within, None, None)
    low = load_coefficient(lo_ptr, lo, within, None, None)
    high = load_coefficient(hi_ptr, hi, within, None, None)
    y = apply_coefficients(y, a, b, low, high, FORM.present[0], FORM.present[1], FORM.present[2], FORM.present[3])
    PROGRAM: gl.constexpr = FORM.program
    values = values_of(y, load_vectors(vectors_ptr, within, None, None, PROGRAM), (), PROGRAM)

    O_D = D * FORM.stride[0] + (FORM.growth[0] - FORM.stride[0])
    O_H = H * FORM.stride[1] + (FORM.growth[1] - FORM.stride[1])
    O_W = W * FORM.stride[2] + (FORM.growth[2] - FORM.stride[2])
    plane = O_D * O_H * O_W
    beside = row % FORM.wide
    row = row // FORM.wide
    o_w = (w + row % FORM.box[3]) * FORM.stride[2] + (phase_w + beside)
    row = row // FORM.box[3]
    o_h = (h + row % FORM.box[2]) * FORM.stride[1] + phase_h
    row = row // FORM.box[2]
    o_d = (d + row % FORM.box[1]) * FORM.stride[0] + phase_d
    image = row // FORM.box[1]
    if FORM.out_last:
        at, channel_at = _along((image * plane + (o_d * O_H + o_h) * O_W + o_w) * FORM.C_out, channel, FORM)
    else:
        at = image * (FORM.C_out * plane) + (o_d * O_H + o_h) * O_W + o_w
        at, channel_at = _along(at, channel * plane, FORM)
    first = n.to(gl.int64) * (plane * FORM.C_out)
    exists = (n + image < N) & (o_d < O_D) & (o_h < O_H) & (o_w < O_W)
    exists, named = _along(exists, channel < FORM.C_out, FORM)
    if FORM.kept is not None:
        _put(kept_ptr + first, at + channel_at, values[FORM.kept], exists, named, FORM)
    _put(out_ptr + first, at + channel_at, values[instructions_of(PROGRAM)], exists, named, FORM)


@gluon.jit
def _multiply(xs, ws, full, empty, slot, turn, steps, INDEX: gl.constexpr, FORM: gl.constexpr):
    """The product of a phase, one step after the other; and the next slot.

    A slot is free once its product is done. Where x is rounded it goes through registers, and the tensor cores work for
    the other consumer meanwhile; registers of a product under way must not be written.
    """
    BITS: gl.constexpr = xs.dtype.primitive_bitwidth
    ROWS: gl.constexpr = FORM.rows
    COLUMNS: gl.constexpr = FORM.columns
    DEPTH: gl.constexpr = FORM.depth
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 256 // BITS])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 32 // BITS)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout=PRODUCT)
    for step in range(steps):
        mbarrier.wait(full.index(slot), turn)
        x = xs.index(2 * slot + INDEX).reshape([ROWS, DEPTH])
        w = ws.index(slot).permute([1, 0])
        if FORM.tf32:
            rounded = rounded_to_tf32(x.load(OPERAND))
            acc = warpgroup_mma(rounded, w, acc, is_async=True)
            acc, _ = warpgroup_mma_wait(0, deps=(acc, rounded))
            # Without the fence the copy engine may overwrite what is still being loaded.
            fence_async_shared()
            mbarrier.arrive(empty.index(slot), count=1)
        else:
            acc = warpgroup_mma(x, w, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if step > 0:
                mbarrier.arrive(empty.index((slot + (FORM.slots - 1)) % FORM.slots), count=1)
        slot += 1
        if slot == FORM.slots:
            slot = 0
            turn ^= 1
    if not FORM.tf32:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if steps > 0:
            mbarrier.arrive(empty.index((slot + (FORM.slots - 1)) % FORM.slots), count=1)
    return acc, slot, turn


@gluon.jit
def _consume(INDEX: gl.constexpr, shared, FORM: gl.constexpr):
    """One tile after the other, and its half of the rows."""
    out_ptr, kept_ptr, xs, ws, full, empty, boxes, total, sizes, pointers, numbers = shared
    slot = 0
    turn = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        channel_0, phase, pair = _tile_of(tile, FORM)
        phase_d, phase_h, phase_w = phase
        accs = ()
        for joined in gl.static_range(known(FORM.joined)):
            steps = _steps_of((phase_d, phase_h, phase_w + joined * FORM.shared), FORM)
            acc, slot, turn = _multiply(xs, ws, full, empty, slot, turn, steps, INDEX, FORM)
            accs = append(accs, acc)
        corner = _corner_of(2 * pair + INDEX, boxes, FORM)
        _store(accs, out_ptr, kept_ptr, corner, phase, channel_0, sizes, pointers, numbers, FORM)


@gluon.jit
def hopper_product_kernel(
    out_ptr,
    kept_ptr,
    x,
    weight,
    scale_ptr,
    shift_ptr,
    lo_ptr,
    hi_ptr,
    vectors_ptr,
    N,
    D,
    H,
    W,
    boxes_d,
    boxes_h,
    boxes_w,
    total,
    scale,
    shift,
    lo,
    hi,
    X_LAYOUT: gl.constexpr,
    FORM: gl.constexpr,
):
    """``total`` tiles of pairs of boxes, times phases, times FORM.channels channels.

    x is channels_last, and ``weight`` what ``pack`` returns, as the copy engine takes them.
    """
    dtype: gl.constexpr = weight.dtype
    xs = gl.allocate_shared_memory(dtype, stacked(2 * FORM.slots, FORM.tile), X_LAYOUT)
    ws = gl.allocate_shared_memory(dtype, [FORM.slots, FORM.columns, FORM.depth], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [FORM.slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [FORM.slots, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(known(FORM.slots)):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)

    boxes = (boxes_d, boxes_h, boxes_w)
    pointers = (scale_ptr, shift_ptr, lo_ptr, hi_ptr, vectors_ptr)
    source = (x, weight, xs, ws, full, empty, boxes, total)
    rest = (out_ptr, kept_ptr, xs, ws, full, empty, boxes, total, (N, D, H, W), pointers, (scale, shift, lo, hi))
    gl.warp_specialize(
        [(_produce, (source, FORM)), (_consume, (0, rest, FORM)), (_consume, (1, rest, FORM))],
        [4, 4],
        [240, 240],
    )

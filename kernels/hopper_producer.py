"""The producer of the march on Hopper: rows of x into shared memory, for two consumers. Needs a triton with Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from fusion_backend.kernels.hopper_tiles import append, begin_of, corner_of, known, loads_of_row, row_layout


@gluon.jit
def _fetch(x, xs, full, empty, tiles, work, FORM: gl.constexpr):
    """Rows of a channels_last x, once for each shift, by the copy engine."""
    BYTES: gl.constexpr = FORM.all_tiles * 64 * FORM.depth * (xs.dtype.primitive_bitwidth // 8)
    begin, end, rows = work
    slot = 0
    phase = 1
    for group in range(begin // rows, (end + rows - 1) // rows):
        row_0, _, last = begin_of(group, work, FORM)
        for row in range(row_0, last):
            for c in gl.static_range(2):
                n, m, w = corner_of(2 * group + c, tiles, FORM)
                at = c * FORM.slots + slot
                mbarrier.wait(empty.index(at), phase)
                mbarrier.expect(full.index(at), BYTES)
                for s_m in gl.static_range(known(FORM.shifts[0])):
                    for s_w in gl.static_range(known(FORM.shifts[1])):
                        tile = xs.index(at * FORM.all_tiles + s_m * FORM.tiles + s_w)
                        x_w = w + (FORM.first[1] + s_w)
                        if FORM.flat:
                            tma.async_copy_global_to_shared(x, [n, row, x_w, 0], full.index(at), tile)
                        else:
                            x_m = m + (FORM.first[0] + s_m)
                            tma.async_copy_global_to_shared(x, [n, row, x_m, x_w, 0], full.index(at), tile)
            slot += 1
            if slot == FORM.slots:
                slot = 0
                phase ^= 1


@gluon.jit
def _row_pointers(x_ptr, corner, row, sizes, z, s_m, LAYOUT: gl.constexpr, FORM: gl.constexpr):
    """Where every second pixel of a row is, [depth, 32]; its position along W; and whether its row exists."""
    N, R, M, W = sizes
    n, m, w = corner
    p = gl.arange(0, 32, layout=gl.SliceLayout(0, LAYOUT))
    channel = gl.arange(0, FORM.depth, layout=gl.SliceLayout(1, LAYOUT))
    if FORM.along_d:
        per_row, per_middle = M * W, W
    else:
        per_row, per_middle = W, R * W
    plane = R * M * W
    in_row = 2 * p % FORM.box[2]
    in_m = 2 * p // FORM.box[2] % FORM.box[1]
    image = 2 * p // (FORM.box[2] * FORM.box[1])
    at = in_row
    if FORM.box[1] > 1:
        at += in_m * per_middle
    if FORM.box[0] > 1:
        at += image * (FORM.C_in * plane)
    # z keeps what follows from it inside the loop, and not in registers all the time; 16 of it divide what 16 divides.
    at = (channel * (plane + z * 16))[:, None] + at[None, :]
    base = x_ptr + n.to(gl.int64) * (FORM.C_in * plane) + (row * per_row + (m + s_m) * per_middle + w)
    q_m = m + s_m + in_m
    exists = ((row < R) & (n + image < N) & (q_m >= 0) & (q_m < M))[None, :]
    if FORM.C_in != FORM.depth:
        exists = exists & (channel < FORM.C_in)[:, None]
    return base + at, (w + in_row)[None, :], exists


@gluon.jit
def _load_row(x_ptr, corner, row, sizes, z, z_2, FORM: gl.constexpr):
    """A row of a strip of a contiguous x: for each shift along the other dimension, whole pixels, and more combs."""
    BITS: gl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    WIDE: gl.constexpr = row_layout(FORM.depth, BITS)
    NARROW: gl.constexpr = gl.SliceLayout(2, WIDE)
    W = sizes[3]
    e = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, WIDE)))[None, None, :]
    loaded = ()
    for s_m in gl.static_range(known(FORM.shifts[0])):
        x_ptrs, q, exists = _row_pointers(x_ptr, corner, row, sizes, z, FORM.first[0] + s_m, NARROW, FORM)
        here = gl.expand_dims(exists, 2) & (gl.expand_dims(q, 2) + e < W)
        loaded = append(loaded, gl.load(gl.expand_dims(x_ptrs, 2) + e, mask=here, other=0.0))
        for j in gl.static_range(known(FORM.tiles)):
            if FORM.first[1] + j < 0 or FORM.first[1] + j >= 2:
                x_ptrs, q, exists = _row_pointers(x_ptr, corner, row, sizes, z_2, FORM.first[0] + s_m, NARROW, FORM)
                here = exists & (q + (FORM.first[1] + j) >= 0) & (q + (FORM.first[1] + j) < W)
                loaded = append(loaded, gl.load(x_ptrs + (FORM.first[1] + j), mask=here, other=0.0))
    return loaded


@gluon.jit
def _load_next_row(x_ptr, group, c: gl.constexpr, row, sizes, tiles, length, FORM: gl.constexpr):
    # Another zero for each, so that no address is kept from one to the next.
    z = (row + c + length) >> 28
    z_2 = (row + c + 2 + length) >> 28
    return _load_row(x_ptr, corner_of(2 * group + c, tiles, FORM), row + 1, sizes, z, z_2, FORM)


@gluon.jit
def _put_row(loaded, xs, at, FORM: gl.constexpr):
    """What ``_load_row`` loaded, into shared memory."""
    PER_SHIFT: gl.constexpr = loads_of_row(FORM)
    for s_m in gl.static_range(known(FORM.shifts[0])):
        wide = loaded[s_m * PER_SHIFT]
        inner = gl.split(wide)
        for j in gl.static_range(known(FORM.tiles)):
            if FORM.first[1] + j < 0:
                x = loaded[s_m * PER_SHIFT + 1 + j]
            elif FORM.first[1] + j < 2:
                x = inner[known(FORM.first[1] + j)]
            else:
                x = loaded[s_m * PER_SHIFT + 1 + j - 2 + max(FORM.first[1], 0)]
            place = xs.index(at * FORM.all_tiles + s_m * FORM.tiles + j)
            place.reshape([32, FORM.depth]).permute([1, 0]).store(x)


@gluon.jit
def _turn(x_ptr, xs, full, empty, sizes, tiles, work, length, FORM: gl.constexpr):
    """Rows of a contiguous x, through registers: a row is loaded as soon as the one before it is out of them."""
    LOADS: gl.constexpr = loads_of_row(FORM) * FORM.shifts[0]
    begin, end, rows = work
    slot = 0
    phase = 1
    for group in range(begin // rows, (end + rows - 1) // rows):
        row_0, _, last = begin_of(group, work, FORM)
        loaded = ()
        for c in gl.static_range(2):
            corner = corner_of(2 * group + c, tiles, FORM)
            loaded = loaded + _load_row(x_ptr, corner, row_0, sizes, 0, 0, FORM)
        for row in range(row_0, last):
            next_loaded = ()
            for c in gl.static_range(2):
                at = c * FORM.slots + slot
                mbarrier.wait(empty.index(at), phase)
                _put_row(loaded[c * LOADS : (c + 1) * LOADS], xs, at, FORM)
                mbarrier.arrive(full.index(at), count=1)
                if not FORM.burst:
                    next_loaded = next_loaded + _load_next_row(x_ptr, group, c, row, sizes, tiles, length, FORM)
            if FORM.burst:
                for c in gl.static_range(2):
                    next_loaded = next_loaded + _load_next_row(x_ptr, group, c, row, sizes, tiles, length, FORM)
            loaded = next_loaded
            slot += 1
            if slot == FORM.slots:
                slot = 0
                phase ^= 1


@gluon.jit
def produce(shared, FORM: gl.constexpr):
    x_ptr, x, xs, full, empty, sizes, tiles, work, length = shared
    if FORM.x_last:
        _fetch(x, xs, full, empty, tiles, work, FORM)
    else:
        _turn(x_ptr, xs, full, empty, sizes, tiles, work, length, FORM)

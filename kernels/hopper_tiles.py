"""How the march on Hopper holds its tiles in registers, and where a program walks: what its Gluon functions share.

Importing this file needs a triton with Gluon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def known(number):
    """As loops that are unrolled take it."""
    return number


@gluon.constexpr_function
def stacked(count, shape):
    return [count, *shape]


@gluon.constexpr_function
def _powers(count, unit):
    """unit, 2 * unit, ... below count * unit."""
    return [unit << bit for bit in range(count.bit_length() - 1)]


@gluon.constexpr_function
def joined_columns(bits, channels):
    """Groups of 8 columns of which a thread's values lie side by side in channels_last: 16 bytes, or all there are."""
    return min(64 // bits, channels // 8)


@gluon.constexpr_function
def comb_layout(depth, bits):
    """[32, depth] as the products' left operand has 8 rows a warp: 4 lanes a row, 32 bits a lane, 8 registers apart."""
    wide = 32 // bits
    registers = [[0, k] for k in _powers(wide, 1)] + [[0, k] for k in _powers(depth // (4 * wide), 4 * wide)]
    lanes = [[0, wide], [0, 2 * wide], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[8, 0], [16, 0]], [], [32, depth])


@gluon.constexpr_function
def tile_layout(form, bits):
    """A tile of the output as it is in a product's registers, a thread's neighbours in memory first.

    [pixels, channels] for channels_last, with columns permuted by ``pack``; else [channels, pixels * joined].
    """
    # A thread's second pixel, and its lane's and its warp's.
    second, lane = (8, 1) if form.x_last else (1, 2)
    if form.out_last:
        wide = 2 * joined_columns(bits, form.channels)
        registers = [[0, c] for c in _powers(wide, 1)] + [[second, 0]]
        registers += [[0, c] for c in _powers(form.channels // (4 * wide), 4 * wide)]
        lanes = [[0, wide], [0, 2 * wide]] + [[p, 0] for p in _powers(8, lane)]
        warps, shape = [[16, 0], [32, 0]], [64, form.channels]
    else:
        joined = form.joined
        registers = [[0, p] for p in _powers(joined, 1)]
        registers += [[1, 0], [0, 8 * joined]] if form.x_last else [[0, joined], [1, 0]]
        registers += [[c, 0] for c in _powers(form.channels // 8, 8)]
        lanes = [[2, 0], [4, 0]] + [[0, p] for p in _powers(8, lane * joined)]
        warps, shape = [[0, 16 * joined], [0, 32 * joined]], [form.channels, 64 * joined]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.constexpr_function
def row_layout(depth, bits):
    """[depth, 32, 2] of a contiguous x: lanes along the row, a thread's channels are 16 bytes of a pixel."""
    vector = min(16 * 8 // bits, depth // 4)
    registers = [[0, 0, 1]] + [[c, 0, 0] for c in _powers(vector, 1)]
    registers += [[c, 0, 0] for c in _powers(depth // (4 * vector), 4 * vector)]
    lanes = [[0, p, 0] for p in _powers(32, 1)]
    return gl.DistributedLinearLayout(registers, lanes, [[vector, 0, 0], [2 * vector, 0, 0]], [], [depth, 32, 2])


@gluon.constexpr_function
def loads_of_row(form):
    """Of a row, for one shift along the other dimension: a wide one, and those of the combs beyond it."""
    return 1 + sum(not 0 <= form.first[1] + j < 2 for j in range(form.tiles))


@gluon.constexpr_function
def product_layout(form):
    """A tile of the product as it is in registers, a thread's neighbours in memory first.

    [rows, columns] for channels_last, with columns permuted by ``pack``; else [channels, rows * wide].
    """
    if form.out_last:
        wide = 2 * form.neighbours
        registers = [[0, c] for c in _powers(wide, 1)] + [[8, 0]]
        registers += [[0, c] for c in _powers(form.columns // (4 * wide), 4 * wide)]
        registers += [[r, 0] for r in _powers(form.rows // 64, 64)]
        lanes = [[0, wide], [0, 2 * wide]] + [[r, 0] for r in _powers(8, 1)]
        warps, shape = [[16, 0], [32, 0]], [form.rows, form.columns]
    else:
        wide, pair = form.wide, 2 if form.shared == 1 else 1  # a thread's channels side by side
        registers = [[0, r] for r in _powers(wide, 1)] + [[c, 0] for c in _powers(pair, 1)] + [[0, 8 * wide]]
        registers += [[c, 0] for c in _powers(form.channels // (4 * pair), 4 * pair)]
        registers += [[0, r] for r in _powers(form.rows // 64, 64 * wide)]
        lanes = [[pair, 0], [2 * pair, 0]] + [[0, r] for r in _powers(8, wide)]
        warps, shape = [[0, 16 * wide], [0, 32 * wide]], [form.channels, form.rows * wide]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.jit
def rounded_to_tf32(x):
    return gl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def append(values, value):
    return values + (value,)  # noqa: RUF005 Gluon has no stars


@gluon.jit
def corner_of(strip, tiles, FORM: gl.constexpr):
    """A strip's first image, row along the other dimension, and pixel."""
    tiles_m, tiles_w = tiles
    rest = strip // tiles_w
    return (
        rest // tiles_m * FORM.box[0],
        rest % tiles_m * FORM.box[1],
        strip % tiles_w * FORM.box[2],
    )


@gluon.jit
def begin_of(group, work, FORM: gl.constexpr):
    """The rows of a group of strips that this program stores, and the one it begins with."""
    begin, end, rows = work
    first = gl.maximum(begin - group * rows, 0) + FORM.padding[0] // FORM.stride[0]
    last = gl.minimum(end - group * rows, rows) + FORM.padding[0] // FORM.stride[0]
    return gl.maximum(first - FORM.halo, 0), first, last

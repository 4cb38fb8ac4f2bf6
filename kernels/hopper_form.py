"""What is compiled into the march on Hopper: which tiles of x a step reads, and which products it makes of them.

A strip is 64 columns of x, and an output needs x at a few shifts s along the row. A channels_last x is fetched once for
each shift. The pixels of a contiguous x are dealt out to combs of 32 instead, every second one to the same: x[2*p + j]
is the p-th of comb j. So x[2*p + h + s] is the p-th of comb h + s, and all shifts together need shifts + 1 combs.

A thread of a product has two pixels: those of two combs are neighbours, the others are 8 apart.
"""

from dataclasses import dataclass

STRIP = 64  # pixels: the rows of a product
COMB = STRIP // 2
CONSUMERS = 2  # warp groups that walk a strip each, side by side


@dataclass(frozen=True)
class Form:
    """What is compiled into a kernel. Triples are along the march, the other dimension, and W."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    growth: tuple[int, int, int]
    along_d: bool
    flat: bool  # the other dimension has one row
    C_in: int
    C_out: int
    depth: int  # C_in, filled up to a power of two
    box: tuple[int, int, int]  # of a strip: images, rows along the other dimension, pixels
    whole: bool  # all strips are full, and no phase is short
    unit: int  # W counts units of so many pixels: the compiler sees only whether 16 divides a number
    x_last: bool
    out_last: bool
    tf32: bool
    kinds: tuple[int, int, int, int]  # scale, shift, lo, hi: 0 none, 1 a number, 2 a tensor
    gate: tuple[bool, bool, bool] | None  # lo_open, hi_open, passes_nan, where bits are written
    program: str
    channels: int
    slots: int
    registers: int
    together: bool
    burst: bool

    @property
    def writes_bits(self) -> bool:
        return self.gate is not None

    @property
    def halo(self) -> int:
        """Rows that a march must begin early."""
        return (self.kernel[0] - 1) // self.stride[0]

    @property
    def carried(self) -> int:
        """Output rows that wait for more rows of x."""
        return max(self.kernel[0] - self.stride[0], 0)

    @property
    def phases(self) -> int:
        """Of an output row of the march."""
        return self.stride[1] * self.stride[2]

    @property
    def stored(self) -> int:
        """Rows of the output that a step stores."""
        return self.stride[0] * self.stride[1]

    @property
    def first(self) -> tuple[int, int]:
        """The lowest shift along the other dimension and along W."""
        _, m, w = (shifts_along(*axis) for axis in self._axes)
        return m.start, w.start

    @property
    def shifts(self) -> tuple[int, int]:
        _, m, w = (shifts_along(*axis) for axis in self._axes)
        return len(m), len(w)

    @property
    def tiles(self) -> int:
        """Of x in a step, for each shift along the other dimension: shifts, or combs."""
        return self.shifts[1] + (not self.x_last)

    @property
    def tile(self) -> tuple[int, ...]:
        """The shape of one: what the copy engine fetches of [N, rows, other rows, W, C_in], or a comb."""
        if not self.x_last:
            return COMB, self.depth
        images, rows, pixels = self.box
        return (images, 1, pixels, self.depth) if self.flat else (images, 1, rows, pixels, self.depth)

    @property
    def all_tiles(self) -> int:
        return self.shifts[0] * self.tiles

    @property
    def joined(self) -> int:
        """Phases along W that are interleaved before they are stored."""
        return self.stride[2] if not self.out_last and self.stride[2] in (2, 4) else 1

    @property
    def taps(self) -> tuple[tuple[tuple[tuple[int, int], ...], ...], ...]:
        """For each row r that a step adds to, and each phase of it: pairs of a shift and a tap of the weight."""
        return tuple(
            tuple(self._taps(r, e_m, e_w) for e_m in range(self.stride[1]) for e_w in range(self.stride[2]))
            for r in range(self.stride[0] + self.carried)
        )

    @property
    def _axes(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(zip(self.kernel, self.stride, self.padding, strict=True))

    def _taps(self, r: int, e_m: int, e_w: int) -> tuple[tuple[int, int], ...]:
        _, (kernel_m, stride_m, padding_m), (kernel_w, stride_w, padding_w) = self._axes
        first_m, first_w = self.first
        return tuple(
            (
                ((e_m + padding_m - k_m) // stride_m - first_m) * self.shifts[1]
                + (e_w + padding_w - k_w) // stride_w
                - first_w,
                (r * kernel_m + k_m) * kernel_w + k_w,
            )
            for k_m in range(kernel_m if r < self.kernel[0] else 0)
            for k_w in range(kernel_w)
            if (e_m + padding_m - k_m) % stride_m == 0 and (e_w + padding_w - k_w) % stride_w == 0
        )


def shifts_along(kernel: int, stride: int, padding: int) -> range:
    """Of x for all phases: (phase + padding - tap) / stride, where that leaves no remainder."""
    return range(-((kernel - 1 - padding) // stride), (padding + stride - 1) // stride + 1)

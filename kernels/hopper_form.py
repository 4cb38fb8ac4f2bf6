"""What is compiled into the march on Hopper: which rows of x a step reads, and which products it makes of them.

A strip's pixels are dealt out to combs: pixel pair*p + j of it is the p-th of comb j. An output needs x at a few shifts
s, and x[pair*p + h + s] is the p-th of comb h + s, so all shifts together need only shifts + pair - 1 combs.
"""

from dataclasses import dataclass

COMB = 32  # pixels, 8 for each warp of a consumer


@dataclass(frozen=True)
class Form:
    """What is compiled into a kernel. Triples are along the march, the other dimension, and W."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    growth: tuple[int, int, int]
    along_d: bool
    C_in: int
    C_out: int
    depth: int  # C_in, filled up to a power of two
    box: tuple[int, int, int]  # of a comb: images, rows along the other dimension, pixels
    whole: bool  # all strips are full, and no phase is short
    unit: int  # W counts units of so many pixels: the compiler sees only whether 16 divides a number
    x_last: bool
    out_last: bool
    tf32: bool
    kinds: tuple[int, int, int, int]  # scale, shift, lo, hi: 0 none, 1 a number, 2 a tensor
    pixels: int
    channels: int
    consumers: int
    slots: int
    registers: int
    ahead: bool

    @property
    def pair(self) -> int:
        return self.pixels // COMB

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
    def first(self) -> tuple[int, int]:
        """The lowest shift along the other dimension and along W."""
        _, m, w = (shifts_along(*axis) for axis in self._axes)
        return m.start, w.start

    @property
    def shifts(self) -> tuple[int, int]:
        _, m, w = (shifts_along(*axis) for axis in self._axes)
        return len(m), len(w)

    @property
    def combs(self) -> int:
        return self.shifts[1] + self.pair - 1

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
    def combs_fetched(self) -> int:
        """Combs of x in a step of one strip."""
        return self.shifts[0] * self.combs

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

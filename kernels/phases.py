"""The phases of a transposed convolution along one dimension: which taps and which inputs an output position needs.

Tap k carries input i to output o = stride*i - padding + dilation*k. Read from the output, with o = stride*q + r:

    i = q + (r + padding - dilation*k) / stride      for the taps k where that division leaves no remainder

So all positions of one remainder r, a phase, use the same taps at the same distances from q: a phase is a dense
convolution. With g = gcd(stride, dilation), its taps are k0, k0 + stride/g, k0 + 2*stride/g, ..., and the input moves
back by dilation/g from each to the next. A phase has no tap at all where g does not divide r + padding, or where k0
is no tap of the kernel.
"""

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class Phase:
    """Outputs stride*q + remainder: each is the sum over (tap, offset) in ``taps`` of weight[tap] * x[q + offset]."""

    remainder: int
    taps: tuple[tuple[int, int], ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(offset for _, offset in self.taps)


@dataclass(frozen=True)
class Axis:
    """A transposed convolution's parameters along one dimension."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    output_padding: int = 0
    dilation: int = 1

    @property
    def growth(self) -> int:
        """The output size is stride * (input size - 1) + growth."""
        return self.dilation * (self.kernel - 1) + 1 - 2 * self.padding + self.output_padding

    def output_size(self, size: int) -> int:
        # In this order a compiler sees what divides the output size.
        return self.stride * size + (self.growth - self.stride)

    def positions(self, remainder: int, output_size: int) -> int:
        """How many outputs a phase has."""
        return max(0, -((remainder - output_size) // self.stride))

    @property
    def step(self) -> int:
        """From one tap of a phase to the next."""
        return self.stride // gcd(self.stride, self.dilation)

    @property
    def input_step(self) -> int:
        """How far the input moves back from one tap of a phase to the next."""
        return self.dilation // gcd(self.stride, self.dilation)

    @property
    def inverse(self) -> int:
        """Of dilation / g modulo ``step``: a phase's first tap is (r + padding) / g * inverse modulo ``step``."""
        return pow(self.input_step, -1, self.step) if self.step > 1 else 0

    def phase(self, remainder: int) -> Phase:
        shifted = remainder + self.padding
        common = self.stride // self.step
        if shifted % common:
            return Phase(remainder, ())
        first = shifted // common * self.inverse % self.step
        taps = range(first, self.kernel, self.step)
        return Phase(remainder, tuple((tap, (shifted - tap * self.dilation) // self.stride) for tap in taps))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(self.phase(remainder) for remainder in range(self.stride))

    @property
    def moves(self) -> bool:
        """Whether any output needs an input other than q: without overlap (kernel <= stride, no padding) none does."""
        beyond = self.growth > self.stride
        return beyond or any(offset != 0 for phase in self.phases for offset in phase.offsets)

    @property
    def sharing(self) -> int:
        """The largest power of two of neighbouring phases, counted from 0, that read the same inputs throughout.

        Such phases are one matrix product, in which no multiply-add is spent on a hole. Only without dilation: there
        the taps of neighbouring phases are neighbours, too.
        """
        if self.dilation > 1:
            return 1
        offsets = [phase.offsets for phase in self.phases]
        together = 1
        while together < self.stride and _same_in_groups(offsets, 2 * together):
            together *= 2
        return together


def _same_in_groups(offsets: list[tuple[int, ...]], size: int) -> bool:
    return all(len(set(offsets[begin : begin + size])) == 1 for begin in range(0, len(offsets), size))

"""The taps of a phase as a kernel works them out, from what ``phases.Axis`` says of a dimension."""

import triton
import triton.language as tl


@triton.jit
def taps_of(
    phase,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """A phase's first tap, the input offset of that, and how many taps there are."""
    COMMON: tl.constexpr = STRIDE // STEP
    shifted = phase + PADDING
    first = shifted // COMMON * INVERSE % STEP
    if KERNEL % STEP == 0:
        count = KERNEL // STEP
    else:
        count = (KERNEL - first + STEP - 1) // STEP
    if COMMON > 1:
        count = tl.where(shifted % COMMON == 0, count, 0)
    return first, (shifted - first * DILATION) // STRIDE, count

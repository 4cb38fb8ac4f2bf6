"""y = min(max(a*x + b, lo), hi): one normal form for any run of affine and clamp steps, with lo <= hi.

    start        a = 1, b = 0, lo = -inf, hi = +inf
    + c          b + c, lo + c, hi + c
    * s, s > 0   all four times s
    * s, s < 0   all four times s, and lo and hi change places
    * s, sign of s known only at run time:
                 a*s, b*s, and lo and hi become the smaller and the larger of lo*s and hi*s
    clamp(l, h)  lo = min(max(lo, l), h), hi = min(max(hi, l), h)      torch's rule: where l > h the result is h

x is the convolution's value; a, b, lo, hi are each a number or one value per channel. Side conditions, all on numbers
known when the graph is read: a scale is finite and not zero, a shift is finite, a bound is not NaN, and no coefficient
leaves the range of float32 (its magnitude stays below the largest number, and a's above the smallest normal one).
What breaks one is refused, and the tail ends before it.

Numbers known only at run time cannot be refused. Their results agree with step-by-step evaluation while every
intermediate is finite. Where a channel's scale is zero behind two bounds, the channel is the constant that eager gives
(also for an infinite x): there a is the smallest normal number, so that a*x cannot be 0*inf. Where a channel's scale is
zero behind one bound, or a channel is divided by zero, an infinite or a NaN result may be the other of the two.

Rounding: numbers are rounded to float32 after every step, as eager rounds the value that stands on a bound, or is zero:
clamp(min=-0.1)*3 + 0.3 is 0 there, where in float64 it would be -5.6e-17, which has no square root. Those of a float64
value are not rounded.

Every step rounds once in eager, the normal form at most twice. a*x + b can cancel where the user's order,
(x + c)*s, does not; but x carries the convolution's own rounding of about half a unit in its last place, and that is
scaled by the same a, so the sum stays within a small factor of eager's error. The sign of a zero may differ, since
x + 0 is taken for x.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.coefficient import Coefficient

LARGEST = 3.4028234663852886e38
SMALLEST_NORMAL = 1.1754943508222875e-38


@dataclass(frozen=True)
class Shift:
    """x + amount."""

    amount: Coefficient


@dataclass(frozen=True)
class Scale:
    """x * factor."""

    factor: Coefficient


@dataclass(frozen=True)
class Clamp:
    """min(max(x, lo), hi). On a bound it ``"passes"``, ``"blocks"`` or ``"halves"`` the gradient (see ``gradient``)."""

    lo: Coefficient
    hi: Coefficient
    gradient: str = "passes"


Step = Shift | Scale | Clamp


@dataclass(frozen=True)
class Refusal:
    """Why a step cannot be folded, in words that fit behind "add at model.py:41: "."""

    reason: str


@dataclass(frozen=True)
class NormalForm:
    """y = min(max(scale*x + shift, lo), hi). The default is the identity."""

    scale: Coefficient = 1.0
    shift: Coefficient = 0.0
    lo: Coefficient = -math.inf
    hi: Coefficient = math.inf

    @property
    def coefficients(self) -> tuple[Coefficient, Coefficient, Coefficient, Coefficient]:
        return self.scale, self.shift, self.lo, self.hi

    @property
    def operations(self) -> int:
        """How many operations it takes: multiply, add and clamp, and those that compute the coefficients."""
        bounded = self.lo != -math.inf or self.hi != math.inf
        return (self.scale != 1.0) + (self.shift != 0.0) + bounded + len(co.formulas(*self.coefficients))

    def __str__(self) -> str:
        return f"y = {self.text('x')}"

    def text(self, x: str) -> str:
        """The right side of the equation, with ``x`` as the name of the value."""
        y = co.times(co.text(self.scale), x)
        if self.shift != 0.0:
            y = co.plus(y, co.text(self.shift))
        if self.lo != -math.inf:
            y = f"max({y}, {co.text(self.lo)})"
        if self.hi != math.inf:
            y = f"min({y}, {co.text(self.hi)})"
        return y


def apply(form: NormalForm, step: Step, single: bool = False) -> NormalForm | Refusal:
    """The normal form of ``step`` behind ``form``. ``single``: the value is computed in float32, and so are numbers."""
    step = rounded(step, single)
    if isinstance(step, Shift):
        result = _shifted(form, step.amount)
    elif isinstance(step, Scale):
        result = _scaled(form, step.factor)
    else:
        result = _clamped(form, step.lo, step.hi)
    if isinstance(result, Refusal):
        return result
    return _within_float32(NormalForm(*(_rounded(c, single) for c in result.coefficients)))


def rounded(step: Step, single: bool) -> Step:
    """The step with its numbers as float32 has them, if ``single``."""
    if isinstance(step, Shift):
        return Shift(_rounded(step.amount, single))
    if isinstance(step, Scale):
        return Scale(_rounded(step.factor, single))
    return Clamp(_rounded(step.lo, single), _rounded(step.hi, single), step.gradient)


def _rounded(c: Coefficient, single: bool) -> Coefficient:
    """What is too large for float32 stays as it is, to be refused."""
    if single and isinstance(c, float) and abs(c) <= LARGEST:
        return ctypes.c_float(c).value
    return c


def fold(steps: Iterable[Step], single: bool = False, form: NormalForm = NormalForm()) -> NormalForm | Refusal:
    """The normal form of ``steps``, first to last, behind ``form``."""
    for step in steps:
        result = apply(form, step, single)
        if isinstance(result, Refusal):
            return result
        form = result
    return form


def _shifted(form: NormalForm, c: Coefficient) -> NormalForm | Refusal:
    if isinstance(c, float) and not math.isfinite(c):
        return Refusal(f"a shift of {c} is not finite")
    return NormalForm(form.scale, co.add(form.shift, c), co.add(form.lo, c), co.add(form.hi, c))


def _scaled(form: NormalForm, s: Coefficient) -> NormalForm | Refusal:
    if not isinstance(s, float):
        return _scaled_at_run_time(form, s)
    if s == 0.0 or not math.isfinite(s):
        return Refusal(f"a scale of {s:g} has no inverse")
    a, b, lo, hi = (co.multiply(c, s) for c in form.coefficients)
    return NormalForm(a, b, lo, hi) if s > 0 else NormalForm(a, b, hi, lo)


def _scaled_at_run_time(form: NormalForm, s: Coefficient) -> NormalForm:
    a, b = co.multiply(form.scale, s), co.multiply(form.shift, s)
    lo, hi = _scaled_bound(form.lo, s), _scaled_bound(form.hi, s)
    no_lo, no_hi = form.lo == -math.inf, form.hi == math.inf
    if no_lo and no_hi:
        return NormalForm(a, b)
    if no_lo:
        return NormalForm(a, b, co.where_negative(s, hi, -math.inf), co.where_negative(s, math.inf, hi))
    if no_hi:
        return NormalForm(a, b, co.where_negative(s, -math.inf, lo), co.where_negative(s, lo, math.inf))
    return NormalForm(co.where_zero(s, SMALLEST_NORMAL, a), b, co.minimum(lo, hi), co.maximum(lo, hi))


def _scaled_bound(bound: Coefficient, s: Coefficient) -> Coefficient:
    if isinstance(bound, float):
        return bound if math.isinf(bound) else co.multiply(bound, s)
    return co.where_zero(s, 0.0, co.multiply(bound, s))  # a bound may be infinite at run time, and inf*0 is NaN


def _clamped(form: NormalForm, lo: Coefficient, hi: Coefficient) -> NormalForm | Refusal:
    for bound in (lo, hi):
        if isinstance(bound, float) and math.isnan(bound):
            return Refusal("a bound is NaN")
    new_lo = co.minimum(co.maximum(form.lo, lo), hi)
    new_hi = co.minimum(co.maximum(form.hi, lo), hi)
    if new_lo == math.inf or new_hi == -math.inf:
        return Refusal("the bounds leave nothing but an infinity")
    return NormalForm(form.scale, form.shift, new_lo, new_hi)


def _within_float32(form: NormalForm) -> NormalForm | Refusal:
    if co.is_infinite(form.scale) or co.is_infinite(form.shift):
        return Refusal("a folded coefficient overflows float32")
    for number in co.numbers(*form.coefficients):
        if math.isfinite(number) and abs(number) > LARGEST:
            return Refusal(f"the folded coefficient {number:g} overflows float32")
    if isinstance(form.scale, float) and abs(form.scale) < SMALLEST_NORMAL:
        return Refusal(f"the folded scale {form.scale:g} underflows float32")
    return form

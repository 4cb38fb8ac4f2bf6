"""Where a folded tail passes the gradient on: where the value lies between its bounds, each end open or closed.

y = min(max(z, lo), hi) with z = a*x + b has one gradient between the bounds and none beyond. What happens on a bound,
and where z is NaN, is not one rule in PyTorch; g is the incoming gradient:

    operation                     on the bound   beyond   at NaN
    clamp, clamp_min, clamp_max   g              0        0
    relu, relu6, hardtanh         0              0        g
    minimum, maximum              g / 2          0        g

So the form's interval [lo, hi] passes the gradient, and a ``Gate`` says the rest: whether each end belongs to it, and
what NaN does. Behind several clamps

    the tighter bound decides about its end; where two are equal, the one that blocks does
    a scale below zero swaps the ends
    a NaN passes if all of them let it pass

and one bit an element is all that the backward needs. Refused, so that the tail ends before it, is what needs more:

    minimum, maximum               a tie halves the gradient
    clamps with nothing in common  the form's bounds meet, and no longer tell where the gradient passed
    a bound known only at run time beside another: which is tighter, or whether they cross, decides about the gradient
    a scale known only at run time behind a bound: where it is zero, all values fall onto one
    a shift behind a bound, but for a number that at most doubles the bounds: next to a large shift float32 no longer
    tells which values lay beyond the bound
    a learned bound: its gradient counts the elements beyond it, without those that are NaN or beyond the other bound
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fusion_backend.patterns import algebra
from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.algebra import Clamp, NormalForm, Refusal, Scale, Step
from fusion_backend.patterns.coefficient import Coefficient


@dataclass(frozen=True)
class Gate:
    """Beside a normal form: whether its bounds block the gradient (open), and whether a NaN passes it.

    ``shifted``: a shift has come behind the bounds.
    """

    lo_open: bool = False
    hi_open: bool = False
    passes_nan: bool = True
    shifted: bool = False


def apply(gate: Gate, form: NormalForm, step: Step) -> Gate | Refusal:
    """The gate of ``step`` behind ``form``, which ``algebra.apply`` can fold."""
    if isinstance(step, Clamp):
        gated = _clamped(gate, form, step)
    elif isinstance(step, Scale):
        gated = _scaled(gate, form, step.factor)
    else:
        gated = _shifted(gate, form, step.amount)
    after = algebra.apply(form, step)
    if isinstance(gated, Refusal):
        return gated
    if isinstance(after, Refusal):
        return after
    if any(leaf.learned for leaf in co.leaves(after.lo, after.hi)):
        return Refusal("the gradient of a learned bound takes more than a bit of each element")
    return gated


def _shifted(gate: Gate, form: NormalForm, amount: Coefficient) -> Gate | Refusal:
    bounds = [bound for bound in (form.lo, form.hi) if not co.is_infinite(bound)]
    if not bounds or amount == 0.0:
        return gate
    exact = isinstance(amount, float) and all(
        isinstance(bound, float) and abs(bound + amount) <= 2 * abs(bound) for bound in bounds
    )
    if gate.shifted or not exact:
        return Refusal("a gradient passes a bound, and behind the shift float32 cannot tell which values lay beyond it")
    return replace(gate, shifted=True)


def _scaled(gate: Gate, form: NormalForm, factor: Coefficient) -> Gate | Refusal:
    if isinstance(factor, float):
        return gate if factor > 0 else replace(gate, lo_open=gate.hi_open, hi_open=gate.lo_open)
    if co.is_infinite(form.lo) and co.is_infinite(form.hi):
        return gate
    return Refusal("a gradient passes a bound, and whether the scale behind it is zero is known only at run time")


def _clamped(gate: Gate, form: NormalForm, clamp: Clamp) -> Gate | Refusal:
    if clamp.gradient == "halves":
        return Refusal("its gradient is halved on the bound")
    blocks = clamp.gradient == "blocks"
    gated = replace(gate, passes_nan=gate.passes_nan and blocks)
    lo, hi = _tighter(form.lo, clamp.lo, max), _tighter(form.hi, clamp.hi, min)
    if isinstance(lo, Refusal):
        return lo
    if isinstance(hi, Refusal):
        return hi
    if not (co.is_infinite(lo) or co.is_infinite(hi)):
        if not (isinstance(lo, float) and isinstance(hi, float)):
            return Refusal("whether its bounds cross is known only at run time, and the gradient depends on it")
        if lo > hi:
            return Refusal("its bounds leave no value that passes a gradient")
    if clamp.lo == lo and not co.is_infinite(lo):
        gated = replace(gated, lo_open=blocks or (gate.lo_open and form.lo == lo))
    if clamp.hi == hi and not co.is_infinite(hi):
        gated = replace(gated, hi_open=blocks or (gate.hi_open and form.hi == hi))
    return gated


def _tighter(old: Coefficient, new: Coefficient, tighter: Callable[[float, float], float]) -> Coefficient | Refusal:
    """The bound that decides, max or min of the two."""
    if isinstance(old, float) and isinstance(new, float):
        return tighter(old, new)
    if co.is_infinite(old) or co.is_infinite(new):
        return new if co.is_infinite(old) else old
    return Refusal("which of two bounds is tighter is known only at run time, and the gradient depends on it")

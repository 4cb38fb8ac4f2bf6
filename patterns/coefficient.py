"""Arithmetic on coefficients: numbers, and values that become known only when the model runs.

A coefficient is a Python float, or a ``Formula`` over ``Leaf`` values: 0-dim tensors, per-channel tensors of shape [C],
and numbers that vary between calls. Numbers are folded at once, in double precision; the rest is evaluated by
``evaluate``, on tensors or on ``fx.Proxy`` objects (which writes the arithmetic into a graph).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Leaf:
    """A value known at run time; ``label`` is what a report prints, with [c] where it is one value per channel.

    ``learned``: a gradient with respect to it is asked for.
    """

    value: Any
    label: str
    per_channel: bool
    learned: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Formula:
    """``op`` of ``OPERATIONS`` applied to ``args``. Formulas share parts: walk them by identity, each part once.

    ``label`` is what a report prints in place of the arithmetic.
    """

    op: str
    args: tuple[Coefficient, ...]
    label: str = ""

    def __repr__(self) -> str:
        return text(self)


Coefficient = float | Leaf | Formula


def is_infinite(c: Coefficient) -> bool:
    return isinstance(c, float) and math.isinf(c)


def add(x: Coefficient, y: Coefficient) -> Coefficient:
    """x + y, with the numbers of a sum gathered in its last term."""
    if isinstance(x, float) and isinstance(y, float):
        return x + y
    if isinstance(x, float):
        x, y = y, x
    if not isinstance(y, float):
        return Formula("add", (x, y))
    if isinstance(x, Formula) and x.op == "add" and isinstance(x.args[1], float):
        return add(x.args[0], x.args[1] + y)
    if y == 0.0 or math.isinf(y):
        return x if y == 0.0 else y
    return Formula("add", (x, y))


def multiply(x: Coefficient, y: Coefficient) -> Coefficient:
    """x * y, with the numbers of a product gathered in its last factor and multiplied into a sum."""
    if isinstance(x, float) and isinstance(y, float):
        return x * y
    if isinstance(x, float):
        x, y = y, x
    if not isinstance(y, float):
        return Formula("multiply", (x, y))
    if isinstance(x, Formula) and x.op == "add":
        return add(multiply(x.args[0], y), multiply(x.args[1], y))
    if isinstance(x, Formula) and x.op == "multiply" and isinstance(x.args[1], float):
        return multiply(x.args[0], x.args[1] * y)
    if y == 0.0 or y == 1.0:
        return 0.0 if y == 0.0 else x
    return Formula("multiply", (x, y))


def reciprocal(x: Coefficient) -> Coefficient:
    if isinstance(x, float):
        return math.inf if x == 0.0 else 1.0 / x
    return Formula("reciprocal", (x,))


def rsqrt(x: Coefficient) -> Coefficient:
    """1 / sqrt(x), of a value known only at run time."""
    return Formula("rsqrt", (x,))


def labelled(x: Coefficient, label: str) -> Coefficient:
    return replace(x, label=label) if isinstance(x, Formula) else x


def minimum(x: Coefficient, y: Coefficient) -> Coefficient:
    if isinstance(x, float) and isinstance(y, float):
        return min(x, y)
    if x == math.inf or x == y:
        return y
    if y == math.inf:
        return x
    if -math.inf in (x, y):
        return -math.inf
    return Formula("minimum", (x, y))


def maximum(x: Coefficient, y: Coefficient) -> Coefficient:
    if isinstance(x, float) and isinstance(y, float):
        return max(x, y)
    if x == -math.inf or x == y:
        return y
    if y == -math.inf:
        return x
    if math.inf in (x, y):
        return math.inf
    return Formula("maximum", (x, y))


def where_negative(test: Coefficient, then: Coefficient, otherwise: Coefficient) -> Coefficient:
    if isinstance(test, float):
        return then if test < 0 else otherwise
    return then if then == otherwise else Formula("where_negative", (test, then, otherwise))


def where_zero(test: Coefficient, then: Coefficient, otherwise: Coefficient) -> Coefficient:
    if isinstance(test, float):
        return then if test == 0 else otherwise
    return Formula("where_zero", (test, then, otherwise))


def _pairwise_minimum(x: Any, y: Any) -> Any:
    if isinstance(x, float):
        x, y = y, x
    return torch.clamp_max(x, y) if isinstance(y, float) else torch.minimum(x, y)


def _pairwise_maximum(x: Any, y: Any) -> Any:
    if isinstance(x, float):
        x, y = y, x
    return torch.clamp_min(x, y) if isinstance(y, float) else torch.maximum(x, y)


# NaN goes through every one of these: an unordered comparison takes the last argument, which is computed from the test.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "multiply": torch.mul,
    "reciprocal": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "minimum": _pairwise_minimum,
    "maximum": _pairwise_maximum,
    "where_negative": lambda test, then, otherwise: torch.where(torch.lt(test, 0), then, otherwise),
    "where_zero": lambda test, then, otherwise: torch.where(torch.eq(test, 0), then, otherwise),
}


def evaluate(c: Coefficient, leaf: Callable[[Leaf], Any], known: dict[int, Any] | None = None) -> Any:
    """The value of ``c``: a float where it is a number, else what the operations make of ``leaf(l)`` for each leaf.

    ``leaf`` returns a floating tensor (or proxy) of shape [C] or []; the result broadcasts them. ``known`` holds what
    has been evaluated, by identity; pass one for several coefficients, and what they share is evaluated once.
    """
    if isinstance(c, float):
        return c
    known = {} if known is None else known
    if id(c) not in known:
        arguments = () if isinstance(c, Leaf) else [evaluate(arg, leaf, known) for arg in c.args]
        known[id(c)] = leaf(c) if isinstance(c, Leaf) else OPERATIONS[c.op](*arguments)
    return known[id(c)]


def parts(*coefficients: Coefficient) -> list[Coefficient]:
    """The coefficients and everything they are made of, each once, in order of appearance."""
    seen: dict[int, Coefficient] = {}
    pending = list(reversed(coefficients))
    while pending:
        c = pending.pop()
        if id(c) not in seen:
            seen[id(c)] = c
            pending.extend(reversed(c.args) if isinstance(c, Formula) else ())
    return list(seen.values())


def leaves(*coefficients: Coefficient) -> list[Leaf]:
    return [c for c in parts(*coefficients) if isinstance(c, Leaf)]


def formulas(*coefficients: Coefficient) -> list[Formula]:
    return [c for c in parts(*coefficients) if isinstance(c, Formula)]


def numbers(*coefficients: Coefficient) -> list[float]:
    return [c for c in parts(*coefficients) if isinstance(c, float)]


LONGEST_TEXT = 12  # operations


def text(c: Coefficient) -> str:
    """How a report prints ``c``."""
    if isinstance(c, float):
        return f"{c:g}"
    if isinstance(c, Leaf):
        return c.label + ("[c]" if c.per_channel else "")
    if c.label:
        return c.label
    if len(formulas(c)) > LONGEST_TEXT:
        names = list(map(text, leaves(c)))
        return f"f({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    args = [text(arg) for arg in c.args]
    if c.op == "add":
        return plus(args[0], args[1])
    if c.op == "multiply":
        return times(args[1], args[0]) if isinstance(c.args[1], float) else times(args[0], args[1])
    if c.op == "reciprocal":
        return f"1/({args[0]})" if " " in args[0] else f"1/{args[0]}"
    if c.op == "rsqrt":
        return f"rsqrt({args[0]})"
    if c.op == "minimum" or c.op == "maximum":
        return f"{c.op[:3]}({args[0]}, {args[1]})"
    if c.op == "where_zero":
        return args[2]  # what stands there for a zero keeps 0*inf away, and says nothing to a reader
    return f"({args[1]} if {args[0]} < 0 else {args[2]})"


def plus(x: str, y: str) -> str:
    return f"{x} - {y[1:]}" if y.startswith("-") else f"{x} + {y}"


def times(x: str, y: str) -> str:
    if x in ("1", "-1"):
        return y if x == "1" else f"-({y})" if " " in y else f"-{y}"
    return "*".join(f"({factor})" if " " in factor else factor for factor in (x, y))

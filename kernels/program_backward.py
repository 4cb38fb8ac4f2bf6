"""The backward of a program, which is a program as well: g is t0, and the program's own tensor, if any, is t1.

From the last value to the first, with g_i for the gradient of v_i, and sums where a value is read more than once:

    v_i = f(v_j)           g_j = f_backward(g_i, v_j)                 activations and bounds
    v_i = v_j + v_k        g_j = g_i             g_k = g_i
    v_i = v_j - v_k        g_j = g_i             g_k = -g_i
    v_i = v_j * v_k        g_j = g_i * v_k       g_k = g_i * v_j
    v_i = v_j / v_k        g_j = g_i / v_k       g_k = -(g_i / v_k) * v_i
    v_i = min(v_j, v_k)    g_j = minimum_backward(g_i, v_j, v_k)
    v_i = a * v_j + b      g_j = a * g_i         g_a = g_i * v_j,  g_b = g_i
    v_i = prelu(v_j, a)    g_j as above          g_a = g_i * v_j where v_j < 0
    v_i = detach(v_j)      nothing

What the result does not need is left out, so the text tells what has to be kept: where v0 is not in it, nothing. Behind
a single activation that its own result tells (see ``activations``), v0 is that result.

The gradient of a coefficient of a channel is the sum over what is here g_a or g_b. Columns of ``vectors`` keep their
names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from fusion_backend.kernels.activations import ACTIVATIONS
from fusion_backend.kernels.program import (
    BACKWARD,
    BINARY,
    BOUNDS,
    OF_RESULT,
    Instruction,
    parse,
)

GRADIENT = "t0"


@functools.cache
def of_result(text: str) -> str | None:
    """The backward at the result of the program; None where the result does not tell."""
    instructions = parse(text)
    if len(instructions) != 1 or instructions[0].name not in ACTIVATIONS:
        return None
    (only,) = instructions
    row = ACTIVATIONS[only.name]
    numbers = [p for p in only.parameters if isinstance(p, float)]
    if row.of_result is None or len(numbers) < len(only.parameters) or not row.tells(*numbers):
        return None
    return _text([Instruction(only.name + OF_RESULT, (GRADIENT, "v0"), only.parameters)])


@functools.cache
def backward_of(text: str, value: str = "v0") -> str | None:
    """The program whose result is the gradient of ``value``, "v0", "t0" or, before it is summed up, "c0", "c1", ...

    "" where that is g itself, None where it is zero. Raises ValueError where a normal form in it has bounds, and for a
    column that is a bound or a parameter of an activation other than leaky_relu.
    """
    instructions = [_renamed(each) for each in parse(text)]
    value = _renamed_value(value)
    written = list(instructions)
    gradients: dict[str, str] = {f"v{len(instructions)}": GRADIENT}

    def write(name: str, *values: str, parameters: tuple[float | str | None, ...] = ()) -> str:
        written.append(Instruction(name, values, parameters))
        return f"v{len(written)}"

    for number in range(len(instructions), 0, -1):
        each = instructions[number - 1]
        if (g := gradients.get(f"v{number}")) is None:
            continue
        if value in each.parameters and each.name not in ("affine", "leaky_relu"):
            raise ValueError(f"{value} of {each.name} has no gradient; allowed are those of affine and leaky_relu")
        for to, gradient in _through(each, g, f"v{number}", write):
            gradients[to] = write("add", gradients[to], gradient) if to in gradients else gradient
    result = gradients.get(value)
    if result is None or result == GRADIENT:
        return None if result is None else ""
    return _text(_needed(written, result))


def behind_form(text: str, scale: float | str | None, shift: float | str | None, columns: int) -> str:
    """``text`` behind "affine v0 scale shift - -", its values one number up and its columns ``columns`` further on."""

    def moved(parameter: float | str | None) -> float | str | None:
        return f"c{int(parameter[1:]) + columns}" if isinstance(parameter, str) else parameter

    def behind(value: str) -> str:
        return f"v{int(value[1:]) + 1}" if value[0] == "v" else value

    first = Instruction("affine", ("v0",), (scale, shift, None, None))
    rest = [
        Instruction(each.name, tuple(map(behind, each.values)), tuple(map(moved, each.parameters)))
        for each in parse(text)
    ]
    return _text([first, *rest])


@functools.cache
def with_columns_from_zero(text: str) -> tuple[tuple[int, ...], str]:
    """The columns of vectors that a program names, and the program with these numbered anew."""
    instructions = parse(text)
    named = {int(p[1:]) for each in instructions for p in each.parameters if isinstance(p, str)}
    columns = tuple(sorted(named))
    renamed = {f"c{old}": f"c{new}" for new, old in enumerate(columns)}

    def parameter(p: float | str | None) -> float | str | None:
        return renamed[p] if isinstance(p, str) else p

    return columns, _text([replace(each, parameters=tuple(map(parameter, each.parameters))) for each in instructions])


Write = Callable[..., str]


def _through(each: Instruction, g: str, y: str, write: Write) -> list[tuple[str, str]]:
    """(an input, its gradient) for each; g is the gradient of y, which ``each`` makes."""
    x, *others = each.values
    if each.name == "detach":
        return []
    if each.name == "affine":
        scale, shift, lo, hi = each.parameters
        if lo is not None or hi is not None:
            raise ValueError(f"a normal form with bounds in a program has no gradient; allowed are {', '.join(BOUNDS)}")
        of_x = g if scale is None else write("affine", g, parameters=(scale, None, None, None))
        of_scale = [(scale, write("mul", g, x))] if isinstance(scale, str) else []
        return [(x, of_x), *of_scale, *([(shift, g)] if isinstance(shift, str) else [])]
    if each.name not in BINARY:
        of_x = write(each.name + BACKWARD, g, x, parameters=each.parameters)
        return [(x, of_x), *(_of_slope(each.parameters[0], g, x, write) if each.name == "leaky_relu" else [])]
    (other,) = others
    if each.name == "add":
        return [(x, g), (other, g)]
    if each.name == "sub":
        return [(x, g), (other, _negative(g, write))]
    if each.name == "mul":
        return [(x, write("mul", g, other)), (other, write("mul", g, x))]
    if each.name == "div":
        of_x = write("div", g, other)
        return [(x, of_x), (other, _negative(write("mul", of_x, y), write))]
    return [(x, write(each.name + BACKWARD, g, x, other)), (other, write(each.name + BACKWARD, g, other, x))]


def _of_slope(slope: float | str | None, g: str, x: str, write: Write) -> list[tuple[str, str]]:
    if not isinstance(slope, str):
        return []
    below = write("affine", x, parameters=(None, None, None, 0.0))
    passed = write("hardtanh" + BACKWARD, g, x, parameters=(None, 0.0))
    return [(slope, write("mul", passed, below))]


def _negative(g: str, write: Write) -> str:
    return write("affine", g, parameters=(-1.0, None, None, None))


def _renamed(each: Instruction) -> Instruction:
    return replace(each, values=tuple(map(_renamed_value, each.values)))


def _renamed_value(value: str) -> str:
    """t0 makes room for the gradient."""
    return f"t{int(value[1:]) + 1}" if value[0] == "t" else value


def _needed(instructions: list[Instruction], result: str) -> list[Instruction]:
    """Those that v<i> is made of, the i-th being v<i>, numbered anew; the last one makes it."""
    needed = {result}
    for number in range(int(result[1:]), 0, -1):
        if f"v{number}" in needed:
            needed.update(instructions[number - 1].values)
    numbers = {"v0": "v0", "t0": "t0", "t1": "t1", "t2": "t2"}
    kept: list[Instruction] = []
    for number, each in enumerate(instructions[: int(result[1:])], 1):
        if f"v{number}" in needed:
            kept.append(replace(each, values=tuple(numbers[value] for value in each.values)))
            numbers[f"v{number}"] = f"v{len(kept)}"
    return kept


def _text(instructions: list[Instruction]) -> str:
    return "; ".join(
        " ".join([each.name, *each.values, *("-" if p is None else str(p) for p in each.parameters)])
        for each in instructions
    )

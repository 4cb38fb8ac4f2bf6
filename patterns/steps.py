"""What a canonical call does to the value of a site: affine and clamp steps, or in words why it is none of them.

add, sub, rsub, neg    a shift by a multiple of the operand, and a scale by a number
mul, div               a scale by the operand, or by one over it
clamp and its kin      a clamp, with the rule of its gradient on a bound
batch_norm, in eval    s = weight / sqrt(running_var + eps): a scale by s, a shift by bias - running_mean * s
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.algebra import Clamp, Scale, Shift, Step
from fusion_backend.patterns.convolution import Convolution, Input
from fusion_backend.patterns.operand import label, read_operand, read_vector
from fusion_backend.patterns.vocabulary import Call


def read_steps(call: Call, names: list[fx.Node], convolution: Convolution | Input) -> list[Step] | str:
    """The steps of ``call`` on the value that ``names`` name, or why it cannot be folded."""
    arguments = call.arguments
    if call.row.activation or call.operation in ("detach", "reshape", "clone"):
        return "not an affine or clamp operation"
    if call.operation == "batch_norm":
        return _batch_norm(arguments, names, convolution)
    places = [place for place, argument in arguments.items() if argument in names]
    if len(places) != 1:
        return "it combines the value with itself"
    if arguments.get("rounding_mode") is not None:
        return f"rounding_mode={arguments['rounding_mode']!r} is not affine"
    place = places[0]

    beside = "other" if place == "input" else "input"

    def operand(name: str, default: co.Coefficient = math.nan) -> co.Coefficient | str:
        if arguments.get(name) is None:
            return default
        return read_operand(arguments[name], convolution.value, convolution.channel_dim)

    if call.operation in ("add", "sub", "rsub"):
        return _affine(call.operation, place == "input", operand(beside), _alpha(arguments.get("alpha", 1)))
    if call.operation == "neg":
        return [Scale(-1.0)]
    if call.operation == "mul":
        factor = operand(beside)
        return factor if isinstance(factor, str) else [Scale(factor)]
    if place != "input" and call.operation not in ("minimum", "maximum"):
        return "the value is the divisor" if call.operation == "div" else "the value is a bound"
    if call.operation == "div":
        return _division(operand("other"))
    return _clamp(call, operand, beside)


def _affine(operation: str, value_first: bool, other: co.Coefficient | str, alpha: float | str) -> list[Step] | str:
    if isinstance(other, str):
        return other
    if isinstance(alpha, str):
        return alpha
    if operation == "rsub":  # rsub(input, other, alpha) = other - alpha*input
        value_first = not value_first
    sign = 1.0 if operation == "add" else -1.0
    if value_first:
        return [Shift(co.multiply(other, sign * alpha))]
    factor = sign * alpha
    return [Shift(other)] if factor == 1.0 else [Scale(factor), Shift(other)]


def _alpha(alpha: Any) -> float | str:
    if isinstance(alpha, fx.Node):
        return "alpha is not a constant number"
    return float(alpha) if isinstance(alpha, (bool, int, float)) else f"alpha={alpha!r} is not a real number"


def _division(divisor: co.Coefficient | str) -> list[Step] | str:
    if isinstance(divisor, str):
        return divisor
    if divisor == 0.0:
        return "a division by zero"
    return [Scale(co.reciprocal(divisor))]


def _clamp(call: Call, operand: Callable[..., co.Coefficient | str], beside: str) -> list[Step] | str:
    name = call.operation
    lo: co.Coefficient | str
    hi: co.Coefficient | str
    at_bound = {"minimum": "halves", "maximum": "halves", "hardtanh": "blocks"}.get(name, "passes")
    if name == "relu":
        return [Clamp(0.0, math.inf, "blocks")]
    if name == "relu6":
        return [Clamp(0.0, 6.0, "blocks")]
    if name == "minimum" or name == "maximum":
        if not isinstance(call.arguments[beside], fx.Node):
            return "a reduction, not a clamp"
        lo, hi = (-math.inf, operand(beside)) if name == "minimum" else (operand(beside), math.inf)
    elif name == "hardtanh":
        lo, hi = operand("min_val", -1.0), operand("max_val", 1.0)
    else:
        lo, hi = operand("min", -math.inf), operand("max", math.inf)
    if isinstance(lo, str):
        return lo
    if isinstance(hi, str):
        return hi
    return [Clamp(lo, hi, at_bound)]


def _batch_norm(arguments: dict[str, Any], names: list[fx.Node], convolution: Convolution | Input) -> list[Step] | str:
    mean, variance, eps = arguments["running_mean"], arguments["running_var"], arguments.get("eps", 1e-5)
    if arguments.get("training", False) is not False or mean is None or variance is None:
        return "it normalises by the statistics of the batch"
    if arguments["input"] not in names or not isinstance(eps, float):
        return "the value is not its input, or eps varies"
    if convolution.channel_dim != 1:
        return "it normalises another dimension than the channels: the convolution has no batch dimension"
    weight, bias = arguments.get("weight"), arguments.get("bias")
    norm = label(mean).removesuffix("running_mean")
    scale = co.rsqrt(co.add(read_vector(variance), eps))
    if weight is not None:
        scale = co.multiply(read_vector(weight), scale)
    scale = co.labelled(scale, f"{norm}scale[c]")
    shift = co.multiply(co.multiply(read_vector(mean), scale), -1.0)
    if bias is not None:
        shift = co.add(read_vector(bias), shift)
    return [Scale(scale), Shift(co.labelled(shift, f"{norm}shift[c]"))]

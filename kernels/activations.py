"""The activations that a program may name: one row each, and beside it the same in Triton.

    meaning      y = f(x, *parameters) in plain PyTorch: what eager computes, and the reference of the kernels
    derivative   dy/dx at x, in plain PyTorch; where f has a corner, and at NaN, what eager's backward gives
    of_result    dy/dx again, at y: where that tells it, nothing else need be kept for the backward
    ``activate``, ``differentiate`` and ``differentiate_result``
                 the same in a kernel, in fp32: one branch each, of which a kernel compiles those that it names

A parameter is a number or one value per channel. In a kernel NaN goes through and infinities give what they give in
eager. Nothing is taken from a GPU vendor's library but ``exp``, ``log``, ``erf``, ``sin`` and ``cos``, which Triton has
everywhere. Near zero, where a fast ``exp`` or ``log`` loses all digits, ``expm1`` and ``log1p`` are their series.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

Meaning = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Activation:
    """A row: y = ``meaning``(x, *parameters); ``equation`` and ``slope`` are y and dy/dx as the docs print them.

    ``tells``   for which parameters ``of_result`` holds; they are numbers then
    ``blocks``  where the derivative is zero, eager's backward gives zero whatever the gradient is, be it NaN
    """

    equation: str
    slope: str
    meaning: Meaning
    derivative: Meaning
    parameters: tuple[str, ...] = ()
    of_result: Meaning | None = None
    tells: Callable[..., bool] = lambda *parameters: True
    blocks: bool = False


# From here on softplus(x) is x, and its derivative 1, to a rounding of float32.
LINEAR = 16.0


def _gelu_derivative(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(x: torch.Tensor) -> torch.Tensor:
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)


def _mish_derivative(x: torch.Tensor) -> torch.Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


def _elu(x: torch.Tensor, alpha: float, scale: float, input_scale: float) -> torch.Tensor:
    return torch.where(x > 0, x * scale, torch.expm1(x * input_scale) * (alpha * scale))


def _elu_derivative(x: torch.Tensor, alpha: float, scale: float, input_scale: float) -> torch.Tensor:
    return torch.where(x <= 0, torch.exp(x * input_scale) * (alpha * scale * input_scale), torch.ones_like(x) * scale)


def _elu_of_result(y: torch.Tensor, alpha: float, scale: float, input_scale: float) -> torch.Tensor:
    return torch.where(y <= 0, (y + alpha * scale) * input_scale, torch.ones_like(y) * scale)


def _softplus(x: torch.Tensor, beta: float, threshold: float) -> torch.Tensor:
    return torch.where(x * beta > threshold, x, torch.log1p(torch.exp(x * beta)) / beta)


def _leaky_relu(x: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    return torch.where(x > 0, x, x * slope)


def _leaky_relu_derivative(x: torch.Tensor, slope: torch.Tensor | float) -> torch.Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.ones_like(x) * slope)


def _hardsigmoid_derivative(x: torch.Tensor) -> torch.Tensor:
    return torch.where((x > -3) & (x < 3), torch.full_like(x, 1 / 6), torch.zeros_like(x))


def _hardswish_derivative(x: torch.Tensor) -> torch.Tensor:
    between = torch.where(x < 3, x / 3 + 0.5, torch.ones_like(x))
    return torch.where(x <= -3, torch.zeros_like(x), between)


def _softplus_derivative(x: torch.Tensor, beta: float, threshold: float) -> torch.Tensor:
    return torch.where(x * beta > threshold, torch.ones_like(x), torch.sigmoid(x * beta))


ACTIVATIONS = {
    "abs": Activation("|x|", "sign(x)", torch.abs, torch.sign),
    "elu": Activation(
        "x*scale where x > 0, else expm1(x*input_scale)*alpha*scale",
        "scale where x > 0, else (y + alpha*scale)*input_scale",
        _elu, _elu_derivative, ("alpha", "scale", "input_scale"),
        _elu_of_result, lambda *parameters: min(parameters) > 0,
    ),
    "erf": Activation(
        "erf(x)", "2/sqrt(pi)*exp(-x^2)", torch.erf, lambda x: torch.exp(-x * x) * (2 / math.sqrt(math.pi))
    ),
    "exp": Activation("exp(x)", "y", torch.exp, torch.exp, of_result=lambda y: y),
    "gelu": Activation(
        "x/2*(1 + erf(x/sqrt(2)))", "(1 + erf(x/sqrt(2)))/2 + x*exp(-x^2/2)/sqrt(2*pi)", F.gelu, _gelu_derivative
    ),
    "gelu_tanh": Activation(
        "x/2*(1 + tanh(sqrt(2/pi)*(x + 0.044715*x^3)))",
        "(1 + t)/2 + x/2*(1 - t^2)*sqrt(2/pi)*(1 + 0.134145*x^2), t being that tanh",
        lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_derivative,
    ),
    "hardsigmoid": Activation(
        "min(max(x + 3, 0), 6)/6", "1/6 where -3 < x < 3, else 0",
        F.hardsigmoid, _hardsigmoid_derivative, blocks=True,
    ),
    "hardswish": Activation(
        "x*min(max(x + 3, 0), 6)/6", "0 where x <= -3, x/3 + 1/2 where x < 3, else 1",
        F.hardswish, _hardswish_derivative, blocks=True,
    ),
    "leaky_relu": Activation(
        "x where x > 0, else x*negative_slope", "1 where x > 0, else negative_slope",
        _leaky_relu, _leaky_relu_derivative, ("negative_slope",),
        _leaky_relu_derivative, lambda slope: slope > 0,
    ),
    "log1p": Activation("log(1 + x)", "1/(1 + x)", torch.log1p, lambda x: 1 / (1 + x)),
    "mish": Activation(
        "x*tanh(log(1 + exp(x)))", "t + x*(1 - t^2)/(1 + exp(-x)), t being that tanh", F.mish, _mish_derivative
    ),
    "sigmoid": Activation(
        "1/(1 + exp(-x))", "y*(1 - y)",
        torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x), of_result=lambda y: y * (1 - y),
    ),
    "silu": Activation(
        "x/(1 + exp(-x))", "s*(1 + x*(1 - s)) with s = 1/(1 + exp(-x))",
        F.silu, lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
    ),
    "sin": Activation("sin(x)", "cos(x)", torch.sin, torch.cos),
    "softplus": Activation(
        "x where x*beta > threshold, else log(1 + exp(x*beta))/beta",
        "1 where x*beta > threshold, else 1 - exp(-y*beta)",
        _softplus, _softplus_derivative, ("beta", "threshold"),
        lambda y, beta, threshold: -torch.expm1(-y * beta), lambda beta, threshold: threshold >= LINEAR,
    ),
    "softsign": Activation(
        "x/(1 + |x|)", "1/(1 + |x|)^2", lambda x: x / (1 + x.abs()), lambda x: (1 + x.abs()) ** -2
    ),
    "sqrt": Activation(
        "sqrt(x)", "1/(2*y)", torch.sqrt, lambda x: 0.5 / torch.sqrt(x), of_result=lambda y: 0.5 / y
    ),
    "square": Activation("x^2", "2*x", torch.square, lambda x: 2 * x),
    "tanh": Activation(
        "tanh(x)", "1 - y^2", torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, of_result=lambda y: 1 - y * y
    ),
}  # fmt: skip


@triton.jit
def _exp(x):
    """2^n * exp(r), with Cephes' polynomial for exp(r): the fast exp is off by |x| times a rounding."""
    n = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -252.0), 252.0)
    r = x - n * 0.693359375 + n * 2.12194440e-4
    p = 8.3334519073e-3 + r * (1.3981999507e-3 + r * 1.9875691500e-4)
    p = 0.50000001201 + r * (1.6666665459e-1 + r * (4.1665795894e-2 + r * p))
    # Two powers, since 2^n itself may be no float.
    half = tl.floor(n * 0.5)
    low = ((half.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    high = (((n - half).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    y = (1 + r * (1 + r * p)) * low * high
    return tl.where(x > 88.73, float("inf"), tl.where(x < -104.0, 0.0, y))


@triton.jit
def _expm1(x):
    series = 1 + x * (
        1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))))
    )
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """Near zero by log((1 + s) / (1 - s)) = 2 * (s + s^3/3 + ...) with s = x / (2 + x)."""
    s = x / (2 + x)
    q = s * s
    series = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.log(1 + x))


@triton.jit
def _tanh(x):
    """Near zero the polynomial of Cephes' tanhf: 1 - 2 / (1 + exp(2|x|)) loses digits there."""
    q = x * x
    p = -5.37397155531e-2 + q * (2.06390887954e-2 - q * 5.70498872745e-3)
    p = -3.33332819422e-1 + q * (1.33314422036e-1 + q * p)
    y = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.625, x + x * q * p, tl.where(x < 0, -y, y))


@triton.jit
def _relu6(x):
    return tl.minimum(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, p, q, r, NAME: tl.constexpr):
    """The activation of that name; p, q and r are its parameters, as many as it has. x is float32."""
    if NAME == "abs":
        y = tl.abs(x)
    elif NAME == "elu":
        y = tl.where(x > 0, x * q, _expm1(x * r) * (p * q))
    elif NAME == "erf":
        y = tl.erf(x)
    elif NAME == "exp":
        y = _exp(x)
    elif NAME == "gelu":
        y = x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z))
    elif NAME == "hardsigmoid":
        y = _relu6(x + 3) * (1 / 6)
    elif NAME == "hardswish":
        y = x * _relu6(x + 3) * (1 / 6)
    elif NAME == "leaky_relu":
        y = tl.where(x > 0, x, x * p)
    elif NAME == "log1p":
        y = _log1p(x)
    elif NAME == "mish":
        e = tl.exp(x)
        n = e * (e + 2)  # tanh(log(1 + e)) = n / (n + 2)
        y = tl.where(x > 20, x, x * (n / (n + 2)))
    elif NAME == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
    elif NAME == "silu":
        y = x / (1 + tl.exp(-x))
    elif NAME == "sin":
        y = tl.sin(x)
    elif NAME == "softplus":
        y = tl.where(x * p > q, x, _log1p(tl.exp(x * p)) / p)
    elif NAME == "softsign":
        y = x / (1 + tl.abs(x))
    elif NAME == "sqrt":
        y = tl.sqrt_rn(x)
    elif NAME == "square":
        y = x * x
    elif NAME == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(False, "an activation without a branch")
    return y


@triton.jit
def differentiate(x, p, q, r, NAME: tl.constexpr):
    """The derivative of the activation of that name at x; as in ``activate``."""
    if NAME == "abs":
        d = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    elif NAME == "elu":
        d = tl.where(x <= 0, tl.exp(x * r) * (p * q * r), q)
    elif NAME == "erf":
        d = tl.exp(-x * x) * 1.1283791670955126
    elif NAME == "exp":
        d = _exp(x)
    elif NAME == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        s = 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))  # (1 + t) / 2
        d = s + x * (s * (1 - s)) * (1.5957691216057308 * (1 + 0.134145 * x * x))
    elif NAME == "hardsigmoid":
        d = tl.where((x > -3) & (x < 3), 1 / 6, 0.0)
    elif NAME == "hardswish":
        d = tl.where(x <= -3, 0.0, tl.where(x < 3, x * (1 / 3) + 0.5, 1.0))
    elif NAME == "leaky_relu":
        d = tl.where(x > 0, 1.0, p)
    elif NAME == "log1p":
        d = 1 / (1 + x)
    elif NAME == "mish":
        e = tl.exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
        n = e * (e + 2)  # tanh(log(1 + e)) = n / (n + 2), and 1 less its square is 4 * (n + 1) / (n + 2)^2
        d = n / (n + 2) + x * (e / (1 + e)) * (4 * (n + 1) / ((n + 2) * (n + 2)))
        d = tl.where(x > 20, 1.0, d)
    elif NAME == "sigmoid":
        e = tl.exp(-tl.abs(x))
        d = e / ((1 + e) * (1 + e))
    elif NAME == "silu":
        s = 1 / (1 + tl.exp(-x))
        d = s * (1 + x * (1 - s))
    elif NAME == "sin":
        d = tl.cos(x)
    elif NAME == "softplus":
        d = tl.where(x * p > q, 1.0, 1 / (1 + tl.exp(-x * p)))
    elif NAME == "softsign":
        d = 1 / ((1 + tl.abs(x)) * (1 + tl.abs(x)))
    elif NAME == "sqrt":
        d = 0.5 / tl.sqrt_rn(x)
    elif NAME == "square":
        d = 2 * x
    elif NAME == "tanh":
        y = _tanh(x)
        d = 1 - y * y
    else:
        tl.static_assert(False, "an activation without a branch")
    return d


@triton.jit
def differentiate_result(y, p, q, r, NAME: tl.constexpr):
    """The same at y, the activation's value, for those that have an ``of_result``."""
    if NAME == "elu":
        d = tl.where(y <= 0, (y + p * q) * r, q)
    elif NAME == "exp":
        d = y
    elif NAME == "leaky_relu":
        d = tl.where(y > 0, 1.0, p)
    elif NAME == "sigmoid":
        d = y * (1 - y)
    elif NAME == "softplus":
        d = -_expm1(-y * p)
    elif NAME == "sqrt":
        d = 0.5 / y
    elif NAME == "tanh":
        d = 1 - y * y
    else:
        tl.static_assert(False, "an activation without a branch")
    return d

"""The activations that a tail may go on through: one row each, a part of the vocabulary.

``kernels/activations.py`` says what each means and computes it, under the names that the rows here end in; a test holds
the two together. Adding one is a row on either side.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch.nn.functional as F
from torch import nn

from fusion_backend.patterns.operation import Operation

SELU = (1.6732632423543772, 1.0507009873554805, 1.0)


def _gelu(approximate: str = "none") -> tuple[str]:
    return ("gelu",) if approximate == "none" else ("gelu_tanh",)


def _pow(exponent: Any) -> tuple[str] | str:
    return ("square",) if exponent == 2 else f"of all powers the square alone is a step, not {exponent!r}"


def _plain(name: str) -> Any:
    return lambda: (name,)


X, INPLACE = ("input",), ("input", "inplace")

ACTIVATIONS = (
    Operation("abs", X, ("abs", "absolute"), 1, (operator.abs, builtins.abs), activation=_plain("abs")),
    Operation("celu", ("input", "alpha", "inplace"), ("celu",), 3, (F.celu,), module=nn.CELU,
              activation=lambda alpha=1.0: ("elu", alpha, 1.0, 1 / alpha)),
    Operation("elu", ("input", "alpha", "inplace"), (), 3, (F.elu,), module=nn.ELU,
              activation=lambda alpha=1.0: ("elu", alpha, 1.0, 1.0)),
    Operation("elu_", ("input", "alpha", "scale", "input_scale"), ("elu",), 4, (), (F.elu_,),
              activation=lambda alpha=1.0, scale=1.0, input_scale=1.0: ("elu", alpha, scale, input_scale)),
    Operation("erf", X, ("erf",), 1, activation=_plain("erf")),
    Operation("exp", X, ("exp",), 1, activation=_plain("exp")),
    Operation("gelu", ("input", "approximate"), ("gelu",), 1, (F.gelu,), module=nn.GELU, activation=_gelu),
    Operation("hardsigmoid", INPLACE, ("hardsigmoid",), 2, (F.hardsigmoid,), module=nn.Hardsigmoid,
              activation=_plain("hardsigmoid")),
    Operation("hardswish", INPLACE, ("hardswish",), 2, (F.hardswish,), module=nn.Hardswish,
              activation=_plain("hardswish")),
    Operation("leaky_relu", ("input", "negative_slope", "inplace"), ("leaky_relu",), 3,
              (F.leaky_relu,), (F.leaky_relu_,), module=nn.LeakyReLU,
              activation=lambda negative_slope=0.01: ("leaky_relu", negative_slope)),
    Operation("log1p", X, ("log1p",), 1, activation=_plain("log1p")),
    Operation("mish", INPLACE, ("mish",), 2, (F.mish,), module=nn.Mish, activation=_plain("mish")),
    Operation("pow", ("input", "exponent"), ("pow",), 2, (operator.pow,), (operator.ipow,), activation=_pow),
    Operation("prelu", ("input", "weight"), ("prelu", "_prelu_kernel"), 2, (F.prelu,),
              activation=lambda weight: ("leaky_relu", weight)),
    Operation("selu", INPLACE, ("selu",), 2, (F.selu,), module=nn.SELU, activation=lambda: ("elu", *SELU)),
    Operation("sigmoid", X, ("sigmoid",), 1, (F.sigmoid,), module=nn.Sigmoid, activation=_plain("sigmoid")),
    Operation("silu", INPLACE, ("silu",), 2, (F.silu,), module=nn.SiLU, activation=_plain("silu")),
    Operation("sin", X, ("sin",), 1, activation=_plain("sin")),
    Operation("softplus", ("input", "beta", "threshold"), ("softplus",), 3, (F.softplus,), module=nn.Softplus,
              activation=lambda beta=1.0, threshold=20.0: ("softplus", beta, threshold)),
    Operation("softsign", X, (), 1, (F.softsign,), module=nn.Softsign, activation=_plain("softsign")),
    Operation("sqrt", X, ("sqrt",), 1, activation=_plain("sqrt")),
    Operation("square", X, ("square",), 1, activation=_plain("square")),
    Operation("tanh", X, ("tanh",), 1, (F.tanh,), module=nn.Tanh, activation=_plain("tanh")),
)  # fmt: skip

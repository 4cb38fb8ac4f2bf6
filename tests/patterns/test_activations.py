"""Every spelling of every activation, in every dialect, is read as one step; and the table is the kernels' table."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS
from torch import Tensor, nn

pytest.importorskip("triton")

from fusion_backend.kernels.activations import ACTIVATIONS as KERNELS
from fusion_backend.patterns.activations import ACTIVATIONS
from fusion_backend.patterns.site import Site, find_convolutions, match

C = 6
MODULES = {
    "nn.CELU": nn.CELU(2.0), "nn.ELU": nn.ELU(0.5), "nn.GELU": nn.GELU(), "nn.GELU, tanh": nn.GELU("tanh"),
    "nn.Hardsigmoid": nn.Hardsigmoid(), "nn.Hardswish": nn.Hardswish(), "nn.LeakyReLU": nn.LeakyReLU(0.2),
    "nn.LeakyReLU, inplace": nn.LeakyReLU(0.2, inplace=True), "nn.Mish": nn.Mish(), "nn.SELU": nn.SELU(),
    "nn.Sigmoid": nn.Sigmoid(), "nn.SiLU": nn.SiLU(), "nn.SiLU, inplace": nn.SiLU(inplace=True),
    "nn.Softplus": nn.Softplus(2, 10), "nn.Softsign": nn.Softsign(), "nn.Tanh": nn.Tanh(),
}  # fmt: skip


class Model(nn.Module):
    def __init__(self, tail: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, C, 3, stride=2, padding=1, output_padding=1)
        self.acts = nn.ModuleDict({name.replace(".", "_"): module for name, module in MODULES.items()})
        self.weight, self.one = nn.Parameter(torch.rand(C)), nn.Parameter(torch.tensor([0.3]))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.conv(x))


@dataclass(frozen=True)
class Row:
    name: str
    tail: Callable[[Any, Tensor], Tensor]
    step: str


def called(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, y: m.acts[name.replace(".", "_")](y)


def statement(method: str) -> Callable[[Any, Tensor], Tensor]:
    def tail(m: Any, y: Tensor) -> Tensor:
        getattr(y, method)()
        return y

    return tail


MODULE_STEPS = {
    "nn.CELU": "elu(y, 2, 1, 0.5)", "nn.ELU": "elu(y, 0.5, 1, 1)", "nn.GELU": "gelu(y)",
    "nn.GELU, tanh": "gelu_tanh(y)", "nn.Hardsigmoid": "hardsigmoid(y)", "nn.Hardswish": "hardswish(y)",
    "nn.LeakyReLU": "leaky_relu(y, 0.2)", "nn.LeakyReLU, inplace": "leaky_relu(y, 0.2)", "nn.Mish": "mish(y)",
    "nn.SELU": "elu(y, 1.67326, 1.0507, 1)", "nn.Sigmoid": "sigmoid(y)", "nn.SiLU": "silu(y)",
    "nn.SiLU, inplace": "silu(y)", "nn.Softplus": "softplus(y, 2, 10)", "nn.Softsign": "softsign(y)",
    "nn.Tanh": "tanh(y)",
}  # fmt: skip

ROWS = [
    *(Row(name, called(name), step) for name, step in MODULE_STEPS.items()),
    *(
        Row(f"torch.{name}", lambda m, y, name=name: getattr(torch, name)(y), f"{step}(y)")
        for name, step in {
            "abs": "abs", "absolute": "abs", "erf": "erf", "exp": "exp", "log1p": "log1p", "sigmoid": "sigmoid",
            "sigmoid_": "sigmoid", "sin": "sin", "sin_": "sin", "sqrt": "sqrt", "square": "square", "tanh": "tanh",
            "tanh_": "tanh", "exp_": "exp",
        }.items()
    ),
    *(
        Row(f"method {name}", lambda m, y, name=name: getattr(y, name)(), f"{step}(y)")
        for name, step in {
            "abs": "abs", "abs_": "abs", "erf": "erf", "exp": "exp", "log1p": "log1p", "sigmoid": "sigmoid",
            "sigmoid_": "sigmoid", "sin": "sin", "sqrt": "sqrt", "sqrt_": "sqrt", "square": "square",
            "square_": "square", "tanh": "tanh", "tanh_": "tanh",
        }.items()
    ),
    Row("statement tanh_", statement("tanh_"), "tanh(y)"),
    Row("builtin abs", lambda m, y: abs(y), "abs(y)"),
    Row("F.celu", lambda m, y: F.celu(y, alpha=0.5), "elu(y, 0.5, 1, 2)"),
    Row("torch.celu", lambda m, y: torch.celu(y), "elu(y, 1, 1, 1)"),
    Row("F.elu", lambda m, y: F.elu(y), "elu(y, 1, 1, 1)"),
    Row("F.elu, inplace", lambda m, y: F.elu(y, 2.0, True), "elu(y, 2, 1, 1)"),
    Row("F.elu_", lambda m, y: F.elu_(y, 0.5), "elu(y, 0.5, 1, 1)"),
    Row("F.gelu", lambda m, y: F.gelu(y), "gelu(y)"),
    Row("F.gelu, tanh", lambda m, y: F.gelu(y, approximate="tanh"), "gelu_tanh(y)"),
    Row("F.hardsigmoid", lambda m, y: F.hardsigmoid(y), "hardsigmoid(y)"),
    Row("F.hardswish", lambda m, y: F.hardswish(y), "hardswish(y)"),
    Row("F.hardswish, inplace", lambda m, y: F.hardswish(y, inplace=True), "hardswish(y)"),
    Row("F.leaky_relu", lambda m, y: F.leaky_relu(y), "leaky_relu(y, 0.01)"),
    Row("F.leaky_relu, slope", lambda m, y: F.leaky_relu(y, negative_slope=0.2), "leaky_relu(y, 0.2)"),
    Row("F.leaky_relu_", lambda m, y: F.leaky_relu_(y, 0.1), "leaky_relu(y, 0.1)"),
    Row("F.mish", lambda m, y: F.mish(y), "mish(y)"),
    Row("operator pow", lambda m, y: y**2, "square(y)"),
    Row("torch.pow", lambda m, y: torch.pow(y, 2), "square(y)"),
    Row("method pow", lambda m, y: y.pow(2.0), "square(y)"),
    Row("method pow_", lambda m, y: y.pow_(2), "square(y)"),
    Row("F.prelu", lambda m, y: F.prelu(y, m.weight), "leaky_relu(y, W)"),
    Row("torch.prelu, one element", lambda m, y: torch.prelu(y, m.one), "leaky_relu(y, W)"),
    Row("F.selu", lambda m, y: F.selu(y), "elu(y, 1.67326, 1.0507, 1)"),
    Row("torch.selu_", lambda m, y: torch.selu_(y), "elu(y, 1.67326, 1.0507, 1)"),
    Row("F.sigmoid", lambda m, y: F.sigmoid(y), "sigmoid(y)"),
    Row("F.silu", lambda m, y: F.silu(y), "silu(y)"),
    Row("F.silu, inplace", lambda m, y: F.silu(y, inplace=True), "silu(y)"),
    Row("F.softplus", lambda m, y: F.softplus(y), "softplus(y, 1, 20)"),
    Row("F.softplus, parameters", lambda m, y: F.softplus(y, 2.0, threshold=5.0), "softplus(y, 2, 5)"),
    Row("F.softsign", lambda m, y: F.softsign(y), "softsign(y)"),
    Row("F.tanh", lambda m, y: F.tanh(y), "tanh(y)"),
]  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_spelling_is_read(row: Row, dialect: str) -> None:
    model = Model(row.tail).eval()
    with torch.no_grad():
        gm = DIALECTS[dialect](model, torch.randn(1, 4, 3, 2))
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site) and site.program is not None, getattr(site, "reason", site)
    assert site.program.end.why == "the value leaves the graph"
    steps = str(site.program)
    if "softsign" in row.step and dialect in ("make_fx", "export"):  # composite in ATen
        assert steps == "v1 = abs(y); v2 = v1 + 1; v3 = y/v2"
        return
    if "W" in row.step:
        (slope,) = site.program.instructions[0].parameters
        assert slope.per_channel == ("one" not in row.name)
        return
    assert steps == f"v1 = {row.step}"


def test_every_row_ends_in_a_row_of_the_kernels_and_the_reverse() -> None:
    steps: dict[str, int] = {}
    for row in ACTIVATIONS:
        parameters = inspect.signature(row.activation).parameters
        missing = {name: 2.0 for name, each in parameters.items() if each.default is each.empty}
        name, *given = row.activation(**missing)
        assert set(parameters) <= set(row.parameters), row.name
        steps[name] = len(given)
    steps["gelu_tanh"] = len(next(row for row in ACTIVATIONS if row.name == "gelu").activation("tanh")) - 1
    assert steps == {name: len(row.parameters) for name, row in KERNELS.items()}


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (lambda m, y: y**3, "of all powers the square alone is a step, not 3"),
        (lambda m, y: y**y, "the value is not its input"),
        (lambda m, y: 2**y, "no step|not its input"),
        (lambda m, y: torch.cos(y), "no step of a tail"),
        (lambda m, y: F.rrelu(y), "no step of a tail"),
        (lambda m, y: F.leaky_relu(y, math.inf), "a parameter of inf is not finite in float32"),
        (lambda m, y: F.softmax(y, 1), "no step of a tail"),
        (lambda m, y: F.glu(y, 1), "no step of a tail"),
    ],
)
def test_what_is_no_step(tail: Any, reason: str) -> None:
    from fusion_backend.patterns.program import Walk

    with torch.no_grad():
        gm = DIALECTS["dynamo"](Model(tail).eval(), torch.randn(1, 4, 3, 2))
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site) and site.program is None
    end = Walk(site.convolution, list(site.aliases), site.last).down()
    assert any(part in end.why for part in reason.split("|")), end.why

"""Every spelling of every operation, in every dialect, is folded to one normal form and gives eager's numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS, call
from torch import Tensor, nn

from fusion_backend import rewrite
from fusion_backend.patterns.site import Site, find_sites

C = 6


class Model(nn.Module):
    """A transposed convolution, the spelled tail behind it, and everything that a tail may name."""

    def __init__(self, tail: Callable[[Any, Tensor], Tensor], convolution: nn.Module | None = None):
        super().__init__()
        self.conv = convolution or nn.ConvTranspose2d(4, C, 3, stride=2, padding=1, output_padding=1)
        self.tail = tail
        self.bias = nn.Parameter(torch.randn(C, 1, 1))
        self.full_rank = nn.Parameter(torch.randn(1, C, 1, 1))
        self.register_buffer("scale", 0.5 + torch.rand(C, 1, 1))
        self.register_buffer("scalar", torch.tensor(0.75))
        self.register_buffer("one_element", torch.tensor([[[0.25]]]))
        self.register_buffer("low", -torch.rand(C, 1, 1))
        self.parameter = nn.Parameter(torch.tensor(1.5))
        self.relu, self.relu_in_place, self.relu6 = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()
        self.hardtanh, self.hardtanh_wide = nn.Hardtanh(), nn.Hardtanh(-0.5, 2.0, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.conv(x))


@dataclass(frozen=True)
class Row:
    name: str
    tail: Callable[[Any, Tensor], Tensor]
    form: str


def statement(method: str, *arguments: Any) -> Callable[[Any, Tensor], Tensor]:
    """``y.method_(...)`` as a statement: what follows goes on with the old name."""

    def tail(m: Any, y: Tensor) -> Tensor:
        getattr(y, method)(*arguments)
        return y * 2

    return tail


def augmented(operator: str) -> Callable[[Any, Tensor], Tensor]:
    def tail(m: Any, y: Tensor) -> Tensor:
        if operator == "+":
            y += m.bias
        elif operator == "-":
            y -= m.bias
        elif operator == "*":
            y *= 3
        else:
            y /= 4
        return y

    return tail


ROWS = [
    Row("operator add", lambda m, y: y + m.bias, "x + B"),
    Row("operator add, reversed", lambda m, y: m.bias + y, "x + B"),
    Row("operator add, number", lambda m, y: y + 2, "x + 2"),
    Row("operator add, number first", lambda m, y: 2.5 + y, "x + 2.5"),
    Row("torch.add", lambda m, y: torch.add(y, m.bias), "x + B"),
    Row("torch.add, alpha", lambda m, y: torch.add(y, m.bias, alpha=2), "x + 2*B"),
    Row("torch.add, alpha on the value", lambda m, y: torch.add(m.bias, y, alpha=-2), "-2*x + B"),
    Row("torch.add, keywords", lambda m, y: torch.add(input=y, other=m.bias, alpha=3), "x + 3*B"),
    Row("method add", lambda m, y: y.add(m.bias), "x + B"),
    Row("method add, alpha", lambda m, y: y.add(m.bias, alpha=0.5), "x + 0.5*B"),
    Row("method add_", lambda m, y: y.add_(m.bias), "x + B"),
    Row("statement add_", statement("add_", 1.0), "2*x + 2"),
    Row("augmented +=", augmented("+"), "x + B"),
    Row("operator sub", lambda m, y: y - m.bias, "x - B"),
    Row("operator sub, number first", lambda m, y: 3 - y, "-x + 3"),
    Row("operator sub, tensor first", lambda m, y: m.bias - y, "-x + B"),
    Row("torch.sub, alpha", lambda m, y: torch.sub(y, m.bias, alpha=2), "x - 2*B"),
    Row("torch.subtract", lambda m, y: torch.subtract(y, 2), "x - 2"),
    Row("method sub_", lambda m, y: y.sub_(m.bias), "x - B"),
    Row("augmented -=", augmented("-"), "x - B"),
    Row("torch.rsub", lambda m, y: torch.rsub(y, 3), "-x + 3"),
    Row("torch.rsub, tensor", lambda m, y: torch.rsub(y, m.bias), "-x + B"),
    Row("operator neg", lambda m, y: -y, "-x"),
    Row("torch.neg", lambda m, y: torch.neg(y), "-x"),
    Row("torch.negative", lambda m, y: torch.negative(y), "-x"),
    Row("method neg_", lambda m, y: y.neg_(), "-x"),
    Row("operator mul", lambda m, y: y * 2.0, "2*x"),
    Row("operator mul, number first", lambda m, y: 2.0 * y, "2*x"),
    Row("operator mul, per channel", lambda m, y: y * m.scale, "S*x"),
    Row("torch.mul", lambda m, y: torch.mul(m.scale, y), "S*x"),
    Row("torch.multiply", lambda m, y: torch.multiply(y, other=-3), "-3*x"),
    Row("method mul_", lambda m, y: y.mul_(0.5), "0.5*x"),
    Row("statement mul_", statement("mul_", 4.0), "8*x"),
    Row("augmented *=", augmented("*"), "3*x"),
    Row("operator div", lambda m, y: y / 4, "0.25*x"),
    Row("operator div, per channel", lambda m, y: y / m.scale, "1/S*x"),
    Row("torch.div", lambda m, y: torch.div(y, 2), "0.5*x"),
    Row("torch.div, keyword", lambda m, y: torch.div(input=y, other=-2), "-0.5*x"),
    Row("torch.divide", lambda m, y: torch.divide(y, 2), "0.5*x"),
    Row("torch.true_divide", lambda m, y: torch.true_divide(y, 2), "0.5*x"),
    Row("method div_", lambda m, y: y.div_(2), "0.5*x"),
    Row("method true_divide", lambda m, y: y.true_divide(2), "0.5*x"),
    Row("augmented /=", augmented("/"), "0.25*x"),
    Row("torch.clamp", lambda m, y: torch.clamp(y, 0, 1), "min(max(x, 0), 1)"),
    Row("torch.clamp, keywords", lambda m, y: torch.clamp(y, min=-1.0, max=1.0), "min(max(x, -1), 1)"),
    Row("torch.clamp, min only", lambda m, y: torch.clamp(y, min=0.5), "max(x, 0.5)"),
    Row("torch.clamp, max only", lambda m, y: torch.clamp(y, max=0.5), "min(x, 0.5)"),
    Row("torch.clamp, tensor bounds", lambda m, y: torch.clamp(y, m.low, m.scale), "min(max(x, min(L, S)), S)"),
    Row("torch.clamp, lo above hi", lambda m, y: torch.clamp(y, 2.0, -1.0), "min(max(x, -1), -1)"),
    Row("method clamp", lambda m, y: y.clamp(0, 6), "min(max(x, 0), 6)"),
    Row("method clamp_", lambda m, y: y.clamp_(0, 6), "min(max(x, 0), 6)"),
    Row("statement clamp_", statement("clamp_", 0.0, 1.0), "min(max(2*x, 0), 2)"),
    Row("torch.clip", lambda m, y: torch.clip(y, 0, 1), "min(max(x, 0), 1)"),
    Row("method clip", lambda m, y: y.clip(max=1), "min(x, 1)"),
    Row("method clip_", lambda m, y: y.clip_(-1, 1), "min(max(x, -1), 1)"),
    Row("torch.clamp_min", lambda m, y: torch.clamp_min(y, 0.25), "max(x, 0.25)"),
    Row("torch.clamp_max", lambda m, y: torch.clamp_max(y, 0.25), "min(x, 0.25)"),
    Row("method clamp_min", lambda m, y: y.clamp_min(-1), "max(x, -1)"),
    Row("method clamp_min, tensor", lambda m, y: y.clamp_min(m.low), "max(x, L)"),
    Row("method clamp_max_", lambda m, y: y.clamp_max_(1), "min(x, 1)"),
    Row("torch.relu", lambda m, y: torch.relu(y), "max(x, 0)"),
    Row("torch.relu_", lambda m, y: torch.relu_(y), "max(x, 0)"),
    Row("method relu", lambda m, y: y.relu(), "max(x, 0)"),
    Row("method relu_", lambda m, y: y.relu_(), "max(x, 0)"),
    Row("F.relu", lambda m, y: F.relu(y), "max(x, 0)"),
    Row("F.relu, inplace", lambda m, y: F.relu(y, inplace=True), "max(x, 0)"),
    Row("nn.ReLU", lambda m, y: m.relu(y), "max(x, 0)"),
    Row("nn.ReLU, inplace", lambda m, y: m.relu_in_place(y), "max(x, 0)"),
    Row("F.relu6", lambda m, y: F.relu6(y), "min(max(x, 0), 6)"),
    Row("nn.ReLU6", lambda m, y: m.relu6(y), "min(max(x, 0), 6)"),
    Row("F.hardtanh", lambda m, y: F.hardtanh(y), "min(max(x, -1), 1)"),
    Row("F.hardtanh, bounds", lambda m, y: F.hardtanh(y, -2, 0.5), "min(max(x, -2), 0.5)"),
    Row("F.hardtanh, keywords", lambda m, y: F.hardtanh(y, min_val=0.0, max_val=0.5), "min(max(x, 0), 0.5)"),
    Row("F.hardtanh_", lambda m, y: F.hardtanh_(y, 0.0, 1.0), "min(max(x, 0), 1)"),
    Row("nn.Hardtanh", lambda m, y: m.hardtanh(y), "min(max(x, -1), 1)"),
    Row("nn.Hardtanh, inplace", lambda m, y: m.hardtanh_wide(y), "min(max(x, -0.5), 2)"),
    Row("torch.minimum", lambda m, y: torch.minimum(y, m.scalar), "min(x, s)"),
    Row("torch.minimum, reversed", lambda m, y: torch.minimum(m.scalar, y), "min(x, s)"),
    Row("torch.maximum", lambda m, y: torch.maximum(y, m.low), "max(x, L)"),
    Row("torch.min", lambda m, y: torch.min(y, m.scalar), "min(x, s)"),
    Row("torch.max", lambda m, y: torch.max(y, other=m.scalar), "max(x, s)"),
    Row("method minimum", lambda m, y: y.minimum(m.parameter), "min(x, p)"),
    Row("method max", lambda m, y: y.max(m.parameter), "max(x, p)"),
    Row("0-dim buffer", lambda m, y: y * m.scalar, "s*x"),
    Row("0-dim parameter", lambda m, y: y + m.parameter, "x + p"),
    Row("one-element tensor", lambda m, y: y + m.one_element, "x + o"),
    Row("full-rank tensor", lambda m, y: y + m.full_rank, "x + F"),
    Row("a computed operand", lambda m, y: y * (m.scale * 2).exp(), "E*x"),
    Row(
        "the seed",
        lambda m, y: torch.clamp(torch.clamp(y + m.bias, min=0.0, max=1.0) * 2.0, min=0.0, max=1.0) / 2.0,
        "min(max(x + B, 0), 0.5)",
    ),
    Row("clamp, then negative scale", lambda m, y: y.clamp(-1, 2) * -3, "min(max(-3*x, -6), 3)"),
    Row(
        "clamp, then a scale of unknown sign",
        lambda m, y: y.clamp(-1, 2) * m.parameter,
        "min(max(p*x, min(-p, 2*p)), max(-p, 2*p))",
    ),
]

NAMES = {"B": "bias", "F": "full_rank", "S": "scale", "L": "low", "s": "scalar", "p": "parameter", "o": "one_element"}


def normalised(text: str) -> str:
    """The equation with each operand's name of the model replaced by its letter; dialects prefix or number them."""
    for letter, name in sorted(NAMES.items(), key=lambda item: -len(item[1])):
        text = re.sub(rf"(?<![A-Za-z])(?:[a-z]_)?(?:self_)?{name}(?:_\d+)?\b(?:\[c\])?", letter, text)
    return text


def test_the_table_is_as_long_as_promised() -> None:
    assert len(ROWS) >= 60


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_spelling_is_folded(row: Row, dialect: str) -> None:
    torch.manual_seed(0)
    model = Model(row.tail).eval()
    x = torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        expected = model(x.clone())
        gm = DIALECTS[dialect](model, x.clone())
        (site,) = find_sites(gm)
        assert isinstance(site, Site), site.reason
        assert site.end.why == "the value leaves the graph"
        if dialect in ("dynamo", "export", "symbolic_trace") and "E" not in row.form:
            assert normalised(str(site.form)) == f"y = {row.form}"
        if rewrite.fold(site):
            gm.graph.lint()
            gm.recompile()
        torch.testing.assert_close(call(gm, x.clone()), expected)

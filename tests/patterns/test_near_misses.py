"""What looks like a site and is none: the reason says why, and the graph stays as it is, to the letter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import aten, dynamo, symbolic
from torch import Tensor, fx, nn

from fusion_backend.backend import fuse
from fusion_backend.options import Options
from fusion_backend.patterns.site import Site, find_sites, match
from fusion_backend.patterns.source import Miss

C, H, W = 6, 10, 14


class Model(nn.Module):
    def __init__(self, tail: Callable[[Any, Tensor], Any], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, C, 3, stride=2, padding=1, output_padding=1, bias=False, dtype=dtype)
        self.tail = tail
        self.register_buffer("along_w", torch.randn(W))
        self.register_buffer("along_h", torch.randn(H, 1))
        self.register_buffer("per_image", torch.randn(2, 1, 1, 1))
        self.register_buffer("full", torch.randn(2, C, H, W))
        self.register_buffer("channel", torch.randn(C, 1, 1))
        self.register_buffer("channel64", torch.randn(C, 1, 1, dtype=torch.float64))
        self.register_buffer("channel_complex", torch.randn(C, 1, 1, dtype=torch.complex64))
        self.register_buffer("five_dims", torch.randn(1, 1, C, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.conv(x))


@dataclass(frozen=True)
class Row:
    name: str
    tail: Callable[[Any, Tensor], Any]
    reason: str
    dtype: torch.dtype = torch.float32


def write_between(m: Any, y: Tensor) -> Tensor:
    m.channel.add_(1)
    return y + m.channel


def gradient_mode_between(m: Any, y: Tensor) -> Tensor:
    with torch.enable_grad():
        return y + 1


def set_item_between(m: Any, y: Tensor) -> Tensor:
    b = m.channel + 1
    b[0] = 7.0
    return y * b


def view_then_in_place(m: Any, y: Tensor) -> Tensor:
    v = y.view(-1)
    y.add_(1)
    return v * 2


ROWS = [
    Row("a second user", lambda m, y: torch.relu(y) + y, "its value has 2 users"),
    Row("a value that is also returned", lambda m, y: (y, torch.relu(y)), "its value is also returned"),
    Row(
        "a bias along W",
        lambda m, y: y + m.along_w,
        r"operand along_w of shape (14,) differs by position, not by channel",
    ),
    Row("a bias along H", lambda m, y: y + m.along_h, "differs by position, not by channel"),
    Row("a bias for each image", lambda m, y: y + m.per_image, "differs by position, not by channel"),
    Row("a residual", lambda m, y: y + m.full, "differs by position, not by channel"),
    Row("a clamp by a full tensor", lambda m, y: y.clamp(min=m.full), "differs by position, not by channel"),
    Row("a minimum with a full tensor", lambda m, y: torch.minimum(y, m.full), "differs by position, not by channel"),
    Row("an operand of more dimensions", lambda m, y: y + m.five_dims, "has more dimensions than the value's"),
    Row("scale zero", lambda m, y: y * 0, "a scale of 0 has no inverse"),
    Row("scale infinite", lambda m, y: y * math.inf, "a scale of inf has no inverse"),
    Row("division by zero", lambda m, y: y / 0.0, "a division by zero"),
    Row("division by infinity", lambda m, y: y / math.inf, "a scale of 0 has no inverse"),
    Row("shift infinite", lambda m, y: y + math.inf, "a shift of inf is not finite"),
    Row("shift NaN", lambda m, y: y - math.nan, "a shift of nan is not finite"),
    Row("bound NaN", lambda m, y: y.clamp(min=math.nan), "a bound is NaN"),
    Row("scale above float32", lambda m, y: y * 1e39, "overflows float32"),
    Row("scale below float32", lambda m, y: y * 1e-39, "underflows float32"),
    Row(
        "rounding division", lambda m, y: torch.div(y, 2, rounding_mode="floor"), "rounding_mode='floor' is not affine"
    ),
    Row("truncating division", lambda m, y: y.div(2, rounding_mode="trunc"), "rounding_mode='trunc' is not affine"),
    Row("floor division", lambda m, y: y // 2, "no step of a tail"),
    Row("a number over the value", lambda m, y: 1.0 / y, "not an affine or clamp operation|the value is the divisor"),
    Row("a tensor over the value", lambda m, y: m.channel / y, "the value is the divisor"),
    Row("the value as a bound", lambda m, y: torch.clamp(m.full, min=y), "the value is a bound"),
    Row("the value with itself", lambda m, y: y + y, "it combines the value with itself"),
    Row("the value times itself", lambda m, y: y * y, "it combines the value with itself"),
    Row("a view in between", lambda m, y: y.view(2, C, -1).relu(), "view", torch.float32),
    Row("a transpose in between", lambda m, y: y.transpose(2, 3).relu(), "transpose"),
    Row("a slice in between", lambda m, y: y[:, :3].relu(), "no step of a tail"),
    Row("a view written through", view_then_in_place, "its value has 2 users"),
    Row("a cast in between", lambda m, y: y.double().relu(), "no step of a tail"),
    Row("tanh", lambda m, y: torch.tanh(y), "not an affine or clamp operation"),
    Row("leaky_relu", lambda m, y: F.leaky_relu(y, 0.1), "not an affine or clamp operation"),
    Row("threshold", lambda m, y: F.threshold(y, 0.1, 20.0), "no step of a tail"),
    Row("a reduction by min", lambda m, y: torch.min(y), "no step of a tail"),
    Row("a reduction by max along a dimension", lambda m, y: torch.max(y, 1)[0], "a reduction, not a clamp"),
    Row(
        "half and a float32 vector",
        lambda m, y: y + m.channel,
        "would promote the value from torch.float16",
        torch.float16,
    ),
    Row("bfloat16 and a float32 vector", lambda m, y: y * m.channel, "would promote", torch.bfloat16),
    Row("float32 and a float64 vector", lambda m, y: y + m.channel64, "would promote the value from torch.float32"),
    Row("float32 and a complex vector", lambda m, y: y + m.channel_complex, "would promote"),
    Row("a complex number", lambda m, y: y * 2j, "is not real"),
    Row("an operand written in between", write_between, "add_ stands between this and what comes before"),
    Row("an operand with an item set", set_item_between, "setitem stands between this and what comes before"),
    Row("a gradient mode in between", gradient_mode_between, "_set_grad_enabled stands between"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_near_miss_is_left_alone(row: Row) -> None:
    with torch.no_grad():
        gm = dynamo(Model(row.tail, row.dtype).eval(), torch.randn(2, 4, 5, 7, dtype=row.dtype))
    before = gm.code
    (miss,) = find_sites(gm)
    assert isinstance(miss, Miss)
    assert any(reason in miss.reason for reason in row.reason.split("|")), miss.reason
    assert "test_near_misses.py:" in miss.reason
    fuse(gm, Options(strict=True))
    assert gm.code == before


def test_there_are_at_least_twenty() -> None:
    assert len(ROWS) >= 20


def test_the_reason_names_the_users_line() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        return y.clamp(min=m.full)

    with torch.no_grad():
        (miss,) = find_sites(dynamo(Model(tail), torch.randn(2, 4, 5, 7)))
    line = tail.__code__.co_firstlineno + 1
    assert miss.reason == (
        f"clamp at test_near_misses.py:{line}: operand full of shape (2, 6, 10, 14) differs by position, not by channel"
    )


def test_an_ordinary_convolution_is_no_site() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for dialect in (dynamo, symbolic, aten):
        gm = dialect(model, torch.randn(1, 3, 8, 8))
        assert list(find_sites(gm)) == []
        reasons = [match(node).reason for node in gm.graph.nodes if node.op.startswith("call")]
        assert all("not a transposed convolution" in reason for reason in reasons)


def test_alpha_that_is_a_tensor_is_refused() -> None:
    graph = fx.Graph()
    x, w, b, alpha = (graph.placeholder(name) for name in ("x", "w", "b", "alpha"))
    y = graph.call_function(torch.conv_transpose2d, (x, w))
    z = graph.call_function(torch.add, (y, b), {"alpha": alpha})
    graph.output(z)
    shapes = {x: (1, 4, 5, 5), w: (4, 6, 3, 3), b: (6, 1, 1), alpha: (), y: (1, 6, 7, 7), z: (1, 6, 7, 7)}
    for node, shape in shapes.items():
        node.meta["val"] = torch.empty(shape, device="meta")
    (miss,) = find_sites(fx.GraphModule(nn.Module(), graph))
    assert miss.reason == "add: alpha is not a constant number"


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_integer_and_complex_convolutions_are_left_alone(dtype: torch.dtype) -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_function(torch.conv_transpose2d, (x, w))
    z = graph.call_function(torch.mul, (y, 2))
    graph.output(z)
    for node, shape in {x: (1, 4, 5, 5), w: (4, 6, 3, 3), y: (1, 6, 7, 7), z: (1, 6, 7, 7)}.items():
        node.meta["val"] = torch.empty(shape, device="meta", dtype=dtype)
    (miss,) = find_sites(fx.GraphModule(nn.Module(), graph))
    assert miss.reason == f"convolution: its dtype is {dtype}; only floating dtypes are folded"


def test_a_graph_without_shapes_is_left_alone() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU()))
    (miss,) = find_sites(gm)
    assert "the shape and dtype of its output are not recorded" in miss.reason


def test_a_module_with_a_hook_is_left_alone() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU())
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    (miss,) = find_sites(symbolic(model, torch.randn(1, 3, 4, 4)))
    assert "forward hooks" in miss.reason


def test_one_channel_is_not_widened_by_an_operand() -> None:
    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.ConvTranspose2d(3, 1, 2, bias=False)
            self.register_buffer("wide", torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.wide

    with torch.no_grad():
        (miss,) = find_sites(dynamo(Widened(), torch.randn(2, 3, 4, 4)))
    assert "does not match the 1 channels" in miss.reason


def test_a_tail_ends_before_what_it_cannot_fold() -> None:
    with torch.no_grad():
        gm = dynamo(Model(lambda m, y: torch.tanh((y + m.channel).relu())), torch.randn(2, 4, 5, 7))
    (site,) = find_sites(gm)
    assert isinstance(site, Site) and len(site.tail) == 2
    assert str(site.form) == "y = max(x + channel[c], 0)"
    assert site.end.reason.startswith("tanh at test_near_misses.py:")


def test_a_tail_ends_before_a_second_user() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        z = (y * 2 + 1).relu()
        return z + z.mean()

    with torch.no_grad():
        (site,) = find_sites(dynamo(Model(tail), torch.randn(2, 4, 5, 7)))
    assert len(site.tail) == 3 and "relu" in site.end.reason and "its value has 2 users" in site.end.reason

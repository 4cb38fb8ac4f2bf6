"""Before a convolution: what is taken along, by which spelling, and where the walk up ends, to the reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS, call, dynamo
from torch import Tensor, fx, nn

from fusion_backend import rewrite
from fusion_backend.patterns.convolution import Convolution, read_convolution
from fusion_backend.patterns.prologue import Prologue, read_prologue
from fusion_backend.patterns.site import Site, find_convolutions, match
from fusion_backend.patterns.source import Miss

Head = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    def __init__(self, head: Head):
        super().__init__()
        self.pre = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)
        self.register_buffer("a", 0.5 + torch.rand(1, 4, 1, 1))
        self.register_buffer("b", torch.randn(4, 1, 1))
        self.register_buffer("slope", torch.rand(4))
        self.register_buffer("full", torch.randn(2, 4, 5, 7))
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.leaky, self.in_place, self.elu = nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), nn.ELU()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(self.head(self, x)))


def read(head: Head, dialect: str = "dynamo") -> tuple[fx.GraphModule, Prologue | Miss, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Model(head).eval(), torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        gm = DIALECTS[dialect](model, x)
    (node,) = find_convolutions(gm)
    convolution = read_convolution(node)
    assert isinstance(convolution, Convolution)
    return gm, read_prologue(convolution), model, x


def names(gm: fx.GraphModule) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes if node.op.startswith("call")]


def replaced(gm: fx.GraphModule) -> list[str]:
    """By the fused operator; the operations that are left."""
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site)
    rewrite.use_fused(site, prologue=True)
    gm.graph.lint()
    gm.recompile()
    return names(gm)


def snake(m: Any, x: Tensor) -> Tensor:
    return x + (1.0 / (m.a + 1e-9)) * torch.pow(torch.sin(x * m.a), 2)


def in_place_behind_a_convolution(m: Any, x: Tensor) -> Tensor:
    x = m.pre(x)
    x.mul_(2)
    return F.leaky_relu_(x + 1, 0.1)


def dac(m: Any, x: Tensor) -> Tensor:
    shape = x.shape
    x = x.reshape(shape[0], shape[1], 5, -1)
    x = x + (m.a + 1e-9).reciprocal() * torch.sin(m.a * x).pow(2)
    return torch.reshape(x, shape)


def two_in_place(m: Any, x: Tensor) -> Tensor:
    return m.in_place(F.elu(m.pre(x), inplace=True))


def an_old_name(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    z = y.mul_(2)
    return y + z


# What is done first, what of it is read, and what is left of the graph beside the operator.
TAKEN: dict[str, tuple[Head, str, list[str]]] = {
    "leaky_relu": (lambda m, x: F.leaky_relu(x, 0.1), "v1 = leaky_relu(input, 0.1)", []),
    "a module": (lambda m, x: m.leaky(x), "v1 = leaky_relu(input, 0.2)", []),
    "elu": (lambda m, x: m.elu(x), "v1 = elu(input, 1, 1, 1)", []),
    "prelu": (lambda m, x: F.prelu(x, m.slope), "v1 = leaky_relu(input, slope[c])", []),
    "relu": (lambda m, x: x.relu(), "v1 = max(input, 0)", []),
    "numbers": (lambda m, x: (2 * x + 1).clamp(max=3), "v1 = min(2*input + 1, 3)", []),
    "channels": (lambda m, x: torch.exp((x + m.b) * m.a), "v1 = a[c]*input + b[c]*a[c]; v2 = exp(v1)", []),
    "snake": (
        snake,
        "v1 = a[c]*input; v2 = sin(v1); v3 = square(v2); v4 = truediv[c]*v3; v5 = input + v4",
        [],
    ),
    "DAC's snake": (
        dac, "v1 = a[c]*input; v2 = sin(v1); v3 = square(v2); v4 = reciprocal[c]*v3; v5 = input + v4", ["reciprocal"]
    ),
    "silu by hand": (lambda m, x: x * torch.sigmoid(x), "v1 = sigmoid(input); v2 = input*v1", []),
    "of what others make": (lambda m, x: torch.tanh(x.flip(2)), "v1 = tanh(input)", ["flip"]),
    "what others read, too": (lambda m, x: (m.pre(x), torch.tanh(x))[1], "v1 = tanh(input)", ["conv2d"]),
    "behind a sum": (lambda m, x: F.leaky_relu(m.pre(x) + x, 0.1), "v1 = leaky_relu(input, 0.1)", ["conv2d", "add"]),
    "in place": (lambda m, x: m.in_place(m.pre(x)), "v1 = leaky_relu(input, 0.2)", ["conv2d"]),
    "in place, twice": (two_in_place, "v1 = elu(input, 1, 1, 1); v2 = leaky_relu(v1, 0.2)", ["conv2d"]),
    "in place, by a view of what is new": (
        lambda m, x: m.in_place(m.pre(x).view(2, 4, 5, 7)), "v1 = leaky_relu(input, 0.2)", ["conv2d"]
    ),
    "in place, in new memory": (
        lambda m, x: F.relu(torch.sigmoid(x) * m.a, inplace=True),
        "v1 = sigmoid(input); v2 = max(a[c]*v1, 0)",
        [],
    ),
    "in place, by an old name": (an_old_name, "v1 = sigmoid(input); v2 = 2*v1; v3 = v2 + v2", []),
    "in place behind another": (
        in_place_behind_a_convolution, "v1 = input + 1; v2 = leaky_relu(v1, 0.1)", ["conv2d", "mul_"]
    ),
    "a copy": (lambda m, x: torch.tanh(x.clone()), "v1 = tanh(input)", []),
    "a value of its own": (lambda m, x: x.detach() + torch.tanh(x), "v1 = tanh(input); v2 = input + v1", []),
}  # fmt: skip


@pytest.mark.parametrize(("head", "steps", "left"), TAKEN.values(), ids=TAKEN)
@torch.no_grad()
def test_it_becomes_part_of_the_operator(head: Head, steps: str, left: list[str]) -> None:
    gm, prologue, model, x = read(head)
    assert str(prologue) == steps
    rest = replaced(gm)
    assert [name for name in rest if name in (*left, "tanh", "leaky_relu", "sigmoid", "clone")] == left
    assert rest.count("conv_transpose.default") == 1
    torch.testing.assert_close(call(gm, x), model(x.clone()))


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name not in ("dynamo", "symbolic_trace")])
@pytest.mark.parametrize(
    "head", [snake, dac, two_in_place, lambda m, x: m.norm(x).relu()], ids=["snake", "dac", "in place", "norm"]
)
@torch.no_grad()
def test_other_dialects(head: Head, dialect: str) -> None:
    gm, prologue, model, x = read(head, dialect)
    assert isinstance(prologue, Prologue)
    assert "conv_transpose.default" in replaced(gm)
    torch.testing.assert_close(call(gm, x), model(x.clone()))


def test_modules_are_read_too() -> None:
    _, prologue, _, _ = read(lambda m, x: m.in_place(m.leaky(x)), "symbolic_trace")
    assert str(prologue) == "v1 = leaky_relu(input, 0.2); v2 = leaky_relu(v1, 0.2)"


def read_twice(m: Any, x: Tensor) -> Tensor:
    m.kept = torch.tanh(x)
    return m.kept


def written_between(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    x.add_(1)
    return y


def operand_written_between(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x * m.a)
    m.a.add_(1)
    return y


def mode_between(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = torch.tanh(x)
    return y * 2


def in_place_on_a_view(m: Any, x: Tensor) -> Tensor:
    return m.in_place(m.pre(x).narrow(1, 0, 4))


def seen_by_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.pre(x)
    m.kept = y.view(-1)
    return m.in_place(y)


def result_unread(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    F.leaky_relu_(y)
    return y


# The first step that is not taken, and why; the steps that are ("": none).
ENDS: dict[str, tuple[Head, str, str]] = {
    "no step": (lambda m, x: x.softmax(1), "softmax at test_prologue.py", ""),
    "an input": (lambda m, x: x, "no step of a prologue", ""),
    "before a softmax": (lambda m, x: x.softmax(1) * 2, "softmax at", "v1 = 2*input"),
    "a second reader": (lambda m, x: (y := torch.tanh(x), m.pre(y))[0], "its value is also read by conv2d", ""),
    "a second reader further up": (lambda m, x: (y := torch.tanh(x)) * y.mean(), "read by mean", "v1 = mean*input"),
    "returned too": (read_twice, "tanh at test_prologue.py:", ""),
    "a second tensor": (lambda m, x: F.relu(x + m.full), "no step of a prologue", "v1 = max(input, 0)"),
    "two tensors that join": (
        lambda m, x: torch.tanh(x.flip(2)) * torch.sigmoid(x.flip(3)), "flip at test_prologue.py:", ""
    ),
    "by position": (lambda m, x: torch.tanh(x * m.full[0, 0]), "differs by position", "v1 = tanh(input)"),
    "another power": (lambda m, x: torch.tanh(x**3), "of all powers the square alone", "v1 = tanh(input)"),
    "a cast": (lambda m, x: torch.tanh(x.double()).float(), "float at test_prologue.py:", ""),
    "another shape": (
        lambda m, x: torch.tanh(x[:, :, :1] * torch.ones(5, 1)), "it reads no tensor of its", "v1 = tanh(input)"
    ),
    "the input written in between": (written_between, "add_ stands between this and the convolution", ""),
    "an operand written in between": (operand_written_between, "add_ stands between", ""),
    "a mode in between": (mode_between, "_set_grad_enabled", "v1 = 2*input"),
    "in place on an input": (lambda m, x: m.in_place(x), "it writes to memory that others may read", ""),
    "in place on a view": (in_place_on_a_view, "it writes to memory that others may read", ""),
    "in place, seen by a view": (seen_by_a_view, "it writes to memory that others may read", ""),
    "in place, by a view of the same shape": (
        lambda m, x: x.view(2, 4, 5, 7).tanh_(), "it writes to memory that others may read", ""
    ),
    "in place, by detach": (lambda m, x: x.detach().tanh_(), "it writes to memory that others may read", ""),
    "in place, read by its old name": (result_unread, "its value is also read by leaky_relu_", ""),
    "nothing": (lambda m, x: x.detach(), "it does nothing", ""),
    "too many": (
        lambda m, x: [x := torch.tanh(x) for _ in range(17)][-1], "before 16 others", "; ".join(
            ["v1 = tanh(input)", *(f"v{i + 1} = tanh(v{i})" for i in range(1, 16))]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("head", "reason", "steps"), ENDS.values(), ids=ENDS)
@torch.no_grad()
def test_where_the_walk_up_ends(head: Head, reason: str, steps: str) -> None:
    gm, prologue, _, _ = read(head)
    before = gm.graph.python_code("self").src
    assert (str(prologue) if isinstance(prologue, Prologue) else "") == steps
    end = prologue.end if isinstance(prologue, Prologue) else prologue
    assert reason in end.reason, end.reason
    if not steps:
        (site,) = (match(node, bare=True) for node in find_convolutions(gm))
        assert isinstance(site, Site) and site.prologue is None
        assert gm.graph.python_code("self").src == before


class Correlated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return F.conv_transpose2d(y, y).relu()


@torch.no_grad()
def test_what_is_the_weight_as_well_is_left() -> None:
    model, x = Correlated(), torch.randn(4, 4, 5, 5)
    gm = dynamo(model, x)
    (node,) = find_convolutions(gm)
    prologue = read_prologue(read_convolution(node))  # type: ignore[arg-type]
    assert isinstance(prologue, Miss) and prologue.why == "it is the weight, too"
    assert "conv_transpose.default" in replaced(gm)
    torch.testing.assert_close(call(gm, x), model(x))


def test_under_autocast_the_convolution_casts() -> None:
    torch.manual_seed(0)
    model, x = Model(lambda m, x: torch.tanh(x)), torch.randn(2, 4, 5, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gm = dynamo(model, x)
    (node,) = find_convolutions(gm)
    prologue = read_prologue(read_convolution(node))  # type: ignore[arg-type]
    assert isinstance(prologue, Miss) and "the convolution casts it to torch.bfloat16" in prologue.reason


def test_nothing_is_read_where_a_gradient_flows() -> None:
    gm = dynamo(Model(lambda m, x: torch.tanh(x)), torch.randn(2, 4, 5, 7))
    (site,) = (match(node) for node in find_convolutions(gm))
    assert isinstance(site, Site) and site.prologue is None
    frozen = Model(lambda m, x: torch.tanh(x) * m.learned).requires_grad_(False)
    frozen.learned = nn.Parameter(torch.rand(1))
    (site,) = (match(node) for node in find_convolutions(dynamo(frozen, torch.randn(2, 4, 5, 7))))
    assert isinstance(site, Site) and site.prologue is None


UNARY = (
    torch.tanh,
    torch.sigmoid,
    F.silu,
    lambda v: v * 0.5 + 1,
    lambda v: v.detach(),
    torch.clone,
    lambda v: v.flip(2),
)
IN_PLACE = (torch.tanh_, torch.relu_, lambda v: v.mul_(0.5), lambda v: F.silu(v, inplace=True))
PAIRS = (torch.add, torch.sub, torch.mul, torch.maximum, lambda v, w: v.add_(w))


def drawn(seed: int) -> Head:
    """Some operations on values that were made before, in place too; what is returned may be any of the last."""
    draw = random.Random(seed)
    steps = []
    for _ in range(draw.randint(2, 6)):
        kind, first, second = draw.random(), draw.randint(1, 3), draw.randint(1, 5)
        table = UNARY if kind < 0.4 else IN_PLACE if kind < 0.7 else PAIRS
        steps.append((table is PAIRS, draw.choice(table), first, second))
    returned = draw.choice([1, 1, 1, 2])

    def head(m: Any, x: Tensor) -> Tensor:
        values = [m.pre(x) if seed % 2 else x]
        for takes_two, step, first, second in steps:
            v = values[-min(first, len(values))]
            w = m.b if second == 5 else values[-min(second, len(values))]
            values.append(step(v, w) if takes_two else step(v))
        return values[-min(returned, len(values))]

    return head


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_whatever_is_drawn_gives_eagers_numbers(seed: int) -> None:
    """And does to the model's input what eager does."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model, x = Model(drawn(seed)).eval(), torch.randn(2, 4, 5, 7)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        replaced(gm)
        return gm.forward

    given = x.clone()
    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(given), model(x))
    assert torch.equal(given, x)

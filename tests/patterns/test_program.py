"""Behind the first normal form: values with several users, operations in place, and where the tail ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import call, dynamo
from torch import Tensor, fx, nn

from fusion_backend import rewrite
from fusion_backend.patterns.program import Program
from fusion_backend.patterns.site import Site, find_convolutions, find_sites, match

Tail = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    def __init__(self, tail: Tail, bias: bool = True):
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=bias)
        self.register_buffer("b", torch.randn(6, 1, 1))
        self.register_buffer("a", 0.5 + torch.rand(1, 6, 1, 1))
        self.register_buffer("full", torch.randn(2, 6, 10, 14))
        self.register_buffer("mask", torch.rand(2, 6, 10, 14))
        self.register_buffer("third", torch.rand(2, 6, 10, 14))
        self.register_buffer("last", torch.rand(2, 6, 10, 14).to(memory_format=torch.channels_last))
        self.tail = tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.conv(x))


def read(tail: Tail, bias: bool = True) -> tuple[fx.GraphModule, Site, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Model(tail, bias).eval(), torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        gm = dynamo(model, x)
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site)
    return gm, site, model, x


def replaced(gm: fx.GraphModule, site: Site) -> list[str]:
    """By the fused operator; the operations that are left."""
    rewrite.use_fused(site)
    gm.graph.lint()
    gm.recompile()
    return [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes if node.op.startswith("call")]


def original_kept(m: Any, y: Tensor) -> Tensor:
    """KernelBench level 2, problem 20."""
    original = y.clone().detach()
    y = y + m.b
    y = y + original
    y = y * original
    return y + original


def snake(m: Any, y: Tensor) -> Tensor:
    return y + torch.sin(m.a * y) ** 2 / m.a


def in_place(m: Any, y: Tensor) -> Tensor:
    y.tanh_()
    z = y.sigmoid_()
    y.mul_(2)
    return z + 1


def before_and_after(m: Any, y: Tensor) -> Tensor:
    gate = torch.sigmoid(y)
    y.tanh_()
    gate.mul_(y)
    return gate - y


def written_through_a_second_name(m: Any, y: Tensor) -> Tensor:
    z = y.detach()
    z.sigmoid_()
    return y * 2


def dead_end(m: Any, y: Tensor) -> Tensor:
    torch.tanh(y)
    return torch.sigmoid(y)


def twice(m: Any, y: Tensor) -> Tensor:
    z = torch.tanh(y) * 2
    return (z + 1).relu() + z


TAILS: dict[str, tuple[Tail, str, str]] = {
    "5": (lambda m, y: torch.tanh(y - m.b), "y = x - b[c]", "v1 = tanh(y)"),
    "16": (
        lambda m, y: F.hardtanh(F.mish(y) + 0.5, -1, 1) * 2,
        "y = x", "v1 = mish(y); v2 = min(max(2*v1 + 1, -2), 2)",
    ),
    "20": (original_kept, "y = x", "v1 = y + b[c]; v2 = v1 + y; v3 = v2*y; v4 = v3 + y"),
    "26": (lambda m, y: y * F.hardswish(y), "y = x", "v1 = hardswish(y); v2 = y*v1"),
    "26, whole": (
        lambda m, y: (y + m.full) * F.hardswish(y + m.full),
        "y = x", "v1 = y + full; v2 = y + full; v3 = hardswish(v2); v4 = v1*v3",
    ),
    "a residual and a mask": (
        lambda m, y: torch.minimum((m.full - y.relu()) * m.mask, m.full),
        "y = max(x, 0)", "v1 = full - y; v2 = v1*mask; v3 = min(v2, full)",
    ),
    "rsub with a tensor": (lambda m, y: torch.rsub(y, m.full), "y = x", "v1 = full - y"),
    "a tensor in place": (lambda m, y: y.add_(m.full).mul_(2), "y = x", "v1 = y + full; v2 = 2*v1"),
    "a tensor that is computed": (
        lambda m, y: torch.tanh(y) + (m.full * 2).exp(), "y = x", "v1 = tanh(y); v2 = v1 + exp"
    ),
    "a tensor that nobody reads": (
        lambda m, y: (y + m.third, torch.tanh(y) + m.full)[1], "y = x", "v1 = tanh(y); v2 = v1 + full"
    ),
    "60": (lambda m, y: torch.sigmoid(y) * y, "y = x", "v1 = sigmoid(y); v2 = v1*y"),
    "74": (
        lambda m, y: F.leaky_relu(F.leaky_relu(y, 0.2) * m.a, 0.2),
        "y = x", "v1 = leaky_relu(y, 0.2); v2 = a[c]*v1; v3 = leaky_relu(v2, 0.2)",
    ),
    "93": (
        lambda m, y: F.gelu(torch.min(y + 0.5, torch.tensor(0.0))) * 2,
        "y = min(x + 0.5, 0)", "v1 = gelu(y); v2 = 2*v1",
    ),
    "mish by hand": (
        lambda m, y: y * torch.tanh(F.softplus(y)), "y = x", "v1 = softplus(y, 1, 20); v2 = tanh(v1); v3 = y*v2"
    ),
    "y + y*y": (lambda m, y: (y + y * y).relu(), "y = x", "v1 = y*y; v2 = y + v1; v3 = max(v2, 0)"),
    "y + y": (lambda m, y: y + y, "y = x", "v1 = y + y"),
    "y - alpha*y": (
        lambda m, y: torch.sub(y.relu(), y, alpha=0.5), "y = x", "v1 = max(y, 0); v2 = 0.5*y; v3 = v1 - v2"
    ),
    "rsub, alpha": (
        lambda m, y: torch.rsub(y.relu(), y, alpha=0.5), "y = x", "v1 = max(0.5*y, 0); v2 = y - v1"
    ),
    "add, alpha": (lambda m, y: torch.add(y, y.abs(), alpha=-3), "y = x", "v1 = abs(y); v2 = -3*v1; v3 = y + v2"),
    "keywords, the other first": (
        lambda m, y: torch.sub(other=y, input=torch.tanh(y)), "y = x", "v1 = tanh(y); v2 = v1 - y"
    ),
    "a quotient, the other first": (
        lambda m, y: torch.div(other=1 + y.abs(), input=y), "y = x", "v1 = abs(y); v2 = v1 + 1; v3 = y/v2"
    ),
    "a tensor, the other first": (
        lambda m, y: torch.sub(other=torch.tanh(y), input=m.full), "y = x", "v1 = tanh(y); v2 = full - v1"
    ),
    "rsub": (lambda m, y: torch.rsub(y.relu(), y), "y = x", "v1 = max(y, 0); v2 = y - v1"),
    "a maximum of two": (lambda m, y: torch.maximum(y, 0.1 * y), "y = x", "v1 = 0.1*y; v2 = max(y, v1)"),
    "a quotient": (lambda m, y: y / (1 + y.abs()), "y = x", "v1 = abs(y); v2 = v1 + 1; v3 = y/v2"),
    "snake": (snake, "y = x", "v1 = a[c]*y; v2 = sin(v1); v3 = square(v2); v4 = 1/a[c]*v3; v5 = y + v4"),
    "in place": (in_place, "y = x", "v1 = tanh(y); v2 = sigmoid(v1); v3 = 2*v2 + 1"),
    "in place, and what it was": (
        before_and_after, "y = x", "v1 = sigmoid(y); v2 = tanh(y); v3 = v1*v2; v4 = v3 - v2"
    ),
    "reshaped to what it is": (
        lambda m, y: torch.tanh(y).view(y.shape).mul_(2), "y = x", "v1 = tanh(y); v2 = 2*v1"
    ),
    "in place, by a second name": (written_through_a_second_name, "y = x", "v1 = sigmoid(y); v2 = 2*v1"),
    "a value that nobody reads": (dead_end, "y = x", "v1 = sigmoid(y)"),
    "a form that is read twice": (twice, "y = x", "v1 = tanh(y); v2 = 2*v1; v3 = max(2*v1 + 1, 0); v4 = v3 + v2"),
    "forms that do not fold together": (
        lambda m, y: torch.tanh(y) * 1e-30 * 1e-30, "y = x", "v1 = tanh(y); v2 = 1e-30*v1; v3 = 1e-30*v2"
    ),
    "a number that is small": (lambda m, y: F.leaky_relu(y + 1e-5, 1e-7), "y = x + 1e-05", "v1 = leaky_relu(y, 1e-07)"),
}  # fmt: skip


@pytest.mark.parametrize(("tail", "form", "steps"), TAILS.values(), ids=TAILS)
def test_the_whole_tail_becomes_one_operator(tail: Tail, form: str, steps: str) -> None:
    gm, site, model, x = read(tail, bias=False)
    assert str(site.form) == form and str(site.program) == steps
    assert site.program.end.why == "the value leaves the graph"
    rest = replaced(gm, site)
    assert "conv_transpose.default" in rest and not {"conv_transpose2d", "tanh", "mish", "hardswish"} & set(rest)
    with torch.no_grad():
        torch.testing.assert_close(call(gm, x), model(x.clone()))


def returned_too(m: Any, y: Tensor) -> Any:
    z = torch.tanh(y)
    return z, torch.sigmoid(z) * 2


def read_by_a_view(m: Any, y: Tensor) -> Tensor:
    z = torch.tanh(y)
    v = z.view(-1)
    z.sigmoid_()
    return v * 2


def a_branch_that_leaves(m: Any, y: Tensor) -> Any:
    z = torch.tanh(y)
    gate = torch.sigmoid(z)
    return z * gate, gate.mean()


def written_between(m: Any, y: Tensor) -> Tensor:
    z = torch.tanh(y)
    m.b.add_(1)
    return F.silu(z + m.b)


def mode_between(m: Any, y: Tensor) -> Tensor:
    z = torch.tanh(y)
    with torch.enable_grad():
        return F.silu(z)


def into_another_tensor(m: Any, y: Tensor) -> Tensor:
    full = m.full.clone()
    full.add_(torch.tanh(y))
    return full


def copy_of_a_copy(m: Any, y: Tensor) -> Any:
    z = torch.tanh(y)
    kept = z.clone()
    return kept, z.add_(1)


# The tail, its steps (None: there are none), why it ends, and how many nodes of it are replaced.
ENDS: dict[str, tuple[Tail, str | None, str]] = {
    "returned too": (returned_too, "v1 = tanh(y)", "its value is also read by what is no step"),
    "a view": (read_by_a_view, "v1 = tanh(y)", "view at test_program.py"),
    "a branch that leaves": (a_branch_that_leaves, "v1 = tanh(y)", "its value is also read by what is no step: mean"),
    "an operand written in between": (written_between, "v1 = tanh(y)", "it may write to what the tail reads"),
    "a mode in between": (mode_between, "v1 = tanh(y)", "_set_grad_enabled"),
    "into another tensor": (into_another_tensor, "v1 = tanh(y)", "it writes to another tensor"),
    "a copy of a copy": (copy_of_a_copy, "v1 = tanh(y)", "its value is also read"),
    "a cast": (lambda m, y: torch.tanh(y).double().sigmoid(), "v1 = tanh(y)", "double"),
    "a third tensor": (
        lambda m, y: (y + m.full) * m.mask - m.third,
        "v1 = y + full; v2 = v1*mask",
        "it is the third tensor",
    ),
    "another layout": (lambda m, y: torch.tanh(y) + m.last, "v1 = tanh(y)", "differs by position, not by channel"),
    "an expanded tensor": (
        lambda m, y: torch.tanh(y) * m.full[:, :1].expand(2, 6, 10, 14),
        "v1 = tanh(y)",
        "differs by position",
    ),
    "a tensor that broadcasts": (lambda m, y: torch.tanh(y) + m.full[:, :1], "v1 = tanh(y)", "differs by position"),
    "a tensor of another dtype": (lambda m, y: torch.tanh(y) + m.full.int(), "v1 = tanh(y)", "differs by position"),
    "a multiple of a tensor": (
        lambda m, y: torch.add(torch.tanh(y), m.full, alpha=2),
        "v1 = tanh(y)",
        "alpha beside a tensor",
    ),
    "a clamp by a tensor": (lambda m, y: torch.tanh(y).clamp(min=m.full), "v1 = tanh(y)", "differs by position"),
    "over a tensor, rounded": (
        lambda m, y: torch.div(torch.tanh(y), m.full, rounding_mode="floor"),
        "v1 = tanh(y)",
        "rounding_mode='floor'",
    ),
    "a tensor that is written to": (
        lambda m, y: torch.tanh(y) + m.full.add_(1),
        "v1 = tanh(y)",
        "it may write to what the tail reads",
    ),
    "a softmax": (lambda m, y: torch.tanh(y).softmax(1), "v1 = tanh(y)", "softmax"),
    "a mean": (lambda m, y: (torch.tanh(y) * y).mean(), "v1 = tanh(y); v2 = v1*y", "mean"),
    "a softmax at once": (lambda m, y: y.softmax(1), None, ""),
    "only an alias": (lambda m, y: y.detach().softmax(1), None, ""),
    "only a copy": (lambda m, y: y.clone().softmax(1), None, ""),
    "a branch at once": (lambda m, y: torch.tanh(y) + y.mean(), None, ""),
    "as a bound": (lambda m, y: torch.tanh(y) + torch.clamp(m.full, min=y), None, ""),
    "powers": (lambda m, y: y**y, None, ""),
    "three values": (lambda m, y: torch.clamp(y, y * 2, y * 3), None, ""),
    "a scale of zero": (lambda m, y: torch.tanh(y) * 0, "v1 = tanh(y)", "a scale of 0 has no inverse"),
    "rounding division": (lambda m, y: torch.div(torch.tanh(y), y, rounding_mode="floor"), None, ""),
    "a slope for each image": (lambda m, y: torch.maximum(y * m.full[:, :1, :1, :1], y), None, ""),
}


@pytest.mark.parametrize(("tail", "steps", "reason"), ENDS.values(), ids=ENDS)
def test_where_the_tail_ends(tail: Tail, steps: str | None, reason: str) -> None:
    gm, site, model, x = read(tail)
    assert (site.program and str(site.program)) == steps
    if isinstance(site.program, Program):
        assert reason in site.program.end.reason, site.program.end.reason
    replaced(gm, site)
    with torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = model(x.clone())
        model.load_state_dict(state)
        results = call(gm, x)
    torch.testing.assert_close(results, expected[0] if isinstance(expected, tuple) else expected, equal_nan=True)


class Learned(Model):
    def __init__(self, tail: Tail, bias: bool = True):
        super().__init__(tail, bias)
        self.gain = nn.Parameter(torch.rand(6, 1, 1))
        self.slope = nn.Parameter(torch.rand(6))


# What a training step reads: the first form with the convolution's bias, the program, and why it ends.
TRAINED = {
    "tanh": (lambda m, y: torch.tanh(y + m.b) * 2, "x + conv.bias[c] + b[c]", "v1 = tanh(y); v2 = 2*v1", "leaves"),
    "bounds, each by itself": (
        lambda m, y: F.gelu(F.relu6(y * 2).clamp(max=3) + 1),
        "2*x + 2*conv.bias[c]",
        "v1 = min(max(y, 0), 6); v2 = min(v1, 3); v3 = v2 + 1; v4 = gelu(v3)",
        "leaves",
    ),
    "a bound that halves": (
        lambda m, y: F.gelu(torch.min(y + 0.5, torch.tensor(0.0))),
        "x + conv.bias[c] + 0.5",
        "v1 = min(y, 0); v2 = gelu(v1)",
        "leaves",
    ),
    "affine steps are one": (
        lambda m, y: (torch.tanh(y) * 2 + 1) / 4 - m.b,
        "x + conv.bias[c]",
        "v1 = tanh(y); v2 = 0.5*v1 - b[c] + 0.25",
        "leaves",
    ),
    "learned ones": (
        lambda m, y: F.prelu(F.silu(y) * m.gain, m.slope),
        "x + conv.bias[c]",
        "v1 = silu(y); v2 = gain[c]*v1; v3 = leaky_relu(v2, slope[c])",
        "leaves",
    ),
    "the original kept": (
        original_kept,
        "x + conv.bias[c]",
        "v1 = detach(y); v2 = y + b[c]; v3 = v2 + v1; v4 = v3*v1; v5 = v4 + v1",
        "leaves",
    ),
    "a residual": (lambda m, y: (y + m.full) * F.hardswish(y), "x + conv.bias[c]",
                   "v1 = y + full; v2 = hardswish(y); v3 = v1*v2", "leaves"),
    "a second tensor": (lambda m, y: (y + m.full) * m.mask, "x + conv.bias[c]", "v1 = y + full", "it is the second"),
    "a learned bound": (
        lambda m, y: torch.maximum(torch.tanh(y), m.gain), "x + conv.bias[c]", "v1 = tanh(y)", "a learned bound",
    ),
    "a name that is detached": (
        lambda m, y: detached_and_written(y), "x + conv.bias[c]", "v1 = tanh(y)", "writes to what is detached as well",
    ),
    "a name by a reshape": (
        lambda m, y: torch.sin(torch.tanh(y).reshape(y.shape)), "x + conv.bias[c]", "v1 = tanh(y); v2 = sin(v1)",
        "leaves",
    ),
    "a detach in place": (
        lambda m, y: detached_in_place(y), "x + conv.bias[c]", "v1 = tanh(y)", "its value is also read",
    ),
    "what ends in a detach": (
        lambda m, y: torch.tanh(y).detach(), "x + conv.bias[c]", "v1 = tanh(y)", "the value leaves",
    ),
    "bounds alone are no program": (
        lambda m, y: F.relu6(y + m.b), "min(max(x + conv.bias[c] + b[c], 0), 6)", "None", "",
    ),
}  # fmt: skip


def detached_and_written(y: Tensor) -> Tensor:
    """In eager the detached name sees what is written."""
    z = torch.tanh(y)
    other = z.detach()
    z.mul_(2)
    return z + other


def detached_in_place(y: Tensor) -> Tensor:
    z = torch.tanh(y)
    other = z * 2
    other.detach_()
    return z + other


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_read_where_a_gradient_flows(name: str) -> None:
    tail, form, program, end = TRAINED[name]
    gm = dynamo(Learned(tail), torch.randn(2, 4, 5, 7))
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site) and site.gate is not None
    assert (str(site.whole.biased), str(site.program)) == (f"y = {form}", program)
    assert end in (site.program or site).end.reason


def test_where_the_program_alone_learns_it_ends() -> None:
    learned = Model(lambda m, y: torch.sigmoid(y) * m.learned).requires_grad_(False)
    learned.learned = nn.Parameter(torch.rand(6, 1, 1))
    (site,) = find_sites(dynamo(learned, torch.randn(2, 4, 5, 7)))
    assert isinstance(site, Site) and str(site.program) == "v1 = sigmoid(y)"
    assert "a gradient flows through it" in site.program.end.reason


def test_a_long_program_in_training_is_cut_short() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        for _ in range(30):
            y = torch.sin(y)
        return y

    (site,) = find_sites(dynamo(Model(tail), torch.randn(2, 4, 5, 7)))
    assert isinstance(site, Site) and len(site.program.instructions) == 20
    assert "it is behind 20 others" in site.program.end.reason


def test_folding_leaves_the_steps_as_they_are_written() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        y = ((y + 1) * 2 - m.b).clamp(0, 1) / 2
        return F.mish(y) * 2 + 1

    gm, site, model, x = read(tail)
    assert site.program is not None and rewrite.fold(site)
    gm.recompile()
    names = [getattr(node.target, "__name__", node.target) for node in gm.graph.nodes if node.op.startswith("call")]
    assert names[-3:] == ["mish", "mul", "add"] and names.count("clamp") == 1
    with torch.no_grad():
        torch.testing.assert_close(call(gm, x), model(x))


UNARY = (torch.tanh, torch.sigmoid, torch.relu, F.silu, lambda v: v * 0.5 + 1, lambda v: v.detach(), torch.clone)
IN_PLACE = (torch.tanh_, torch.sigmoid_, torch.relu_, lambda v: v.mul_(0.5), lambda v: F.silu(v, inplace=True))
PAIRS = (torch.add, torch.sub, torch.mul, torch.maximum, lambda v, w: v.add_(w), lambda v, w: torch.rsub(v, w, alpha=2))


def drawn(seed: int) -> Tail:
    """Some operations on values that were made before, in place too; what is returned may be any of these."""
    draw = random.Random(seed)
    steps = []
    for _ in range(draw.randint(2, 7)):
        kind, first, second = draw.random(), draw.randint(1, 3), draw.randint(1, 5)
        table = UNARY if kind < 0.4 else IN_PLACE if kind < 0.6 else PAIRS if kind < 0.97 else (lambda v: v + v.mean(),)
        steps.append((table is PAIRS, draw.choice(table), first, second))
    also = draw.choice([None, None, 1, 2, 3])

    def tail(m: Any, y: Tensor) -> Any:
        values = [y]
        for takes_two, step, first, second in steps:
            v = values[-min(first, len(values))]
            w = m.full if second == 4 else m.b if second == 5 else values[-min(second, len(values))]
            values.append(step(v, w) if takes_two else step(v))
        return values[-1] if also is None else (values[-1], values[-min(also, len(values))])

    return tail


@pytest.mark.parametrize("seed", range(40))
@torch.no_grad()
def test_whatever_is_drawn_gives_eagers_numbers(seed: int) -> None:
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model, x = Model(drawn(seed)).eval(), torch.randn(2, 4, 5, 7)
    sites: list[Site] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        (site,) = (match(node, bare=True) for node in find_convolutions(gm))
        sites.append(site)
        replaced(gm, site)
        return gm.forward

    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    assert len(sites) == 1

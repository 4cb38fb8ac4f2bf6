"""A value inside of the tail that others read as well: which is kept, what counts as one value, what makes it end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import dynamo, results
from torch import Tensor, fx, nn

from fusion_backend import rewrite
from fusion_backend.patterns.site import Site, find_convolutions, match

pytest.importorskip("triton")

Tail = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    def __init__(self, tail: Tail, bias: bool = True):
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, bias=bias)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.register_buffer("a", 0.5 + torch.rand(1, 6, 1))
        self.register_buffer("full", torch.randn(2, 6, 14))
        self.tail = tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.up(x))


def read(tail: Tail, bias: bool = True) -> tuple[fx.GraphModule, Site, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Model(tail, bias).eval(), torch.randn(2, 4, 7)
    with torch.no_grad():
        gm = dynamo(model, x)
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site)
    return gm, site, model, x


def replaced(gm: fx.GraphModule, site: Site) -> list[str]:
    """By the operator that keeps a value, if there is one to keep; the operations that are left."""
    rewrite.use_fused(site, keeps=True)
    gm.graph.lint()
    gm.recompile()
    return [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes if node.op.startswith("call")]


def assert_eagers(gm: fx.GraphModule, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = model(x.clone())
        model.load_state_dict(state)
        found = results(gm, x)
    for ours, theirs in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(ours, theirs)


def hifigan(m: Any, h: Tensor) -> Tensor:
    total = m.conv(F.leaky_relu(h, 0.1)) + h
    total += m.conv(F.leaky_relu(h, 0.1)) + h
    total += m.conv(F.leaky_relu(h, 0.1)) + h
    return total / 3


def snake(m: Any, h: Tensor) -> Tensor:
    return h + torch.sin(m.a * h) ** 2


def snakes(m: Any, h: Tensor) -> Tensor:
    return m.conv(snake(m, h)) + m.conv(snake(m, h)) * h


def in_place_afterwards(m: Any, h: Tensor) -> Any:
    z = m.conv(torch.tanh(h))
    h.add_(1)
    return z, h * z


def result_in_place_afterwards(m: Any, h: Tensor) -> Any:
    z = torch.tanh(h)
    y = m.conv(z) + h
    z.add_(1)
    return y, z, h


def renamed_before(m: Any, h: Tensor) -> Any:
    z = torch.tanh(h)
    h.mul_(2)
    return m.conv(z * h), h


def names(m: Any, h: Tensor) -> Any:
    other = h.detach().view(h.shape)
    z = torch.tanh(other)
    return m.conv(z) + other, h


def by_the_way(m: Any, h: Tensor) -> Any:
    gate = torch.sigmoid(h)
    return m.conv(torch.tanh(h)), gate.mean()


def a_copy(m: Any, h: Tensor) -> Any:
    z = torch.tanh(h)
    kept = z.clone()
    return kept, z.add_(1)


# The tail, its program with what is kept, and how many repeats there are.
KEPT: dict[str, tuple[Tail, str, int]] = {
    "HiFi-GAN": (hifigan, "v1 = leaky_relu(y, 0.1); y is kept", 2),
    "one residual block": (lambda m, h: m.conv(torch.tanh(h)) + h, "v1 = tanh(y); y is kept", 0),
    "the others one by one": (
        lambda m, h: (F.silu(h), m.conv(F.leaky_relu(h, 0.1)), F.leaky_relu(h, 0.1)),
        "v1 = silu(y); y is kept",
        0,
    ),
    "snakes": (snakes, "v1 = a[c]*y; v2 = sin(v1); v3 = square(v2); v4 = y + v3; y is kept", 4),
    "a later value": (
        lambda m, h: m.conv(torch.tanh(z) * h) + z if (z := F.silu(h)) is not None else z,
        "v1 = silu(y); v2 = tanh(v1); v3 = v2*y; v1 is kept",
        0,
    ),
    "returned": (lambda m, h: (h, torch.tanh(h)), "v1 = tanh(y); y is kept", 0),
    "returned, a later value": (
        lambda m, h: (torch.tanh(z), z) if (z := F.silu(h)) is not None else z,
        "v1 = silu(y); v2 = tanh(v1); v1 is kept",
        0,
    ),
    "in place afterwards": (in_place_afterwards, "v1 = tanh(y); y is kept", 0),
    "the result in place afterwards": (result_in_place_afterwards, "v1 = tanh(y); y is kept", 0),
    "renamed before": (renamed_before, "v1 = tanh(y); v2 = 2*y; v3 = v1*v2; v2 is kept", 0),
    "names": (names, "v1 = tanh(y); y is kept", 0),
    "what the result does not read": (by_the_way, "v1 = sigmoid(y); v2 = tanh(y); v1 is kept", 0),
    "a copy": (a_copy, "v1 = tanh(y); v2 = v1 + 1; v1 is kept", 0),
    "behind a first form": (
        lambda m, h: m.conv(torch.tanh(z)) + z if (z := (h + 1).relu()) is not None else z,
        "v1 = tanh(y); y is kept",
        0,
    ),
    "a residual": (lambda m, h: (h, torch.tanh(h + m.full)), "v1 = y + full; v2 = tanh(v1); y is kept", 0),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", KEPT)
def test_both_values_come_from_one_operator(name: str, bias: bool) -> None:
    tail, program, repeats = KEPT[name]
    gm, site, model, x = read(tail, bias)
    assert str(site.keeping) == program
    assert len(site.keeping.repeats) == repeats
    rest = replaced(gm, site)
    assert "conv_transpose_keeping.default" in rest
    assert not {"conv_transpose1d", "conv_transpose.default"} & set(rest)
    assert_eagers(gm, model, x)


@pytest.mark.parametrize("name", KEPT)
def test_without_what_is_kept_the_site_is_what_it_was(name: str) -> None:
    gm, site, model, x = read(KEPT[name][0])
    assert site.program is None or site.program.kept is None
    rewrite.use_fused(site)
    gm.graph.lint()
    gm.recompile()
    assert_eagers(gm, model, x)


def test_the_operator_stands_before_every_reader() -> None:
    gm, site, _, _ = read(hifigan)
    rest = replaced(gm, site)
    assert rest.index("conv_transpose_keeping.default") < rest.index("conv1d")
    assert "leaky_relu" not in rest
    (operator,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fused_post.conv_transpose_keeping.default)
    result, kept = operator.users
    assert [user.target for user in result.users] == [torch.conv1d] * 3
    assert len(kept.users) == 3


def two_kept(m: Any, h: Tensor) -> Any:
    z = torch.tanh(h)
    return h, z, m.conv(torch.sigmoid(z))


def written_between(m: Any, h: Tensor) -> Any:
    y = m.conv(F.leaky_relu(h, 0.1))
    h.add_(1)
    return y + m.conv(F.leaky_relu(h, 0.1))


def written_through_a_view(m: Any, h: Tensor) -> Any:
    y = m.conv(F.leaky_relu(h, 0.1))
    h[:, :2].add_(1)
    return y + m.conv(F.leaky_relu(h, 0.1))


def operand_written_between(m: Any, h: Tensor) -> Any:
    y = m.conv(torch.tanh(h * m.a))
    m.a.add_(1)
    return y + m.conv(torch.tanh(h * m.a)) + h


def one_written(m: Any, h: Tensor) -> Any:
    z, same = F.leaky_relu(h, 0.1), F.leaky_relu(h, 0.1)
    y = m.conv(z) + m.conv(same)
    z.add_(1)
    return y * z * same


def one_written_through_a_view(m: Any, h: Tensor) -> Any:
    z = F.leaky_relu(h, 0.1)
    y = m.conv(z) + h
    same = F.leaky_relu(h, 0.1)
    z.view(-1).mul_(2)
    return y * z * same


def both_returned(m: Any, h: Tensor) -> Any:
    z = F.leaky_relu(h, 0.1)
    return m.conv(z), z, F.leaky_relu(h, 0.1), h


def slopes(m: Any, h: Tensor) -> Any:
    return m.conv(F.leaky_relu(h, 0.1)) + m.conv(F.leaky_relu(h, 0.2)) + h


def zeros(m: Any, h: Tensor) -> Any:
    return m.conv(F.leaky_relu(h, 0.0)) + m.conv(F.leaky_relu(h, -0.0)) + h


# The tail, the program with what is kept, if one is, and how many leaky_relus, tanhs and sigmoids are left.
LEFT: dict[str, tuple[Tail, str, int]] = {
    "two of them": (two_kept, "v1 = tanh(y); y is kept", 1),
    "written to in between": (written_between, "v1 = leaky_relu(y, 0.1); y is kept", 1),
    "written to through a view": (written_through_a_view, "v1 = leaky_relu(y, 0.1); y is kept", 1),
    "an operand is written to": (operand_written_between, "v1 = a[c]*y; v2 = tanh(v1); y is kept", 1),
    "of two equal ones one is written to": (one_written, "v1 = leaky_relu(y, 0.1); y is kept", 1),
    "the same through a view": (one_written_through_a_view, "v1 = leaky_relu(y, 0.1); y is kept", 1),
    "both are returned": (both_returned, "v1 = leaky_relu(y, 0.1); y is kept", 1),
    "other parameters": (slopes, "v1 = leaky_relu(y, 0.1); y is kept", 1),
    "zeros of two signs": (zeros, "v1 = leaky_relu(y, 0); y is kept", 1),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_one_value_is_left(name: str) -> None:
    tail, program, left = LEFT[name]
    gm, site, model, x = read(tail)
    assert str(site.keeping) == program
    rest = replaced(gm, site)
    assert sum(each in ("leaky_relu", "tanh", "sigmoid") for each in rest) == left
    assert_eagers(gm, model, x)


def test_equal_values_that_nobody_can_tell_apart_are_one_without_a_kept_one_too() -> None:
    def tail(m: Any, h: Tensor) -> Tensor:
        return m.conv(F.leaky_relu(h, 0.1)) + m.conv(F.leaky_relu(h, 0.1))

    gm, site, model, x = read(tail)
    assert site.keeping is None and str(site.program) == "v1 = leaky_relu(y, 0.1)"
    rest = replaced(gm, site)
    assert "leaky_relu" not in rest and "conv_transpose.default" in rest
    assert_eagers(gm, model, x)


def test_nothing_is_kept_beside_a_result_that_nobody_reads() -> None:
    def tail(m: Any, h: Tensor) -> Tensor:
        torch.tanh(h)
        return h.softmax(1)

    _, site, _, _ = read(tail)
    assert site.keeping is None and site.program is None


def test_nothing_is_kept_where_a_gradient_flows() -> None:
    model, x = Model(hifigan), torch.randn(2, 4, 7)
    (site,) = (match(node, bare=True) for node in find_convolutions(dynamo(model, x)))
    assert isinstance(site, Site) and site.keeping is None and site.program is None


STEPS: tuple[Callable[..., Any], ...] = (
    *[lambda m, v, w: F.leaky_relu(v, 0.1)] * 4,
    *[lambda m, v, w: torch.tanh(v)] * 2,
    *[lambda m, v, w: m.conv(v)] * 3,
    lambda m, v, w: v * m.a,
    lambda m, v, w: v + m.full,
    lambda m, v, w: v + w,
    lambda m, v, w: v * w,
    lambda m, v, w: v.detach(),
    lambda m, v, w: v.clone(),
    lambda m, v, w: v.view(v.shape),
    lambda m, v, w: v.view(-1).view(v.shape),
    lambda m, v, w: v.add_(0.5),
    lambda m, v, w: v.add_(w),
    lambda m, v, w: v[:, :2].mul_(2) is None or v,
    lambda m, v, w: m.a.add_(0.25) is None or v,
    lambda m, v, w: F.leaky_relu(v, 0.1, inplace=True),
    lambda m, v, w: v + v.mean(),
)


def drawn(seed: int) -> Tail:
    """Steps on values that were made before, the convolution's more often than others; any of them may be returned."""
    draw = random.Random(seed)
    steps = [(draw.choice(STEPS), draw.choice((0, 0, draw.randint(0, 9))), draw.randint(0, 9)) for _ in range(9)]
    also = sorted(draw.sample(range(10), draw.randint(0, 3)))

    def tail(m: Any, y: Tensor) -> tuple[Tensor, ...]:
        values = [y]
        for step, first, second in steps:
            v, w = (values[each % len(values)] for each in (first, second))
            values.append(step(m, v, w))
        return tuple(values[each] for each in [*also, -1])

    return tail


def shared(results: tuple[Tensor, ...]) -> list[bool]:
    """For each pair of results whether they share memory."""
    memories = [result.untyped_storage().data_ptr() for result in results]
    return [x == y for i, x in enumerate(memories) for y in memories[:i]]


@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_whatever_is_drawn_gives_eagers_numbers_in_memory_of_their_own(seed: int) -> None:
    torch.manual_seed(seed)
    torch._dynamo.reset()
    model, x = Model(drawn(seed)).eval(), torch.randn(2, 4, 7)
    sites: list[Site] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        (site,) = (match(node, bare=True) for node in find_convolutions(gm))
        sites.append(site)
        replaced(gm, site)
        return gm.forward

    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = torch.compile(model, backend=backend, fullgraph=True)(x)
    model.load_state_dict(state)
    expected = model(x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert shared(found) == shared(expected)
    assert len(sites) == 1

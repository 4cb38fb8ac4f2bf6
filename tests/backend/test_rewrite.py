"""What stands in the graph after a rewrite: the operations before, the operations after, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dialects import DIALECTS, call, dynamo
from torch import Tensor, fx, nn

from fusion_backend import backend, choice, explain, fused_post, rewrite
from fusion_backend.options import Options
from fusion_backend.patterns.site import Site, find_sites

KERNELS = {"epilogue": rewrite.use_epilogue, "fused": rewrite.use_fused}


class Model(nn.Module):
    def __init__(self, tail: Any, bias: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=bias, dtype=dtype)
        self.register_buffer("b", torch.randn(6, 1, 1, dtype=dtype))
        self.register_buffer("s", torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.25], dtype=dtype).reshape(6, 1, 1))
        self.register_buffer("factor", torch.tensor(-1.5, dtype=dtype))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.up(x))


def targets(gm: fx.GraphModule) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes if node.op.startswith("call")]


def seed(m: Any, y: Tensor) -> Tensor:
    y = torch.clamp(y + m.b, 0.0, 1.0)
    return torch.clamp(y * 2.0, 0.0, 1.0) / 2.0


TAILS = {
    "seed": seed,
    "bias only": lambda m, y: y,
    "numbers": lambda m, y: (y * -2 + 1).relu() - 3,
    "vectors": lambda m, y: (y.clamp(-1, 2) * m.s + m.b) / 2,
    "a scalar tensor": lambda m, y: (y.relu() * m.factor).clamp(max=1),
    "tensor bounds": lambda m, y: torch.minimum(y.clamp(m.s, m.b), m.factor) * 2,
    "followed by tanh": lambda m, y: torch.tanh((y + m.b).relu()),
    "in place": lambda m, y: y.add_(m.b).relu_().mul_(0.5),
}


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_folding_the_seed() -> None:
    model, x = Model(seed), torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        gm = dynamo(model, x)
        assert targets(gm) == ["conv_transpose2d", "add", "clamp", "mul", "clamp", "truediv"]
        (site,) = find_sites(gm)
        assert rewrite.fold(site)
        gm.recompile()
        assert targets(gm) == ["conv_transpose2d", "reshape", "to", "reshape", "add", "clamp"]
        torch.testing.assert_close(call(gm, x), model(x))


def test_a_tail_that_is_minimal_is_left_as_written() -> None:
    with torch.no_grad():
        gm = dynamo(Model(lambda m, y: (y + m.b).relu()), torch.randn(2, 4, 5, 7))
        before = gm.code
        (site,) = find_sites(gm)
        assert not rewrite.fold(site)
    assert gm.code == before


def test_the_epilogue_operator_takes_bias_and_tail() -> None:
    with torch.no_grad():
        gm = dynamo(Model(seed), torch.randn(2, 4, 5, 7))
        (site,) = find_sites(gm)
        rewrite.use_epilogue(site)
        gm.graph.lint()
        gm.recompile()
    names = targets(gm)
    assert "conv_transpose2d" in names and not {"clamp", "mul", "truediv"} & set(names)
    (convolution,) = [node for node in gm.graph.nodes if node.target is torch.conv_transpose2d]
    assert convolution.args[2] is None, "the bias is part of the shift"
    (epilogue,) = [node for node in gm.graph.nodes if node.target is torch.ops.fused_post.epilogue_.default]
    _, scale, shift, lo, hi, *numbers = epilogue.args
    assert (scale, lo, hi) == (None, None, None) and isinstance(shift, fx.Node)
    assert numbers == [1.0, 0.0, 0.0, 0.5]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", TAILS)
def test_an_operator_gives_eagers_numbers_in_every_dialect(name: str, dialect: str, kernel: str) -> None:
    if kernel == "fused" and dialect == "symbolic_trace":
        kernel = "epilogue"  # a module call keeps its weight to itself
    model, x = Model(TAILS[name]), torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        expected = model(x)
        gm = DIALECTS[dialect](model, x)
        for site in find_sites(gm):
            if isinstance(site, Site):
                KERNELS[kernel](site)
        gm.graph.lint()
        gm.recompile()
        torch.testing.assert_close(call(gm, x), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_operator_goes_through_inductor(
    name: str, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU tensor an operator computes its reference, so that the whole way can be tested without a GPU."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, x = Model(TAILS[name], dtype=dtype), torch.randn(2, 4, 5, 7, dtype=dtype)
    seen: list[Any] = []
    fuse = backend.fuse
    monkeypatch.setattr(backend, "fuse", lambda *args: seen.append(fuse(*args)) or seen[-1])
    with torch.no_grad():
        options = {"fused_post.strict": True, "fused_post.kernel": kernel}
        compiled = torch.compile(model, backend=fused_post, options=options)
        tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(compiled(x), model(x), **tolerance)
    assert [decision.kernel for decision in seen[0].plan] == [kernel]


def test_the_fused_operator_takes_convolution_bias_and_tail() -> None:
    with torch.no_grad():
        gm = dynamo(Model(seed), torch.randn(2, 4, 5, 7))
        (site,) = find_sites(gm)
        rewrite.use_fused(site)
        gm.graph.lint()
        gm.recompile()
    assert not {"conv_transpose2d", "clamp", "mul", "truediv"} & set(targets(gm))
    (fused,) = [node for node in gm.graph.nodes if node.target is torch.ops.fused_post.conv_transpose.default]
    x, weight, *sizes, groups, scale, shift, lo, hi, a, b, low, high, channels_last, _, plan = fused.args
    assert sizes == [[2, 2], [1, 1], [1, 1], [1, 1]] and groups == 1
    assert (scale, lo, hi) == (None, None, None) and isinstance(shift, fx.Node)
    assert (a, b, low, high) == (1.0, 0.0, 0.0, 0.5) and channels_last is False
    assert all(node.op == "placeholder" for node in (x, weight))
    assert plan is None


@pytest.mark.parametrize("leave_bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_operator_for_training_takes_convolution_bias_and_tail(fused: bool, leave_bias: bool) -> None:
    gm = dynamo(Model(lambda m, y: torch.relu(y + m.b).clamp(max=1) * 0.5), torch.randn(2, 4, 5, 7))
    assert targets(gm) == ["conv_transpose2d", "add", "relu", "clamp", "mul"]
    (site,) = find_sites(gm)
    rewrite.use_training(site, fused, leave_bias)
    gm.graph.lint()
    gm.recompile()
    arithmetic = ["reshape", "to", "mul", "contiguous"]
    arithmetic += [] if leave_bias else ["reshape", "to", "mul", "add"]
    assert sorted(targets(gm)) == sorted([*arithmetic, "conv_transpose_training.default", "getitem"])
    (made,) = [node for node in gm.graph.nodes if "conv_transpose_training" in str(node.target)]
    _, _, bias, *sizes, groups, scale, shift, lo, hi, a, b, low, high = made.args[:16]
    *gate, by_us, last, _ = made.args[16:]
    assert (bias is not None) == leave_bias
    assert sizes == [[2, 2], [1, 1], [1, 1], [1, 1]] and groups == 1
    assert (scale, lo, hi) == (None, None, None) and isinstance(shift, fx.Node)
    assert (a, b, low, high) == (0.5, 0.0, 0.0, 0.5)
    assert gate == [True, False, False]
    assert (by_us, last) == (fused, False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_is_asked_for_trains(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, x = Model(seed), torch.randn(2, 4, 5, 7)
    options = {"fused_post.kernel": kernel, "fused_post.strict": True}
    compiled = torch.compile(model, backend=fused_post, options=options)
    assert explain(compiled, x).sites[0].kernel == kernel
    gradients = [torch.autograd.grad(f(x).square().sum(), [model.up.weight, model.up.bias]) for f in (compiled, model)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_fused_operator_keeps_eagers_memory_format(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, x = Model(seed), torch.randn(2, 4, 5, 7).to(memory_format=memory_format)
    with torch.no_grad():
        compiled = torch.compile(model, backend=fused_post, options={"fused_post.kernel": "fused"})
        assert compiled(x).stride() == model(x).stride()


def test_the_fused_operator_casts_as_autocast_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, x = Model(lambda m, y: y.relu() * 2), torch.randn(2, 4, 5, 7)
    options = {"fused_post.kernel": "fused", "fused_post.strict": True}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, expected = torch.compile(model, backend=fused_post, options=options)(x), model(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_several_users_of_a_biased_convolution_read_the_epilogue() -> None:
    model, x = Model(lambda m, y: torch.tanh(y) + torch.sigmoid(y)), torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        gm = dynamo(model, x)
        (site,) = find_sites(gm)
        rewrite.use_epilogue(site)
        gm.graph.lint()
        gm.recompile()
        torch.testing.assert_close(call(gm, x), model(x))


def test_a_kernel_that_does_not_compile_falls_back_once_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, x = Model(seed), torch.randn(2, 4, 5, 7)
    calls: list[list[str]] = []

    def inductor(mode: Any, options: Any) -> Any:
        def compile_or_fail(gm: fx.GraphModule, example_inputs: Any) -> Any:
            calls.append(targets(gm))
            if any("epilogue" in name for name in calls[-1]):
                raise RuntimeError("ptxas says no")
            return gm.forward

        compile_or_fail.config = {}  # type: ignore[attr-defined]
        return compile_or_fail

    monkeypatch.setattr(backend.opt, "inductor", inductor)
    with torch.no_grad(), caplog.at_level("WARNING"):
        compiled = torch.compile(model, backend=fused_post, options={"fused_post.kernel": "epilogue"})
        torch.testing.assert_close(compiled(x), model(x))
    assert len(calls) == 2 and calls[1] == ["conv_transpose2d", "add", "clamp", "mul", "clamp", "truediv"]
    (record,) = [record for record in caplog.records if record.name.startswith("fusion_backend")]
    assert "ptxas says no" in record.getMessage()


def test_fuse_reports_its_plan() -> None:
    with torch.no_grad():
        gm = dynamo(Model(seed), torch.randn(2, 4, 5, 7))
        fused = backend.fuse(gm, Options(strict=True))
    assert [decision.kernel for decision in fused.plan] == ["inductor"] and not backend.has_kernels(gm)


ON_A_BOUND = {
    "a folded bound": lambda y: (y.clamp(min=-0.1) * 1.5 * 2 + 0.3).sqrt(),
    "a folded shift": lambda y: (torch.relu(y) + 0.3 - 0.1 - 0.2).sqrt(),
    "a bound of a program's": lambda y: (torch.tanh(y).clamp(min=-0.1) * 3 + 0.3).sqrt(),
    "a shift of a program's": lambda y: (torch.tanh(torch.relu(y)) + 0.3 - 0.1 - 0.2).sqrt(),
    "a division": lambda y: 1 / (y.clamp(min=0.3) - 0.1 - 0.2 + 1e-20),
}


@pytest.mark.parametrize("kernel", ["auto", "fused"])
@pytest.mark.parametrize("tail", ON_A_BOUND.values(), ids=ON_A_BOUND)
@torch.no_grad()
def test_what_stands_on_a_bound_is_what_it_is_in_eager(monkeypatch: pytest.MonkeyPatch, tail: Any, kernel: str) -> None:
    """To the bit: behind it there may be a root, or a division."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    up, x = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), torch.randn(2, 4, 5, 7) * 3
    options = {"fused_post.kernel": kernel, "fused_post.strict": True}
    y = torch.compile(lambda x: tail(up(x)), backend=fused_post, options=options)(x)
    torch.testing.assert_close(y, tail(up(x)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_weight_of_prelus_kernel_broadcasts_like_any_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the last dimension, and not along the channels, of which there are as many here."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    up, x, weight = nn.ConvTranspose2d(4, 6, 1), torch.randn(2, 4, 5, 6), torch.arange(6.0)

    def model(x: Tensor) -> Tensor:
        return torch._prelu_kernel(up(x), weight)

    options = {"fused_post.kernel": "fused", "fused_post.strict": True}
    torch.testing.assert_close(torch.compile(model, backend=fused_post, options=options)(x), model(x))


@torch.no_grad()
def test_a_tail_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    up, x = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), torch.randn(1, 4, 2, 2)

    def model(x: Tensor) -> Tensor:
        y = up(x)
        for _ in range(1100):
            y = torch.sin(y)
        return y

    options = {"fused_post.kernel": "fused", "fused_post.strict": True}
    (site,) = explain(torch.compile(Wrapped(model), backend=fused_post, options=options), x).sites
    assert site.kernel == "fused" and "it is behind 64 others" in site.reason


class Wrapped(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

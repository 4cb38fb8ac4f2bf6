"""Tails with activations through the whole backend: numbers, the report, and what is left to Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS, call
from torch import Tensor, fx, nn

pytest.importorskip("triton")

from benchmarks.kernelbench import PROBLEMS
from benchmarks.measure import TOLERANCE, relative_rmse
from fusion_backend import backend, choice, explain, fused_post, rewrite
from fusion_backend.kernels import hopper_strips
from fusion_backend.patterns.site import Site, find_convolutions, match
from tests.kernels.implementations import GPU_MARKS

KERNELS = {"epilogue": rewrite.use_epilogue, "fused": rewrite.use_fused}


class Model(nn.Module):
    def __init__(self, tail: Any, rank: int = 2, bias: bool = True):
        super().__init__()
        convolution = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.up = convolution(4, 6, 3, 2, 1, 1, bias=bias)
        self.b = nn.Parameter(torch.randn(6, *(1,) * rank))
        self.a = nn.Parameter(0.5 + torch.rand(6, *(1,) * rank))
        self.slope = nn.Parameter(torch.rand(6))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.up(x))


def original_kept(m: Any, y: Tensor) -> Tensor:
    original = y.clone().detach()
    return ((y + m.b + original) * original) + original


def in_place(m: Any, y: Tensor) -> Tensor:
    y.tanh_()
    return F.silu(y.add_(m.b), inplace=True)


TAILS = {
    "tanh": lambda m, y: torch.tanh(y - m.b),
    "mish, clamp": lambda m, y: F.hardtanh(F.mish(y) + 0.5, -1, 1) * 2,
    "the original kept": original_kept,
    "hardswish": lambda m, y: y * F.hardswish(y),
    "gelu": lambda m, y: F.gelu(torch.min(y + 0.5, torch.tensor(0.0))) * 2,
    "prelu": lambda m, y: F.prelu(y, m.slope) * m.a,
    "snake": lambda m, y: y + torch.sin(m.a * y) ** 2 / m.a,
    "in place": in_place,
    "bounds by channel": lambda m, y: torch.minimum(torch.sigmoid(y), m.a).clamp(min=m.b),
}


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", TAILS)
@torch.no_grad()
def test_an_operator_gives_eagers_numbers_in_every_dialect(name: str, dialect: str, kernel: str) -> None:
    if kernel == "fused" and dialect == "symbolic_trace":
        kernel = "epilogue"  # a module call keeps its weight to itself
    model, x = Model(TAILS[name]).eval(), torch.randn(2, 4, 5, 7)
    expected = model(x)
    gm = DIALECTS[dialect](model, x)
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site) and site.program is not None
    KERNELS[kernel](site)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(call(gm, x), expected)


@pytest.mark.parametrize(
    ("name", "kernel", "rank", "dtype", "dynamic"),
    [
        ("tanh", "fused", 1, torch.float32, False),
        ("mish, clamp", "fused", 2, torch.bfloat16, True),
        ("the original kept", "fused", 3, torch.float32, False),
        ("hardswish", "epilogue", 3, torch.float16, False),
        ("prelu", "fused", 2, torch.float32, True),
        ("snake", "fused", 1, torch.bfloat16, False),
        ("in place", "epilogue", 2, torch.float32, False),
        ("bounds by channel", "fused", 2, torch.float16, False),
    ],
)
@torch.no_grad()
def test_the_whole_way_through_inductor(
    name: str, kernel: str, rank: int, dtype: torch.dtype, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU tensor an operator computes its reference, so that the whole way can be tested without a GPU."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model = Model(TAILS[name], rank).eval().to(dtype)
    seen: list[Any] = []
    fuse = backend.fuse
    monkeypatch.setattr(backend, "fuse", lambda *args: seen.append(fuse(*args)) or seen[-1])
    options = {"fused_post.strict": True, "fused_post.kernel": kernel}
    compiled = torch.compile(model, backend=fused_post, options=options, dynamic=dynamic)
    for N in (2, 3):
        x = torch.randn(N, 4, *(5, 6, 4)[:rank], dtype=dtype)
        allowed = 2 * relative_rmse(model(x), model, (x,)) + TOLERANCE[dtype] / 10
        assert relative_rmse(compiled(x), model, (x,)) <= allowed
    assert {decision.kernel for fused in seen for decision in fused.plan} == {kernel}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(32, 24, 3, 2, 1, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.up(x) + skip
        return (y * F.hardswish(y)).relu() - skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_residual_through_inductor(
    kernel: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose layout differs from the convolution's: it ends the tail."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model = Residual().eval()
    options = {"fused_post.strict": True, "fused_post.kernel": kernel}
    compiled = torch.compile(model, backend=fused_post, options=options, dynamic=True)
    for N in (2, 3):
        x = torch.randn(N, 32, 5, 6).to(memory_format=memory_format)
        skip = torch.randn(N, 24, 10, 12)
        for other in (skip.to(memory_format=memory_format), skip, skip.mT.contiguous().mT):
            torch.testing.assert_close(compiled(x, other), model(x, other))
    same, differs = (explain(compiled, x, other).sites[0] for other in (skip.to(memory_format=memory_format), other))
    assert same.equation.endswith(
        "; v1 = y + args_1; v2 = hardswish(v1); v3 = v1*v2; v4 = max(v3, 0); v5 = v4 - args_1"
    )
    assert ";" not in differs.equation and "differs by position" in differs.reason


@torch.no_grad()
def test_the_report_says_the_steps_where_a_kernel_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, x = Model(TAILS["mish, clamp"]).eval(), torch.randn(2, 4, 5, 7)
    compiled = torch.compile(model, backend=fused_post, options={"fused_post.kernel": "fused"})
    (fused,), (plain,) = explain(compiled, x).sites, explain(model, x).sites
    assert fused.equation == "y = x + up.bias[c]; v1 = mish(y); v2 = min(max(2*v1 + 1, -2), 2)"
    assert "the tail ends at return: the value leaves the graph" in fused.reason
    assert (plain.kernel, plain.equation) == ("inductor", "y = x + up.bias[c]")
    assert "the tail ends at mish at test_program.py" in plain.reason


@torch.no_grad()
def test_a_bare_convolution_with_an_activation_is_a_site_for_the_fused_kernel_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, x = Model(lambda m, y: torch.tanh(y), bias=False).eval(), torch.randn(2, 4, 5, 7)
    found = {}
    for kernel in ("fused", "epilogue", "inductor", "auto"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=fused_post, options={"fused_post.kernel": kernel})
        (site,) = explain(compiled, x).sites
        found[kernel] = (site.kernel, site.equation)
        torch.testing.assert_close(compiled(x), model(x))
    missed = (None, "")
    assert found == {"fused": ("fused", "y = x; v1 = tanh(y)"), "epilogue": missed, "inductor": missed, "auto": missed}


def site_of(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, Site]:
    gm = DIALECTS["dynamo"](model.eval(), *inputs)
    (site,) = (match(node, bare=True) for node in find_convolutions(gm))
    assert isinstance(site, Site)
    return gm, site


@torch.no_grad()
def test_a_site_with_a_residual_is_none_for_the_march_on_hopper() -> None:
    x, reason = torch.randn(2, 32, 5, 6), "a program reads a tensor of the result's shape"
    for tail in (torch.relu, torch.tanh):
        _, site = site_of(Model(lambda m, y, tail=tail: tail(y)), x[:, :4])
        assert hopper_strips.why_not(choice.problem_of(site)[0]) != reason
    _, site = site_of(Residual(), x, torch.randn(2, 24, 10, 12))
    assert hopper_strips.why_not(choice.problem_of(site)[0]) == reason


@torch.no_grad()
def test_a_site_that_becomes_channels_last_keeps_its_residual_out_of_the_kernel() -> None:
    """The residual would have to become channels_last as well, in a pass of its own."""
    x, skip = torch.randn(2, 32, 5, 6), torch.randn(2, 24, 10, 12)
    gm, site = site_of(Residual(), x, skip)
    assert choice.taken(site, "fused").program is not None
    for left in (choice.taken(site, "fused", relayout=True), choice.taken(site, "inductor")):
        assert left.program is None and left.tail == site.tail
    rewrite.use_fused(site, relayout=True)
    gm.graph.lint()
    gm.recompile()
    names = [getattr(node.target, "__name__", node.target) for node in gm.graph.nodes if node.op.startswith("call")]
    assert "hardswish" in names and "conv_transpose.default" in names
    _, alone = site_of(Model(TAILS["tanh"]), torch.randn(2, 4, 5, 7))
    assert choice.taken(alone, "fused", relayout=True).program is not None


# Problems of KernelBench, level 2: the program of each, and where it ends.
KERNELBENCH = {
    2: (None, ""),
    5: ("v1 = tanh(y)", "return: the value leaves the graph"),
    11: ("v1 = tanh(y)", "max_pool2d"),
    16: ("v1 = mish(y); v2 = min(max(2*v1 + 1, -2), 2)", "return: the value leaves the graph"),
    19: ("v1 = gelu(y)", "group_norm"),
    20: ("v1 = y + bias_after[c]; v2 = v1 + y; v3 = v2*y; v4 = v3 + y", "return: the value leaves the graph"),
    26: ("v1 = y + args_1; v2 = hardswish(v1); v3 = v1*v2", "return: the value leaves the graph"),
    60: ("v1 = sigmoid(y); v2 = v1*y", "group_norm"),
    61: (None, ""),
    74: ("v1 = leaky_relu(y, 0.2); v2 = scale[c]*v1; v3 = leaky_relu(v2, 0.2)", "max_pool3d"),
    93: ("v1 = gelu(y); v2 = 2*v1", "return: the value leaves the graph"),
    100: (None, ""),
}


@pytest.mark.parametrize("number", KERNELBENCH)
@torch.no_grad()
def test_the_tails_of_kernelbench(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, inputs = PROBLEMS[number].build(small=True)
    compiled = torch.compile(model, backend=fused_post, options={"fused_post.kernel": "fused"})
    (site,) = explain(compiled, *inputs).sites
    program, end = KERNELBENCH[number]
    assert site.kernel == "fused"
    assert site.equation.partition("; ")[2] == (program or "")
    assert end in site.reason


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("name", TAILS)
@torch.no_grad()
def test_tails_on_a_gpu(name: str, device: str, dtype: torch.dtype, last: bool) -> None:
    """Kernels of ours compute all of it, launched by Inductor without Python."""
    from torch._inductor.utils import run_and_get_code

    if name == "gelu":
        pytest.skip("its 0-dim tensor is made anew in each call, on the CPU")
    memory_format = torch.channels_last if last else torch.contiguous_format
    model = Model(TAILS[name]).eval()
    model.up = nn.ConvTranspose2d(32, 6, 3, 2, 1, 1)
    model = model.to(device, dtype).to(memory_format=memory_format)
    x = torch.randn(2, 32, 17, 24, device=device, dtype=dtype).to(memory_format=memory_format)
    options = {"fused_post.strict": True, "fused_post.kernel": "fused"}
    result, codes = run_and_get_code(torch.compile(model, backend=fused_post, options=options), x)
    allowed = 2 * relative_rmse(model(x), model, (x,)) + TOLERANCE[dtype] / 10
    if dtype == torch.float32:
        allowed = max(allowed, 1e-3)  # TF32, where cuDNN may take none
    assert relative_rmse(result, model, (x,)) <= allowed
    assert result.stride() == model(x).stride()
    assert all("torch.ops.fused_post" not in code and "extern_kernels.conv" not in code for code in codes)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@torch.no_grad()
def test_a_residual_on_a_gpu(device: str, dtype: torch.dtype, last: bool) -> None:
    memory_format = torch.channels_last if last else torch.contiguous_format
    model = Residual().eval().to(device, dtype).to(memory_format=memory_format)
    x = torch.randn(2, 32, 17, 24, device=device, dtype=dtype).to(memory_format=memory_format)
    skip = torch.randn(2, 24, 34, 48, device=device, dtype=dtype).to(memory_format=memory_format)
    compiled = torch.compile(
        model, backend=fused_post, options={"fused_post.strict": True, "fused_post.kernel": "fused"}
    )
    (site,) = explain(compiled, x, skip).sites
    assert "v5 = v4 - args_1" in site.equation
    allowed = 2 * relative_rmse(model(x, skip), model, (x, skip)) + TOLERANCE[dtype] / 10
    if dtype == torch.float32:
        allowed = max(allowed, 1e-3)  # TF32, where cuDNN may take none
    assert relative_rmse(compiled(x, skip), model, (x, skip)) <= allowed

"""Tails of which others read a value as well, through the whole backend: numbers, the report, and who keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from benchmarks.measure import TOLERANCE, relative_rmse
from fusion_backend import backend, choice, explain, fused_post
from fusion_backend.kernels import problem
from tests.kernels.implementations import GPU_MARKS

CONV = ((nn.ConvTranspose1d, nn.Conv1d), (nn.ConvTranspose2d, nn.Conv2d), (nn.ConvTranspose3d, nn.Conv3d))
FUSED = {"fused_post.strict": True, "fused_post.kernel": "fused"}


class HiFiGan(nn.Module):
    """A stage of HiFi-GAN: each residual block reads the up-convolution's output twice."""

    def __init__(self, C_in: int = 8, C: int = 6, rank: int = 1, bias: bool = True, sizes: tuple[int, ...] = (4, 2, 1)):
        super().__init__()
        up, conv = CONV[rank - 1]
        self.up = up(C_in, C, *sizes, bias=bias)
        self.blocks = nn.ModuleList(conv(C, C, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(F.leaky_relu(x, 0.1))
        total = self.blocks[0](F.leaky_relu(h, 0.1)) + h
        for block in list(self.blocks)[1:]:
            total += block(F.leaky_relu(h, 0.1)) + h
        return total / len(self.blocks)


class Tail(nn.Module):
    def __init__(self, tail: Callable[..., Any]) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(8, 6, 4, 2, 1)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.tail = tail

    def forward(self, x: Tensor) -> Any:
        return self.tail(self, self.up(x))


@pytest.fixture(autouse=True)
def _reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU tensor an operator computes its reference, so that the whole way can be tested without a GPU."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    torch._dynamo.reset()
    torch.manual_seed(0)


def plans_seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    fuse = backend.fuse
    monkeypatch.setattr(backend, "fuse", lambda *args: seen.append(fuse(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize(
    ("rank", "dtype", "dynamic", "bias", "inference"),
    [
        (1, torch.float32, False, True, torch.no_grad),
        (1, torch.bfloat16, True, False, torch.no_grad),
        (2, torch.float32, True, True, torch.inference_mode),
        (3, torch.float16, False, True, torch.no_grad),
    ],
)
def test_a_stage_of_hifigan(
    rank: int, dtype: torch.dtype, dynamic: bool, bias: bool, inference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = plans_seen(monkeypatch)
    model = HiFiGan(rank=rank, bias=bias).to(dtype)
    compiled = torch.compile(model, backend=fused_post, options=FUSED, dynamic=dynamic)
    with inference():
        for N in (2, 3):
            x = torch.randn(N, 8, *(5, 6, 4)[:rank], dtype=dtype)
            allowed = 2 * relative_rmse(model(x), model, (x,)) + TOLERANCE[dtype] / 10
            assert relative_rmse(compiled(x), model, (x,)) <= allowed
    assert all(decision.choice.keeps for fused in seen for decision in fused.plan)


def test_channels_last_stays_what_it_is() -> None:
    model = HiFiGan(rank=2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    kept = lambda x: (h := model.up(x), F.leaky_relu(h, 0.1))  # noqa: E731
    with torch.no_grad():
        for function in (model, kept):
            found, expected = torch.compile(function, backend=fused_post, options=FUSED)(x), function(x)
            torch.testing.assert_close(found, expected)
            pairs = zip(found, expected, strict=True) if function is kept else [(found, expected)]
            assert all(ours.stride() == theirs.stride() for ours, theirs in pairs)


def test_a_site_that_becomes_channels_last_keeps_nothing() -> None:
    """Both would have to be turned."""
    with torch.no_grad():
        model, x = HiFiGan(rank=2), torch.randn(2, 8, 5, 6)
        compiled = torch.compile(model, backend=fused_post, options=FUSED, dynamic=False)
        (site,) = explain(compiled, x).sites
        assert site.kernel == "fused" and site.equation == "y = x + up.bias[c]"
        torch.testing.assert_close(compiled(x), model(x))


def in_place_afterwards(m: Any, h: Tensor) -> Any:
    z = m.conv(F.leaky_relu(h, 0.1))
    h.add_(1)
    return z, h * z


def result_in_place_afterwards(m: Any, h: Tensor) -> Any:
    z = F.leaky_relu(h, 0.1)
    y = m.conv(z) + h
    z.add_(1)
    return y, z


def returned(m: Any, h: Tensor) -> Any:
    return h, F.leaky_relu(h, 0.1)


def equal_ones_returned(m: Any, h: Tensor) -> Any:
    return F.leaky_relu(h, 0.1), F.leaky_relu(h, 0.1), h


@pytest.mark.parametrize("tail", [in_place_afterwards, result_in_place_afterwards, returned, equal_ones_returned])
@torch.no_grad()
def test_results_are_eagers_and_have_memory_of_their_own(tail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, model, x = plans_seen(monkeypatch), Tail(tail), torch.randn(2, 8, 7)
    found, expected = torch.compile(model, backend=fused_post, options=FUSED)(x), model(x)
    torch.testing.assert_close(found, expected)
    assert [decision.choice.keeps for fused in seen for decision in fused.plan] == [True]
    for ours, theirs in zip(found, expected, strict=True):
        ours.mul_(2)
        theirs.mul_(2)
    torch.testing.assert_close(found, expected)


def test_where_a_gradient_flows_the_tail_ends_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = plans_seen(monkeypatch), torch.randn(2, 8, 7)
    ours, theirs = HiFiGan(), HiFiGan()
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend=fused_post, options=FUSED)
    for train in (True, False):
        ours.train(train)
        for run, model in ((compiled, ours), (theirs, theirs)):
            model.zero_grad()
            run(x).square().sum().backward()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=1e-4, atol=1e-4)
    assert not any(decision.choice.keeps for fused in seen for decision in fused.plan)


def test_a_frozen_site_in_front_of_what_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, model, x = plans_seen(monkeypatch), HiFiGan(), torch.randn(2, 8, 7)
    model.up.requires_grad_(False)
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([block.weight.grad.clone() for block in model.blocks])
    torch.testing.assert_close(*gradients)
    assert [decision.choice.keeps for fused in seen for decision in fused.plan] == [True]


@torch.no_grad()
def test_the_report_says_what_is_kept() -> None:
    model, x = HiFiGan(), torch.randn(2, 8, 7)
    (site,) = explain(torch.compile(model, backend=fused_post, options=FUSED), x).sites
    assert site.equation == "y = x + up.bias[c]; v1 = leaky_relu(y, 0.1); y is kept"
    assert "the tail ends at conv1d at" in site.reason
    (plain,) = explain(torch.compile(model, backend=fused_post, options={"fused_post.kernel": "inductor"}), x).sites
    assert plain.equation == "y = x + up.bias[c]" and "its value has 6 users" in plain.reason


@torch.no_grad()
def test_nothing_is_kept_for_a_result_that_inductor_makes_in_a_pass_that_is_needed_anyway() -> None:
    """Behind the first value it reads that once more, and the result need not be in memory."""
    for tail, kept in (
        (lambda m, h: (F.leaky_relu(h, 0.1).softmax(1), h), False),
        (lambda m, h: (m.conv(F.leaky_relu(h, 0.1)), h.mean()), True),
    ):
        compiled = torch.compile(Tail(tail), backend=fused_post, options=FUSED)
        (site,) = explain(compiled, torch.randn(2, 8, 7)).sites
        assert site.kernel == "fused" and ("is kept" in site.equation) == kept


@torch.no_grad()
def test_nothing_is_kept_in_front_of_steps_that_take_time() -> None:
    """A few warps of a product would work them out, where a pass has all of a GPU's."""
    for step, kept in ((torch.sin, False), (torch.tanh, False), (lambda h: torch.minimum(h, 2 * h), True)):
        tail = lambda m, h, step=step: (m.conv(step(h)), h.mean())  # noqa: E731
        (site,) = explain(torch.compile(Tail(tail), backend=fused_post, options=FUSED), torch.randn(2, 8, 7)).sites
        assert site.kernel == "fused" and ("is kept" in site.equation) == kept


@pytest.mark.parametrize("hopper", [False, True])
@torch.no_grad()
def test_auto_keeps_a_value_where_one_write_more_is_predicted_to_be_faster_than_a_pass(
    hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes that are measured on an H200: in float32 the fastest product there is turned back, and keeps nothing."""
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(problem, "shared_memory_limit", lambda device: 227 * 1024)
    monkeypatch.setattr(problem, "is_hopper", lambda device: hopper)
    with torch.device("meta"):
        model, x = HiFiGan(512, 256, sizes=(16, 8, 4)), torch.randn(16, 512, 256)
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        (site,) = explain(model.to(dtype), x.to(dtype)).sites
        kept[dtype] = (site.kernel, "is kept" in site.equation)
    float32 = ("fused", False) if hopper else ("inductor", False)
    assert kept == {torch.float32: float32, torch.bfloat16: ("fused", True)}


@torch.no_grad()
def test_what_is_fused_without_a_kept_value_is_not_lost_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no plan stores two, or none is known to be as fast, the tail is the shorter one."""
    with torch.device("meta"):
        model, x = HiFiGan(512, 256, sizes=(16, 8, 4)), torch.randn(16, 512, 256)

    def only_one_value(site: Any, *rest: Any, **kwargs: Any) -> Any:
        keeps = site.program is not None and site.program.kept is not None
        return "nothing is measured" if keeps else choice.Prediction("general", 1.5, "itself", 0)

    monkeypatch.setattr(choice, "measured_plan", only_one_value)
    monkeypatch.setattr(choice, "_takes_prologue", lambda site, plan: False)
    for kernel in ("auto", "fused"):
        compiled = torch.compile(model, backend=fused_post, options={"fused_post.kernel": kernel})
        (site,) = explain(compiled, x).sites
        assert (site.kernel, site.equation) == ("fused", "y = x + up.bias[c]")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
@torch.no_grad()
def test_a_stage_on_a_gpu(rank: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel writes both, launched by Inductor without Python; also where another way is measured to be faster."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(choice, "measured_plan", lambda *given, **named: "nothing is measured")
    # A contiguous site in two dimensions would become channels_last with the convolutions beside it, and keep nothing.
    memory_format = torch.channels_last if rank == 2 else torch.contiguous_format
    model = HiFiGan(32, 24, rank).to(device, dtype, memory_format=memory_format)
    x = torch.randn(2, 32, *(37, 12, 9)[:rank], device=device, dtype=dtype).to(memory_format=memory_format)
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    (site,) = explain(compiled, x).sites
    assert "y is kept" in site.equation
    result, codes = run_and_get_code(compiled, x)
    assert codes
    allowed = 2 * relative_rmse(model(x), model, (x,)) + TOLERANCE[dtype] / 10
    if dtype == torch.float32:
        allowed = max(allowed, 1e-3)  # TF32, where cuDNN may take none
    assert relative_rmse(result, model, (x,)) <= allowed
    assert all("torch.ops.fused_post" not in code for code in codes)

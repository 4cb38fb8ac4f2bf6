"""Steps before a convolution through the whole backend: numbers, the report, what is taken and what is Inductor's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

pytest.importorskip("triton")

from benchmarks.measure import TOLERANCE, relative_rmse
from fusion_backend import backend, choice, explain, fused_post, plan
from fusion_backend.kernels import problem
from fusion_backend.options import Options
from tests.kernels.implementations import GPU_MARKS

UPS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Snake(nn.Module):
    """BigVGAN's."""

    def __init__(self, channels: int, rank: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(1, channels, *(1,) * rank))

    def forward(self, x: Tensor) -> Tensor:
        alpha = torch.exp(self.alpha)
        return x + (1.0 / (alpha + 1e-9)) * torch.pow(torch.sin(x * alpha), 2)


def norm(channels: int, rank: int) -> nn.Module:
    made = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](channels)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return nn.Sequential(made, nn.ReLU(inplace=True))


HEADS: dict[str, Any] = {
    "HiFi-GAN": lambda channels, rank: nn.LeakyReLU(0.1),
    "EnCodec": lambda channels, rank: nn.ELU(alpha=1.0),
    "BigVGAN": Snake,
    "BatchNorm, relu": norm,
    "sigmoid": lambda channels, rank: nn.Sigmoid(),
    "in place": lambda channels, rank: nn.SiLU(inplace=True),
}


class Up(nn.Module):
    def __init__(self, head: str, rank: int = 2, channels: int = 8):
        super().__init__()
        self.pre = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](channels, channels, 1, bias=False)
        self.head = HEADS[head](channels, rank)
        self.up = UPS[rank - 1](channels, 6, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(self.head(self.pre(x))))


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU tensor an operator computes its reference, so that the whole way can be tested without a GPU."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)


FUSED = {"fused_post.strict": True, "fused_post.kernel": "fused"}


def rewritten(model: nn.Module) -> Any:
    """As with FUSED, but run without Inductor."""

    def fused(gm: fx.GraphModule, inputs: Any) -> Any:
        backend.fuse(gm, Options(kernel="fused", strict=True))
        return gm.forward

    return torch.compile(model, backend=fused, fullgraph=True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("head", "rank", "dtype", "dynamic", "last"),
    [
        ("EnCodec", 1, torch.bfloat16, False, False),
        ("BigVGAN", 2, torch.float32, True, True),
        ("in place", 3, torch.float16, False, False),
    ],
)
@torch.no_grad()
def test_the_whole_way_through_inductor(
    head: str, rank: int, dtype: torch.dtype, dynamic: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_format = torch.channels_last if last else torch.contiguous_format
    model = Up(head, rank).eval().to(dtype)
    seen: list[Any] = []
    fuse = backend.fuse
    monkeypatch.setattr(backend, "fuse", lambda *args: seen.append(fuse(*args)) or seen[-1])
    monkeypatch.setattr(choice, "is_relaid", lambda site, around: False)
    compiled = torch.compile(model, backend=fused_post, options=FUSED, dynamic=dynamic)
    for N in (2, 3):
        x = torch.randn(N, 8, *(5, 6, 4)[:rank]).to(dtype).to(memory_format=memory_format)
        given = x.clone()
        allowed = 2 * relative_rmse(model(x), model, (x,)) + TOLERANCE[dtype] / 10
        assert relative_rmse(compiled(given), model, (x,)) <= allowed
        assert torch.equal(given, x)
    decisions = [decision for fused in seen for decision in fused.plan]
    assert decisions and all(decision.choice.prologue for decision in decisions)


class Vocoder(nn.Module):
    """HiFi-GAN's generator, small: a leaky_relu before each up-convolution, residual blocks between."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.post = nn.Conv1d(5, 16, 3, padding=1), nn.Conv1d(4, 1, 3, padding=1)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(16 >> i, 8 >> i, 4, 2, 1) for i in range(2))
        self.blocks = nn.ModuleList(nn.Conv1d(8 >> i, 8 >> i, 3, padding=1) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = x + block(F.leaky_relu(x, 0.1))
        return torch.tanh(self.post(F.leaky_relu(x)))


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_a_vocoder_and_its_report() -> None:
    model, x = Vocoder().eval(), torch.randn(2, 5, 7)
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    torch.testing.assert_close(rewritten(model)(x), model(x))
    report = explain(compiled, x)
    assert [site.prologue for site in report.sites] == ["v1 = leaky_relu(input, 0.1)"] * 2
    first = Vocoder.forward.__code__.co_firstlineno + 3
    assert report.sites[0].source == f"test_prologue.py:{first}, test_prologue.py:{first + 1}"
    assert "       before  v1 = leaky_relu(input, 0.1)\n" in str(report)
    assert [site.prologue for site in explain(model, x).sites] == ["", ""]


class Two(nn.Module):
    """The steps between are the first one's tail and the second one's prologue."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ConvTranspose1d(8, 8, 2, 2, bias=False), nn.ConvTranspose1d(8, 6, 2, 2)
        self.norm = norm(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(torch.exp(x))))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("left", [False, True], ids=["both fused", "the first left to Inductor"])
@torch.no_grad()
def test_what_one_site_has_for_a_tail_is_no_others_prologue(left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, choose = Two().eval(), torch.randn(2, 8, 5), plan.choose
    kept = choice.Choice("inductor", "for the test", folds=False)
    if left:
        names = ("conv_transpose1d",)
        monkeypatch.setattr(
            plan, "choose", lambda site, *rest: kept if site.convolution.node.name in names else choose(site, *rest)
        )
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    first, second = explain(compiled, x).sites
    torch.testing.assert_close(rewritten(model)(x), model(x), rtol=1e-4, atol=1e-5)
    assert first.prologue == ("" if left else "v1 = exp(input)")
    assert second.prologue.startswith("v1 = max(norm.0.scale[c]*input + ") == left


def test_where_a_gradient_flows_steps_before_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    compiled = torch.compile(Up("HiFi-GAN"), backend=fused_post, options=FUSED)
    (site,) = explain(compiled, torch.randn(2, 8, 5, 6)).sites
    assert site.kernel == "fused" and site.prologue == ""


class Long(nn.Module):
    """By turns: what is before the steps, and the steps."""

    def __init__(self, before: Any = lambda x: x, head: Any = lambda x: F.leaky_relu(x, 0.1)):
        super().__init__()
        self.up, self.before, self.head = nn.ConvTranspose1d(256, 128, 16, 8, 4).bfloat16(), before, head

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(self.head(self.before(x))))


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_auto_takes_steps_along_where_x_is_turned_and_lies_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(problem, "shared_memory_limit", lambda device: 227 * 1024)
    x = torch.randn(8, 256, 512).bfloat16()
    plain = nn.Conv1d(256, 256, 1, bias=False).bfloat16()
    biased = nn.Conv1d(256, 256, 1).bfloat16()

    def taken(model: nn.Module, x: Tensor = x) -> str:
        (site,) = explain(model.eval(), x).sites
        assert site.kernel == "fused" and (", with the steps before it" in site.reason) == bool(site.prologue)
        assert "by turned" in site.reason or not site.prologue
        return site.prologue

    assert taken(Long()) == taken(Long(plain)) == "v1 = leaky_relu(input, 0.1)"
    # Inductor works these out in one pass with what they are read by.
    assert taken(Long(biased)) == taken(Long(lambda x: x.flip(2))) == taken(Long(head=lambda x: x)) == ""


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_auto_leaves_steps_to_inductor_where_x_is_taken_as_it_is_or_laid_out_with_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(choice, "copy_rate", lambda gpu: 1e11)
    monkeypatch.setattr(problem, "shared_memory_limit", lambda device: 227 * 1024)
    up, beside = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1), nn.Conv2d(64, 8, 1)
    x = torch.randn(16, 64, 64, 64)
    for model, given, why in (
        (lambda x: up(torch.tanh(x)).relu(), x.to(memory_format=torch.channels_last), "march"),
        (lambda x: beside(up(torch.tanh(x)).relu()), x, "in channels_last like the convolutions beside it"),
    ):
        (site,) = explain(model, given).sites
        assert site.kernel == "fused" and why in site.reason and site.prologue == ""


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_steps_before_on_a_gpu(head: str, device: str, dtype: torch.dtype, last: bool) -> None:
    """Kernels of ours compute all of it, launched by Inductor without Python."""
    from torch._inductor.utils import run_and_get_code

    memory_format = torch.channels_last if last else torch.contiguous_format
    model = Up(head, 2, 32).eval()
    model.pre = nn.Identity()
    if head == "in place":
        model.pre = nn.Hardswish()
    model = model.to(device, dtype).to(memory_format=memory_format)
    x = torch.randn(2, 32, 17, 24, device=device, dtype=dtype).to(memory_format=memory_format)
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    (site,) = explain(compiled, x).sites
    assert bool(site.prologue)
    given = x.clone(memory_format=torch.preserve_format)
    result, codes = run_and_get_code(compiled, given)
    allowed = 2 * relative_rmse(model(x.clone()), model, (x,)) + TOLERANCE[dtype] / 10
    if dtype == torch.float32:
        allowed = max(allowed, 1e-3)  # TF32, where cuDNN may take none
    assert relative_rmse(result, model, (x,)) <= allowed
    assert result.stride() == model(x.clone()).stride()
    assert all("torch.ops.fused_post" not in code and "extern_kernels.conv" not in code for code in codes)

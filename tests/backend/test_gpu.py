"""The whole way on a GPU: the fused kernel in a compiled model, writes to its weights, and CUDA graphs."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import TOLERANCE, relative_rmse
from fusion_backend import autotune, choice, evidence, explain, fused_post
from fusion_backend.kernels import hopper_march
from fusion_backend.kernels.plans import plans_for
from fusion_backend.kernels.problem import is_hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.usefixtures("_reset"),
]
FUSED = {"fused_post.strict": True, "fused_post.kernel": "fused"}


@pytest.fixture
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Up(nn.Module):
    """A site that the march takes, one that the general kernel takes, and one with neither bias nor tail."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(64, 256, 3, 2, 1, 1)
        self.second = nn.ConvTranspose2d(256, 32, 4, 2, 1)
        self.third = nn.ConvTranspose2d(32, 16, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.third(self.second(self.first(x).relu()).clamp(0, 1) * 2))


def setting(dtype: torch.dtype = torch.float32, last: bool = False) -> tuple[nn.Module, Tensor]:
    model, x = Up().eval().to("cuda", dtype), torch.randn(4, 64, 17, 32, device="cuda", dtype=dtype)
    return (
        (model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)) if last else (model, x)
    )


def assert_accurate(result: Tensor, model: nn.Module, x: Tensor) -> None:
    allowed = 2 * relative_rmse(model(x), model, (x,)) + TOLERANCE[x.dtype] / 10
    if x.dtype == torch.float32:
        allowed = max(allowed, 1e-3)  # three convolutions in TF32, where cuDNN may take none
    assert relative_rmse(result, model, (x,)) <= allowed


@pytest.mark.parametrize("plan", [None, "march", "hopper"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@torch.no_grad()
def test_a_result_of_one_channel(last: bool, plan: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is contiguous and channels_last at once, and its layout is x's."""
    model, x = nn.Sequential(nn.ConvTranspose2d(32, 1, 3, 2, 1, 1), nn.ReLU()), torch.randn(4, 32, 64, 64)
    model, x = model.to("cuda", torch.bfloat16), x.to("cuda", torch.bfloat16)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if plan == "hopper" and not is_hopper(x.device):
        pytest.skip("no Hopper")

    def named(site: Any, *_: Any) -> str:
        problem, _ = choice.problem_of(site)
        return next(each.name for each in plans_for(problem) if each.name.startswith(plan))

    if plan is not None:
        monkeypatch.setattr(choice, "_plan_asked_for", named)
    assert_accurate(torch.compile(model, backend=fused_post, options=FUSED)(x), model, x)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_numbers_and_the_kernels_of_a_model(dtype: torch.dtype, last: bool) -> None:
    """Three kernels of ours; Inductor's own pack the weights, make coefficients, and compute the tanh."""
    from torch._inductor.utils import run_and_get_code

    model, x = setting(dtype, last)
    assert [site.kernel for site in explain(torch.compile(model, backend=fused_post, options=FUSED), x).sites] == [
        "fused"
    ] * 3
    result, codes = run_and_get_code(torch.compile(model, backend=fused_post, options=FUSED), x)
    assert_accurate(result, model, x)
    assert result.stride() == model(x).stride()
    launched = [name for code in codes for name in re.findall(r"^ *(\w+)\.run\(", code, re.MULTILINE)]
    ours = [name for name in launched if re.match(r"_(conv_transpose|row_march)_kernel", name)]
    turning = [name for name in launched if name.startswith("_transpose_kernel")]
    assert len(ours) == 3 and len(launched) - len(turning) <= 3 + 3 + 2 + 1, launched
    assert not any("torch.ops.fused_post" in code or "extern_kernels.conv" in code for code in codes)


@pytest.fixture(params=["as chosen", "hopper"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """With "hopper": every site that can takes a plan of the march on Hopper. Counts its launches."""
    if request.param == "as chosen":
        return {}
    counts = {"hopper": 0}
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("no Hopper")
    launch = hopper_march.launched

    def counted(*args: Any) -> Any:
        counts["hopper"] += 1
        return launch(*args)

    def measured_plan(site: Any, options: Any, relayout: bool = False, left: bool = False) -> evidence.Prediction | str:
        problem, _ = choice.problem_of(site, relayout)
        plan = next((plan for plan in plans_for(problem) if plan.is_hopper), None)
        return evidence.Prediction(plan.name, 2.0, "none", 0) if plan else "no such plan"

    monkeypatch.setattr(hopper_march, "launched", counted)
    monkeypatch.setattr(choice, "measured_plan", measured_plan)
    return counts


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_plan_that_is_opaque_to_inductor(launches: dict[str, int], dtype: torch.dtype, last: bool) -> None:
    """Alone, behind and before operations of Inductor's, and in CUDA graphs."""
    model, x = setting(dtype, last)
    for options in (FUSED, FUSED | {"triton.cudagraphs": True}):
        compiled = torch.compile(model, backend=fused_post, options=options)
        for _ in range(3):
            y = compiled(x).clone()
            assert_accurate(y, model, x)
            assert compiled(x).stride() == model(x).stride()
        torch._dynamo.reset()
    assert launches.get("hopper", 1) > 0


class Unet(nn.Module):
    """Sites among ordinary convolutions, which Inductor lays out channels_last, with a skip connection around."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(16, 64, 3, 2, 1), nn.BatchNorm2d(64)
        self.up, self.out = nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.Conv2d(48, 16, 3, 1, 1)
        self.last = nn.ConvTranspose2d(16, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(self.down(x)).relu()).relu()
        return self.last(self.out(torch.cat([y, x], 1)).relu())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_sites_among_convolutions_that_inductor_lays_out_anew(
    launches: dict[str, int], dtype: torch.dtype, last: bool
) -> None:
    model, x = Unet().eval().to("cuda", dtype), torch.randn(4, 16, 34, 66, device="cuda", dtype=dtype)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    y = compiled(x)
    assert_accurate(y, model, x)
    assert y.stride() == model(x).stride()
    assert [site.kernel for site in explain(compiled, x).sites] == ["fused", "fused"]


@pytest.mark.parametrize("mode", ["max-autotune", "max-autotune-no-cudagraphs"])
@torch.no_grad()
def test_max_autotune_measures_while_the_model_is_compiled(mode: str) -> None:
    model, x = setting(torch.bfloat16)
    autotune._known.clear()
    compiled = torch.compile(model, backend=fused_post, mode=mode)
    state = torch.cuda.get_rng_state()
    y = compiled(x).clone()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_accurate(y, model, x)
    assert len(autotune._known) == 3
    for found in autotune._known.values():
        assert isinstance(found, dict), found
        assert autotune.INDUCTOR in found and len(found) > 1
    assert all("measured to have" in site.reason for site in explain(compiled, x).sites if site.matched)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@torch.no_grad()
def test_every_change_of_a_weight_is_seen(launches: dict[str, int], mode: str | None) -> None:
    model, x = setting(torch.bfloat16)
    options: dict[str, Any] = FUSED | ({"triton.cudagraphs": True} if mode else {})
    compiled, other = torch.compile(model, backend=fused_post, options=options), copy.deepcopy(model)
    for _ in range(3):
        assert_accurate(compiled(x).clone(), model, x)
    model.first.weight.mul_(-1)
    model.second.weight.data.mul_(2)
    for _ in range(3):
        assert_accurate(compiled(x).clone(), model, x)
    model.load_state_dict(other.state_dict())
    assert_accurate(compiled(x).clone(), model, x)
    model.second.weight = nn.Parameter(torch.randn_like(model.second.weight) / 16)
    assert_accurate(compiled(x).clone(), model, x)


@torch.no_grad()
def test_a_graph_that_the_user_captured_sees_the_weight_as_it_is_at_its_replay(launches: dict[str, int]) -> None:
    model, x = setting(torch.bfloat16)
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compiled(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(x)
    for factor in (1, -1):
        model.first.weight.mul_(factor)
        graph.replay()
        assert_accurate(y.clone(), model, x)


@torch.no_grad()
def test_sizes_that_vary(launches: dict[str, int]) -> None:
    model, _ = setting(torch.bfloat16)
    compiled = torch.compile(model, backend=fused_post, options=FUSED, dynamic=True)
    for shape in ((4, 64, 17, 32), (2, 64, 9, 48), (1, 64, 33, 7)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        assert_accurate(compiled(x), model, x)


@torch.no_grad()
def test_autocast(launches: dict[str, int]) -> None:
    model, x = setting()
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    with torch.autocast("cuda", torch.bfloat16):
        result, expected = compiled(x), model(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.1, atol=0.03)


@torch.no_grad()
def test_auto_takes_the_fused_kernel_where_this_gpu_is_measured() -> None:
    conv = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1).to("cuda", torch.bfloat16)
    x = torch.randn(32, 64, 64, 64, device="cuda", dtype=torch.bfloat16)
    (site,) = explain(conv, x).sites
    known = bool(evidence.measured(torch.cuda.get_device_name()))
    assert site.kernel == ("fused" if known else "inductor"), site.reason
    result = torch.compile(conv, backend=fused_post, options={"fused_post.strict": True})(x)
    assert_accurate(result, conv, x)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["fused", "epilogue"])
def test_a_training_step_has_eagers_gradients_and_keeps_one_bit_an_element(
    kernel: str, dtype: torch.dtype, last: bool
) -> None:
    """Beside its input and parameters, whatever layout the backward takes."""
    model = nn.Sequential(nn.ConvTranspose2d(64, 64, 3, 2, 1, 1), nn.Hardtanh(0.0, 1.0)).to("cuda", dtype)
    x, out = (torch.randn(shape, device="cuda", dtype=dtype) for shape in ((4, 64, 16, 32), (4, 64, 32, 64)))
    if last:
        model, x, out = (each.to(memory_format=torch.channels_last) for each in (model, x, out))
    x.requires_grad_()
    inputs = [x, *model.parameters()]
    compiled = torch.compile(model, backend=fused_post, options=FUSED | {"fused_post.kernel": kernel})
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = compiled(x)
    ours = torch.autograd.grad(y, inputs, out)
    for own in (y, *inputs):
        kept.pop(own.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= y.numel() // 8 + 64 * 4 * 4, kept
    exact = copy.deepcopy(model).double()
    x64 = x.detach().double().requires_grad_()
    right = torch.autograd.grad(exact(x64), [x64, *exact.parameters()], out.double())
    eager = torch.autograd.grad(model(x), inputs, out)
    assert ours[0].stride() == eager[0].stride()
    for our, its, true in zip(ours, eager, right, strict=True):
        error, allowed = (((each.double() - true).norm() / true.norm()).item() for each in (our, its))
        # A gate near its bound flips: where cuDNN takes no TF32 eager has fewer of these.
        assert error <= 2 * max(allowed, 2e-2) + TOLERANCE[dtype] / 10


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_training_with_the_fused_kernel_takes_the_march_on_hopper(launches: dict[str, int], last: bool) -> None:
    """For the first site; the second one's weight does not fit, the third has a program, and no bits."""
    model, x = setting(torch.float32, last)
    gradients = []
    for run in (model, torch.compile(model, backend=fused_post, options=FUSED | {"fused_post.strict": False})):
        run(x).sum().backward()
        gradients.append([parameter.grad.float() for parameter in model.parameters()])
        model.zero_grad()
    assert launches.get("hopper", 1) == 1
    for ours, eager in zip(gradients[1], gradients[0], strict=True):
        assert (ours - eager).norm() <= 0.05 * eager.norm()

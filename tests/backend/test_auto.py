"""``auto``: what it takes by the measurements that ship with us, and that what it takes is right."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from benchmarks.measure import TOLERANCE, relative_rmse
from fusion_backend import autotune, choice, evidence, explain, fused_post
from fusion_backend.kernels import hopper_strips, problem
from fusion_backend.kernels.phases import Axis

OPTIONS = {"fused_post.strict": True}


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made as on an H200, whose measurements ship with us; operators compute their references."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(choice, "copy_rate", lambda gpu: 1e11)  # so fast that no copy counts
    monkeypatch.setattr(problem, "shared_memory_limit", lambda device: 227 * 1024)
    torch._dynamo.reset()


class Up(nn.Module):
    """A site like measured ones, of the seed's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).clamp(0, 1) * 2


X = torch.randn(16, 64, 64, 64)
K3S2 = Axis(3, 2, 1, 1)
SEED = problem.Problem(
    (Axis(), K3S2, K3S2), 64, 64, 1, 16 * 64 * 64, torch.bfloat16, False, False, False, False, 227 * 1024
)


@pytest.mark.usefixtures("on_h200")
def test_auto_takes_the_fused_kernel_where_it_is_measured_to_be_faster() -> None:
    model = Up().eval()
    with torch.no_grad():
        (site,) = explain(model, X).sites
    assert site.kernel == "fused"
    assert "times the speed of Inductor at the most similar measured case, seed" in site.reason
    assert "march" in site.reason and "144 KiB for the packed weight" in site.reason
    (site,) = explain(model, X).sites
    assert site.kernel == "fused" and "times the speed of Inductor in training" in site.reason


@pytest.mark.usefixtures("on_h200")
def test_every_write_to_a_parameter_is_seen() -> None:
    """Also those that no version counts."""
    model = Up().eval()
    compiled, other = torch.compile(model, backend=fused_post, options=OPTIONS), copy.deepcopy(model)
    with torch.no_grad():
        for write in (
            lambda: model.conv.weight.mul_(-1),
            lambda: model.conv.weight.data.mul_(-2),
            lambda: model.conv.bias.data.add_(1),
            lambda: model.load_state_dict(other.state_dict()),
            lambda: setattr(model.conv, "weight", nn.Parameter(torch.randn_like(model.conv.weight))),
        ):
            write()
            torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("how", ["autocast", "inference_mode", "dynamic", "freezing", "reduce-overhead"])
def test_the_ways_in_which_users_run_models(how: str) -> None:
    model = Up().eval()
    arguments: dict[str, Any] = {"options": OPTIONS}
    if how == "freezing":
        arguments = {"options": OPTIONS | {"freezing": True}}
    elif how == "reduce-overhead":
        arguments = {"mode": how}
    compiled = torch.compile(model, backend=fused_post, dynamic=True if how == "dynamic" else None, **arguments)
    inference = torch.inference_mode if how == "inference_mode" else torch.no_grad
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if how == "autocast" else {}
    with inference(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for N in (16, 17):
            x = torch.randn(N, *X.shape[1:])
            torch.testing.assert_close(compiled(x), model(x), **tolerance)


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("rate", [1e11, 1e8], ids=["fast copies", "slow copies"])
def test_a_program_is_left_to_inductor_where_a_plan_without_one_is_so_much_faster(
    monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """In float32 a volume's weight does not fit the march, but that on Hopper, which takes no residual."""
    monkeypatch.setattr(problem, "is_hopper", lambda device: True)
    monkeypatch.setattr(choice, "copy_rate", lambda gpu: rate)
    conv = nn.ConvTranspose3d(32, 16, 3, 2, 1).to(memory_format=torch.channels_last_3d).eval()
    x = torch.randn(16, 32, 16, 32, 32).to(memory_format=torch.channels_last_3d)

    def model(x: Tensor, skip: Tensor) -> Tensor:
        return conv(x).clamp(-1).tanh() + skip

    with torch.no_grad():
        (site,) = explain(model, x, torch.randn_like(conv(x))).sites
    assert site.kernel == "fused"
    taken = rate == 1e8
    assert ("tanh" in site.equation) == taken
    assert ("hopper" in site.reason and "a pass of Inductor's behind it" in site.reason) == (not taken)


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("rate", [1e11, 1e8], ids=["fast copies", "slow copies"])
def test_no_plan_is_taken_by_a_time_that_it_does_not_have_with_a_residual(
    monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """A result that is turned back has none; this site is measured to be faster by such a plan alone."""
    monkeypatch.setattr(choice, "copy_rate", lambda gpu: rate)
    conv = nn.ConvTranspose1d(512, 256, 16, 8, 4).eval()
    x, skip = torch.randn(16, 512, 256), torch.randn(16, 256, 2048)
    with torch.no_grad():
        (plain,) = explain(lambda x: conv(x).tanh(), x).sites
        (site,) = explain(lambda x, skip: conv(x).tanh() + skip, x, skip).sites
    assert plain.kernel == "fused" and "turned back" in plain.reason
    if rate == 1e8:
        assert site.kernel == "inductor"
    else:
        assert site.kernel == "fused" and "turned back, and a pass of Inductor's behind it" in site.reason


@pytest.mark.usefixtures("on_h200")
def test_no_plan_is_taken_that_has_no_room_for_a_programs_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "is_hopper", lambda device: True)
    monkeypatch.setattr(choice, "copy_rate", lambda gpu: 1e8)
    conv, slope = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1).eval(), torch.rand(64)

    x = torch.randn(64, *X.shape[1:])

    def reason() -> str:
        with torch.no_grad():
            (site,) = explain(lambda x, slope: nn.functional.prelu(conv(x), slope), x, slope).sites
        return site.reason

    assert "by hopper" in reason()
    monkeypatch.setattr(hopper_strips, "has_room", lambda problem, config, columns: not columns)
    assert "by march" in reason()


class Among(nn.Module):
    """A site among ordinary convolutions, whose layout Inductor chooses."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.before, self.up = nn.Conv2d(64, 64, 1, groups=groups), nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)
        self.behind = nn.Conv2d(64, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.up(self.before(x).relu()).relu())


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_site_among_ordinary_convolutions_is_channels_last_like_them(memory_format: torch.memory_format) -> None:
    model = Among().eval().to(memory_format=memory_format)
    x = X.to(memory_format=memory_format)
    compiled = torch.compile(model, backend=fused_post, options=OPTIONS)
    with torch.no_grad():
        (site,) = explain(model, x).sites
        y, expected = compiled(x), model(x)
    assert site.kernel == "fused"
    assert ("in channels_last like the convolutions beside it" in site.reason) == (
        memory_format is torch.contiguous_format
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.stride() == expected.stride()


class OneChannel(nn.Module):
    """As MONAI's AutoEncoder ends, whose last convolution is measured."""

    def __init__(self, among: bool, tail: bool) -> None:
        super().__init__()
        self.before = nn.Conv2d(32, 32, 1) if among else nn.Identity()
        self.up = nn.ConvTranspose2d(32, 1, 3, 2, 1, 1)
        self.behind = nn.ReLU() if tail else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.up(self.before(x)))


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize(("among", "tail"), [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_result_of_one_channel_finds_its_measurement(
    among: bool, tail: bool, memory_format: torch.memory_format
) -> None:
    """It is contiguous in either layout; what x is tells which was measured."""
    model = OneChannel(among, tail).bfloat16().eval().to(memory_format=memory_format)
    x = torch.randn(16, 32, 128, 128, dtype=torch.bfloat16).to(memory_format=memory_format)
    compiled = torch.compile(model, backend=fused_post, options=OPTIONS)
    with torch.no_grad():
        (site,) = explain(model, x).sites
        y, expected = compiled(x), model(x)
    last = among or memory_format is torch.channels_last
    speedup = [3, 4][last]
    assert site.kernel == "fused" and f"predicted to have {speedup}." in site.reason
    assert "at the most similar measured case, monai_autoencoder 4" in site.reason
    assert ("in channels_last like the convolutions" in site.reason) == (last and x.is_contiguous())
    assert relative_rmse(y, model, (x,)) <= 2 * relative_rmse(expected, model, (x,)) + TOLERANCE[y.dtype] / 10
    assert y.stride() == model.up(model.before(x)).stride()  # as Dynamo has it, and eager without a relu


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sizes", [(8, 1, 5), (1, 4, 5), (8, 4, 1), (8, 4, 5)])
def test_the_layout_of_a_result_is_eagers(sizes: tuple[int, int, int], memory_format: torch.memory_format) -> None:
    C_in, C_out, size = sizes
    conv = nn.ConvTranspose2d(C_in, C_out, 3, 2, 1).to(memory_format=memory_format)
    y = conv(torch.randn(2, C_in, size, size).to(memory_format=memory_format))
    assert choice.layout_of(y)[0] == (memory_format is torch.channels_last)


@pytest.mark.usefixtures("on_h200")
def test_a_contiguous_site_whose_layout_is_unknown_or_not_worth_its_copies_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.no_grad():
        (site,) = explain(Among(groups=2).eval(), X).sites
        assert site.kernel == "inductor"
        assert "which layout Inductor gives the convolutions beside it cannot be told" in site.reason
        monkeypatch.setattr(choice, "copy_rate", lambda gpu: 1e9)  # a slower one
        (site,) = explain(Among().eval(), X).sites
        assert site.kernel == "inductor"
        assert "is predicted to have 0." in site.reason
        monkeypatch.setattr(choice, "copy_rate", lambda gpu: None)
        (site,) = explain(Among().eval(), X).sites
        assert "how fast NVIDIA H200 copies is not measured" in site.reason


@pytest.mark.usefixtures("on_h200")
def test_a_transposed_convolution_that_inductor_keeps_is_one_of_those_it_lays_out() -> None:
    """Behind it and alone, the same site is taken as it is."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.ConvTranspose2d(64, 64, 5, 1, 2), nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()).relu()

    model = Two().eval()
    with torch.no_grad():
        kept, taken = explain(model, X).sites
        (alone,) = explain(nn.Sequential(model.second, nn.ReLU()), X).sites
    assert [kept.kernel, taken.kernel, alone.kernel] == ["inductor", "fused", "fused"]
    assert "in channels_last" in taken.reason and "in channels_last" not in alone.reason


@pytest.mark.usefixtures("on_h200")
def test_a_bare_convolution_is_taken_where_that_is_faster() -> None:
    """As in nnU-Net: no bias, and a concatenation behind."""
    conv = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1, bias=False).eval()

    def model(x: Tensor) -> Tensor:
        return torch.cat([conv(x), conv(x) * 2])

    compiled = torch.compile(model, backend=fused_post, options=OPTIONS)
    with torch.no_grad():
        report = explain(model, X)
        torch.testing.assert_close(compiled(X), model(X))
        unmeasured = explain(model, X[:, :, :2, :2]).sites
    assert [(site.kernel, site.equation) for site in report.sites] == [("fused", "y = x"), ("fused", "y = 2*x")]
    assert [site.matched for site in unmeasured] == [False, True]
    assert not any(site.kernel == "fused" for site in explain(model, X.requires_grad_()).sites)


@pytest.mark.usefixtures("on_h200")
def test_a_graph_that_dynamo_compiles_twice() -> None:
    """Once for any size and once for a size that the user marked."""
    model, x = Up().eval(), X.clone()
    torch._dynamo.mark_dynamic(x, 0, specialize_on=[lambda size: size == 16])
    compiled = torch.compile(model, backend=fused_post, options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(X[:9]), model(X[:9]))


@pytest.mark.usefixtures("on_h200")
def test_what_the_switch_for_tf32_forbids_is_not_done() -> None:
    """Also where the user set that of convolutions alone: then the older, general one cannot be read."""
    convolutions = torch.backends.cudnn.conv
    before, kernels = convolutions.fp32_precision, {}
    try:
        for precision in ("ieee", "tf32"):
            convolutions.fp32_precision = precision
            with torch.no_grad():
                (kernels[precision],) = (site.kernel for site in explain(Up().eval(), X).sites)
    finally:
        convolutions.fp32_precision = before
    assert kernels == {"ieee": "inductor", "tf32": "fused"}


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What measuring finds, and 1 ms for anything else. All is compiled and run once, but not timed."""
    found: dict[str, float] = {}
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(autotune, "captured", lambda run, pool: run() is None or run)
    monkeypatch.setattr(autotune, "timed", lambda contenders: {name: found.get(name, 1.0) for name in contenders})
    return found


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("fast", ["turned 128x128x64, 8 warps, 3 stages", "inductor"])
def test_max_autotune_measures_and_takes_what_is_fastest(timings: dict[str, float], fast: str) -> None:
    """Also where nothing of the kind was measured before, and without drawing from the user's random numbers."""
    timings[fast] = 0.5
    model = nn.Sequential(nn.ConvTranspose2d(64, 64, 5, 3, 1), nn.ReLU()).eval()
    compiled = torch.compile(model, backend=fused_post, mode="max-autotune")
    x, state = X[:2, :, :8, :8], torch.get_rng_state()
    with torch.no_grad():
        (site,) = explain(compiled, x).sites
        torch.testing.assert_close(compiled(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert site.kernel == ("inductor" if fast == "inductor" else "fused")
    speedup = "0.50" if fast == "inductor" else "2.00"
    assert f"measured to have {speedup} times the speed of Inductor" in site.reason
    if fast != "inductor":
        assert f"by {fast}; " in site.reason


@pytest.mark.usefixtures("on_h200")
def test_a_convolution_is_measured_once_and_what_fails_is_left_to_inductor(
    timings: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Up().eval()
    compiled = torch.compile(model, backend=fused_post, mode="max-autotune-no-cudagraphs")
    with torch.no_grad(), mock.patch.object(autotune, "contenders", side_effect=RuntimeError("no memory")) as measured:
        for _ in range(2):
            assert [site.kernel for site in explain(compiled, X).sites] == ["inductor"]
    assert measured.call_count == 1
    assert "measuring a transposed convolution failed, Inductor takes it: no memory" in caplog.text


@pytest.mark.usefixtures("on_h200")
def test_a_gpu_that_was_full_is_measured_again(timings: dict[str, float]) -> None:
    timings["inductor"] = 2.0
    model = Up().eval()
    compiled = torch.compile(model, backend=fused_post, mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        with mock.patch.object(autotune, "contenders", side_effect=torch.OutOfMemoryError("full")):
            (site,) = explain(compiled, X).sites
        assert site.kernel == "inductor" and "no memory for measuring" in site.reason
        assert [site.kernel for site in explain(compiled, X).sites] == ["fused"]


@pytest.mark.usefixtures("on_h200")
def test_with_a_program_and_without_it_is_the_same_measurement(timings: dict[str, float]) -> None:
    timings["inductor"] = 2.0
    compiled = torch.compile(nn.Sequential(Up(), nn.Tanh()).eval(), backend=fused_post, mode="max-autotune")
    with torch.no_grad():
        (site,) = explain(compiled, X).sites
    assert site.kernel == "fused" and "tanh" in site.equation
    assert len(autotune._known) == 1


@pytest.mark.usefixtures("on_h200")
def test_where_the_switch_for_tf32_is_changed_later_eager_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    model = Up().eval()
    compiled = torch.compile(model, backend=fused_post, options=OPTIONS)
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "tf32"
        with torch.no_grad():
            expected = model(X)
            for precision in ("tf32", "ieee", "ieee", "tf32"):
                convolutions.fp32_precision = precision
                torch.testing.assert_close(compiled(X), expected)
    finally:
        convolutions.fp32_precision = before
    assert caplog.text.count("TF32 for convolutions was allowed when a model was compiled and is forbidden now") == 1


@pytest.mark.parametrize("last", [False, True])
def test_two_products_of_different_sizes_are_measured_beside_the_other_kinds(last: bool) -> None:
    axes = (Axis(), Axis(4, 2, 1), Axis(4, 2, 1))
    each = replace(SEED, axes=axes, C_in=512, C_out=256, x_last=last, out_last=last, hopper=True)
    names = [plan.name for plan in autotune.candidates(each, (16, 512, 16, 16), "unknown")]
    products = [name for name in names if "product" in name]
    contiguous = ["turned product 128x128x2", "turned product 256x128, turned back", "turned product 128x64x2"]
    assert products == (["product 256x128", "product 128x128"] if last else contiguous)
    kinds = {(name.startswith("turned"), "back" in name) for name in names if name not in products}
    assert kinds == ({(False, False)} if last else {(False, False), (True, False)})
    assert len(names) <= autotune.MOST_PLANS


def test_what_is_opaque_is_counted_with_what_it_costs_the_host(
    timings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        autotune,
        "contenders",
        lambda problem, shape, device, plans: dict.fromkeys(["inductor", *(plan.name for plan in plans)]),
    )
    monkeypatch.setattr(evidence, "OPAQUE", 0.1)
    hopper = replace(SEED, hopper=True)
    kinds = [autotune.candidates(each, X.shape, "unknown") for each in (SEED, hopper)]
    assert [any(plan.is_hopper for plan in kind) for kind in kinds] == [False, True]
    last = autotune.candidates(replace(hopper, x_last=True, out_last=True), X.shape, "unknown")
    assert {plan.is_product for plan in last if plan.is_hopper} == {False, True}
    (first, *_) = (plan.name for plan in kinds[1] if plan.is_hopper)
    for ms, replayed, speedup in ((0.5, False, 2.0), (0.05, False, 10.0), (0.05, True, 20.0)):
        timings[first] = ms
        autotune._known.clear()
        found = autotune.measure(hopper, hopper, X.shape, torch.device("cpu"), "unknown", replayed)
        assert isinstance(found, evidence.Prediction)
        assert (found.plan, round(found.speedup, 3)) == (first, speedup)


def test_a_gpu_that_is_not_measured_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA GeForce RTX 4090")
    with torch.no_grad():
        sites = explain(Up().eval(), X).sites
    assert [site.kernel for site in sites] == ["inductor"]
    assert "nothing is measured on NVIDIA GeForce RTX 4090" in sites[0].reason
    assert evidence.measured("NVIDIA GeForce RTX 4090") == ()

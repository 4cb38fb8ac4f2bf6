"""Packed weights and coefficients outside the graph: once, anew when parameters change, no longer than they live."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from fusion_backend import backend, choice, evidence, explain, fused_post
from fusion_backend.derived import Derived, DerivedInputs
from fusion_backend.kernels import problem

OPTIONS = {"fused_post.strict": True}


class Counted:
    """Packs by negation, and counts."""

    def __init__(self) -> None:
        self.packed = 0

    def __call__(self, weight: Tensor) -> Tensor:
        self.packed += 1
        return -weight.detach()


def test_a_weight_is_packed_once_and_anew_where_it_changed() -> None:
    pack, weight = Counted(), nn.Parameter(torch.randn(3))
    weights = Derived([0], pack)
    assert weights([weight]) is weights([weight]) and pack.packed == 1
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(weights([weight]), -weight) and pack.packed == 2
    weight.data = torch.randn(3)
    assert torch.equal(weights([weight]), -weight) and pack.packed == 3
    assert torch.equal(weights([weight]), -weight) and pack.packed == 3


def test_each_of_several_weights_is_kept_as_long_as_it_lives() -> None:
    pack, first, second = Counted(), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    weights = Derived([0], pack)
    for _ in range(3):
        assert torch.equal(weights([first]), -first) and torch.equal(weights([second]), -second)
    assert pack.packed == 2 and weights.nbytes == 24
    del first
    gc.collect()
    assert weights.nbytes == 12
    assert torch.equal(weights([second]), -second) and pack.packed == 2


def test_a_tensor_that_counts_no_versions_is_packed_each_time() -> None:
    pack = Counted()
    with torch.inference_mode():
        weight, weights = torch.randn(3), Derived([0], pack)
        assert torch.equal(weights([weight]), -weight)
        weight.mul_(2)
        assert torch.equal(weights([weight]), -weight) and pack.packed == 2 and weights.nbytes == 0


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made as on an H200, whose measurements ship with us; operators compute their references."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(problem, "shared_memory_limit", lambda device: 227 * 1024)
    torch._dynamo.reset()


class Up(nn.Module):
    """Two sites like measured ones, of the seed's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)
        self.second = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).clamp(0, 1)


X = torch.randn(4, 64, 64, 64)


def derived_inputs(monkeypatch: pytest.MonkeyPatch) -> list[DerivedInputs]:
    made: list[DerivedInputs] = []
    monkeypatch.setattr(backend, "DerivedInputs", lambda *args: made.append(DerivedInputs(*args)) or made[-1])
    return made


@pytest.mark.usefixtures("on_h200")
def test_auto_takes_the_fused_kernel_where_it_is_measured_to_be_faster() -> None:
    model = Up().eval()
    with torch.no_grad():
        sites = explain(model, X).sites
    assert [site.kernel for site in sites] == ["fused", "fused"]
    assert all("times the speed of Inductor at the most similar measured case, seed" in site.reason for site in sites)
    assert all("march" in site.reason and "144 KiB for the packed weight" in site.reason for site in sites)
    assert [site.kernel for site in explain(model, X).sites] == ["inductor", "inductor"]  # with gradients


@pytest.mark.usefixtures("on_h200")
def test_the_compiled_model_sees_every_change_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = derived_inputs(monkeypatch), Up().eval()
    compiled = torch.compile(model, backend=fused_post, options=OPTIONS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(X), model(X))
        model.first.weight.mul_(-1)
        torch.testing.assert_close(compiled(X), model(X))
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(X), model(X))
        model.second.weight = nn.Parameter(torch.randn_like(model.second.weight))
        torch.testing.assert_close(compiled(X), model(X))
    assert made and all(len(each.derived) == 4 for each in made)


@pytest.mark.usefixtures("on_h200")
def test_what_is_packed_goes_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = derived_inputs(monkeypatch), Up().eval()
    with torch.no_grad():
        torch.compile(model, backend=fused_post, options=OPTIONS)(X)
    kept = made.pop().derived
    assert sorted(each.nbytes for each in kept) == [4 * 64] * 2 + [4 * 9 * 64 * 64] * 2
    del model
    gc.collect()
    assert [each.nbytes for each in kept] == [0] * 4


@pytest.mark.usefixtures("on_h200")
def test_one_graph_for_several_modules_keeps_one_packed_weight_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made, modules = derived_inputs(monkeypatch), [Up().eval() for _ in range(3)]
    with torch.no_grad():
        for module in modules:
            module.compile(backend=fused_post, options=OPTIONS)
        for module in modules * 2:
            torch.testing.assert_close(module(X), module.forward(X))
    assert sum(each.nbytes for inputs in made for each in inputs.derived) == 3 * 2 * 4 * (9 * 64 * 64 + 64)


@pytest.mark.usefixtures("on_h200")
def test_a_weight_that_is_computed_is_packed_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made = derived_inputs(monkeypatch)
    model = Up().eval()
    nn.utils.parametrizations.weight_norm(model.first)
    compiled = torch.compile(model, backend=fused_post, options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    assert [len(each.derived) for each in made] == [3]  # the other weight, and both biases


@pytest.mark.usefixtures("on_h200")
def test_what_the_user_passes_in_each_call_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = derived_inputs(monkeypatch)
    compiled = torch.compile(F.conv_transpose2d, backend=fused_post, options=OPTIONS)
    with torch.no_grad():
        for _ in range(2):
            weight, bias = torch.randn(64, 64, 3, 3), torch.randn(64)
            expected = F.conv_transpose2d(X, weight, bias, 2, 1, 1)
            torch.testing.assert_close(compiled(X, weight, bias, 2, 1, 1), expected)
    assert [inputs.derived for inputs in made] == [[]]


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
        for N in (4, 5):
            x = torch.randn(N, *X.shape[1:])
            torch.testing.assert_close(compiled(x), model(x), **tolerance)


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_among_ordinary_convolutions_a_site_is_taken_in_channels_last_alone(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)).eval()
    model, x = model.to(memory_format=memory_format), X.to(memory_format=memory_format)
    with torch.no_grad():
        (site,) = explain(model, x).sites
    taken = memory_format == torch.channels_last
    assert site.kernel == ("fused" if taken else "inductor")
    assert ("a contiguous one among them is not measured" in site.reason) == (not taken)


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


def test_a_gpu_that_is_not_measured_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA GeForce RTX 4090")
    with torch.no_grad():
        sites = explain(Up().eval(), X).sites
    assert [site.kernel for site in sites] == ["inductor", "inductor"]
    assert all("nothing is measured on NVIDIA GeForce RTX 4090" in site.reason for site in sites)
    assert evidence.measured("NVIDIA GeForce RTX 4090") == ()

"""``auto`` in training: what it takes by the steps that were measured, and that what it takes has eager's gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from benchmarks.cases import TAILS, Case
from benchmarks.evidence import as_text, compact_training
from fusion_backend import choice, evidence, explain, fused_post, training
from fusion_backend.kernels import problem

X = torch.randn(4, 16, 8, 8)
LESS, AS_MUCH = {"fused": 10, "epilogue": 10, "peer": 160}, {"fused": 160, "epilogue": 160, "peer": 160}


def row(plans: dict[str, float], kept: dict[str, int] = LESS, tail: str = "seed", N: int = 4) -> dict[str, Any]:
    return {
        "case": f"{tail} N={N}",
        "x": [N, 16, 8, 8],
        "C_out": 32,
        "kernel_stride_padding": [3, 2, 1, 1],
        "tail": tail,
        "dtype": "float32",
        "memory_format": "contiguous",
        "plans": plans,
        "peer": 1.0,
        "kept": kept,
    }


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows that are measured on a GPU for which choices are made here; operators compute their references."""
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    monkeypatch.setattr(choice, "gpu_name", lambda device: "a GPU")
    monkeypatch.setattr(problem, "shared_memory_limit", lambda device: 227 * 1024)
    monkeypatch.setattr(training, "measured", lambda gpu: tuple(map(training.case_of, rows)))
    torch._dynamo.reset()
    return rows


class Up(nn.Module):
    def __init__(self, tail: Callable[[Tensor], Tensor] = lambda y: y.clamp(0, 1) * 2) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(16, 32, 3, 2, 1, 1)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.conv(x))


@pytest.mark.parametrize(
    ("plans", "kept", "taken"),
    [
        ({"fused": 0.8, "epilogue": 0.9}, LESS, "fused"),
        ({"fused": 0.9, "epilogue": 0.8}, LESS, "epilogue"),
        ({"fused": 0.8}, AS_MUCH, "fused"),
        ({"fused": 1.5, "epilogue": 1.01}, LESS, "epilogue"),
        ({"fused": 0.97, "epilogue": 0.98}, AS_MUCH, None),
        ({"fused": 1.03, "epilogue": 1.5}, LESS, None),
        ({"fused": 0.97, "epilogue": 1.01}, {"fused": 160, "epilogue": 10, "peer": 160}, "epilogue"),
        ({}, LESS, None),
        ({"folded": 0.9}, AS_MUCH | {"folded": 160}, "folded"),
        ({"folded": 0.97}, AS_MUCH | {"folded": 160}, None),
    ],
)
def test_what_is_faster_is_taken_or_what_keeps_less_and_is_not_slower(
    known: list[dict[str, Any]], plans: dict[str, float], kept: dict[str, int], taken: str | None
) -> None:
    known.append(row(plans, kept))
    (site,) = explain(Up(), X).sites
    assert site.kernel == (taken if taken in ("fused", "epilogue") else "inductor")
    if taken:
        assert f"{1 / plans[taken]:.2f} times the speed of Inductor in training" in site.reason
        assert f"keeping {kept[taken] / 160:.2f} of what Inductor keeps" in site.reason
    with torch.no_grad():
        assert "in training" not in explain(Up(), X).sites[0].reason


def test_what_is_measured_as_long_as_it_is_near(known: list[dict[str, Any]]) -> None:
    known.append(row({"fused": 0.5}))
    assert [site.kernel for site in explain(Up(), X[:2]).sites] == ["inductor"]
    known.append(row({"fused": 0.9}, N=8))
    (site,) = explain(Up(), X[:2]).sites
    assert site.kernel == "fused" and "1.11 times" in site.reason and "seed N=4" in site.reason
    known[1]["plans"] = {"fused": 1.1}
    (site,) = explain(Up(), X[:2]).sites
    assert site.kernel == "inductor" and "predicted to have 0.91 times" in site.reason


def test_bits_in_the_results_order_say_nothing_of_such_that_are_not(known: list[dict[str, Any]]) -> None:
    """Rows of 16 elements, and of 15."""
    odd = Up()
    odd.conv.output_padding = (0, 0)
    known.append(row({"fused": 0.5}))
    known.append(row({"fused": 0.5}, N=8))
    assert [site.kernel for site in explain(odd, X).sites] == ["inductor"]
    known.append({**row({"fused": 0.8}), "kernel_stride_padding": [3, 2, 1, 0]})
    (site,) = explain(odd, X).sites
    assert site.kernel == "fused" and "1.25 times" in site.reason


@pytest.mark.parametrize(
    ("hopper", "mode", "counts"), [(True, None, True), (True, "reduce-overhead", False), (False, None, False)]
)
def test_an_operator_that_inductor_cannot_look_into_counts_with_what_it_takes_the_host(
    known: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, hopper: bool, mode: str | None, counts: bool
) -> None:
    """0.1 ms, as in inference; the epilogue kernel has none, nor has a program."""
    monkeypatch.setattr(problem, "is_hopper", lambda device: hopper)

    def taken(epilogue: float, peer: float, tail: str = "seed", model: nn.Module | None = None) -> str:
        known[:] = [{**row({"fused": 0.02, "epilogue": epilogue}, tail=tail), "peer": peer}]
        (site,) = explain(torch.compile(model or Up(), backend=fused_post, mode=mode), X).sites
        return site.kernel

    assert taken(0.07, 0.06) == ("inductor" if counts else "fused")
    assert taken(0.05, 0.06) == ("epilogue" if counts else "fused")
    assert taken(0.15, 0.2) == "fused"
    assert taken(0.05, 0.06, "bias_tanh", Up(torch.tanh)) == "fused"


def test_a_lone_relu_is_judged_by_its_like(known: list[dict[str, Any]]) -> None:
    known.append(row({"fused": 0.5}))
    assert [site.kernel for site in explain(Up(F.relu), X).sites] == ["inductor"]
    known.append(row({"fused": 0.9}, {"fused": 20, "peer": 0}, "bias_relu"))
    (site,) = explain(Up(F.relu), X).sites
    assert site.kernel == "fused" and "1.11 times" in site.reason


@pytest.mark.parametrize(
    ("tail", "measured"),
    [(torch.tanh, "bias_tanh"), (F.gelu, "bias_gelu"), (lambda y: F.leaky_relu(y, 0.3), "bias_leaky_relu")],
)
def test_a_program_is_judged_by_the_same_program(known: list[dict[str, Any]], tail: Any, measured: str) -> None:
    """Where that speaks against it, what stands before it is judged as if there were none."""
    known.extend(row({"fused": 0.5}, tail=other) for other in training.KINDS if other != measured)
    (before,) = explain(Up(tail), X).sites
    assert before.kernel == "inductor" and ";" not in before.equation
    known.append(row({"epilogue": 1.2, "fused": 0.8}, {"fused": 0, "epilogue": 160, "peer": 160}, measured))
    (site,) = explain(Up(tail), X).sites
    assert (site.kernel, site.equation.count("; v")) == ("fused", 1)
    assert "1.25 times the speed of Inductor in training" in site.reason
    assert ("its result tells the gradient" in site.reason) == (measured == "bias_tanh")
    known[-1]["plans"] = {"fused": 1.2}
    assert explain(Up(tail), X).sites == (before,)
    known[-1]["plans"] = {"folded": 0.5}
    known[-1]["kept"]["folded"] = 160
    assert explain(Up(tail), X).sites == (before,)


@pytest.mark.parametrize(
    ("tail", "measured"),
    [
        (lambda y: F.silu(F.relu6(y)), "bias_silu"),
        (lambda y: F.gelu(y, approximate="tanh"), "bias_gelu"),
        (torch.sigmoid, "bias_tanh"),
        (lambda y: F.leaky_relu(y).square(), "bias_leaky_relu"),
        (lambda y: F.leaky_relu(y, 0.3) @ y.new_ones(16, 1), "bias_leaky_relu"),  # its result stays, and tells
        (lambda y: F.prelu(y, y.new_ones(1) / 2), "bias_leaky_relu"),
        (lambda y: F.tanh(y).clamp(0, 1), "seed"),
        (lambda y: y.clamp(0, 1) * 2, "bias_tanh"),
        (F.relu, "bias_gelu"),
    ],
)
def test_another_program_says_nothing(known: list[dict[str, Any]], tail: Any, measured: str) -> None:
    known.append(row({"fused": 0.5, "epilogue": 0.5}, tail=measured))
    assert [site.kernel for site in explain(Up(tail), X).sites] == ["inductor"]


@pytest.mark.parametrize("name", [name for name in TAILS if name != "none"])
def test_the_benchmarks_tails_are_of_the_kinds_that_are_written_down(known: list[dict[str, Any]], name: str) -> None:
    case = Case("", (4, 16, 8, 8), 32, 3, 2, 1, 1, name)
    x, *others = case.inputs("cpu", torch.float32, torch.contiguous_format)
    known.append(row({"fused": 0.5}, tail=name))
    model = case.model()

    def forward(x: Tensor, *others: Tensor) -> Tensor:
        """What is added is made here: what comes from outside others may write to, and it ends the tail."""
        return model(x, *(other * 1 for other in others))

    (site,) = explain(forward, x.requires_grad_(), *others).sites
    assert site.kernel == "fused" and "2.00 times the speed of Inductor in training" in site.reason


def test_a_tail_of_no_known_kind_is_refused() -> None:
    with pytest.raises(KeyError, match="none"):
        training.case_of(row({"fused": 0.5}, tail="none"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Up(lambda y: y * 2 + 1), "the tail has no bounds"), (Up().requires_grad_(False), "no kernel of ours is taken")],
)
def test_where_no_bits_are_kept_nothing_is_measured(known: list[dict[str, Any]], model: Up, reason: str) -> None:
    known.append(row({"fused": 0.5}))
    model.conv.bias.requires_grad_(True)
    (site,) = explain(model, X).sites
    assert site.kernel == "inductor" and reason in site.reason


@pytest.mark.parametrize("way", ["fused", "epilogue"])
@pytest.mark.parametrize("tail", [lambda y: y.clamp(0, 1) * 2, F.relu], ids=["clamp", "relu"])
def test_the_gradients_are_eagers(known: list[dict[str, Any]], way: str, tail: Callable[[Tensor], Tensor]) -> None:
    known.extend((row({way: 0.5}), row({way: 0.5}, tail="bias_relu")))
    model, x = Up(tail), X.clone().requires_grad_()
    compiled = torch.compile(model, backend=fused_post, options={"fused_post.strict": True})
    assert [site.kernel for site in explain(compiled, x).sites] == [way]
    results = [torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()]) for f in (compiled, model)]
    torch.testing.assert_close(*results)


def test_results_become_what_is_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def column(ms: float, saved: int) -> dict[str, float]:
        return {"ms": ms, "saved_bytes": saved, "peak_bytes": 2 * saved}

    contenders = {
        "eager": column(9, 90),
        "inductor": column(5, 50),
        "inductor max-autotune": {"raised": "late"},
        "fused_post auto": column(1, 1),
        "fused_post fused": column(2, 10),
        "fused_post epilogue": {"error": 1.0},
        "fused_post inductor": column(4, 40),
    }
    result = {**row({}), "y": [4, 32, 16, 16], "memory_format": "channels_last_3d", "contenders": contenders}
    compacted = compact_training(result)
    assert compacted is not None
    (tmp_path / "a-gpu.json").write_text(as_text({"gpu": "A GPU", "cases": [], "training": [compacted] * 2}))
    monkeypatch.setattr(evidence, "MEASURED", tmp_path)
    case, _ = training.measured.__wrapped__("A GPU")
    assert (case.plans, case.peer) == ({"fused": 2, "folded": 4}, 5)
    assert case.kept == {"fused": 10, "folded": 40, "peer": 50} and case.problem.x_last
    assert compact_training({**result, "contenders": {"eager": column(9, 90)}}) is None


def test_what_ships_is_read() -> None:
    for path in evidence.MEASURED.glob("*.json"):
        for each in json.loads(path.read_text()).get("training", ()):
            case = training.case_of(each)
            assert case.peer > 0 and case.kept.keys() == {*case.plans, "peer"}

"""What a measured case says of another convolution, and of which it says nothing."""

import json
from dataclasses import replace

import pytest
import torch

from fusion_backend import evidence
from fusion_backend.evidence import Case, Prediction, predict
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.plans import choose_plan
from fusion_backend.kernels.problem import Problem

K3S2 = Axis(3, 2, 1, 1)
SEED = Problem((Axis(), K3S2, K3S2), 64, 64, 1, 32 * 64 * 64, torch.bfloat16, True, True, False, False, 227 * 1024)
SHAPE = (32, 64, 64, 64)
MARCH, GENERAL = "march 64x64, 4 warps, 3 stages", "128x64x128, 4 warps, 3 stages"
HOPPER, PRODUCT = "hopper 64, 2 slots", "product 256x64"


def case(name: str, N: int, plans: dict[str, float], peer: float = 1.0) -> Case:
    return Case(name, replace(SEED, positions=N * 64 * 64), (N, 64, 64, 64), plans, peer)


CASES = (
    case("small", 16, {MARCH: 0.5, GENERAL: 0.8}),
    case("large", 64, {MARCH: 0.4, GENERAL: 0.7}),
    case("larger", 128, {GENERAL: 1.25}),
)


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "measured", lambda gpu: CASES if gpu == "known" else ())


def test_the_nearer_of_two_gives_the_plan_and_the_slower_the_speedup() -> None:
    found = predict(replace(SEED, positions=20 * 64 * 64), (20, 64, 64, 64), "known")
    assert found == Prediction(MARCH, 2.0, "small", 9 * 64 * 64 * 2)


def test_the_same_convolution_needs_no_other() -> None:
    found = predict(CASES[2].problem, CASES[2].shape, "known")
    assert isinstance(found, Prediction)
    assert (found.plan, found.speedup, found.case) == (GENERAL, 0.8, "larger")


def test_a_kind_of_gpu_that_is_not_measured() -> None:
    assert predict(SEED, SHAPE, "unknown") == "nothing is measured on unknown"


def on_2d(axis: Axis) -> tuple[Axis, ...]:
    return (Axis(), axis, axis)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"dtype": torch.float32, "tf32": True}, SHAPE),
        ({"x_last": False}, SHAPE),
        ({"out_last": False}, SHAPE),
        ({"groups": 2}, SHAPE),
        ({"axes": on_2d(Axis(3, 1, 1))}, SHAPE),
        ({"axes": on_2d(Axis(2, 2))}, SHAPE),
        ({"axes": on_2d(Axis(4, 2, 1))}, SHAPE),
        ({"axes": on_2d(Axis(7, 2, 3, 1))}, SHAPE),
        ({"axes": on_2d(Axis(3, 2, 1, 1, 2))}, SHAPE),
        ({"axes": (Axis(), Axis(9, 4), Axis())}, SHAPE),
        ({"axes": (K3S2, K3S2, K3S2)}, (2, 64, 16, 64, 64)),
        ({"C_in": 8}, SHAPE),
        ({"C_out": 256}, SHAPE),
        ({"positions": 2**10}, (1, 64, 32, 32)),
        ({}, (512, 64, 2, 64)),
        ({}, (4096, 64, 1, 16)),
        ({}, (16, 64, 1, 4096)),
    ],
    ids=str,
)
def test_what_a_case_says_nothing_of(changes: dict[str, object], shape: tuple[int, ...]) -> None:
    assert predict(replace(SEED, **changes), shape, "known") == "no measured case on known is like it"


@pytest.mark.parametrize(
    ("plans", "peer", "taken"),
    [
        ({MARCH: 0.5, GENERAL: 0.8}, 1.0, MARCH),
        ({MARCH: 0.7}, 1.0, None),
        ({MARCH: 0.8, GENERAL: 0.5}, 1.0, None),
        ({HOPPER: 0.5, PRODUCT: 0.8}, 1.0, HOPPER),
        ({HOPPER: 0.8, PRODUCT: 0.5}, 1.0, None),
    ],
    ids=["far faster", "hardly faster", "no march", "far faster on Hopper", "no march on Hopper"],
)
def test_one_case_alone_must_show_a_march_to_be_far_faster(
    monkeypatch: pytest.MonkeyPatch, plans: dict[str, float], peer: float, taken: str | None
) -> None:
    monkeypatch.setattr(evidence, "measured", lambda gpu: (case("small", 16, plans, peer),))
    found = predict(replace(SEED, hopper=True), SHAPE, "known")
    if taken:
        assert isinstance(found, Prediction) and (found.plan, found.speedup) == (taken, 2.0)
    else:
        assert found == "a single measured case on known is like it, small, and no march is far faster there"


def test_of_another_size_the_march_is_cut_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs get narrower tiles."""
    monkeypatch.setattr(evidence, "measured", lambda gpu: CASES[:2])
    shape = (2, 64, 64, 64)
    found = predict(replace(SEED, positions=2 * 64 * 64), shape, "known")
    assert isinstance(found, Prediction)
    assert found.plan == choose_plan(replace(SEED, positions=2 * 64 * 64), shape).name != MARCH


def test_a_case_where_no_plan_was_right_speaks_against_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "measured", lambda gpu: (case("wrong", 16, {}), CASES[1]))
    found = predict(replace(SEED, positions=20 * 64 * 64), (20, 64, 64, 64), "known")
    assert found == "at a most similar measured case, wrong, no plan of ours that fits here was exact enough"


def test_what_ships_is_read() -> None:
    for path in evidence.MEASURED.glob("*.json"):
        cases = json.loads(path.read_text())["cases"]
        assert cases and all(evidence.case_of(row).peer > 0 for row in cases)


def test_what_is_opaque_is_counted_with_what_it_costs_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.11 ms at the measured case; a quarter of that at one of a quarter of its images, where it counts as 0.1 ms."""
    hopper = "hopper 64, 2 slots, together"
    cases = tuple(case(str(N), N, {hopper: 0.11, MARCH: 0.3}) for N in (31, 33))
    monkeypatch.setattr(evidence, "measured", lambda gpu: cases)
    monkeypatch.setattr(evidence, "OPAQUE", 0.1)
    for N, replayed, plan, speedup in ((32, False, hopper, 9), (8, False, MARCH, 3), (8, True, hopper, 9)):
        found = predict(replace(SEED, hopper=True, positions=N * 64 * 64), (N, 64, 64, 64), "known", replayed)
        assert isinstance(found, Prediction)
        assert (found.plan.split()[0], int(found.speedup)) == (plan.split()[0], speedup)
    found = predict(SEED, SHAPE, "known")  # where triton has no language for it
    assert isinstance(found, Prediction)
    assert found.plan == MARCH

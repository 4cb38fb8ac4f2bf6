"""Which plans there are, and which the rule takes, without a GPU."""

from dataclasses import replace

import pytest
import torch

from fusion_backend.kernels.hopper_strips import why_not
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.plans import choose_plan, plan_named, plans_for, plans_turned_back, why_no_bits
from fusion_backend.kernels.problem import Problem

SEED = Problem(
    axes=(Axis(), Axis(3, 2, 1, 1), Axis(3, 2, 1, 1)),
    C_in=64,
    C_out=64,
    groups=1,
    positions=128 * 128 * 128,
    dtype=torch.bfloat16,
    x_last=False,
    out_last=False,
    tf32=False,
    exact=False,
    shared_limit=227 * 1024,
)
WIDE = replace(SEED, axes=(Axis(), Axis(), Axis(16, 8, 4)), C_in=512, C_out=256)
DOWN = replace(SEED, axes=(Axis(), Axis(2, 2), Axis(2, 2)), C_in=512)
EXACT = replace(SEED, dtype=torch.float32, exact=True)
DEPTHWISE = replace(SEED, C_in=1, C_out=1, groups=64)
EVERYTHING = [
    replace(each, x_last=x_last, out_last=out_last, shared_limit=limit * 1024, hopper=limit == 227)
    for each in (SEED, WIDE, DOWN, EXACT, DEPTHWISE)
    for x_last in (False, True)
    for out_last in (False, True)
    for limit in (64, 99, 227)
]


def test_each_plan_is_found_by_its_name_and_by_no_other() -> None:
    for problem in EVERYTHING:
        plans = list(plans_for(problem))
        assert plans
        assert len({plan.name for plan in plans}) == len(plans)
        assert [plan_named(problem, plan.name) for plan in plans] == plans
        assert plan_named(problem, "fast") is None


def test_the_rule_takes_one_that_fits() -> None:
    for problem in EVERYTHING:
        plan = choose_plan(problem, (128, problem.C_in * problem.groups, 128, 128))
        assert plan in list(plans_for(problem))
        assert not plan.name.startswith("hopper")


def test_only_a_hopper_has_its_plans() -> None:
    for problem in EVERYTHING:
        hopper = [plan.name for plan in plans_for(problem) if plan.name.startswith("hopper")]
        taken = problem.hopper and (why_not(problem) is None)
        assert bool(hopper) == taken
    assert any(plan.name == "hopper 64, 2 slots" for plan in plans_for(replace(SEED, hopper=True)))


def test_what_a_program_reads_has_room_in_all_of_them() -> None:
    turned_back = replace(WIDE, dtype=torch.float32, tf32=True, x_last=True)
    for problem in (*EVERYTHING, turned_back):
        reads, wide = replace(problem, tensors=2), replace(problem, columns=2**12)
        assert choose_plan(reads, (128, problem.C_in * problem.groups, 128, 128)) in list(plans_for(reads))
        assert set(plans_for(reads)) <= {plan for plan in plans_for(problem) if not plan.back and not plan.is_hopper}
        assert list(plans_for(wide)) == [plan for plan in plans_for(problem) if not plan.is_hopper]
    assert any(plan.back for plan in plans_for(turned_back))


@pytest.mark.parametrize(
    ("problem", "begins"),
    [
        (SEED, "march 64x64"),
        (WIDE, "turned 64x128"),  # taps at odd addresses
        (replace(WIDE, x_last=True), "64x128"),
        (replace(WIDE, x_last=True, out_last=True), "128x"),
        (DOWN, "128x"),  # no tap moves
        (DEPTHWISE, "256x8"),
        (EXACT, "128x64"),
    ],
)
def test_what_the_rule_takes(problem: Problem, begins: str) -> None:
    shape = (128, problem.C_in * problem.groups, *(128,) * sum(axis != Axis() for axis in problem.axes))
    assert choose_plan(problem, shape).name.startswith(begins)


def test_what_the_packed_weight_takes() -> None:
    pytest.importorskip("triton")
    from fusion_backend.kernels.conv_transpose import pack_for

    for problem in EVERYTHING:
        kernel = [axis.kernel for axis in problem.axes]
        weight = torch.empty(problem.C_in * problem.groups, problem.C_out, *kernel, dtype=problem.dtype)
        for plan in plans_for(problem):
            assert pack_for(plan, weight, problem).nbytes == plan.packed_bytes(problem)


def test_only_a_contiguous_x_is_turned() -> None:
    for problem in EVERYTHING:
        turned = [plan for plan in plans_for(problem) if plan.turned]
        assert bool(turned) == (not problem.x_last and problem.dot and not problem.exact)
        assert all(plan.problem(problem).x_last for plan in turned)


def test_results_are_turned_back_where_float32_has_no_whole_sectors() -> None:
    vocoder = replace(WIDE, axes=(Axis(), Axis(), Axis(16, 8, 4)), dtype=torch.float32, tf32=True, x_last=True)
    back = [plan for plan in plans_for(vocoder) if plan.back]
    assert back and all(plan.problem(vocoder) == replace(vocoder, out_last=True) for plan in back)
    assert all(plan_named(vocoder, plan.name) == plan for plan in back)
    others = ({"out_last": True}, {"dtype": torch.bfloat16, "tf32": False}, {"axes": (Axis(), Axis(), Axis(8, 4, 2))})
    for other in others:
        assert not any(plan.back for plan in plans_for(replace(vocoder, **other)))


def test_what_is_turned_on_both_sides_is_as_if_all_were_channels_last() -> None:
    """There is some for whatever is contiguous and can be turned, on a Hopper the march for that first."""
    for problem in EVERYTHING:
        plans = list(
            plans_turned_back(problem, (128, problem.C_in * problem.groups, *(128,) * 3)[: 2 + len(SEED.axes)])
        )
        can = problem.dot and not problem.exact and not problem.x_last and not problem.out_last
        assert bool(plans) == can
        rest = replace(problem, x_last=True, out_last=True)
        assert all(plan.turned and plan.back and plan.problem(problem) == rest for plan in plans)
        assert {replace(plan, turned=False, back=False) for plan in plans} <= set(plans_for(rest))
        if can:
            assert plans[0].is_hopper == (problem.hopper and why_not(rest) is None)
            assert plans[0].name.startswith("turned ") and plans[0].name.endswith(", turned back")


def test_bits_of_a_result_that_is_turned_back_are_the_workspaces() -> None:
    for problem in (SEED, replace(SEED, hopper=True), WIDE, DOWN):
        for C_out in (64, 60):
            given = replace(problem, C_out=C_out)
            for plan in plans_turned_back(given, (128, given.C_in, 128, 128)):
                alone = replace(plan, turned=False, back=False)
                rest = replace(given, x_last=True, out_last=True)
                assert why_no_bits(plan, given, 63) == why_no_bits(alone, rest, 64)
                assert C_out == 64 or why_no_bits(plan, given, 64)

"""Which plans there are, and which the rule takes, without a GPU."""

from dataclasses import replace

import pytest
import torch

from fusion_backend.kernels.hopper_strips import why_not
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.plans import choose_plan, plan_named, plans_for, plans_for_bits, why_no_bits
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
        marches = [plan for plan in plans_for(problem) if plan.is_hopper and not plan.is_product]
        assert list(plans_for(wide)) == [plan for plan in plans_for(problem) if plan not in marches]
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


def test_bits_are_asked_of_what_writes_the_result_as_it_is_before_what_is_turned_on_both_sides() -> None:
    """There is some for whatever is contiguous and can be turned, as if all were channels_last."""
    for problem in EVERYTHING:
        shape = (128, problem.C_in * problem.groups, 128, 128)
        plain, plans = (list(plans_for_bits(problem, shape, turned)) for turned in (False, True))
        assert plans[: len(plain)] == plain and set(plain) <= set(plans_for(problem))
        assert plain[0].is_hopper == (problem.hopper and why_not(problem) is None)
        rest = replace(problem, x_last=True, out_last=True)
        both = plans[len(plain) :]
        assert bool(both) == (problem.dot and not problem.exact and not problem.x_last and not problem.out_last)
        assert all(plan.turned and plan.back and plan.problem(problem) == rest for plan in both)
        alone = [replace(plan, turned=False, back=False) for plan in both]
        assert not both or alone == list(plans_for_bits(rest, shape, True))
        assert all(plan.name.startswith("turned ") and plan.name.endswith(", turned back") for plan in both)


def test_bits_of_a_result_that_is_turned_back_are_the_workspaces() -> None:
    for problem in (SEED, replace(SEED, hopper=True), WIDE, DOWN):
        shape = (128, problem.C_in, 128, 128)
        for C_out in (64, 60):
            given = replace(problem, C_out=C_out)
            for plan in plans_for_bits(given, shape, True):
                reason = why_no_bits(plan, given, 63)
                assert plan.back or reason is not None
                if plan.back:
                    rest = replace(given, x_last=True, out_last=True)
                    assert reason == why_no_bits(replace(plan, turned=False, back=False), rest, 64)
                    assert C_out == 64 or reason is not None
        assert any(why_no_bits(plan, problem, 63) is None for plan in plans_for_bits(problem, shape, True))

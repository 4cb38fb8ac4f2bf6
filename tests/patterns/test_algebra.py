"""The normal form equals step-by-step evaluation in float64: random chains, bounds hit, signs, NaN and infinities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.algebra import LARGEST, Clamp, NormalForm, Refusal, Scale, Shift, apply, fold
from fusion_backend.patterns.coefficient import Coefficient, Leaf

C = 5
INFINITE = (math.inf, -math.inf)
numbers = st.floats(-8, 8, width=32)
factors = st.one_of(
    st.floats(-4, 4, width=32).filter(lambda s: abs(s) > 1e-3), st.sampled_from([-1.0, 1e-6, -1e-6, 1e6])
)
bounds = st.one_of(numbers, st.sampled_from(INFINITE))
number_steps = st.one_of(
    numbers.map(Shift), factors.map(Scale), st.tuples(bounds, bounds).map(lambda pair: Clamp(*pair))
)


def vectors(values: st.SearchStrategy[float]) -> st.SearchStrategy[Coefficient]:
    def leaf(entries: list[float]) -> Leaf:
        return Leaf(torch.tensor(entries, dtype=torch.float64), "t", per_channel=True)

    return st.one_of(values, st.lists(values, min_size=C, max_size=C).map(leaf))


vector_steps = st.one_of(
    vectors(numbers).map(Shift),
    vectors(factors).map(Scale),
    st.tuples(vectors(bounds), vectors(bounds)).map(lambda pair: Clamp(*pair)),
)


def value(c: Coefficient) -> torch.Tensor:
    result = co.evaluate(c, lambda leaf: leaf.value)
    return torch.as_tensor(result, dtype=torch.float64).reshape(-1, 1)


def step_by_step(x: torch.Tensor, steps: list[Any]) -> torch.Tensor:
    """x [C, n] in float64, each step as eager does it."""
    for step in steps:
        if isinstance(step, Shift):
            x = x + value(step.amount)
        elif isinstance(step, Scale):
            x = x * value(step.factor)
        else:
            x = torch.minimum(torch.maximum(x, value(step.lo)), value(step.hi))
    return x


def normal_form(x: torch.Tensor, form: NormalForm) -> torch.Tensor:
    a, b, lo, hi = map(value, form.coefficients)
    return torch.minimum(torch.maximum(a * x + b, lo), hi)


def inputs(steps: list[Any]) -> torch.Tensor:
    """Ordinary values, both infinities, NaN, and for each clamp the x that lands on its bounds."""
    xs = torch.cat([torch.linspace(-9, 9, 19, dtype=torch.float64), torch.tensor([*INFINITE, math.nan, 0.0, -0.0])])
    xs = xs.expand(C, -1)
    for i, step in enumerate(steps):
        if isinstance(step, Clamp):
            for bound in (step.lo, step.hi):
                x = value(bound).expand(C, 1)
                for earlier in reversed(steps[:i]):
                    if isinstance(earlier, Shift):
                        x = x - value(earlier.amount)
                    elif isinstance(earlier, Scale):
                        x = x / value(earlier.factor)
                xs = torch.cat([xs, x.expand(C, 1)], 1)
    return xs


def assert_same(steps: list[Any]) -> None:
    form = fold(steps)
    if isinstance(form, Refusal):
        return
    x = inputs(steps)
    expected, actual = step_by_step(x, steps), normal_form(x, form)
    scale = math.prod(max(1.0, float(value(s.factor).abs().max())) for s in steps if isinstance(s, Scale))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * scale * 100, equal_nan=True)


@settings(max_examples=400, deadline=None)
@given(st.lists(number_steps, max_size=12))
def test_chains_of_numbers(steps: list[Any]) -> None:
    assert_same(steps)


@settings(max_examples=400, deadline=None)
@given(st.lists(vector_steps, max_size=12))
def test_chains_with_one_value_per_channel(steps: list[Any]) -> None:
    assert_same(steps)


@settings(max_examples=200, deadline=None)
@given(st.lists(vector_steps, max_size=6), st.lists(vector_steps, max_size=6))
def test_bounds_stay_in_order(first: list[Any], second: list[Any]) -> None:
    form = fold([*first, *second])
    if isinstance(form, NormalForm):
        lo, hi = value(form.lo), value(form.hi)
        assert bool(((lo <= hi) | torch.isclose(lo, hi, rtol=1e-12, atol=1e-12)).all())


def vector(*entries: float) -> Leaf:
    return Leaf(torch.tensor(entries, dtype=torch.float64), "t", per_channel=True)


def test_identity_steps_change_nothing() -> None:
    steps = [Shift(0.0), Scale(1.0), Clamp(-math.inf, math.inf)]
    assert fold(steps) == NormalForm() and NormalForm().operations == 0


def test_the_seed_is_one_add_and_one_clamp() -> None:
    bias, s = vector(*range(C)), 2.0
    form = fold([Shift(bias), Clamp(0.0, 1.0), Scale(s), Clamp(0.0, 1.0), Scale(1 / s)])
    assert form == NormalForm(1.0, bias, 0.0, min(1.0, 1 / s))


def test_a_negative_scale_swaps_the_bounds() -> None:
    assert fold([Clamp(-1.0, 2.0), Scale(-3.0)]) == NormalForm(-3.0, 0.0, -6.0, 3.0)
    assert fold([Clamp(-math.inf, 2.0), Scale(-1.0)]) == NormalForm(-1.0, 0.0, -2.0, math.inf)


def test_a_lower_bound_above_the_upper_gives_the_upper() -> None:
    assert fold([Clamp(5.0, -1.0)]) == NormalForm(1.0, 0.0, -1.0, -1.0)


def test_clamps_of_disjoint_ranges_are_constant() -> None:
    assert fold([Clamp(0.0, 1.0), Clamp(3.0, 4.0)]) == NormalForm(1.0, 0.0, 3.0, 3.0)


def test_a_zero_in_a_scale_vector_behind_two_bounds_is_eagers_constant_for_infinite_x() -> None:
    steps = [Clamp(-1.0, 2.0), Scale(vector(0.0, 1.0, -1.0, 2.0, 0.0)), Shift(0.5)]
    x = torch.tensor([*INFINITE, math.nan, 1.0, -3.0], dtype=torch.float64).expand(C, -1)
    torch.testing.assert_close(normal_form(x, fold(steps)), step_by_step(x, steps), rtol=0, atol=1e-30, equal_nan=True)


def test_an_infinite_bound_vector_times_zero_is_no_nan() -> None:
    steps = [Clamp(vector(*[-math.inf] * C), 1.0), Scale(vector(0.0, 1.0, -1.0, 2.0, 0.0))]
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).expand(C, -1)
    torch.testing.assert_close(normal_form(x, fold(steps)), step_by_step(x, steps), rtol=0, atol=1e-30)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_in_a_coefficient_vector_goes_through(bad: float) -> None:
    entries = vector(1.0, bad, 2.0, -1.0, 0.5)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64).expand(C, -1)
    for steps in ([Shift(entries), Clamp(0.0, 1.0)], [Clamp(entries, 3.0)], [Clamp(-3.0, entries), Shift(1.0)]):
        torch.testing.assert_close(normal_form(x, fold(steps)), step_by_step(x, steps), equal_nan=True)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Scale(0.0)], "a scale of 0 has no inverse"),
        ([Scale(math.inf)], "a scale of inf has no inverse"),
        ([Scale(math.nan)], "a scale of nan has no inverse"),
        ([Shift(math.inf)], "a shift of inf is not finite"),
        ([Shift(math.nan)], "a shift of nan is not finite"),
        ([Clamp(math.nan, 1.0)], "a bound is NaN"),
        ([Clamp(0.0, math.nan)], "a bound is NaN"),
        ([Clamp(0.0, -math.inf)], "nothing but an infinity"),
        ([Clamp(0.0, 1.0), Clamp(math.inf, math.inf)], "nothing but an infinity"),
        ([Scale(1e30), Scale(1e30)], "overflows float32"),
        ([Scale(1e-30), Scale(1e-30)], "underflows float32"),
        ([Shift(LARGEST), Shift(LARGEST)], "overflows float32"),
        ([Clamp(0.0, 1e30), Scale(1e10)], "overflows float32"),
        ([Scale(1e-30), Shift(vector(1, 1, 1, 1, 1)), Scale(1e30), Scale(1e30)], "overflows float32"),
    ],
)
def test_what_is_refused(steps: list[Any], reason: str) -> None:
    refusal = fold(steps)
    assert isinstance(refusal, Refusal) and reason in refusal.reason
    assert isinstance(fold(steps[:-1]), NormalForm), "only the last step is at fault"
    before = fold(steps[:-1])
    assert isinstance(before, NormalForm) and apply(before, steps[-1]) == refusal


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([], "y = x"),
        ([Shift(-2.0)], "y = x - 2"),
        ([Scale(-1.0)], "y = -x"),
        ([Scale(2.5), Shift(1.0)], "y = 2.5*x + 1"),
        ([Clamp(0.0, math.inf)], "y = max(x, 0)"),
        ([Clamp(0.0, 6.0), Scale(0.5)], "y = min(max(0.5*x, 0), 3)"),
        ([Shift(vector(*range(C))), Scale(2.0)], "y = 2*x + 2*t[c]"),
        ([Scale(co.reciprocal(vector(*range(C))))], "y = 1/t[c]*x"),
    ],
)
def test_the_equation_reads_like_mathematics(steps: list[Any], text: str) -> None:
    assert str(fold(steps)) == text

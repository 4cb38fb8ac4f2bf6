"""The gate of a folded tail against what eager's autograd does: on the bounds, beyond them, at NaN and infinities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion_backend.patterns import algebra, gradient
from fusion_backend.patterns.algebra import Clamp, NormalForm, Refusal, Scale, Shift, Step
from fusion_backend.patterns.coefficient import Leaf
from fusion_backend.patterns.gradient import Gate

# Multiples of 1/16, on which every step below is exact in float64, so that bounds are hit to the bit.
X = torch.cat([torch.arange(-160, 161) / 16, torch.tensor([math.nan, math.inf, -math.inf, -0.0])]).double()


@dataclass(frozen=True)
class Operation:
    """A step, and what a user writes for it."""

    step: Step
    eager: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        return repr(self.step)


def clamp(lo: float, hi: float) -> Operation:
    return Operation(Clamp(lo, hi), lambda x: x.clamp(lo, hi))


def hardtanh(lo: float, hi: float) -> Operation:
    return Operation(Clamp(lo, hi, "blocks"), lambda x: F.hardtanh(x, lo, hi))


def shift(amount: float) -> Operation:
    return Operation(Shift(amount), lambda x: x + amount)


def scale(factor: float) -> Operation:
    return Operation(Scale(factor), lambda x: x * factor)


RELU = Operation(Clamp(0.0, math.inf, "blocks"), F.relu)
RELU6 = Operation(Clamp(0.0, 6.0, "blocks"), F.relu6)
numbers = st.integers(-24, 24).map(lambda n: n / 8)
ordered = st.tuples(numbers, numbers).map(sorted)
operations = st.one_of(
    numbers.map(shift),
    st.sampled_from([0.5, 2.0, -1.0, -2.0, -0.5]).map(scale),
    ordered.map(lambda ends: clamp(*ends)),
    ordered.filter(lambda ends: ends[0] < ends[1]).map(lambda ends: hardtanh(*ends)),
    numbers.map(lambda lo: Operation(Clamp(lo, math.inf), lambda x: x.clamp_min(lo))),
    numbers.map(lambda hi: Operation(Clamp(-math.inf, hi), lambda x: x.clamp_max(hi))),
    st.sampled_from([RELU, RELU6]),
)


def fold(steps: list[Step]) -> tuple[NormalForm, Gate] | Refusal:
    form, gate = NormalForm(), Gate()
    for step in steps:
        gated, folded = gradient.apply(gate, form, step), algebra.apply(form, step)
        if isinstance(gated, Refusal) or isinstance(folded, Refusal):
            return gated if isinstance(gated, Refusal) else folded
        form, gate = folded, gated
    return form, gate


def eager_gradient(chain: list[Operation]) -> Tensor:
    x = X.clone().requires_grad_()
    y = x * 1.0
    for operation in chain:
        y = operation.eager(y)
    (result,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return result


def folded_gradient(form: NormalForm, gate: Gate) -> Tensor:
    """Written from the definition: inside, on a closed end, or a NaN that passes."""
    a, b, lo, hi = form.coefficients
    z = a * X + b
    above = z > lo if gate.lo_open else z >= lo
    below = z < hi if gate.hi_open else z <= hi
    return torch.where(above & below | (z.isnan() & gate.passes_nan), a, 0.0)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.lists(operations, max_size=8))
def test_a_gate_is_eagers_gradient_for_any_chain(chain: list[Operation]) -> None:
    folded = fold([operation.step for operation in chain])
    if isinstance(folded, Refusal):
        reasons = ("no value that passes", "nothing but an infinity", "behind the shift")
        assert any(reason in folded.reason for reason in reasons)
        return
    assert torch.equal(folded_gradient(*folded), eager_gradient(chain))


@pytest.mark.parametrize(
    ("chain", "gate"),
    [
        ([], Gate(False, False, True)),
        ([shift(1.0), scale(-2.0)], Gate(False, False, True)),
        ([clamp(0.0, 1.0)], Gate(False, False, False)),
        ([RELU], Gate(True, False, True)),
        ([RELU, scale(-1.0)], Gate(False, True, True)),
        ([RELU6], Gate(True, True, True)),
        ([clamp(0.0, 1.0), RELU], Gate(True, False, False)),
        ([RELU, clamp(0.0, 1.0)], Gate(True, False, False)),
        ([RELU, clamp(-1.0, 1.0)], Gate(True, False, False)),
        ([RELU, clamp(0.5, 1.0)], Gate(False, False, False)),
    ],
    ids=str,
)
def test_the_tighter_bound_decides_and_of_equal_ones_the_one_that_blocks(chain: list[Operation], gate: Gate) -> None:
    folded = fold([operation.step for operation in chain])
    assert not isinstance(folded, Refusal)
    assert folded[1] == gate
    assert torch.equal(folded_gradient(*folded), eager_gradient(chain))


KNOWN, LEARNED = Leaf(None, "c", per_channel=True), Leaf(None, "p", per_channel=True, learned=True)
AT_RUN_TIME = "is known only at run time"

REFUSED = [
    ([Clamp(-math.inf, 1.0, "halves")], "halved on the bound"),
    ([Clamp(0.0, 1.0), Clamp(2.0, 3.0)], "leave no value that passes"),
    ([Clamp(2.0, 1.0)], "leave no value that passes"),
    ([Clamp(KNOWN, 1.0)], AT_RUN_TIME),
    ([Clamp(KNOWN, math.inf), Clamp(0.0, math.inf, "blocks")], AT_RUN_TIME),
    ([Clamp(0.0, math.inf), Scale(KNOWN)], "whether the scale behind it is zero"),
    ([Clamp(-1.0, 1.0), Shift(LEARNED)], "behind the shift"),
    ([Clamp(-1.0, 1.0), Shift(KNOWN)], "behind the shift"),
    ([Clamp(0.0, math.inf, "blocks"), Shift(1.0)], "behind the shift"),
    ([Clamp(-1.0, 1.0), Shift(1.5)], "behind the shift"),
    ([Clamp(-1.0, 1.0), Scale(1e-4), Shift(300.0)], "behind the shift"),
    ([Clamp(-1.0, 1.0), Shift(0.5), Shift(0.5)], "behind the shift"),
    ([Clamp(LEARNED, math.inf)], "the gradient of a learned bound"),
]


@pytest.mark.parametrize(("steps", "reason"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_one_bit_cannot_hold_is_refused(steps: list[Step], reason: str) -> None:
    folded = fold(steps)
    assert isinstance(folded, Refusal)
    assert reason in folded.reason


@pytest.mark.parametrize(
    "steps",
    [
        [Scale(LEARNED), Shift(LEARNED), Clamp(0.0, 1.0), Scale(-2.0)],
        [Clamp(-1.0, 1.0), Shift(1.0), Scale(0.5)],
        [Clamp(KNOWN, math.inf), Scale(2.0)],
    ],
    ids=["before the bounds", "from -1..1 to 0..1", "one bound known at run time"],
)
def test_what_one_bit_holds_is_folded(steps: list[Step]) -> None:
    assert not isinstance(fold(steps), Refusal)

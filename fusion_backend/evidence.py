"""What is measured of a kind of GPU, and what that says of a convolution that is not among the measured ones.

``measured/<gpu>.json`` holds, for each measured case, the device's time of every plan of ours that was exact enough,
packing the weight included, and of the best of eager, Inductor and Inductor max-autotune. It is written from the
benchmarks' results by ``python -m benchmarks.evidence``. A convolution is judged by the two measured cases most like
it, in halvings and doublings of their sizes: both must speak for a plan of ours. A single near case must show a march
to be far faster; where there is none, nothing is claimed.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.plans import Plan, choose_plan, plans_for
from fusion_backend.kernels.problem import SMALLEST_EDGE, Problem
from fusion_backend.kernels.rounding import cdiv

MEASURED = Path(__file__).parent / "measured"

# Farther than this, in halvings and doublings of all sizes together, no case says anything of another.
FARTHEST = 3.0

# Nor where any of the numbers of positions, or sizes, is farther than this, or of the channels than that.
FARTHEST_SIZE = 3.0
FARTHEST_CHANNELS = 1.5

# Milliseconds that the host takes longer over a call with an operator that is opaque to Inductor than over Inductor's
# (on the H200's host; most of it is Python, the dispatcher and triton's launcher). A plan with one is counted with no
# less, so that it loses nothing where the device waits for the host; unless CUDA graphs replay the call.
OPAQUE = 0.04

# Less than this is not worth leaving Inductor, whose time differs from run to run, too.
LEAST_SPEEDUP = 1.05

# Where a single case is near it must show so much, by a march: those take as long as their bytes do, while for a plain
# product of matrices much depends on how well the peer does, which differs more from shape to shape.
LEAST_SPEEDUP_ALONE = 1.5


@dataclass(frozen=True)
class Case:
    """A measured convolution of an x of ``shape``: milliseconds of the exact enough ``plans``, and of the ``peer``."""

    name: str
    problem: Problem
    shape: tuple[int, ...]
    plans: dict[str, float]
    peer: float


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True)
class Prediction:
    """The plan that was fastest at the most similar case, and the least speedup over the peers at the two."""

    plan: str
    speedup: float
    case: str
    packed_bytes: int  # of the weight as the plan reads it


def predict(
    problem: Problem, shape: Sequence[int], gpu: str, replayed: bool = False, beside: float = 0.0
) -> Prediction | str:
    """For an x of ``shape`` on a ``gpu`` of this name; or why nothing can be said, in words.

    ``replayed``: the call becomes part of a CUDA graph, so that no operator costs the host anything. ``beside``:
    milliseconds that any plan of ours takes on top, and the peers do not.
    """
    deciding = nearest(problem, shape, measured(gpu), gpu, fewest=1)
    if isinstance(deciding, str):
        return deciding
    fitting = {plan.name: plan for plan in plans_for(problem)}
    predictions = [_prediction(problem, case, fitting, replayed, beside) for case in deciding]
    if any(prediction is None for prediction in predictions):
        return f"at a most similar measured case, {deciding[0].name}, no plan of ours that fits here was exact enough"
    first, *others = (prediction for prediction in predictions if prediction is not None)
    exact = _distance(problem, tuple(shape), deciding[0]) == 0
    ruled = choose_plan(problem, tuple(shape))
    if not exact and fitting[first.plan].is_march and ruled.is_march and not fitting[first.plan].turned:
        # How wide a tile may be depends on how many there are, which the rule sees and the case does not.
        first = replace(first, plan=ruled.name, packed_bytes=ruled.packed_bytes(problem))
    if not others and not exact:
        plan = fitting[first.plan]
        marches = plan.is_march or (plan.is_hopper and not plan.is_product)
        if first.speedup < LEAST_SPEEDUP_ALONE or not marches:
            return f"a single measured case on {gpu} is like it, {first.case}, and no march is far faster there"
    return replace(first, speedup=min(each.speedup for each in (first, *others)))


def nearest(
    problem: Problem, shape: Sequence[int], cases: Sequence[AnyCase], gpu: str, fewest: int = 2
) -> list[AnyCase] | str:
    """The case of this very convolution, or else the two most like it, at least ``fewest``; or why there are none."""
    if not cases:
        return f"nothing is measured on {gpu}"
    distances = ((_distance(problem, tuple(shape), case), case) for case in cases)
    near = sorted((pair for pair in distances if pair[0] <= FARTHEST), key=lambda pair: pair[0])
    if not near or (near[0][0] > 0 and len(near) < fewest):
        return f"no measured case on {gpu} is like it"
    return [case for _, case in (near[:1] if near[0][0] == 0 else near[:2])]


def ranked(problem: Problem, shape: Sequence[int], gpu: str) -> list[str]:
    """The names of plans, those first that were fastest at the most similar measured case; none where none is near."""
    cases = [(_distance(problem, tuple(shape), case), i, case) for i, case in enumerate(measured(gpu))]
    distance, _, case = min(cases, default=(math.inf, 0, None))
    return sorted(case.plans, key=case.plans.__getitem__) if case is not None and distance <= FARTHEST else []


def _prediction(
    problem: Problem, case: Case, fitting: dict[str, Plan], replayed: bool, beside: float
) -> Prediction | None:
    growth = _products(problem) / _products(case.problem)
    known = {name: counted(fitting[name], ms * growth, replayed) for name, ms in case.plans.items() if name in fitting}
    if not known:
        return None
    plan = min(known, key=known.__getitem__)
    speedup = case.peer * growth / (known[plan] + beside)
    return Prediction(plan, speedup, case.name, fitting[plan].packed_bytes(problem))


def counted(plan: Plan, ms: float, replayed: bool) -> float:
    """What a plan that takes the device ``ms`` is counted with."""
    return max(ms, OPAQUE) if plan.is_hopper and not replayed else ms


def is_plan(name: str) -> bool:
    """Whether it is the name of a plan, among those of whatever else is measured."""
    return "warps" in name or is_opaque(name)


def is_opaque(name: str) -> bool:
    """Whether a plan of this name has an operator that Inductor cannot look into."""
    return "slots" in name or "product" in name


def _products(problem: Problem) -> int:
    """What the device's time grows with, among problems of one kind."""
    return int(problem.positions) * problem.C_in * problem.C_out


def _distance(problem: Problem, shape: tuple[int, ...], case: Case) -> float:
    """0 for the same convolution; infinite where a case says nothing of another."""
    other = case.problem
    if _kind(problem) != _kind(other):
        return math.inf
    if problem.axes == other.axes and (problem.C_in, problem.C_out, shape) == (other.C_in, other.C_out, case.shape):
        return 0.0
    channels = [_apart(problem.C_in, other.C_in), _apart(problem.C_out, other.C_out)]
    fewest = min(problem.C_in, problem.C_out, other.C_in, other.C_out)
    # Where tensor cores are not filled, each channel less costs as much as it saves.
    if max(channels) > (FARTHEST_CHANNELS if fewest >= SMALLEST_EDGE else 0.5):
        return math.inf
    sizes = [_apart(int(problem.positions), int(other.positions))]
    sizes += [_apart(size, its) for size, its in zip(shape[2:], case.shape[2:], strict=True)]
    if max(sizes) > FARTHEST_SIZE:
        return math.inf
    # Not quite the same, even if the numbers are.
    return 0.01 + sum(channels) + sum(sizes) / 2


def _kind(problem: Problem) -> tuple[Any, ...]:
    """What must be the same for one case to say anything of another: all but the sizes and the padding."""
    axes = tuple((axis.kernel, axis.stride, axis.dilation) for axis in problem.axes)
    number = (problem.dtype.itemsize, problem.tf32, problem.exact)
    return (axes, number, problem.groups, problem.x_last, problem.out_last)


def _apart(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1) / max(b, 1)))


@functools.cache
def measured(gpu: str) -> tuple[Case, ...]:
    """The cases measured on a GPU of this name; none where it is not known."""
    path = file_of(gpu)
    return tuple(case_of(row) for row in json.loads(path.read_text())["cases"]) if path.is_file() else ()


@functools.cache
def copy_rate(gpu: str) -> float | None:
    """Bytes read and written in a millisecond, by a copy of much memory on a GPU of this name."""
    path = file_of(gpu)
    rate = json.loads(path.read_text()).get("copy_gb_per_s") if path.is_file() else None
    return rate * 1e6 if rate else None


def file_of(gpu: str) -> Path:
    return MEASURED / f"{'-'.join(gpu.lower().replace('/', ' ').split())}.json"


def case_of(row: dict[str, Any]) -> Case:
    """From a row of the file: the same numbers for each dimension, no groups, and the output laid out as eager's is."""
    N, C_in, *sizes = row["x"]
    axis, dtype = Axis(*row["kernel_stride_padding"]), getattr(torch, row["dtype"])
    positions = N * math.prod(cdiv(axis.output_size(size), axis.stride) for size in sizes)
    last = row["memory_format"] == "channels_last"
    problem = Problem(
        axes=(Axis(),) * (3 - len(sizes)) + (axis,) * len(sizes),
        C_in=C_in,
        C_out=row["C_out"],
        groups=1,
        positions=positions,
        dtype=dtype,
        x_last=last and C_in > 1 and max(sizes) > 1,  # else x is contiguous as well, and counts as that
        out_last=last and len(sizes) > 1,  # in one dimension cuDNN's is contiguous
        tf32=dtype == torch.float32,
        exact=False,
        shared_limit=0,  # of no account here
    )
    return Case(row["case"], problem, tuple(row["x"]), row["plans"], row["peer"])


def gpu_name(device: torch.device) -> str:
    known = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if known else f"device {device}"

"""What is measured of a kind of GPU, and what that says of a convolution that is not among the measured ones.

``measured/<gpu>.json`` holds, for each measured case, the device's time of every plan of ours and of the best of eager,
Inductor and Inductor max-autotune (``python -m benchmarks.evidence`` writes it from the benchmark's results). A
convolution is judged by the measured cases most like it, in halvings and doublings of their sizes. Where none is near,
nothing is claimed.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusion_backend.kernels.plans import plans_for
from fusion_backend.kernels.problem import Problem

MEASURED = Path(__file__).parent / "measured"

# Farther than this, in halvings and doublings, no case says anything of another.
FARTHEST = 3.0

# Nearer than this, it is the same case: the file rounds.
SAME = 0.01

# Less than this is not worth leaving Inductor, whose time differs from run to run, too.
LEAST_SPEEDUP = 1.05


@dataclass(frozen=True)
class Case:
    """A measured convolution: in milliseconds its ``plans`` that were right and ``peer``, the best of the peers."""

    name: str
    kind: tuple[Any, ...]
    sizes: tuple[float, ...]
    plans: dict[str, float]
    peer: float


@dataclass(frozen=True)
class Prediction:
    """The plan that was fastest at the most similar case, and the least speedup over the peers at similar ones."""

    plan: str
    speedup: float
    case: str
    packed_bytes: int  # of the weight as the plan reads it


def predict(problem: Problem, shape: Sequence[int], gpu: str) -> Prediction | str:
    """For an x of ``shape`` on a ``gpu`` of this name; or why nothing can be said, in words."""
    cases = measured(gpu)
    if not cases:
        return f"nothing is measured on {gpu}"
    if problem.groups != 1 or any(axis.dilation != 1 for axis in problem.axes):
        return "no convolution with groups or dilation is measured"
    kind, sizes = kind_of(problem), sizes_of(problem, shape)
    alike = ((_distance(sizes, case.sizes), case) for case in cases if case.kind == kind)
    near = sorted((pair for pair in alike if pair[0] <= FARTHEST), key=lambda pair: pair[0])
    if not near:
        return f"no measured case on {gpu} is like it"
    # A case of the very same sizes says all; else the two nearest must agree.
    deciding = near[:1] if near[0][0] < SAME else near[:2]
    fitting = {plan.name: plan.packed_bytes(problem) for plan in plans_for(problem)}
    predictions = [_prediction(case, fitting) for _, case in deciding]
    if any(prediction is None for prediction in predictions):
        return f"at a most similar measured case, {near[0][1].name}, no plan of ours that fits here was right"
    nearest, *others = (prediction for prediction in predictions if prediction is not None)
    return replace(nearest, speedup=min(each.speedup for each in (nearest, *others)))


def _prediction(case: Case, fitting: dict[str, int]) -> Prediction | None:
    known = {name: ms for name, ms in case.plans.items() if name in fitting}
    if not known:
        return None
    plan = min(known, key=known.__getitem__)
    return Prediction(plan, case.peer / known[plan], case.name, fitting[plan])


def kind_of(problem: Problem) -> tuple[Any, ...]:
    """What must be the same for one case to say anything of another."""
    overlaps = any(axis.kernel > axis.stride for axis in problem.axes)
    return (problem.dtype.itemsize, problem.tf32, problem.exact, problem.x_last, problem.out_last, overlaps)


def sizes_of(problem: Problem, shape: Sequence[int]) -> tuple[float, ...]:
    """Logarithms, each times its weight, whose differences make the distance."""
    rank = len(shape) - 2
    taps = math.prod(axis.kernel for axis in problem.axes)
    phases = math.prod(axis.stride for axis in problem.axes)
    numbers = (problem.C_in, problem.C_out, taps, phases, int(problem.positions) ** 0.5, int(shape[-1]) ** 0.5)
    return (float(rank), *(math.log2(max(1.0, number)) for number in numbers))


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


@functools.cache
def measured(gpu: str) -> tuple[Case, ...]:
    """The cases measured on a GPU of this name; none where it is not known."""
    path = MEASURED / f"{'-'.join(gpu.lower().replace('/', ' ').split())}.json"
    if not path.is_file():
        return ()
    return tuple(_case(row) for row in json.loads(path.read_text())["cases"])


def _case(row: dict[str, Any]) -> Case:
    kind = (row["itemsize"], row["tf32"], False, row["x_last"], row["out_last"], row["overlaps"])
    return Case(row["case"], kind, tuple(row["sizes"]), row["plans"], row["peer"])


def gpu_name(device: torch.device) -> str:
    known = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if known else f"device {device}"

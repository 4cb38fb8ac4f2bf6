"""What is measured of training steps on a kind of GPU, and which of our ways that speaks for at a site.

Two of them keep one bit an element for the backward, or what a program needs, by ``conv_transpose_training``:

    fused       the fused kernel writes the result, and bits where there are bounds
    epilogue    PyTorch's convolution, and the epilogue kernel, which writes the bits
    folded      the tail's normal form in torch operations, left to Inductor, without bits

``measured/<gpu>.json`` holds under "training", for each measured site, the device's time of a forward and a backward in
each way and in the fastest of the peers (``peer``), and the bytes that forward keeps for backward in each. A site
is judged as in inference (``evidence``): by itself or by the two cases most like it, which both must speak for a way. A
case speaks for one that is faster than the peer, or that keeps less and is not slower. Only cases of the same kind are
asked: behind a lone relu the peer keeps its result alone, which the next operation keeps anyway; a program has no bits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion_backend import evidence
from fusion_backend.evidence import LEAST_SPEEDUP
from fusion_backend.kernels.problem import Problem

# What counts as not slower: a step's time differs that much from run to run.
NOT_SLOWER = 0.98

FOLDED = "folded"

# What is kept differs, and so sites are judged by their like: a relu alone, bounds, and programs whose result tells the
# gradient, or does not.
RELU, BOUNDS, RESULT, PROGRAM = "relu", "bounds", "result", "program"

# Of the tails of the benchmark; the others have bounds.
KINDS = {
    "bias_relu": RELU,
    "bias_tanh": RESULT,
    "bias_leaky_relu": PROGRAM,  # its result leaves the graph, and may be written to
    "bias_gelu": PROGRAM,
    "bias_silu": PROGRAM,
    "mish_hardtanh": PROGRAM,
    "residual": PROGRAM,
    "add_hardswish": PROGRAM,
    "min_gelu": PROGRAM,
}


@dataclass(frozen=True)
class Case(evidence.Case):
    """``plans`` are our ways; ``kept`` in bytes: of each way and, under "peer", of the peer."""

    kept: dict[str, int]
    kind: str


@dataclass(frozen=True)
class Prediction:
    """A way of ours, its least speedup over the peer, and the most that it keeps in units of what the peer keeps."""

    way: str
    speedup: float
    kept: float
    case: str

    @property
    def is_taken(self) -> bool:
        return self.speedup >= LEAST_SPEEDUP or (self.speedup >= NOT_SLOWER and self.kept < 1)


def predict(problem: Problem, shape: Sequence[int], kind: str, gpu: str) -> Prediction | str:
    """The fastest of our ways that is to be taken or, where none is, the fastest; or why nothing can be said."""
    cases = [case for case in measured(gpu) if case.kind == kind]
    near = evidence.nearest(problem, shape, cases, gpu)
    if isinstance(near, str):
        return near
    ways = [_prediction(way, near) for way in near[0].plans if all(way in case.plans for case in near)]
    if not ways:
        return f"at a most similar measured case, {near[0].name}, no way of ours was right"
    return max(ways, key=lambda way: (way.is_taken, way.speedup))


def _prediction(way: str, near: list[Case]) -> Prediction:
    speedup = min(case.peer / case.plans[way] for case in near)
    kept = max(case.kept[way] / max(case.kept["peer"], 1) for case in near)
    return Prediction(way, speedup, kept, near[0].name)


@functools.cache
def measured(gpu: str) -> tuple[Case, ...]:
    """The cases measured on a GPU of this name; none where it is not known."""
    path = evidence.file_of(gpu)
    return tuple(map(case_of, json.loads(path.read_text()).get("training", ()))) if path.is_file() else ()


def case_of(row: dict[str, Any]) -> Case:
    """From a row of the file."""
    return Case(**vars(evidence.case_of(row)), kept=row["kept"], kind=KINDS.get(row["tail"], BOUNDS))

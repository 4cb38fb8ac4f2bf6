"""What is measured of training steps on a kind of GPU, and which of our ways that speaks for at a site.

Two of them keep one bit an element for the backward, or what a program needs, by ``conv_transpose_training``:

    fused       the fused kernel writes the result, and bits where there are bounds
    epilogue    PyTorch's convolution, and the epilogue kernel, which writes the bits
    folded      the tail's normal form in torch operations, left to Inductor, without bits

``measured/<gpu>.json`` holds under "training", for each measured site, the device's time of a forward and a backward in
each way and in the fastest of the peers (``peer``), and the bytes that forward keeps for backward in each. A site
is judged as in inference (``evidence``): by itself or by the two cases most like it, which both must speak for a way. A
case speaks for one that is faster than the peer, or that keeps less and is not slower. Only cases of the same kind are
asked: behind a lone relu the peer keeps its result alone, which the next operation keeps anyway. A program is judged
by the same instructions alone: what they cost decides, since the fused kernel does them forward and back (on an H200 in
bfloat16, channels_last, that way has 1.30 times the peer's speed behind a leaky_relu, and 0.55 times behind a gelu).
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion_backend import evidence
from fusion_backend.evidence import LEAST_SPEEDUP, OPAQUE
from fusion_backend.kernels.plans import plans_for_bits, why_no_bits
from fusion_backend.kernels.problem import Problem

# What counts as not slower: a step's time differs that much from run to run.
NOT_SLOWER = 0.98

FUSED, FOLDED = "fused", "folded"

# What is kept differs, and so sites are judged by their like: a relu alone, bounds, or a program (``kind_of``).
RELU, BOUNDS = "relu", "bounds"

# Of the tails of the benchmark.
KINDS = {
    "seed": BOUNDS,
    "clamp_halve": BOUNDS,
    "bias_relu": RELU,
    "bias_tanh": "tanh v0, and its result tells",
    "bias_leaky_relu": "leaky_relu v0 #",  # its result leaves the graph, and may be written to
    "bias_gelu": "gelu v0",
    "bias_silu": "silu v0",
    "mish_hardtanh": "mish v0; affine v1 - # - -; hardtanh v2 # #; affine v3 # - - -",
    "residual": "detach v0; affine v0 - c0 - -; add v2 v1; mul v3 v1; add v4 v1",
    "add_hardswish": "add v0 t0; hardswish v1; mul v1 v2",
    "min_gelu": "minmax v0 - #; gelu v1; affine v2 # - - -",
}


def kind_of(program: str, result_tells: bool) -> str:
    """Its text without the numbers, which are constants of the kernels, and without a last step that does nothing."""
    text = re.sub(r"; affine v\d+ - - - -$", "", program)
    text = re.sub(r"(?<= )-?(\d[^ ;]*|inf|nan)", "#", text)
    return f"{text}, and its result tells" if result_tells else text


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


def predict(problem: Problem, shape: Sequence[int], kind: str, gpu: str, replayed: bool = False) -> Prediction | str:
    """The fastest of our ways that is to be taken or, where none is, the fastest; or why nothing can be said.

    ``replayed``: the step becomes part of CUDA graphs, so that no operator costs the host anything.
    """
    bits = kind in (RELU, BOUNDS)
    cases = [case for case in measured(gpu) if case.kind == kind]
    if bits:
        cases = [case for case in cases if _in_order(case.problem, case.shape) == _in_order(problem, shape)]
    near = evidence.nearest(problem, shape, cases, gpu)
    if isinstance(near, str):
        return near
    opaque = {FUSED} if bits and not replayed and _is_opaque(problem, tuple(shape)) else set()
    ways = [_prediction(way, near, way in opaque) for way in near[0].plans if all(way in case.plans for case in near)]
    if not ways:
        return f"at a most similar measured case, {near[0].name}, no way of ours was exact enough"
    return max(ways, key=lambda way: (way.is_taken, way.speedup))


def _in_order(problem: Problem, shape: Sequence[int]) -> bool:
    """Whether the fused kernel may write bits as it writes the result; else that is turned, or there are none."""
    return problem.out_last or problem.axes[2].output_size(shape[-1]) % 8 == 0


def _is_opaque(problem: Problem, shape: tuple[int, ...]) -> bool:
    """Whether the operator that writes the bits is one that Inductor cannot look into."""
    W_out = problem.axes[2].output_size(shape[-1])
    plans = (plan for plan in plans_for_bits(problem, shape, True) if why_no_bits(plan, problem, W_out) is None)
    return any(plan.is_hopper for plan in itertools.islice(plans, 1))


def _prediction(way: str, near: list[Case], opaque: bool) -> Prediction:
    """``opaque``: counted with no less than what that takes the host longer, as in inference."""
    speedup = min(case.peer / max(case.plans[way], OPAQUE if opaque else 0.0) for case in near)
    kept = max(case.kept[way] / max(case.kept["peer"], 1) for case in near)
    return Prediction(way, speedup, kept, near[0].name)


@functools.cache
def measured(gpu: str) -> tuple[Case, ...]:
    """The cases measured on a GPU of this name; none where it is not known."""
    path = evidence.file_of(gpu)
    return tuple(map(case_of, json.loads(path.read_text()).get("training", ()))) if path.is_file() else ()


def case_of(row: dict[str, Any]) -> Case:
    """From a row of the file."""
    return Case(**vars(evidence.case_of(row)), kept=row["kept"], kind=KINDS[row["tail"]])

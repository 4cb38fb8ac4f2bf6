"""What a site takes on this GPU, by each of our plans and by Inductor, measured while the model is compiled.

This is what ``mode="max-autotune"`` asks for. The convolution is measured alone, with a bias and a clamp behind it, on
random numbers: Inductor's own way, and the operator with the plans that are likely, each compiled by Inductor, so that
packing the weight counts, and replayed as a CUDA graph on a cold cache, in turn. A convolution is measured once a
process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._inductor
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from fusion_backend.cache_key import cache_key_tag
from fusion_backend.evidence import Prediction, counted, ranked
from fusion_backend.kernels import hopper_blocks
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.plans import Plan, choose_plan, plans_for
from fusion_backend.kernels.problem import Problem

log = logging.getLogger(__name__)

INDUCTOR = "inductor"

# Of our plans; each costs a second or two of compiling, and a product on Hopper three.
MOST_PLANS = 6

ROUNDS = 15
CACHE_BYTES = 256 * 2**20  # more than any GPU's cache holds

# Milliseconds of every contender by its name, or why they could not be measured.
_known: dict[Any, dict[str, float] | str] = {}


def measure(
    alone: Problem,
    problem: Problem,
    shape: tuple[int, ...],
    device: torch.device,
    gpu: str,
    replayed: bool,
    beside: float = 0.0,
) -> Prediction | str:
    """The fastest plan for an x of ``shape``, and its speed in units of Inductor's; or why it could not be measured.

    ``alone`` is the convolution as it is measured; ``problem`` has those of its plans that the site can take.
    ``replayed`` and ``beside`` are as for ``predict``.
    """
    key = (alone, shape, gpu, device.index)
    if key not in _known:
        try:
            _known[key] = _measure(alone, shape, device, gpu)
        except torch.OutOfMemoryError as raised:  # another time there may be room
            log.warning("there is no memory for measuring a transposed convolution, Inductor takes it: %s", raised)
            return "there is no memory for measuring"
        except Exception as raised:  # whatever compiling raises: the site can go to Inductor
            log.warning("measuring a transposed convolution failed, Inductor takes it: %s", raised, exc_info=True)
            _known[key] = f"measuring failed: {type(raised).__name__}"
    times = _known[key]
    if isinstance(times, str):
        return times
    plans = [plan for plan in plans_for(problem) if plan.name in times]
    if not plans:
        return "no plan of ours that fits here was measured"
    counts = {plan: counted(plan, times[plan.name], replayed) for plan in plans}
    best = min(counts, key=counts.__getitem__)
    speedup = times[INDUCTOR] / (counts[best] + beside)
    return Prediction(best.name, speedup, "itself", best.packed_bytes(problem))


def _measure(problem: Problem, shape: tuple[int, ...], device: torch.device, gpu: str) -> dict[str, float]:
    plans = candidates(problem, shape, gpu)
    with measuring(device):
        times = timed(contenders(problem, shape, device, plans))
    log.info("%s on %s: %s", shape, gpu, ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items()))
    return times


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Outside of the graph that is being compiled, whatever mode its compilation is in."""
    with contextlib.ExitStack() as stack:
        for context in (
            torch._guards.tracing(None),
            _disable_current_modes(),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
            torch.compiler.config.patch(cache_key_tag=cache_key_tag()),  # type: ignore[attr-defined]
        ):
            stack.enter_context(context)
        yield


@functools.cache
def copy_rate(device: torch.device, size: int = 2**28) -> float:
    """Bytes read and written in a millisecond by a copy."""
    with measuring(device):
        source = torch.zeros(size, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return 2 * size / timed({"copy": lambda: target.copy_(source)})["copy"]


def candidates(problem: Problem, shape: tuple[int, ...], gpu: str) -> list[Plan]:
    """The rule's, those that were fastest at similar measured convolutions, and the first ones of each kind."""
    everything = list(plans_for(problem))
    by_name = {plan.name: plan for plan in everything}
    kinds: dict[tuple[bool, ...], list[Plan]] = {}
    for plan in _products_of_one_shape(everything):
        kinds.setdefault((plan.is_hopper, plan.is_product, plan.is_march, plan.turned, plan.back), []).append(plan)
    first = [plan for i in range(2) for kind in kinds.values() for plan in kind[i : i + 1]]
    known = [by_name[name] for name in ranked(problem, shape, gpu) if name in by_name]
    return list(dict.fromkeys([choose_plan(problem, shape), *known[:3], *first]))[:MOST_PLANS]


def _products_of_one_shape(plans: Sequence[Plan]) -> Iterator[Plan]:
    """``plans``, and of products whose tiles are as large the first: how many tiles there are decides between them."""
    sizes: set[tuple[int, bool]] = set()
    for plan in plans:
        if isinstance(plan.config, hopper_blocks.Config):
            size = (plan.config.rows * plan.config.columns, plan.back)
            if size in sizes:
                continue
            sizes.add(size)
        yield plan


def contenders(
    problem: Problem, shape: tuple[int, ...], device: torch.device, plans: Sequence[Plan]
) -> dict[str, Callable[[], object]]:
    """Inductor's own way and the operator with each of the plans, compiled, on the same tensors."""
    from fusion_backend.kernels import conv_transpose as kernels  # needs triton

    rank = len(shape) - 2
    axes = problem.axes[3 - rank :]
    sizes = tuple([getattr(axis, name) for axis in axes] for name in kernels.AXIS)
    like = torch.empty(0, dtype=problem.dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)  # the user's own goes on as if nothing had been drawn
    x = empty(shape, like, problem.x_last).normal_(generator=generator)
    kernel = [axis.kernel for axis in axes]
    weight = like.new_empty(shape[1], problem.C_out, *kernel).normal_(generator=generator)
    channels = problem.C_out * problem.groups
    bias = like.new_empty(channels).normal_(generator=generator)
    stride, padding, output_padding, dilation = sizes
    convolve, last = kernels.CONV_TRANSPOSE[len(shape)], problem.out_last

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = convolve(x, weight, bias, stride, padding, output_padding, problem.groups, dilation)
        return torch.clamp(y, 0.0, 1.0)

    def ours(plan: Plan) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            coefficients = (None, bias.float(), None, None, 1.0, 0.0, 0.0, 1.0)
            operator = torch.ops.fused_post.conv_transpose.default
            return operator(x, weight, *sizes, problem.groups, *coefficients, last, not problem.exact, plan.name)

        return run

    functions = {INDUCTOR: theirs} | {plan.name: ours(plan) for plan in plans}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    found: dict[str, Callable[[], object]] = {}
    for name, function in functions.items():
        try:
            compiled = torch._inductor.compile(
                fx.symbolic_trace(function), [x, weight, bias], options={"triton.cudagraphs": False}
            )
            found[name] = captured(functools.partial(compiled, x, weight, bias), pool)
        except Exception as raised:  # of a plan of ours; without Inductor's there is nothing to compare
            if name == INDUCTOR:
                raise
            log.warning("%s does not run here: %s", name, raised)
    return found


def captured(run: Callable[[], object], pool: Any) -> Callable[[], object]:
    """``run`` as a CUDA graph. Graphs of one pool write their results to the same memory, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()

    def replay(kept: Any = run) -> None:
        """What ``run`` holds lives as long as the graph."""
        graph.replay()

    return replay


def timed(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds, the median of each: all of them once a round, each time behind a write to more than the cache."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, run in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}

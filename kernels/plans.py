"""How the operator computes a transposed convolution: by which kernel and configuration, and from x as it is or turned.

    hopper    ``hopper_march``, on a Hopper, where the weight's taps fit in shared memory
    march     ``row_march``, where the weight's taps fit in shared memory
    product   ``hopper_product``, on a Hopper, from a channels_last x
    general   ``conv_transpose``, for all there is
    turned    any of the latter behind a pass that makes a contiguous x channels_last, at about a copy's speed
    back      product or general into a channels_last workspace of the result's size, and a pass that turns that; any of
              them, and turned, for a gate's bits that a contiguous result has no whole bytes for

A plan has a name, by which a measurement, a compiled graph and a report speak of it. What is chosen without a name is a
rule, read off benchmarks/results/conv_transpose-nvidia-h200-first.json: march where it can, and turn x for the general
kernel where taps read x at odd addresses; with a prologue, which that pass does, also for the march. Everything is
worked out without a GPU and without triton.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusion_backend.kernels import hopper_blocks, hopper_strips, strips, tiling
from fusion_backend.kernels.problem import SMALLEST_EDGE, Problem
from fusion_backend.kernels.rounding import cdiv


@dataclass(frozen=True)
class Plan:
    """A configuration of a kernel; ``turned``: x is made channels_last first.

    ``back``: the result is channels_last at first.
    """

    config: hopper_strips.Config | hopper_blocks.Config | strips.Config | tiling.Config
    turned: bool = False
    back: bool = False

    @property
    def is_march(self) -> bool:
        return isinstance(self.config, strips.Config)

    @property
    def is_product(self) -> bool:
        return isinstance(self.config, hopper_blocks.Config)

    @property
    def is_hopper(self) -> bool:
        """Whether it runs as an operator of its own, which Inductor cannot look into."""
        return isinstance(self.config, (hopper_strips.Config, hopper_blocks.Config))

    @property
    def name(self) -> str:
        """For example "hopper 64, 2 slots", "march 64x32, 4 warps, 2 stages", "turned 64x64x128, 4 warps, 3 stages"."""
        turned = "turned " if self.turned else ""
        back = ", turned back" if self.back else ""
        if isinstance(self.config, (hopper_strips.Config, hopper_blocks.Config)):
            return f"{turned}{self.config.name}{back}"
        if isinstance(self.config, strips.Config):
            size = f"march {self.config.pixels}x{self.config.channels}"
        else:
            size = f"{self.config.rows}x{self.config.columns}x{self.config.depth_bytes}"
        return f"{turned}{size}, {self.config.num_warps} warps, {self.config.num_stages} stages{back}"

    def packed_bytes(self, problem: Problem) -> int:
        """Of the weight as the kernel reads it, filled up to whole blocks."""
        taps = math.prod(axis.kernel for axis in problem.axes)
        if isinstance(self.config, (hopper_strips.Config, strips.Config)):
            C_out = cdiv(problem.C_out, self.config.channels) * self.config.channels
            return taps * C_out * strips.block_k_of(problem) * problem.dtype.itemsize
        if isinstance(self.config, hopper_blocks.Config):
            return taps * math.prod(hopper_blocks.packed_shape(problem, self.config)) * problem.dtype.itemsize
        cut = tiling.tiling_for(self.problem(problem), self.config)
        assert cut is not None, "a plan fits"
        C_in = cdiv(problem.C_in, cut.block_k) * cut.block_k
        return taps * problem.groups * problem.C_out * C_in * problem.dtype.itemsize

    def problem(self, problem: Problem) -> Problem:
        """What is left of the problem for the kernel itself: a pass that turns x does the prologue, too."""
        x_last, out_last = problem.x_last or self.turned, problem.out_last or self.back
        return replace(problem, x_last=x_last, out_last=out_last, prologue=problem.prologue and not self.turned)


def plans_for(problem: Problem) -> Iterator[Plan]:
    """All that fit; there is always one."""
    if problem.hopper and hopper_strips.why_not(problem) is None:
        yield from map(Plan, hopper_strips.configs_for(problem))
    yield from _products(problem)
    for turned in (False, True) if _can_turn(problem) else (False,):
        rest = Plan(tiling.DOT_CONFIGS[0], turned).problem(problem)
        if strips.why_not(rest) is None:
            yield from (Plan(config, turned) for config in strips.configs_for(rest))
        yield from (Plan(each.config, turned) for each in tiling.tilings(rest))
        if _can_turn_back(rest):
            yield from (Plan(each.config, turned, back=True) for each in tiling.tilings(replace(rest, out_last=True)))


def _products(problem: Problem) -> Iterator[Plan]:
    turned = not problem.x_last
    if not problem.hopper or (turned and not _can_turn(problem)):
        return
    for back in (False,) if problem.out_last or problem.tensors or problem.kept else (False, True):
        rest = Plan(hopper_blocks.CONFIGS[0], turned, back).problem(problem)
        if hopper_blocks.why_not(rest) is None:
            yield from (Plan(config, turned, back) for config in hopper_blocks.configs_for(rest))


def plans_for_bits(problem: Problem, shape: tuple[int, ...], turned: bool) -> Iterator[Plan]:
    """Best first, those that may write a gate's bits beside the result; ``why_no_bits`` says whether they can.

    ``turned``: also such that make a contiguous x channels_last, and the result contiguous again.
    """
    if problem.hopper and hopper_strips.why_not(problem) is None:
        yield from map(Plan, hopper_strips.configs_for(problem))
    yield choose_plan(problem, shape)
    yield Plan(tiling.choose_tiling(problem).config)
    yield from (Plan(each.config) for each in tiling.tilings(problem))
    if turned and not problem.out_last and _can_turn(problem):
        rest = plans_for_bits(replace(problem, x_last=True, out_last=True), shape, False)
        yield from (replace(plan, turned=True, back=True) for plan in rest)


def why_no_bits(plan: Plan, problem: Problem, W_out: int) -> str | None:
    """Why a plan cannot write a gate's bits beside an output whose rows have W_out elements; None: it can.

    Where the result is turned back they are the workspace's, in channels_last order (see ``gate``).
    """
    rest = plan.problem(problem)
    if isinstance(plan.config, hopper_strips.Config):
        return hopper_strips.why_no_bits(rest, W_out)
    if isinstance(plan.config, hopper_blocks.Config):
        return "the product on Hopper writes none"
    if isinstance(plan.config, strips.Config):
        return strips.why_no_bits(rest, plan.config, W_out)
    cut = tiling.tiling_for(rest, plan.config)
    assert cut is not None, "a plan fits"
    return tiling.why_no_bits(rest, cut, W_out)


def plan_named(problem: Problem, name: str) -> Plan | None:
    return next((plan for plan in plans_for(problem) if plan.name == name), None)


def choose_plan(problem: Problem, shape: tuple[int, ...]) -> Plan:
    """By the rule above, for an x of ``shape``, whose batch and spatial sizes may be symbolic."""
    if strips.why_not(problem) is None:
        return Plan(strips.choose_march(problem, shape).config)
    turned = _can_turn(problem) and problem.axes[2].moves
    rest = replace(problem, x_last=True, prologue=False) if turned else problem
    if problem.prologue and turned and strips.why_not(rest) is None:
        return Plan(strips.choose_march(rest, shape).config, turned)
    return Plan(tiling.choose_tiling(rest).config, turned)


def _can_turn(problem: Problem) -> bool:
    """Tensor cores read x in whole blocks of channels; turning fewer moves more bytes than it saves."""
    return problem.dot and not problem.exact and not problem.x_last and problem.C_in >= SMALLEST_EDGE


def _can_turn_back(problem: Problem) -> bool:
    """Where a tile has too few phases for whole 32-byte sectors of a contiguous row of float32.

    What a program reads or stores beside it is laid out as the result, and not as the workspace.
    """
    if problem.tensors or problem.kept:
        return False
    few = problem.axes[2].stride > tiling.MOST_JOINED
    return problem.tf32 and problem.dot and problem.x_last and not problem.out_last and few

"""The plan for a graph: every transposed convolution in it, what it is, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from fusion_backend import surroundings
from fusion_backend.choice import Choice, choose, taken
from fusion_backend.options import Options
from fusion_backend.patterns.site import Site, find_convolutions, match
from fusion_backend.patterns.source import Miss, is_tensor, value_of
from fusion_backend.surroundings import Surroundings


@dataclass(frozen=True)
class Decision:
    """What the transposed convolution at ``node`` is, and the implementation it gets (None for a Miss)."""

    node: fx.Node
    found: Site | Miss
    choice: Choice | None

    @property
    def kernel(self) -> str | None:
        return self.choice.kernel if self.choice else None


def make_plan(module: fx.GraphModule, options: Options) -> tuple[Decision, ...]:
    """One decision for each transposed convolution, in graph order. Changes nothing."""
    around = surroundings.read(module)
    plan = _decide(module, options, around)
    left = [decision.node for decision in plan if decision.kernel != "fused" and _is_2d(decision.node)]
    if left and len(left) < len(plan) and around.relayout is False:
        plan = _decide(module, options, surroundings.read(module, left))
    return plan


def _decide(module: fx.GraphModule, options: Options, around: Surroundings) -> tuple[Decision, ...]:
    """In graph order: what the tail of one site holds is no other's prologue."""
    held: set[fx.Node] = set()

    def read(node: fx.Node, bare: bool = False) -> Site | Miss:
        site = match(node, bare)
        if isinstance(site, Site) and site.prologue is not None and not held.isdisjoint(site.prologue.nodes):
            return replace(site, prologue=None)
        return site

    def decide(node: fx.Node) -> Decision:
        found = read(node)
        if isinstance(found, Site):
            return Decision(node, found, choose(found, options, around))
        bare = read(node, bare=True)
        choice = choose(bare, options, around) if isinstance(bare, Site) else None
        if isinstance(bare, Site) and choice is not None and choice.kernel == "fused":
            return Decision(node, bare, choice)
        return Decision(node, found, None)

    plan = []
    for node in find_convolutions(module):
        decision = decide(node)
        held.update(_replaced(decision))
        plan.append(decision)
    return tuple(plan)


def _replaced(decision: Decision) -> tuple[fx.Node, ...]:
    """The nodes of the site's tail that the rewrite replaces."""
    site, choice = decision.found, decision.choice
    if not isinstance(site, Site) or choice is None or choice.kernel is None:
        return ()
    if choice.kernel == "inductor" and not choice.training and not (choice.folds and site.is_shorter_folded):
        return ()
    return taken(site, choice.kernel, choice.relayout, choice.program, keeps=choice.keeps).replaced


def _is_2d(node: fx.Node) -> bool:
    value = value_of(node)
    return is_tensor(value) and len(value.shape) == 4

"""The plan for a graph: every transposed convolution in it, what it is, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fusion_backend.choice import Choice, choose
from fusion_backend.options import Options
from fusion_backend.patterns.site import Site, find_convolutions, functions, match
from fusion_backend.patterns.source import Miss


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
    called = functions(module)

    def decide(node: fx.Node) -> Decision:
        found = match(node)
        if isinstance(found, Site):
            return Decision(node, found, choose(found, options, called))
        bare = match(node, bare=True)
        choice = choose(bare, options, called) if isinstance(bare, Site) else None
        if isinstance(bare, Site) and choice is not None and choice.kernel == "fused":
            return Decision(node, bare, choice)
        return Decision(node, found, None)

    return tuple(decide(node) for node in find_convolutions(module))

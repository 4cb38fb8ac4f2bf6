"""The ``torch.compile`` backend: read Dynamo's graph, plan, rewrite, hand on to Inductor."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis

from fusion_backend import options as opt
from fusion_backend import rewrite
from fusion_backend.choice import problem_of
from fusion_backend.derived import DerivedInputs
from fusion_backend.kernels.plans import plan_named
from fusion_backend.patterns.site import Site, find_convolutions, match
from fusion_backend.plan import Decision, make_plan
from fusion_backend.report import describe

log = logging.getLogger(__name__)


def fused_post(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Compile ``gm`` with Inductor, its transposed convolutions and their pointwise tails folded.

    ``mode`` and ``options`` are those of ``torch.compile``; ``options`` takes every option of Inductor and our own:

    ``"fused_post.kernel"``  "auto" (default), "fused", "epilogue" or "inductor": what the sites get
    ``"fused_post.strict"``  False (default) or True: raise our own mistakes instead of logging them

    Raises ValueError on an unknown key or value.
    """
    options, rest = opt.parse(kwargs.get("options"))
    inductor = opt.inductor(kwargs.get("mode"), rest)
    try:
        fused = fuse(gm, options, example_inputs)
    except Exception:
        if options.strict:
            raise
        log.exception(
            "a mistake in fused_post; the graph goes to Inductor as you wrote it, and your model runs. "
            "Please report this traceback as a bug"
        )
        return inductor(gm, example_inputs)
    if not fused.has_kernels:
        return inductor(gm, example_inputs)
    try:
        with torch.compiler.config.patch(cache_key_tag=cache_key_tag()):  # type: ignore[attr-defined]
            return fused.derived.wrap(inductor(gm, [*example_inputs, *fused.derived.examples]))
    except RestartAnalysis:
        raise
    except Exception as error:
        if options.strict:
            raise
        log.warning("a kernel of fused_post did not compile; the graph goes to Inductor as you wrote it: %s", error)
        fused.undo()
        return inductor(gm, example_inputs)


@dataclass(frozen=True)
class Fused:
    """A graph module that was rewritten according to ``plan``, the graphs it had before, and the inputs it got."""

    plan: tuple[Decision, ...]
    originals: dict[fx.GraphModule, fx.Graph]
    derived: DerivedInputs

    @property
    def has_kernels(self) -> bool:
        return any(decision.choice is not None and decision.choice.uses_operator for decision in self.plan)

    def undo(self) -> None:
        _restore(self.originals)


def _restore(originals: dict[fx.GraphModule, fx.Graph]) -> None:
    for module, graph in originals.items():
        module.graph = graph


def fuse(gm: fx.GraphModule, options: opt.Options, example_inputs: Sequence[Any] = ()) -> Fused:
    """Rewrite copies of ``gm``'s graphs according to its plan, and give it those. On an exception ``gm`` is as it was.

    Without ``example_inputs`` nothing is derived outside the graph. (Copies, since Dynamo goes on to read its own.)
    """
    originals = {module: module.graph for module in map(_module, find_convolutions(gm))}
    for module, graph in originals.items():
        module.graph = _copy(graph)
    try:
        plan = make_plan(gm, options)
        log.debug("%s", describe(plan))
        derived = DerivedInputs(gm, example_inputs)
        matched = [decision for decision in plan if decision.kernel is not None]
        rewritten = [_rewrite(decision, derived) for decision in matched]
        if not any(rewritten):
            _restore(originals)
        for module in originals if any(rewritten) else ():
            module.graph.lint()
            module.recompile()
    except Exception:
        _restore(originals)
        raise
    log.info("%d transposed convolutions, %d matched, %d rewritten", len(plan), len(matched), sum(rewritten))
    return Fused(plan, originals, derived)


def _rewrite(decision: Decision, derived: DerivedInputs) -> bool:
    """Put the kernel in; say whether anything changed. The site is read anew: one before it may hold its operands."""
    site, choice = match(decision.node, bare=True), decision.choice
    if not isinstance(site, Site) or choice is None:
        return False
    if choice.training:
        # A GPU adds a convolution's bias in a pass of its own, a CPU does not.
        return rewrite.use_training(site, fused=choice.kernel == "fused", leave_bias=choice.kernel == "inductor")
    if choice.kernel == "fused":
        return rewrite.use_fused(site, choice.plan, _packed(site, choice.plan, derived), derived.add)
    return rewrite.use_epilogue(site, derived.add) if choice.kernel == "epilogue" else rewrite.fold(site)


def _packed(site: Site, plan_name: str | None, derived: DerivedInputs) -> fx.Node | None:
    """The input for the site's packed weight; None where the operator is to pack it in every call."""
    weight, found = site.convolution.weight, problem_of(site) if plan_name else None
    if plan_name is None or found is None or weight is None:
        return None
    from fusion_backend.kernels import conv_transpose  # it needs triton

    problem, _ = found
    plan = plan_named(problem, plan_name)
    assert plan is not None, "a plan that was chosen fits"
    return derived.add([weight], lambda tensor: conv_transpose.pack_for(plan, tensor.to(problem.dtype), problem))


def _module(node: fx.Node) -> fx.GraphModule:
    module = node.graph.owning_module
    assert module is not None, "a graph that is compiled belongs to a module"
    return module


def _copy(graph: fx.Graph) -> fx.Graph:
    """A deep copy that keeps what Dynamo hangs on the nodes beside their ``meta`` (such as ``_dynamo_source``)."""
    duplicate = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, duplicate.nodes, strict=True):
        for name, value in vars(old).items():
            vars(new).setdefault(name, value)
    return duplicate


def cache_key_tag() -> str:
    """The user's, and what our operators are made of: AOTAutograd's cache knows an operator by its name alone."""
    return f"{torch.compiler.config.cache_key_tag} fused_post {_hash_of_kernels()}".lstrip()


@functools.cache
def _hash_of_kernels() -> str:
    sources = sorted((Path(__file__).parent / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _reset() -> None:
    """What ``torch._dynamo.reset()`` calls: Inductor drops its CUDA graphs."""
    opt.inductor(None, {}).reset()  # type: ignore[attr-defined]


fused_post.reset = _reset  # type: ignore[attr-defined]

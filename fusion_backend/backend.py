"""The ``torch.compile`` backend: read Dynamo's graph, plan, rewrite, hand on to Inductor."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis

from fusion_backend import options as opt
from fusion_backend import rewrite
from fusion_backend.cache_key import cache_key_tag
from fusion_backend.choice import allows_tf32
from fusion_backend.patterns.site import Site, match
from fusion_backend.patterns.source import value_of
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
    options, inductor = opt.read(kwargs.get("mode"), kwargs.get("options"))
    try:
        fused = fuse(gm, options)
    except Exception:
        if options.strict:
            raise
        log.exception(
            "a mistake in fused_post; the graph goes to Inductor as you wrote it, and your model runs. "
            "Please report this traceback as a bug"
        )
        return inductor(gm, example_inputs)
    if not has_kernels(gm):
        return inductor(gm, example_inputs)
    try:
        original = fused.original(gm)
        with torch.compiler.config.patch(cache_key_tag=cache_key_tag()):  # type: ignore[attr-defined]
            compiled = inductor(gm, example_inputs)
        return compiled if original is None else unless_tf32_changes(compiled, original)
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
    """A graph module that was rewritten according to ``plan``, and the graphs it had before."""

    plan: tuple[Decision, ...]
    originals: dict[fx.GraphModule, fx.Graph]

    def undo(self) -> None:
        for module, graph in self.originals.items():
            module.graph = graph

    def original(self, gm: fx.GraphModule) -> fx.GraphModule | None:
        """``gm`` as it was, to run eagerly, where a kernel in it reads the switch for TF32; else None.

        None also where a rewritten graph is nested in it (checkpointing, ``torch.cond``): that is not kept apart.
        """
        reads = any(decision.kernel == "fused" and _is_float32(decision.node) for decision in self.plan)
        if not reads or set(self.originals) != {gm}:
            return None
        return fx.GraphModule(gm, _copy(self.originals[gm]))


def unless_tf32_changes(compiled: Callable[..., Any], original: fx.GraphModule) -> Callable[..., Any]:
    """``compiled``, whose kernels have the switch for TF32 as it is now; where it has changed, ``original``.

    PyTorch's convolutions read the switch at each call, and Dynamo does not guard it.
    """
    allowed = allows_tf32()
    warned = False

    def run(*args: Any) -> Any:
        nonlocal warned
        if allows_tf32() == allowed:
            return compiled(*args)
        if not warned:
            log.warning(
                "TF32 for convolutions was %s when a model was compiled and is %s now; the model runs uncompiled until "
                "that is changed back, or until torch._dynamo.reset()",
                *(("forbidden", "allowed")[i] for i in (allowed, not allowed)),
            )
            warned = True
        return original(*args)

    return run


def _is_float32(node: fx.Node) -> bool:
    return bool(getattr(value_of(node), "dtype", None) == torch.float32)


def has_kernels(gm: fx.GraphModule) -> bool:
    """Whether an operator of ours is in ``gm``; also in one that was compiled before, which Dynamo may do twice."""
    children = (child for child in gm.modules() if isinstance(child, fx.GraphModule))
    return any(
        getattr(node.target, "namespace", "") == "fused_post" for child in children for node in child.graph.nodes
    )


def fuse(gm: fx.GraphModule, options: opt.Options) -> Fused:
    """Rewrite ``gm`` in place according to its plan. On an exception ``gm`` is as it was."""
    plan = make_plan(gm, options)
    log.debug("%s", describe(plan))
    matched = [decision for decision in plan if decision.kernel is not None]
    modules = {_module(decision.node) for decision in matched}
    fused = Fused(plan, {module: _copy(module.graph) for module in modules})
    try:
        rewritten = [_rewrite(decision) for decision in matched]
        for module in modules if any(rewritten) else ():
            module.graph.lint()
            module.recompile()
    except Exception:
        fused.undo()
        raise
    log.info("%d transposed convolutions, %d matched, %d rewritten", len(plan), len(matched), sum(rewritten))
    return fused


def _rewrite(decision: Decision) -> bool:
    """Put the kernel in; say whether anything changed. The site is read anew: one before it may hold its operands."""
    site, choice = match(decision.node, bare=True), decision.choice
    if not isinstance(site, Site) or choice is None:
        return False
    if choice.training:
        # A GPU adds a convolution's bias in a pass of its own, a CPU does not.
        left = choice.kernel == "inductor"
        program = choice.program and not left
        return rewrite.use_training(site, fused=choice.kernel == "fused", leave_bias=left, program=program)
    if choice.kernel == "fused":
        return rewrite.use_fused(site, choice.plan, choice.relayout, choice.program, choice.prologue, choice.keeps)
    if choice.kernel == "epilogue":
        return rewrite.use_epilogue(site)
    return choice.folds and rewrite.fold(site)


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


def _reset() -> None:
    """What ``torch._dynamo.reset()`` calls: Inductor drops its CUDA graphs."""
    opt.inductor(None, {}).reset()  # type: ignore[attr-defined]


fused_post.reset = _reset  # type: ignore[attr-defined]

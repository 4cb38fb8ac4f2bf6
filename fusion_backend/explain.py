"""``explain``: what the backend does to a model, without compiling it."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

from fusion_backend import options as opt
from fusion_backend.backend import fused_post
from fusion_backend.plan import make_plan
from fusion_backend.report import Report, SiteReport, describe

_NUMBERS = itertools.count()


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="fused_post")`` does with each transposed convolution of ``model``.

    Runs ``model(*args, **kwargs)`` once, eagerly, under Dynamo, in the gradient mode of the caller: under
    ``torch.no_grad()`` it reports inference, else training. A module that ``torch.compile(module, ...)`` returned is
    explained with the options it was compiled with, anything else with the default ones. The model's compiled code is
    neither used nor touched (before torch 2.13: where the model is compiled and has graph breaks, each call adds an
    entry to Dynamo's cache for it).
    """
    module, options, dynamic = _unwrap(model)
    sites: list[SiteReport] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        sites.extend(describe(make_plan(gm, options)).sites)
        return gm.forward

    arguments: dict[str, Any] = {"backend": record, "dynamic": dynamic}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        arguments["isolate_recompiles"] = True
    compiled_before = _compiled()
    try:
        with torch._dynamo.config.patch(recompile_limit=2**31), torch.compiler.set_stance("default"):
            torch.compile(_fresh(module), **arguments)(*args, **kwargs)
    finally:
        for code in _compiled() - compiled_before:
            eval_frame.reset_code(code)  # type: ignore[attr-defined]
    return Report(tuple(sites))


def _compiled() -> set[types.CodeType]:
    """The code objects for which Dynamo's cache has an entry."""
    codes = {reference() for reference in convert_frame.input_codes.seen}
    return {code for code in codes if code is not None and eval_frame._debug_get_cache_entry_list(code)}


def _unwrap(model: Callable[..., Any]) -> tuple[Callable[..., Any], opt.Options, bool | None]:
    """The model behind a compiled one, and the options it was compiled with, where the backend was ours."""
    if not isinstance(model, OptimizedModule):
        return getattr(model, "_torchdynamo_orig_callable", model), opt.Options(), None
    original: nn.Module = model._orig_mod
    wrapper = innermost_backend(model.dynamo_ctx.callback)  # type: ignore[arg-type]
    if getattr(wrapper, "compiler_fn", None) is not fused_post:
        return original, opt.Options(), None
    options, _ = opt.read(wrapper.kwargs.get("mode"), wrapper.kwargs.get("options"))  # type: ignore[attr-defined]
    return original, options, wrapper.dynamic  # type: ignore[attr-defined]


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` inside a code object of its own: Dynamo caches by code object, and leaves the user's alone.

    Each has a name of its own, since Dynamo also remembers by name which sizes have varied.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(
        run.__code__.replace(co_name=f"explained_{next(_NUMBERS)}"), run.__globals__, closure=run.__closure__
    )

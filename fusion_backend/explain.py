"""``explain``: what the backend does to a model, without compiling it."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

from fusion_backend import options as opt
from fusion_backend.backend import fused_post
from fusion_backend.plan import make_plan
from fusion_backend.report import Report, SiteReport, describe


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What ``torch.compile(model, backend="fused_post")`` does with each transposed convolution of ``model``.

    Runs ``model(*args, **kwargs)`` once, eagerly, under Dynamo, in the gradient mode of the caller: under
    ``torch.no_grad()`` it reports inference, else training. A module that was compiled with this backend is explained
    with its own options. Compiled code of the model, and its compile caches, are neither used nor touched.
    """
    module, options, dynamic = _unwrap(model)
    sites: list[SiteReport] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        sites.extend(describe(make_plan(gm, options)).sites)
        return gm.forward

    with torch._dynamo.config.patch(recompile_limit=2**31):
        torch.compile(_fresh(module), backend=record, dynamic=dynamic)(*args, **kwargs)
    return Report(tuple(sites))


def _unwrap(model: Callable[..., Any]) -> tuple[Callable[..., Any], opt.Options, bool | None]:
    """The model behind a compiled one, and the options it was compiled with, where the backend was ours."""
    if not isinstance(model, OptimizedModule):
        return getattr(model, "_torchdynamo_orig_callable", model), opt.Options(), None
    original: nn.Module = model._orig_mod
    wrapper = innermost_backend(model.dynamo_ctx.callback)  # type: ignore[arg-type]
    if getattr(wrapper, "compiler_fn", None) is not fused_post:
        return original, opt.Options(), None
    options, _ = opt.parse(wrapper.kwargs.get("options"))  # type: ignore[attr-defined]
    return original, options, wrapper.dynamic  # type: ignore[attr-defined]


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` inside a code object of its own: Dynamo caches by code object, and leaves the user's alone."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(run.__code__.replace(co_name="explained"), run.__globals__, closure=run.__closure__)

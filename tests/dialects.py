"""One model in each dialect that the vocabulary reads, as a graph module with recorded shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def dynamo(model: nn.Module, *inputs: Any) -> Callable[..., Any]:
    """Dynamo's graph, called like the model; its parameters are inputs of the graph, bound here."""
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        def first_call(*arguments: Any) -> Any:
            captured.append((gm, list(arguments)))
            return gm(*arguments)

        return first_call

    torch._dynamo.reset()
    torch.compile(model, backend=record, fullgraph=True)(
        *(i.clone() if isinstance(i, torch.Tensor) else i for i in inputs)
    )
    ((gm, arguments),) = captured
    gm.bound_arguments = arguments
    return gm


def symbolic(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    gm = fx.symbolic_trace(model)
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return gm


def aten(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def export(model: nn.Module, *inputs: Any) -> fx.GraphModule:
    return torch.export.export(model, inputs).module()


DIALECTS = {"dynamo": dynamo, "symbolic_trace": symbolic, "make_fx": aten, "export": export}


def call(gm: fx.GraphModule, *inputs: Any) -> Any:
    """Run the graph module of any dialect on ``inputs``; of Dynamo's the first result."""
    return results(gm, *inputs)[0] if hasattr(gm, "bound_arguments") else gm(*inputs)


def results(gm: fx.GraphModule, *inputs: Any) -> tuple[Any, ...]:
    """All results of Dynamo's graph."""
    fresh = iter([i.clone() if isinstance(i, torch.Tensor) else i for i in inputs])
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    bound = [
        next(fresh) if "_x_" in str(n).lower() or "_k_" in str(n).lower() else a
        for n, a in zip(names, gm.bound_arguments, strict=True)
    ]
    return tuple(gm(*bound))

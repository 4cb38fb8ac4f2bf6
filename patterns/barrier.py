"""What may stand between a convolution and the end of its tail: calls that write to no memory and change no mode.

A rewrite moves the tail's operations, and with our kernels the convolution itself, to where the tail ends. So nothing
in between may write to what they read. Dynamo's graph is not functional, and a writer does not always say so by its
name (``F.batch_norm(training=True)``, ``F.relu(b, True)``), so what is not known to be pure counts as a barrier.
"""

from __future__ import annotations

import inspect
import operator
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusion_backend.patterns.source import aten_name, attribute, is_tensor, value_of

_WRITING_OPERATORS = {
    *(getattr(operator, f"i{name}") for name in "add sub mul truediv floordiv mod pow matmul".split()),
    *(getattr(operator, name) for name in "iand ior ixor ilshift irshift iconcat setitem delitem".split()),
}
# They update running statistics or a table, and their schemas do not say so.
_STATEFUL = ("batch_norm", "instance_norm", "embedding", "moving_avg", "rrelu", "fused_")
_METHODS_WITH_EFFECTS = ("backward", "retain_grad", "register_hook", "record_stream", "set_")
_PURE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.Linear, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Identity, nn.Upsample, nn.Softmax,
)  # fmt: skip


def is_barrier(node: fx.Node) -> bool:
    """Whether ``node`` may write to memory or change a mode, so that nothing may be moved across it."""
    if node.op == "call_module":
        module: Any = attribute(node.graph.owning_module, str(node.target))
        return (
            type(module) not in _PURE_MODULES or bool(getattr(module, "inplace", False)) or bool(module._forward_hooks)
        )
    if node.op == "call_method":
        return not _is_pure_method(node)
    return node.op == "call_function" and not _is_pure_function(node)


def _is_pure_method(node: fx.Node) -> bool:
    name = str(node.target)
    if _is_bookkeeping(node, name):
        return True
    owner = value_of(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    of_tensor = is_tensor(owner) or isinstance(owner, (int, float, torch.SymInt, torch.SymFloat))
    return of_tensor and not name.endswith("_") and name not in _METHODS_WITH_EFFECTS and "out" not in node.kwargs


def _is_pure_function(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        return _is_bookkeeping(node, name) or not (target._schema.is_mutable or _is_stateful(name))
    name = getattr(target, "__name__", "")
    if "out" in node.kwargs or name.endswith("_") or _is_stateful(name) or node.is_impure():
        return False
    if getattr(operator, name, None) is target or target is getattr:
        return target not in _WRITING_OPERATORS
    if name.startswith("sym_"):
        return target is getattr(torch, name, None)  # arithmetic on sizes
    if isinstance(target, types.BuiltinFunctionType):
        return target in (getattr(torch, name, None), getattr(torch._C._nn, name, None))
    return target is getattr(F, name, None) and not _in_place(node, target)


def _is_bookkeeping(node: fx.Node, name: str) -> bool:
    """In place, but harmless: the gradient's books, not the values.

    Who reads behind a ``detach_`` has no gradient, which is no change for a constant, as ``torch.export`` lifts it.
    """
    owner = node.args[0] if node.args else None
    lifted = isinstance(owner, fx.Node) and aten_name(owner.target).startswith("lift_fresh")
    return name == "requires_grad_" or (name == "detach_" and lifted)


def _is_stateful(name: str) -> bool:
    return any(word in name for word in _STATEFUL)


def _in_place(node: fx.Node, function: Any) -> bool:
    """Whether ``inplace`` or ``out`` of a function of ``torch.nn.functional`` is set, by position or by name."""
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return True
    return bound.arguments.get("inplace", False) is not False or bound.arguments.get("out") is not None

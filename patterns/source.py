"""Where in the user's program a node comes from, what its value looks like, and why it is not part of a site."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_FRAME = re.compile(r'File "(.+?)", line (\d+), in ')
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NOT_THE_USERS = (os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, _OURS + os.sep)


@dataclass(frozen=True)
class Miss:
    """Why ``node`` ends a site, or is none: ``operation`` is the user's word for the node, ``why`` what is wrong."""

    why: str
    node: fx.Node
    operation: str

    @property
    def reason(self) -> str:
        line = source_line(self.node)
        return f"{self.operation} at {line}: {self.why}" if line else f"{self.operation}: {self.why}"


def source_line(node: fx.Node) -> str:
    """The "file.py:line" of the innermost frame that is neither torch's nor ours; "" where there is none."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [(path, line) for path, line in frames if not path.startswith(_NOT_THE_USERS)]
    return f"{os.path.basename(users[-1][0])}:{users[-1][1]}" if users else ""


def value_of(node: fx.Node) -> Any:
    """The value that tracing recorded for ``node``: a fake tensor, a TensorMetadata, a symbolic number, or None.

    Dynamo writes ``example_value``, AOTAutograd, make_fx and torch.export write ``val``, ShapeProp ``tensor_meta``.
    Parameters and buffers of a graph module that carries no such record are read off the module.
    """
    for key in ("val", "example_value", "tensor_meta"):
        if node.meta.get(key) is not None:
            return node.meta[key]
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return attribute(node.graph.owning_module, str(node.target))
    return None


def attribute(module: Any, path: str) -> Any:
    """The attribute of ``module`` at the dotted ``path``, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_single(value: Any) -> bool:
    """Whether operations on ``value`` are computed in float32: half precision is, too."""
    return bool(value.dtype != torch.float64)


def needs_gradient(value: Any) -> bool:
    """Whether a gradient flows back through ``value``, as far as tracing recorded it."""
    return bool(getattr(value, "requires_grad", False))


def same_shape(x: Sequence[Any], y: Sequence[Any]) -> bool:
    """Whether two shapes are equal in every call, symbolic sizes included, without adding a guard."""
    return len(x) == len(y) and all(statically_known_true(a == b) for a, b in zip(x, y, strict=True))


def aten_name(target: Any) -> str:
    """The "add" of ``aten.add.Tensor`` and of the packet ``aten.add``; "" for every other target."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
    elif isinstance(target, torch._ops.OpOverloadPacket):
        name = target._qualified_op_name
    else:
        return ""
    return name.removeprefix("aten::") if name.startswith("aten::") else ""


def may_share_memory(x: fx.Node, y: fx.Node) -> bool:
    """Whether the values of two nodes, of which y's is a tensor, share memory, or tracing does not say."""
    value, other = value_of(x), value_of(y)
    parts = value if isinstance(value, (tuple, list)) else [value]
    is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]
    if not isinstance(other, torch.Tensor):
        return True
    return any(is_alias_of(part, other) if isinstance(part, torch.Tensor) else part is None for part in parts)

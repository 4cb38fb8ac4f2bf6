"""A pointwise operation, from any dialect, as one canonical call.

One row per operation: its parameters in torch's order, and its spellings. A name is the method (``x.add``), the
in-place method (``x.add_``), the function (``torch.add``), and the ATen operator (``aten.add.Tensor``,
``aten.add_.Scalar``, ...) of that name; functions under other names and Python's operators are listed. Activations are
rows of ``activations``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusion_backend.patterns.activations import ACTIVATIONS
from fusion_backend.patterns.operation import Operation
from fusion_backend.patterns.source import aten_name, attribute, is_tensor, same_shape, value_of

_STATISTICS = ("running_mean", "running_var", "training", "momentum", "eps")

OPERATIONS = (
    Operation("add", ("input", "other", "alpha"), ("add",), 2, (operator.add,), (operator.iadd,)),
    Operation("sub", ("input", "other", "alpha"), ("sub", "subtract"), 2, (operator.sub,), (operator.isub,)),
    Operation("rsub", ("input", "other", "alpha"), ("rsub",)),
    Operation("neg", ("input",), ("neg", "negative"), 1, (operator.neg,)),
    Operation("mul", ("input", "other"), ("mul", "multiply"), 2, (operator.mul,), (operator.imul,)),
    Operation(
        "div", ("input", "other", "rounding_mode"), ("div", "divide", "true_divide"), 2,
        (operator.truediv,), (operator.itruediv,),
    ),
    Operation("clamp", ("input", "min", "max"), ("clamp", "clip"), 3),
    Operation("clamp_min", ("input", "min"), ("clamp_min",)),
    Operation("clamp_max", ("input", "max"), ("clamp_max",)),
    Operation("minimum", ("input", "other"), ("minimum", "min")),
    Operation("maximum", ("input", "other"), ("maximum", "max")),
    Operation("relu", ("input", "inplace"), ("relu",), 2, (F.relu,), module=nn.ReLU),
    Operation("relu6", ("input", "inplace"), ("relu6",), 2, (F.relu6,), module=nn.ReLU6),
    Operation(
        "hardtanh", ("input", "min_val", "max_val", "inplace"), ("hardtanh",), 4, (F.hardtanh,), (F.hardtanh_,),
        module=nn.Hardtanh,
    ),
    Operation("batch_norm", ("input", "weight", "bias", *_STATISTICS, "cudnn_enabled"), ("batch_norm",), 9),
    Operation(
        "batch_norm", ("input", "running_mean", "running_var", "weight", "bias", *_STATISTICS[2:]), (), 8,
        (F.batch_norm,),
    ),
    Operation("detach", ("input",), ("detach",), 1),
    Operation("clone", ("input",), ("clone",), 1),
    *ACTIVATIONS,
)  # fmt: skip

# To the shape that it has: another name of its input, as detach is, but the gradient flows on.
_RESHAPED = Operation("reshape", ("input",), ())


@dataclass(frozen=True)
class Call:
    """``node`` applies the operation of ``row`` to ``arguments`` (by parameter name), in place or not."""

    node: fx.Node
    row: Operation
    arguments: dict[str, Any] = field(default_factory=dict)
    in_place: bool = False

    @property
    def operation(self) -> str:
        return self.row.name

    def writes_to(self, names: Sequence[fx.Node]) -> bool:
        """Whether it updates, in place, the value that ``names`` name."""
        return self.in_place and self.arguments.get("input") in names


def read_call(node: fx.Node) -> Call | None:
    """The canonical call that ``node`` is, or None where the vocabulary does not know it."""
    if _is_reshaped_to_itself(node):
        return Call(node, _RESHAPED, {"input": node.args[0]})
    if node.op == "call_module":
        return _read_module(node)
    row, in_place, is_aten = _find(node)
    if row is None or len(node.args) > (len(row.parameters) if is_aten else row.positional):
        return None
    if row.name in ("minimum", "maximum") and len(node.args) + len(node.kwargs) != 2:
        return None  # torch.min(x), torch.min(x, dim, keepdim) reduce
    arguments = dict(zip(row.parameters, node.args, strict=False))
    for name, value in node.kwargs.items():
        name = "input" if name == "self" else name
        if name not in row.parameters or name in arguments:
            return None
        arguments[name] = value
    in_place = bool(arguments.pop("inplace", False)) or in_place
    return Call(node, row, arguments, in_place)


def word(node: fx.Node) -> str:
    """What a user calls the operation of ``node``, for reports."""
    if node.op == "output":
        return "return"
    if node.op == "call_module":
        return type(attribute(node.graph.owning_module, str(node.target))).__name__
    return aten_name(node.target) or str(getattr(node.target, "__name__", node.target))


def _is_reshaped_to_itself(node: fx.Node) -> bool:
    """Whether it is another name of its input: DAC's activation flattens what is flat."""
    name = str(node.target) if node.op == "call_method" else aten_name(node.target)
    if name not in ("reshape", "view") and node.target is not torch.reshape:
        return False
    before: Any = value_of(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    after = value_of(node)
    if not is_tensor(before) or not is_tensor(after):
        return False
    return bool(before.dtype == after.dtype) and same_shape(before.shape, after.shape)


def _find(node: fx.Node) -> tuple[Operation | None, bool, bool]:
    """The row of ``node``'s target, whether the spelling is in place, and whether it is ATen's."""
    if node.op == "call_method":
        name = str(node.target)
        if name.startswith("__"):  # as before torch 2.13 Dynamo writes abs(x)
            return _BY_NAME.get(name.strip("_")), False, False
        return _BY_NAME.get(name.removesuffix("_")), name.endswith("_"), False
    name = aten_name(node.target)
    if name:
        return _BY_NAME.get(name.removesuffix("_")), name.endswith("_"), True
    if node.op != "call_function" or not callable(node.target):
        return None, False, False
    return (*_BY_FUNCTION.get(node.target, (None, False)), False)


def _read_module(node: fx.Node) -> Call | None:
    module = attribute(node.graph.owning_module, str(node.target))
    row = _BY_MODULE.get(type(module))
    if row is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    arguments: dict[str, Any] = {"input": node.args[0] if node.args else node.kwargs["input"]}
    arguments |= {name: getattr(module, name) for name in row.parameters[1:] if name != "inplace"}
    return Call(node, row, arguments, getattr(module, "inplace", False))


def _functions() -> dict[Any, tuple[Operation, bool]]:
    table: dict[Any, tuple[Operation, bool]] = {}
    for row in OPERATIONS:
        for name in row.names:
            for spelling, in_place in ((name, False), (name + "_", True)):
                if hasattr(torch, spelling):
                    table[getattr(torch, spelling)] = (row, in_place)
        table.update(dict.fromkeys(row.functions, (row, False)))
        table.update(dict.fromkeys(row.in_place_functions, (row, True)))
    return table


_BY_MODULE: dict[type, Operation] = {row.module: row for row in OPERATIONS if row.module is not None}
_BY_NAME = {name: row for row in OPERATIONS for name in row.names}
_BY_FUNCTION = _functions()

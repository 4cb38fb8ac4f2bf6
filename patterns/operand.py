"""What stands beside the value in a pointwise call: a number, or one value per channel.

An operand is read against the value's shape [N, C, *spatial] (or [C, *spatial]) and dtype. It is accepted where it
broadcasts along C and only C and leaves shape and dtype of the value as they are:

    Python numbers; numbers that vary between calls (symbolic ints and floats); ``torch.tensor(number)``
    0-dim and one-element tensors
    tensors with C elements along the channel dimension and one along every other
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusion_backend.patterns.coefficient import Coefficient, Leaf
from fusion_backend.patterns.source import is_tensor, needs_gradient, value_of

_DYNAMO_NAME = re.compile(r"^[lLgG]_")
_DYNAMO_SCOPE = re.compile(r"^[lLgG]_\w*?_(?=(?:modules|parameters|buffers)_)")
_COMPILED_MODULE = re.compile(r"(_modules)?_+orig_mod")
_DYNAMO_KIND = re.compile(r"(?:^|_)(?:modules|parameters|buffers)_")


def read_operand(operand: Any, value: Any, channel_dim: int) -> Coefficient | str:
    """The coefficient that ``operand`` is beside ``value``, or why it is none."""
    if isinstance(operand, (bool, int, float)):
        return float(operand)
    if not isinstance(operand, fx.Node):
        return f"an operand of type {type(operand).__name__} is not real"
    known = value_of(operand)
    if isinstance(known, (int, float, torch.SymInt, torch.SymFloat)):
        return Leaf(operand, label(operand), per_channel=False)
    if not is_tensor(known):
        return f"the shape and dtype of operand {label(operand)} are not recorded in the graph"
    promoted = torch.promote_types(known.dtype, value.dtype) if len(known.shape) else _promoted_by_scalar(known, value)
    if promoted != value.dtype:
        return f"operand {label(operand)} of dtype {known.dtype} would promote the value from {value.dtype}"
    shape = _shape_problem(known.shape, value.shape, channel_dim, label(operand))
    if shape:
        return shape
    if _is_constant(operand):
        return float(torch.tensor(operand.args[0], dtype=known.dtype).item())
    per_channel = not all(statically_known_true(n == 1) for n in known.shape)
    return Leaf(operand, label(operand), per_channel, learned=needs_gradient(known))


def read_vector(operand: fx.Node) -> Leaf:
    """A bias, or a parameter or statistic of a normalisation: [C], whatever its floating dtype."""
    return Leaf(operand, label(operand), per_channel=True, learned=needs_gradient(value_of(operand)))


def label(node: fx.Node) -> str:
    """The user's name for ``node``: Dynamo's L_self_modules_up_parameters_bias_ is up.bias."""
    name = str(node.target) if node.op in ("placeholder", "get_attr") else node.name
    name = _COMPILED_MODULE.sub("", name)
    if not _DYNAMO_NAME.match(name):
        return name
    parts = [part.strip("_") for part in _DYNAMO_KIND.split(_DYNAMO_NAME.sub("", _DYNAMO_SCOPE.sub("L_", name)))]
    return ".".join(part for part in parts if part)


def _is_constant(node: fx.Node) -> bool:
    """Whether ``node`` is ``torch.tensor(number)`` with no other user, who might write to it."""
    return node.target is torch.tensor and len(node.users) == 1 and isinstance(node.args[0], (bool, int, float))


def _promoted_by_scalar(scalar: Any, value: Any) -> torch.dtype:
    """torch's rule for a 0-dim tensor: it promotes only across categories (integer, float, complex)."""
    return torch.promote_types(scalar.dtype, value.dtype) if scalar.dtype.is_complex else value.dtype


def _shape_problem(shape: Any, value_shape: Any, channel_dim: int, name: str) -> str:
    offset = len(value_shape) - len(shape)
    if offset < 0:
        return f"operand {name} of shape {tuple(shape)} has more dimensions than the value's {tuple(value_shape)}"
    for dim, size in enumerate(shape, offset):
        if statically_known_true(size == 1):
            continue
        if dim != channel_dim:
            return f"operand {name} of shape {tuple(shape)} differs by position, not by channel"
        if not statically_known_true(size == value_shape[dim]):
            return f"operand {name} of shape {tuple(shape)} does not match the {value_shape[dim]} channels"
    return ""

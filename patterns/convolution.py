"""A transposed convolution, from any dialect, as one frozen record.

Dialects: ``torch.conv_transpose{1,2,3}d`` (which ``F.conv_transpose{1,2,3}d`` is) and ``torch.convolution``;
``aten.conv_transpose{1,2,3}d`` and ``aten.convolution`` with ``transposed=True``; and, as a module call,
``nn.ConvTranspose{1,2,3}d``, also with a parametrized weight and with ``output_size=``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fusion_backend.patterns.source import Miss, aten_name, attribute, is_tensor, value_of

_FUNCTIONS: dict[Any, int] = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
_MODULES: dict[type, int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_TRANSPOSED_ORDER = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_GENERAL_ORDER = (
    "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
)  # fmt: skip
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


@dataclass(frozen=True)
class Convolution:
    """A transposed convolution of ``rank`` spatial dimensions.

    ``x`` is [N, C_in, *spatial] or, unbatched, [C_in, *spatial]; the weight is [C_in, C_out / groups, *kernel]. For a
    module call weight and bias are None: they stay inside the module, and so does what ``output_size`` makes of the
    output padding. ``arguments`` are the node's own, in the order of ``torch.conv_transpose{1,2,3}d``.
    """

    node: fx.Node
    rank: int
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...] | None
    groups: int
    dilation: tuple[int, ...]

    @property
    def value(self) -> Any:
        """What tracing recorded for the output: [N, C_out, *spatial] or [C_out, *spatial]."""
        return value_of(self.node)

    @property
    def channel_dim(self) -> int:
        return len(self.value.shape) - self.rank - 1


@dataclass(frozen=True)
class Input:
    """The input [N, C_in, *spatial] or [C_in, *spatial] of a convolution, as the value of steps before it."""

    node: fx.Node
    rank: int

    @property
    def value(self) -> Any:
        return value_of(self.node)

    @property
    def channel_dim(self) -> int:
        return len(self.value.shape) - self.rank - 1


def read_convolution(node: fx.Node) -> Convolution | Miss | None:
    """The transposed convolution that ``node`` is; a Miss where it is one that is left alone; None for other nodes."""
    found = _read(node)
    if not isinstance(found, Convolution):
        return found
    value = found.value
    if not is_tensor(value):
        return Miss("the shape and dtype of its output are not recorded in the graph", node, "convolution")
    if not value.dtype.is_floating_point:
        return Miss(f"its dtype is {value.dtype}; only floating dtypes are folded", node, "convolution")
    return found


def _read(node: fx.Node) -> Convolution | Miss | None:
    if node.op == "call_module":
        return _read_module(node)
    if node.op != "call_function":
        return None
    rank = _FUNCTIONS.get(node.target)
    if rank is not None:
        return _read_call(node, rank, _TRANSPOSED_ORDER)
    if node.target is torch.convolution:
        return _read_call(node, None, _GENERAL_ORDER)
    name = aten_name(node.target)
    if name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        return _read_call(node, int(name[-2]), _TRANSPOSED_ORDER)
    if name == "convolution":
        return _read_call(node, None, _GENERAL_ORDER)
    return None


def _read_call(node: fx.Node, rank: int | None, order: tuple[str, ...]) -> Convolution | Miss | None:
    arguments: dict[str, Any] = {**_DEFAULTS, **dict(zip(order, node.args, strict=False)), **node.kwargs}
    if rank is None:
        if not arguments["transposed"]:
            return None
        rank = len(arguments["stride"])
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    sizes = [_per_dimension(arguments[name], rank) for name in ("stride", "padding", "output_padding", "dilation")]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(arguments["groups"], int):
        return None
    if any(size is None for size in sizes):
        return Miss("its stride, padding or dilation varies between calls", node, "convolution")
    stride, padding, output_padding, dilation = sizes
    return Convolution(
        node, rank, x, weight, bias, stride, padding, output_padding, arguments["groups"], dilation  # type: ignore[arg-type]
    )  # fmt: skip


def _read_module(node: fx.Node) -> Convolution | Miss | None:
    module: Any = attribute(node.graph.owning_module, str(node.target))
    kind = type(module).__mro__[1] if parametrize.is_parametrized(module) else type(module)
    if kind not in _MODULES:
        return None
    if module._forward_hooks:
        return Miss("the module has forward hooks, which may change its output", node, "convolution")
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, fx.Node):
        return None
    has_output_size = len(node.args) > 1 or node.kwargs.get("output_size") is not None
    return Convolution(
        node, _MODULES[kind], x, None, None, module.stride, module.padding,
        None if has_output_size else module.output_padding, module.groups, module.dilation,
    )  # fmt: skip


def _per_dimension(size: Any, rank: int) -> tuple[int, ...] | None:
    sizes = (size,) * rank if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sizes) == 1:
        sizes *= rank
    return sizes if len(sizes) == rank and all(isinstance(s, int) for s in sizes) else None

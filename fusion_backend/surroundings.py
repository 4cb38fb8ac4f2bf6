"""What stands beside a site in its graph, as far as the choice of its kernel depends on that.

Inductor lays two-dimensional convolutions out channels_last, whatever the user's layout, where it expects that to pay
(``GraphLowering.decide_layout_opt``), and with them all that is between them. A contiguous site among them that is
measured as if it were alone would have copies on both sides. So it is turned channels_last as well, or left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch._inductor.config
from torch import fx

from fusion_backend.patterns.convolution import Convolution, read_convolution
from fusion_backend.patterns.site import Site, functions
from fusion_backend.patterns.source import aten_name, is_tensor, value_of

_CONVOLUTIONS = ("conv2d", "convolution", "cudnn_convolution")

# What reads its input from memory, however that was made. The windows of a pool would make each value several times:
# Inductor stores it first where it takes more than one load, of a bias for instance, to make it (``realize_hint``).
_LIBRARY = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
_WINDOWS = ("max_pool", "avg_pool")
_VIEWS = (
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand",
    "getitem", "narrow", "chunk", "split", "unbind", "detach", "t",
)  # fmt: skip

# Inductor relays out no graph with 300 of its nodes, which are smaller than ours, for each convolution.
MOST_NODES = 60


@dataclass(frozen=True)
class Surroundings:
    """``functions``: the names that the whole graph calls. ``relayout``: Inductor lays its two-dimensional convolutions
    out channels_last; None where that cannot be told."""

    functions: frozenset[str] = frozenset()
    relayout: bool | None = False


def read(module: fx.GraphModule, left: Iterable[fx.Node] = ()) -> Surroundings:
    """``left`` are transposed convolutions that Inductor keeps."""
    return Surroundings(functions(module), _relayout(module, [*_ordinary(module), *left]))


def is_stored(node: fx.Node) -> bool:
    """Whether the value lies in memory, whatever reads it: an input of the graph, or what a library computes.

    A bias Inductor adds itself, together with what reads the sum.
    """
    if node.op in ("placeholder", "get_attr"):
        return True
    transposed = read_convolution(node)
    if isinstance(transposed, Convolution):
        return transposed.weight is not None and transposed.bias is None
    name = aten_name(node.target) or getattr(node.target, "__name__", "")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return node.op == "call_function" and name in ("conv1d", "conv3d", *_CONVOLUTIONS) and bias is None


def _ordinary(module: fx.GraphModule) -> Iterator[fx.Node]:
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            for node in child.graph.nodes:
                name = aten_name(node.target) or getattr(node.target, "__name__", "")
                if node.op == "call_function" and name in _CONVOLUTIONS:
                    yield node


def _relayout(module: fx.GraphModule, convolutions: list[fx.Node]) -> bool | None:
    if not convolutions or not torch._inductor.config.layout_optimization:
        return False
    values = [[value_of(each) for each in node.all_input_nodes[:2]] for node in convolutions]
    if not all(len(pair) == 2 and all(is_tensor(value) and len(value.shape) == 4 for value in pair) for pair in values):
        return None
    if not all(isinstance(size, int) for pair in values for value in pair for size in value.shape):
        return False  # Inductor leaves layouts alone where sizes vary
    if any(map(_is_grouped, convolutions)) or len(module.graph.nodes) >= MOST_NODES * len(convolutions):
        return None
    return True


def _is_grouped(node: fx.Node) -> bool:
    """In groups of more than one channel, for which channels_last is slow."""
    x, weight = (value_of(each) for each in node.all_input_nodes[:2])
    transposed = read_convolution(node)
    if isinstance(transposed, Convolution):
        return weight.shape[1] > 1 and transposed.groups > 1
    return weight.shape[1] > 1 and bool(x.shape[1] // weight.shape[1] > 1)


def saves_a_pass(site: Site) -> bool:
    """Whether Inductor would do the site's tail in a pass over memory that our kernel saves.

    It would not where there is no tail, and where it reads the result in a pass that is needed anyway: before a norm, a
    mean, a softmax, a concatenation or another pointwise operation, it does the tail in that one.
    """
    if not site.tail and site.convolution.bias is None:
        return False
    return not any(_passes(site))


def is_read_from_memory(site: Site) -> bool:
    """Whether a reader of the site's result needs it in memory, so that Inductor would write it in any case."""
    return not all(_passes(site))


def _passes(site: Site) -> Iterator[bool]:
    """For each reader of the site's result whether Inductor makes what it reads together with it."""
    inside = {site.convolution.node, *site.replaced}
    loads = site.convolution.bias is not None
    return (_is_pass(user, loads) for name in site.aliases for user in name.users if user not in inside)


def _is_pass(node: fx.Node, loads: bool) -> bool:
    """Whether Inductor makes what ``node`` reads together with it; ``loads``: from more than one value in memory."""
    name = aten_name(node.target) or str(getattr(node.target, "__name__", node.target))
    if node.op == "output" or name.startswith("conv") or name in _LIBRARY:
        return False
    if loads and name.startswith(_WINDOWS):
        return False
    if name in _VIEWS:
        return any(_is_pass(user, loads) for user in node.users)
    result = value_of(node)
    return any(map(is_tensor, result)) if isinstance(result, (tuple, list)) else is_tensor(result)

"""Putting a site's implementation into its graph.

The tail's nodes are erased one by one and nothing else is: Dynamo's graphs hold in-place calls whose result nobody
reads, and dead-code elimination would take them for dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.proxy import GraphAppendingTracer

from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.coefficient import Coefficient, Leaf
from fusion_backend.patterns.site import Site
from fusion_backend.patterns.source import is_tensor, value_of


def fold(site: Site) -> bool:
    """Replace the tail by its normal form in plain torch operations, where that is shorter; say whether it is."""
    if not site.is_shorter_folded:
        return False
    with site.last.graph.inserting_before(site.last):
        readers = _readers(site)
        _replace(site, readers, _folded(site).node)
    return True


def use_epilogue(site: Site) -> bool:
    """Replace bias and tail by the operator ``fused_post::epilogue_``, in place on the convolution's fresh output."""
    from fusion_backend.kernels import epilogue  # noqa: F401  the import registers the operator, and needs triton

    node, readers = site.convolution.node, _readers(site)
    with _inserting(site):
        y = _without_bias(site) if site.convolution.bias is not None else node
        node.graph.call_function(torch.ops.fused_post.epilogue_.default, (y, *_coefficients(site)))
    _replace(site, readers, y)
    if y is not node:
        node.graph.erase_node(node)
    return True


def use_fused(site: Site) -> bool:
    """Replace convolution, bias and tail by the operator ``fused_post::conv_transpose``."""
    from fusion_backend.kernels import conv_transpose  # noqa: F401  the import registers the operator, and needs triton

    convolution, readers = site.convolution, _readers(site)
    node, value = convolution.node, convolution.value
    assert convolution.weight is not None
    with _inserting(site):
        sizes = (convolution.stride, convolution.padding, convolution.output_padding, convolution.dilation)
        inputs = (_as(value.dtype, convolution.x), _as(value.dtype, convolution.weight))
        layout = (_is_channels_last(value), torch.backends.cudnn.allow_tf32)
        arguments = (*inputs, *(list(size or ()) for size in sizes), convolution.groups, *_coefficients(site), *layout)
        y = node.graph.call_function(torch.ops.fused_post.conv_transpose.default, arguments)
    _replace(site, readers, y)
    node.graph.erase_node(node)
    return True


_IDENTITY = (1.0, 0.0, -math.inf, math.inf)


def _inserting(site: Site) -> Any:
    """Where a site's implementation goes: behind everything it reads, before everything that reads its result."""
    return site.last.graph.inserting_before(site.last if site.tail else site.last.next)


def _coefficients(site: Site) -> tuple[fx.Node | float | None, ...]:
    """The normal form, bias included, as our operators take it: four vectors or None, and four numbers."""
    coefficients = site.biased.coefficients
    leaf = _leaf_reader(site, GraphAppendingTracer(site.last.graph))
    known: dict[int, Any] = {}
    channels = site.convolution.value.shape[1]

    def vector(c: Coefficient) -> fx.Node | None:
        """[C] float32 contiguous, or None for a number."""
        if isinstance(c, float):
            return None
        proxy = co.evaluate(c, leaf, known)
        return (proxy if _is_per_channel(c) else proxy.expand(channels)).contiguous().node

    numbers = [c if isinstance(c, float) else none for c, none in zip(coefficients, _IDENTITY, strict=True)]
    return (*map(vector, coefficients), *numbers)


def _as(dtype: torch.dtype, node: fx.Node) -> fx.Node:
    """``node`` in ``dtype``: under autocast the convolution casts its inputs."""
    known = value_of(node)
    return node if known is None or known.dtype == dtype else node.graph.call_method("to", (node, dtype))


def _is_channels_last(value: Any) -> bool | None:
    """The memory format that eager's convolution gives; None, for that of the input, where strides are not recorded."""
    stride = getattr(value, "stride", None)
    if not callable(stride):
        return None
    return value.shape[1] != 1 and bool(statically_known_true(stride(1) == 1))


def _folded(site: Site) -> fx.Proxy:
    """min(max(a*y + b, lo), hi), in float32 where the value is half precision, rounded once."""
    value, form = site.convolution.value, site.form
    tracer = GraphAppendingTracer(site.last.graph)
    y: Any = fx.Proxy(site.convolution.node, tracer)
    compute = _compute_dtype(value.dtype)
    cast = compute != value.dtype
    spatial = (1,) * site.convolution.rank
    leaf = _leaf_reader(site, tracer)
    known: dict[int, Any] = {}

    def broadcast(c: Coefficient) -> Any:
        tensor = co.evaluate(c, leaf, known)
        return tensor.reshape(-1, *spatial) if _is_per_channel(c) else tensor

    if cast:
        y = y.to(compute)
    if form.scale != 1.0:
        y = torch.mul(y, broadcast(form.scale))
    if form.shift != 0.0:
        y = torch.add(y, broadcast(form.shift))
    y = _clamped(y, broadcast(form.lo), broadcast(form.hi))
    return y.to(value.dtype) if cast else y


def _clamped(y: Any, lo: Any, hi: Any) -> Any:
    if isinstance(lo, float) and isinstance(hi, float):
        bounds = {name: bound for name, bound in (("min", lo), ("max", hi)) if not math.isinf(bound)}
        return torch.clamp(y, **bounds) if bounds else y  # type: ignore[call-overload]
    if not co.is_infinite(lo):
        y = co.OPERATIONS["maximum"](y, lo)
    return y if co.is_infinite(hi) else co.OPERATIONS["minimum"](y, hi)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _leaf_reader(site: Site, tracer: GraphAppendingTracer) -> Callable[[Leaf], fx.Proxy]:
    """Reads a leaf as a proxy of shape [C] or [], in the compute dtype; each leaf once."""
    value = site.convolution.value
    dtype, device = _compute_dtype(value.dtype), getattr(value, "device", None)
    read: dict[fx.Node, fx.Proxy] = {}

    def leaf(leaf: Leaf) -> fx.Proxy:
        if leaf.value not in read:
            known = value_of(leaf.value)
            proxy: Any = fx.Proxy(leaf.value, tracer)
            if leaf.per_channel:
                proxy = proxy.reshape(-1)
            elif is_tensor(known):
                proxy = proxy.reshape(())
            if getattr(known, "device", None) != device:
                # A number that varies, or a 0-dim tensor on the CPU beside a GPU. A product with a tensor is the form
                # in which AOTAutograd and Inductor pass it to a kernel; any other use specialises a float, and
                # compiles the graph anew for each value.
                one = tracer.create_proxy("call_function", torch.full, ((), 1.0), {"dtype": dtype, "device": device})
                proxy = one * proxy
            read[leaf.value] = proxy.to(dtype)
        return read[leaf.value]

    return leaf


def _is_per_channel(c: Coefficient) -> bool:
    return any(leaf.per_channel for leaf in co.leaves(c))


def _without_bias(site: Site) -> fx.Node:
    node = site.convolution.node
    args = tuple(None if i == 2 else argument for i, argument in enumerate(node.args))
    kwargs = {name: argument for name, argument in node.kwargs.items() if name != "bias"}
    bare = node.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    bare.meta = dict(node.meta)
    return bare


def _readers(site: Site) -> list[tuple[fx.Node, fx.Node]]:
    """(reader, name) for everything behind the tail that reads its result under one of its names."""
    return [(user, name) for name in site.aliases for user in name.users if user not in site.tail]


def _replace(site: Site, readers: list[tuple[fx.Node, fx.Node]], new: fx.Node) -> None:
    """Let ``readers`` read ``new`` in place of the tail's result, and erase the tail."""
    new.meta = {**new.meta, **site.last.meta}
    for reader, name in readers:
        reader.replace_input_with(name, new)
    for node in reversed(site.tail):
        node.graph.erase_node(node)

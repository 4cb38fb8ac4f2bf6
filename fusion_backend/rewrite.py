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
    with node.graph.inserting_before(site.last if site.tail else node.next):
        y = _without_bias(site) if site.convolution.bias is not None else node
        form = site.biased
        tensors = [_vector(site, c) for c in form.coefficients]
        numbers = [c if isinstance(c, float) else none for c, none in zip(form.coefficients, _IDENTITY, strict=True)]
        node.graph.call_function(torch.ops.fused_post.epilogue_.default, (y, *tensors, *numbers))
    _replace(site, readers, y)
    if y is not node:
        node.graph.erase_node(node)
    return True


_IDENTITY = (1.0, 0.0, -math.inf, math.inf)


def _folded(site: Site) -> fx.Proxy:
    """min(max(a*y + b, lo), hi); computed in float32 if the value is half precision and a coefficient a tensor."""
    value, form = site.convolution.value, site.form
    tracer = GraphAppendingTracer(site.last.graph)
    y: Any = fx.Proxy(site.convolution.node, tracer)
    compute = _compute_dtype(value.dtype)
    cast = compute != value.dtype and any(co.leaves(c) for c in form.coefficients)
    spatial = (1,) * site.convolution.rank
    leaf = _leaf_reader(site, tracer)

    def broadcast(c: Coefficient) -> Any:
        tensor = co.evaluate(c, leaf)
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


def _vector(site: Site, c: Coefficient) -> fx.Node | None:
    """``c`` as a [C] float32 contiguous node, or None where it is a number."""
    if isinstance(c, float):
        return None
    proxy = co.evaluate(c, _leaf_reader(site, GraphAppendingTracer(site.last.graph)))
    if not _is_per_channel(c):
        proxy = proxy.expand(site.convolution.value.shape[1])
    return proxy.contiguous().node


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
    names = site.aliases if site.tail else (site.convolution.node,)
    return [(user, name) for name in names for user in name.users if user not in site.tail]


def _replace(site: Site, readers: list[tuple[fx.Node, fx.Node]], new: fx.Node) -> None:
    """Let ``readers`` read ``new`` in place of the tail's result, and erase the tail."""
    new.meta = {**new.meta, **site.last.meta}
    for reader, name in readers:
        reader.replace_input_with(name, new)
    for node in reversed(site.tail):
        node.graph.erase_node(node)

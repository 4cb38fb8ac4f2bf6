"""Putting a site's implementation into its graph.

The tail's nodes are erased one by one and nothing else is: Dynamo's graphs hold in-place calls whose result nobody
reads, and dead-code elimination would take them for dead.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from fusion_backend.choice import layout_of, taken
from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.algebra import NormalForm
from fusion_backend.patterns.coefficient import Coefficient, Leaf
from fusion_backend.patterns.gradient import Gate
from fusion_backend.patterns.program import Instruction
from fusion_backend.patterns.site import Site
from fusion_backend.patterns.source import is_tensor, value_of
from fusion_backend.program_text import trained, written


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

    site = taken(site, "epilogue")
    node, readers = site.convolution.node, _readers(site)
    with _inserting(site):
        y = _without_bias(site) if site.convolution.bias is not None else node
        arguments = (y, *_coefficients(site, site.biased))
        node.graph.call_function(torch.ops.fused_post.epilogue_.default, arguments, _programs(site))
    _replace(site, readers, y)
    if y is not node:
        node.graph.erase_node(node)
    return True


def use_fused(
    site: Site,
    plan: str | None = None,
    relayout: bool = False,
    program: bool = True,
    prologue: bool = False,
    keeps: bool = False,
) -> bool:
    """Replace convolution, bias and tail by the operator ``fused_post::conv_transpose``, which takes ``plan``.

    ``relayout``: by way of channels_last. What is read and what is returned keep their strides. ``program`` and
    ``prologue``: the operator takes the site's, where it has one. ``keeps``: it is
    ``fused_post::conv_transpose_keeping``, which returns a value of the site's program beside the result.
    """
    from fusion_backend.kernels import conv_transpose  # noqa: F401  the import registers the operator, and needs triton

    site = taken(site, "fused", relayout, program, prologue, keeps)
    if site.program is not None and site.program.kept is not None:
        _use_keeping(site, plan)
        return True
    readers = _readers(site)
    with _inserting(site):
        last, allow_tf32 = layout_of(site.convolution.value)
        target = torch.ops.fused_post.conv_transpose.default
        y = _call(site, target, relayout or last, allow_tf32, plan, **_programs(site))
        if relayout:
            x: Any = y.args[0]
            with y.graph.inserting_before(y):
                y.update_arg(0, y.graph.call_method("contiguous", (x,), {"memory_format": torch.channels_last}))
            y = y.graph.call_method("contiguous", (y,))
        if relayout or last:
            y = _strided(site, y)
    _replace(site, readers, y)
    _erase_convolution(site)
    return True


def _use_keeping(site: Site, plan: str | None) -> None:
    """Never by way of channels_last: both would have to be turned."""
    assert site.program is not None
    readers, holders = _readers(site), _readers_of(site.program.held, site)
    with _inserting(site):
        last, allow_tf32 = layout_of(site.convolution.value)
        target = torch.ops.fused_post.conv_transpose_keeping.default
        both = _call(site, target, last, allow_tf32, plan, **_programs(site), kept=site.program.kept)
        y, kept = (both.graph.call_function(operator.getitem, (both, i)) for i in range(2))
        if last:
            y, kept = _strided(site, y), _strided(site, kept)
    kept.meta = {**kept.meta, **site.program.held[0].meta}
    for reader, name in holders:
        reader.replace_input_with(name, kept)
    _replace(site, readers, y)
    _erase_convolution(site)


def _erase_convolution(site: Site) -> None:
    before = site.prologue.nodes if site.prologue else ()
    for node in (site.convolution.node, *reversed(before)):
        node.graph.erase_node(node)


def use_training(site: Site, fused: bool, leave_bias: bool, program: bool = False) -> bool:
    """Replace convolution, bias and tail by ``fused_post::conv_transpose_training``, which has gradients.

    ``leave_bias``: PyTorch adds the convolution's bias, as in eager; else it becomes part of the tail's shift.
    ``program``: the operator takes the site's, where it has one.
    """
    from fusion_backend.kernels import conv_transpose_training  # noqa: F401  as above

    site = site.whole if program else replace(site, program=None)
    gate, readers = site.gate, _readers(site)
    assert gate is not None
    with _inserting(site):
        last, allow_tf32 = layout_of(site.convolution.value)
        flags = (gate.lo_open, gate.hi_open, gate.passes_nan, fused, last, allow_tf32)
        target = torch.ops.fused_post.conv_transpose_training.default
        both = _call(site, target, *flags, leave_bias=leave_bias, **_programs(site))
        y = both.graph.call_function(operator.getitem, (both, 0))
        if last:
            y = _strided(site, y)
    _replace(site, readers, y)
    site.convolution.node.graph.erase_node(site.convolution.node)
    return True


def _strided(site: Site, y: fx.Node) -> fx.Node:
    """With the strides that the graph records: that of a single channel is all that tells channels_last."""
    stride = getattr(value_of(site.last), "stride", None)
    if site.convolution.value.shape[1] != 1 or not callable(stride) or stride(1) == 1:
        return y
    return y.graph.call_method("unsqueeze", (y.graph.call_method("squeeze", (y, 1)), 1))


def _call(site: Site, target: Any, *flags: Any, leave_bias: bool | None = None, **program: Any) -> fx.Node:
    """A call of an operator that takes a transposed convolution and a normal form, and the rest behind them.

    ``leave_bias`` is None for an operator without an argument for the convolution's bias.
    """
    convolution = site.convolution
    dtype, graph = convolution.value.dtype, convolution.node.graph
    assert convolution.weight is not None
    inputs: list[fx.Node | None] = [_as(dtype, site.x), _as(dtype, convolution.weight)]
    left = convolution.bias if leave_bias else None
    if leave_bias is not None:
        inputs.append(None if left is None else _as(dtype, left))
    sizes = (convolution.stride, convolution.padding, convolution.output_padding, convolution.dilation)
    coefficients = _coefficients(site, site.form if left is not None else site.biased)
    lists = (list(size or ()) for size in sizes)
    return graph.call_function(target, (*inputs, *lists, convolution.groups, *coefficients, *flags), program)


_IDENTITY = (1.0, 0.0, -math.inf, math.inf)


def _inserting(site: Site) -> Any:
    """Where a site's implementation goes: behind everything it reads, before everything that reads its result."""
    return site.last.graph.inserting_before(site.last if site.tail else site.last.next)


def _coefficients(site: Site, form: NormalForm) -> tuple[fx.Node | float | None, ...]:
    """A normal form as our operators take it: four vectors or None, and four numbers."""
    coefficients = form.coefficients
    leaf = _leaf_reader(site, GraphAppendingTracer(site.last.graph), coefficients)
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


def _programs(site: Site) -> dict[str, Any]:
    """What is done behind the first normal form, and before the convolution, as our operators take it.

    For an operator that trains also which columns learn.
    """
    given: dict[str, Any] = {}
    if site.program is not None:
        instructions = site.program.instructions if site.gate is None else trained(site)
        text, vectors, columns = _program(site, instructions, site.convolution.value.shape[1])
        tensors = {f"tensor_{i}": tensor for i, tensor in enumerate(site.program.tensors)}
        given |= {"program": text, "vectors": vectors, **tensors}
        if site.gate is not None:
            given["learned"] = [i for i, c in enumerate(columns) if any(leaf.learned for leaf in co.leaves(c))]
    if site.prologue is not None:
        text, vectors, _ = _program(site, site.prologue.instructions, value_of(site.x).shape[1])
        given |= {"prologue": text, "prologue_vectors": vectors}
    return given


def _program(
    site: Site, instructions: tuple[Instruction, ...], channels: int
) -> tuple[str, fx.Node | None, list[Coefficient]]:
    """Text, a column for each vector in it, or None, and what the columns are."""
    text, columns = written(instructions)
    leaf = _leaf_reader(site, GraphAppendingTracer(site.last.graph), columns)
    known: dict[int, Any] = {}
    vectors: Any = [co.evaluate(column, leaf, known).expand(channels) for column in columns]
    stacked: Any = torch.stack(vectors, 1) if vectors else None
    return text, stacked.node if vectors else None, columns


def _as(dtype: torch.dtype, node: fx.Node) -> fx.Node:
    """``node`` in ``dtype``: under autocast the convolution casts its inputs."""
    known = value_of(node)
    return node if known is None or known.dtype == dtype else node.graph.call_method("to", (node, dtype))


def _folded(site: Site) -> fx.Proxy:
    """min(max(a*y + b, lo), hi), in float32 where the value is half precision, rounded once."""
    value, form = site.convolution.value, site.form
    tracer = GraphAppendingTracer(site.last.graph)
    y: Any = fx.Proxy(site.convolution.node, tracer)
    compute = _compute_dtype(value.dtype)
    cast = compute != value.dtype
    spatial = (1,) * site.convolution.rank
    leaf = _leaf_reader(site, tracer, form.coefficients)
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
    y = _clamped(y, broadcast(form.lo), broadcast(form.hi), site.gate)
    return y.to(value.dtype) if cast else y


def _clamped(z: Any, lo: Any, hi: Any, gate: Gate | None) -> Any:
    """min(max(z, lo), hi) by operations whose gradient at the bounds is the gate's; None: no gradient is asked for."""
    bounds = {name: bound for name, bound in (("min", lo), ("max", hi)) if not co.is_infinite(bound)}
    if not bounds:
        return z
    numbers = all(isinstance(bound, float) for bound in bounds.values())
    if gate is None and not numbers:
        for name, bound in bounds.items():
            z = co.OPERATIONS["maximum" if name == "min" else "minimum"](z, bound)
        return z
    opens = {name: gate is not None and getattr(gate, end) for name, end in (("min", "lo_open"), ("max", "hi_open"))}
    if gate == Gate(lo_open=True) and bounds == {"min": 0.0}:
        return F.relu(z)
    if gate == Gate(lo_open=True, hi_open=True) and numbers:
        return F.hardtanh(z, lo, hi)

    def clamped(z: Any) -> Any:
        for name, bound in bounds.items():  # a number and a tensor do not go into one call
            z = torch.clamp(z, **{name: bound})
        return z

    if gate is None or (not gate.passes_nan and not any(opens[name] for name in bounds)):
        return torch.clamp(z, **bounds) if numbers else clamped(z)
    passes = [
        compare(z, bounds[name])
        for name, compare in (
            ("min", torch.gt if opens["min"] else torch.ge),
            ("max", torch.lt if opens["max"] else torch.le),
        )
        if name in bounds
    ]
    passing = functools.reduce(torch.logical_and, passes)
    if gate.passes_nan:
        passing = torch.logical_or(passing, torch.isnan(z))
    return torch.where(passing, z, clamped(z.detach()))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _leaf_reader(
    site: Site, tracer: GraphAppendingTracer, coefficients: Sequence[Coefficient]
) -> Callable[[Leaf], fx.Proxy]:
    """Reads a leaf of ``coefficients`` as a proxy of shape [C] or [], in the compute dtype; each leaf once."""
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

    learned = {each.value: each for each in co.leaves(*coefficients) if each.learned}
    if site.gate is not None and len(learned) > 1:
        # Two biases have one gradient. AOTAutograd returns it as two views of one memory, and autograd, which takes
        # both for its own, would accumulate into it twice. Behind a concatenation each has a part of its own.
        lengths = [value.shape[site.convolution.channel_dim] if each.per_channel else 1 for each in learned.values()]
        together: Any = torch.cat([leaf(each).reshape(-1) for each in learned.values()])  # type: ignore[misc]
        begin = 0
        for each, length in zip(learned.values(), lengths, strict=True):
            part = together.narrow(0, begin, length)
            read[each.value] = part if each.per_channel else part.reshape(())
            begin += length
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
    return _readers_of(site.aliases, site)


def _readers_of(names: Sequence[fx.Node], site: Site) -> list[tuple[fx.Node, fx.Node]]:
    return [(user, name) for name in names for user in name.users if user not in site.replaced]


def _replace(site: Site, readers: list[tuple[fx.Node, fx.Node]], new: fx.Node) -> None:
    """Let ``readers`` read ``new`` in place of the tail's result, and erase the tail."""
    new.meta = {**new.meta, **site.last.meta}
    for reader, name in readers:
        reader.replace_input_with(name, new)
    for node in reversed(site.replaced):
        node.graph.erase_node(node)

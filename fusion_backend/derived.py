"""What is worked out from a model's parameters alone: once, kept while they are as they were, outside the graph.

A kernel of ours reads the weight in an order of its own, and a tail as one shift and two bounds. Where no gradient
flows, working that out in the graph would cost a launch or two in every call. So the graph gets an input for it, and a
wrapper around what Inductor made of the graph finds that input: it looks whether the parameters are the tensors they
were, at their addresses and of their versions, and works it out anew if not. What is kept goes when a parameter goes.

While the user captures a CUDA graph, nothing kept is used: a replay must see the parameters as they are then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

Make = Callable[..., Tensor]
State = tuple[tuple[int, int], ...]  # version and address of each tensor


class Derived:
    """What ``make`` made of the inputs at ``indices``, for each set of tensors that these have been and that lives."""

    def __init__(self, indices: Sequence[int], make: Make) -> None:
        self._indices = tuple(indices)
        self._make = make
        self._kept: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], State, Tensor]] = {}

    def __call__(self, inputs: Sequence[Any]) -> Tensor:
        """From all inputs of the graph."""
        tensors = [inputs[index] for index in self._indices]
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return self._make(*tensors)
        kept = self._kept.get(tuple(map(id, tensors)))
        if kept is not None:
            references, state, made = kept
            same = all(reference() is tensor for reference, tensor in zip(references, tensors, strict=True))
            if same and state == _state(tensors):
                return made
        return self._make_and_keep(tensors)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept now."""
        return sum(made.nbytes for *_, made in self._kept.values())

    def _make_and_keep(self, tensors: list[Tensor]) -> Tensor:
        with torch.no_grad():
            made = self._make(*tensors)
            if any(made.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for tensor in tensors):
                made = made.clone()  # a view would keep the parameter itself
        if any(tensor.is_inference() for tensor in tensors):  # these do not count their versions
            return made
        if made.is_cuda:
            torch.cuda.current_stream(made.device).synchronize()  # the next call may be on another stream
        key = tuple(map(id, tensors))
        references = [weakref.ref(tensor, lambda _: self._kept.pop(key, None)) for tensor in tensors]
        self._kept[key] = (references, _state(tensors), made)
        return made


def _state(tensors: Sequence[Tensor]) -> State:
    return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors)


class DerivedInputs:
    """The inputs that a graph gets for what is derived, behind its own."""

    def __init__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        own = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._last = own[-1] if own else None
        self._examples = dict(zip(own, example_inputs, strict=False))
        self._indices = {node: index for index, node in enumerate(own)}
        self._inputs = example_inputs
        self.derived: list[Derived] = []
        self.examples: list[Tensor] = []

    def add(self, nodes: Sequence[fx.Node], make: Make) -> fx.Node | None:
        """A new input: what ``make`` makes of the tensors that ``nodes`` are. None where these are no plain inputs."""
        if self._last is None or not nodes or not all(map(self._is_plain, nodes)):
            return None
        derived = Derived([self._indices[node] for node in nodes], make)
        with _disable_current_modes():
            example = derived(self._inputs)
        with self._last.graph.inserting_after(self._last):
            node = self._last.graph.placeholder(f"fused_post_derived_{len(self.derived)}")
        mode = nodes[0].meta["example_value"].fake_mode
        node.meta["example_value"] = mode.from_tensor(example, static_shapes=True)
        # What Dynamo notes for a parameter: CUDA graphs read it where it is, and record anew where that changes.
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        node._dynamo_source = None  # no source in the user's program, hence no guard
        self._last = node
        self.derived.append(derived)
        self.examples.append(example)
        return node

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a node is a parameter or buffer that counts its versions; an input of the call is none."""
        example = self._examples.get(node)
        static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
        return (
            isinstance(example, Tensor)
            and type(example) in (Tensor, torch.nn.Parameter)
            and static is not None
            and not example.is_inference()
            and hasattr(node.meta.get("example_value"), "fake_mode")
        )

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` takes our inputs behind its own; the result takes its own, and is called as it is."""
        if not self.derived:
            return compiled
        derived = tuple(self.derived)
        return lambda *args: compiled(*args, *[each(args) for each in derived])

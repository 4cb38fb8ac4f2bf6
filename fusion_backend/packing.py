"""Packed weights: made once, kept while the weight is as it was, and handed to the compiled graph as one more input.

A kernel of ours reads the weight in an order of its own. Where no gradient flows, packing it in the graph would cost a
launch or two in every call. So the graph gets an input for the packed weight, and a wrapper around what Inductor made
of it finds that input: it looks whether the weight is the tensor it packed before, at the address and of the version
that it had then, and packs it anew if not. What is packed goes when its weight goes.

While a CUDA graph is being captured by the user, nothing kept is used: a replay must see the weight as it is then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

Pack = Callable[[Tensor], Tensor]


class PackedWeights:
    """What one input of a graph was packed to, for each tensor that this input has been and that still lives."""

    def __init__(self, index: int, pack: Pack) -> None:
        self.index = index
        self._pack = pack
        self._kept: dict[int, tuple[weakref.ref[Tensor], int, int, Tensor]] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._pack(weight)
        kept = self._kept.get(id(weight))
        if kept is not None:
            reference, version, address, packed = kept
            if reference() is weight and weight._version == version and weight.data_ptr() == address:
                return packed
        return self._pack_and_keep(weight)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept now."""
        return sum(packed.nbytes for *_, packed in self._kept.values())

    def _pack_and_keep(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            packed = self._pack(weight)
        if weight.is_inference():  # it does not count its versions
            return packed
        if weight.is_cuda:
            torch.cuda.current_stream(weight.device).synchronize()  # the next call may be on another stream
        key = id(weight)
        reference = weakref.ref(weight, lambda _: self._kept.pop(key, None))
        self._kept[key] = (reference, weight._version, weight.data_ptr(), packed)
        return packed


class PackedInputs:
    """The inputs that a graph gets for packed weights, behind its own."""

    def __init__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._examples = example_inputs
        self._own = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._last = self._own[-1] if self._own else None
        self.weights: list[PackedWeights] = []
        self.examples: list[Tensor] = []

    def add(self, weight: fx.Node, pack: Pack) -> fx.Node | None:
        """A new input for ``weight`` packed by ``pack``; None where the weight is no tensor that the graph is given."""
        if weight not in self._own or self._last is None:
            return None
        index = self._own.index(weight)
        if index >= len(self._examples):
            return None
        example, fake = self._examples[index], weight.meta.get("example_value")
        if not isinstance(example, Tensor) or type(example) not in (Tensor, torch.nn.Parameter):
            return None
        mode = getattr(fake, "fake_mode", None)
        if mode is None or example.is_inference():
            return None
        packed = PackedWeights(index, pack)
        with _disable_current_modes():
            real = packed(example)
        with weight.graph.inserting_after(self._last):
            node = weight.graph.placeholder(f"fused_post_packed_{len(self.weights)}")
        node.meta["example_value"] = mode.from_tensor(real, static_shapes=True)
        # What Dynamo notes for a parameter: CUDA graphs read it where it is, and record anew where that changes.
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        node._dynamo_source = None  # no source in the user's program, hence no guard
        self._last = node
        self.weights.append(packed)
        self.examples.append(real)
        return node

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled`` takes our inputs behind its own; the result takes its own, and is called as it is."""
        if not self.weights:
            return compiled
        weights = tuple(self.weights)
        return lambda *args: compiled(*args, *[packed(args[packed.index]) for packed in weights])

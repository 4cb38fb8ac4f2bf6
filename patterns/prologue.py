"""What is done to a convolution's input before it: conv(f(x)), f being a pointwise program of x alone.

    v0 = x, v1 = a*v0, v2 = sin(v1), ... the last one is what the convolution reads

The walk goes up from the convolution, latest node first, and takes a node along if it is a step (see ``program``), if
nobody else reads it, and if nothing between it and the convolution may write to memory or changes a mode. Wherever all
that is taken reads one tensor of x's shape, from there down is a prologue; the longest wins. Others may read that x.

A step in place writes to what it reads. Taken along it writes nothing, so what it would have written to must be memory
that this very walk accounts for: a value of the prologue, or x itself, if x is new memory by the operation that made it
and nobody else reads it, by any name.

Nothing is read where a gradient flows, and nothing that reads a second tensor of x's shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fusion_backend.patterns.barrier import is_barrier
from fusion_backend.patterns.convolution import Convolution, Input, read_convolution
from fusion_backend.patterns.program import Instruction, read_instructions, text_of
from fusion_backend.patterns.source import Miss, aten_name, is_tensor, same_shape, value_of
from fusion_backend.patterns.vocabulary import read_call, word

# Each is worked out again whenever a kernel loads x.
MOST_NODES = 16

# Whose results lie in new memory, beside those that a row of the vocabulary makes.
FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, F.linear)
OPERATORS = ("conv1d", "conv2d", "conv3d", "convolution", "linear")


@dataclass(frozen=True)
class Prologue:
    """``nodes``, first to last, make of ``x`` what the convolution reads; ``end`` is why there are no more of them."""

    nodes: tuple[fx.Node, ...]
    x: fx.Node
    instructions: tuple[Instruction, ...]
    end: Miss

    def __str__(self) -> str:
        return text_of(self.instructions, (), "input")


def read_prologue(convolution: Convolution) -> Prologue | Miss:
    """The longest, or why there is none."""
    x = value_of(convolution.x)
    if is_tensor(x) and x.dtype != convolution.value.dtype:
        return Miss(f"the convolution casts it to {convolution.value.dtype}", convolution.x, word(convolution.x))
    return _Walk(convolution).up()


class _Walk:
    """``nodes`` are taken, and read the tensors ``open`` of x's shape, which are not."""

    def __init__(self, convolution: Convolution):
        self.convolution = convolution
        self.nodes: set[fx.Node] = set()
        self.open: set[fx.Node] = {convolution.x}
        self.order = {node: i for i, node in enumerate(convolution.node.graph.nodes)}
        self.at = convolution.node  # the first of those that are taken
        self.end: Miss | None = None

    def up(self) -> Prologue | Miss:
        found: Prologue | Miss | None = None
        while True:
            end = self._take(max(self.open, key=self.order.__getitem__))
            if end is None and len(self.open) == 1:
                read = self._read(*self.open)
                if isinstance(read, Prologue) or not isinstance(found, Prologue):
                    found = read
                end = self.end
            if end is not None:
                return replace(found, end=end) if isinstance(found, Prologue) else found or end

    def _take(self, node: fx.Node) -> Miss | None:
        """Take ``node`` along, and go on with what it reads; or why not."""
        value = value_of(self.convolution.x)
        if read_call(node) is None or not is_tensor(value):
            return Miss("no step of a prologue", node, word(node))
        if len(self.nodes) == MOST_NODES:
            return Miss(f"it is before {MOST_NODES} others, and a kernel does no more", node, word(node))
        others = [user for user in node.users if user not in self.nodes and user is not self.convolution.node]
        if node is self.convolution.weight:
            return Miss("it is the weight, too", node, word(node))
        if others:
            kind = "is also returned" if others[-1].op == "output" else f"is also read by {word(others[0])}"
            return Miss(f"its value {kind}", node, word(node))
        barrier = next((each for each in self._passed(node) if is_barrier(each)), None)
        if barrier is not None:
            return Miss(f"{word(barrier)} stands between this and the convolution", node, word(node))
        read = [each for each in node.all_input_nodes if _is_like(value_of(each), value)]
        if not read:
            return Miss("it reads no tensor of its result's shape and dtype", node, word(node))
        self.at = node
        self.nodes.add(node)
        self.open.remove(node)
        self.open.update(read)
        return None

    def _passed(self, node: fx.Node) -> Iterator[fx.Node]:
        """What stands between ``node`` and those that are taken."""
        each = self.at.prev
        while each is not node:
            yield each
            each = each.prev

    def _read(self, x: fx.Node) -> Prologue | Miss:
        """From ``x`` down, or why not. Where no longer one can be any better, that is the ``end``."""
        nodes = tuple(sorted(self.nodes, key=self.order.__getitem__))
        read = read_instructions(Input(x, self.convolution.rank), nodes)
        if isinstance(read, Miss):
            self.end = read
            return read
        instructions, writer = read
        if writer is not None and not (_is_new(x) and all(user in self.nodes for user in x.users)):
            return Miss("it writes to memory that others may read", writer, word(writer))
        if not instructions:
            return Miss("it does nothing", nodes[0], word(nodes[0]))
        return Prologue(nodes, x, instructions, Miss("", x, word(x)))


def _is_like(value: Any, x: Any) -> bool:
    return is_tensor(value) and value.dtype == x.dtype and same_shape(value.shape, x.shape)


def _is_new(node: fx.Node) -> bool:
    """Whether its value lies in memory of its own, which no other node has a name for but through this one."""
    call = read_call(node)
    if call is not None:
        return not call.in_place and call.operation not in ("detach", "reshape")
    if isinstance(read_convolution(node), Convolution):
        return True
    return node.target in FUNCTIONS or aten_name(node.target) in OPERATORS

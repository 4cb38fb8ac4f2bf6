"""What a tail does behind its first normal form: activations, further normal forms, and products and sums of values.

    v0 = the first normal form, v1 = sigmoid(v0), v2 = v0*v1, v3 = min(max(2*v2 + 1, 0), 6), ...

The walk goes down the graph node by node and numbers the values that it makes. Unlike in the first run of affine and
clamp operations a value may have several users here, as in x*sigmoid(x), provided that all of them are in the tail: it
ends at the last value of which that is true. Names are as in ``site``: an operation in place renames what its memory
holds, ``detach`` and a reshape to the same shape name it once more, and what writes to other memory, or may, ends the
tail before it.

A tensor of the convolution's shape, dtype and strides, a residual or a mask, may stand in the place of the other
value: at most two for a site.

An affine or clamp operation is folded into the normal form that made its input, whoever else reads that: its value
depends on the input of that form alone. What nobody reads is left out in the end.

One value in front of the result may have other readers as well: it is kept (see ``keeping``). Whoever cannot store two
takes the program without that.

Where a gradient flows nothing is kept, and the program begins at the first bound of the first run, since a bound is an
instruction of its own there: its gradient is (see ``gradient``), and a normal form has none of its bounds'. ``detach``
is one, too, but ends the tail where it is in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_backend.patterns import algebra
from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.algebra import LARGEST, Clamp, NormalForm, Refusal, Scale, Step
from fusion_backend.patterns.barrier import is_barrier
from fusion_backend.patterns.coefficient import Coefficient
from fusion_backend.patterns.convolution import Convolution, Input
from fusion_backend.patterns.keeping import Closing, State, closings
from fusion_backend.patterns.operand import label, read_operand, read_vector
from fusion_backend.patterns.source import Miss, is_single, is_tensor, needs_gradient, same_shape, value_of
from fusion_backend.patterns.steps import read_steps
from fusion_backend.patterns.vocabulary import Call, read_call, word

# Of a program. Longer ones take minutes to compile, and registers that there are not.
MOST_VALUES = 64

# The same where a gradient flows: its backward has three times as many. And of tensors it reads one more, the gradient.
MOST_TRAINED = 20

MOST_TENSORS = 2
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "minimum": "min", "maximum": "max"}

# How the kernels call a bound, by what it does to a gradient.
BOUNDS = {"passes": "clamp", "blocks": "hardtanh", "halves": "minmax"}


@dataclass(frozen=True)
class Instruction:
    """v<i+1> = ``name``(values of these numbers, parameters), as the i-th of a program.

    ``name``        an activation, an operation of ``BINARY``, or "affine": then the parameters are scale, shift, lo and
                    hi of a normal form; where a gradient flows also "detach", or one of ``BOUNDS`` with lo and hi
    ``values``      -1 and -2 are the program's tensors
    ``parameters``  each a coefficient, or None where a normal form has none
    """

    name: str
    values: tuple[int, ...]
    parameters: tuple[Coefficient | None, ...] = ()

    def text(self, tensors: tuple[fx.Node, ...], first: str = "y") -> str:
        """How a report prints it; v0 is ``first``."""
        x = [label(tensors[-1 - value]) if value < 0 else f"v{value}" if value else first for value in self.values]
        if self.name in BOUNDS.values():
            form = [n if c is None else c for c, n in zip(self.parameters, (-math.inf, math.inf), strict=True)]
            return NormalForm(1.0, 0.0, *form).text(x[0])
        if self.name == "affine":
            numbers = (1.0, 0.0, -math.inf, math.inf)
            form = [n if c is None else c for c, n in zip(self.parameters, numbers, strict=True)]
            return NormalForm(*form).text(x[0])
        if self.name in ("minimum", "maximum"):
            return f"{BINARY[self.name]}({x[0]}, {x[1]})"
        if self.name in BINARY:
            return f"{x[0]} {BINARY[self.name]} {x[1]}" if self.name in ("add", "sub") else BINARY[self.name].join(x)
        return f"{self.name}({', '.join([*x, *(co.text(p) for p in self.parameters if p is not None)])})"


@dataclass(frozen=True)
class Program:
    """The nodes behind the first run, first to last, and what they do to its value.

    ``aliases``  the nodes that name the result
    ``tensors``  those of the convolution's shape that it reads
    ``end``      why the tail goes no further
    ``repeats``  nodes behind these, and behind other readers, that make values of these once more
    ``kept``     the number of a value that others read, too, and ``held`` the nodes that name it; None, and none
    """

    nodes: tuple[fx.Node, ...]
    aliases: tuple[fx.Node, ...]
    instructions: tuple[Instruction, ...]
    tensors: tuple[fx.Node, ...]
    end: Miss
    repeats: tuple[fx.Node, ...] = ()
    kept: int | None = None
    held: tuple[fx.Node, ...] = ()

    def __str__(self) -> str:
        steps = text_of(self.instructions, self.tensors)
        return steps if self.kept is None else f"{steps}; {f'v{self.kept}' if self.kept else 'y'} is kept"


def text_of(instructions: tuple[Instruction, ...], tensors: tuple[fx.Node, ...] = (), first: str = "y") -> str:
    return "; ".join(f"v{i} = {each.text(tensors, first)}" for i, each in enumerate(instructions, 1))


def read_program(
    convolution: Convolution, names: list[fx.Node], last: fx.Node, before: Sequence[Step] | None = None
) -> tuple[Program | None, Program | None]:
    """What comes behind ``last``, at which the value has these ``names``; and the same with a value that is kept.

    None where that is nothing, or where nothing is gained by keeping one. ``before``: where a gradient flows, the steps
    up to ``last`` that are to be its first.
    """
    walk = Walk(convolution, names, last, before)
    end = walk.down()
    plain = [Closing(*each) for each in walk.closed[-1:]]
    found = [] if walk.trains else list(closings(walk))
    plain = _longest([*plain, *(each for each in found if each.kept is None)])
    keeping = _longest([*plain, *(each for each in found if each.kept is not None)])
    program = [_program(walk, each, end) for each in plain]
    kept = [_program(walk, each, end) for each in keeping if each.kept is not None]
    return next(iter(program), None), next(iter(kept), None)


def _longest(found: list[Closing]) -> list[Closing]:
    """The first of those that replace the most nodes."""
    return sorted(found, key=lambda closing: -closing.nodes)[:1]


def _program(walk: Walk, closing: Closing, end: Miss) -> Program | None:
    instructions, tensors, kept = walk.instructions(closing.value, closing.kept)
    if not instructions:
        return None
    if closing.count < len(walk.nodes):
        node = walk.nodes[closing.count - 1]
        end = Miss(f"its value is also read by what is no step: {end.reason}", node, word(node))
    nodes = tuple(walk.nodes[: closing.count])
    return Program(nodes, closing.aliases, instructions, tensors, end, closing.repeats, kept, closing.held)


def read_instructions(x: Input, nodes: Sequence[fx.Node]) -> tuple[tuple[Instruction, ...], fx.Node | None] | Miss:
    """How ``nodes`` make the last of them of x, and the first of them that writes to x's memory, if one does."""
    walk = Walk(x, [x.node], x.node)
    for node in nodes:
        miss = walk.read(node)
        if miss is not None:
            return miss
    instructions, tensors, _ = walk.instructions(walk.number[nodes[-1]])
    assert not tensors, "what is of x's shape is x, or made of it"
    return instructions, next((node for node in nodes if walk.writes_to(node, x.node)), None)


IDENTITY = NormalForm()


@dataclass(frozen=True)
class _Value:
    """What makes a value: an instruction, or a normal form of the value ``base``, whose own form is the identity."""

    base: int
    form: NormalForm = IDENTITY
    instruction: Instruction | None = None

    @property
    def is_name(self) -> bool:
        """Whether it is another name of ``base``."""
        return self.instruction is None and self.form == IDENTITY


class Walk:
    """``nodes`` have been read; each of the nodes in ``number`` names a value, and lies in the memory ``memory``."""

    def __init__(
        self,
        convolution: Convolution | Input,
        names: list[fx.Node],
        last: fx.Node,
        before: Sequence[Step] | None = None,
    ):
        self.convolution = convolution
        self.last = last
        self.trains = before is not None
        self.nodes: list[fx.Node] = []
        self.tensors: list[fx.Node] = []
        self.values = [_Value(0)]
        first = self._one_by_one(0, before or ())
        start = 0 if isinstance(first, str) else first.base
        self.refused = first if isinstance(first, str) else None
        self.number = dict.fromkeys(names, start)
        self.memory = dict.fromkeys(names, start)
        self.closed: list[tuple[int, int, tuple[fx.Node, ...]]] = []  # nodes read, the value, its names
        self.states: list[State] = []  # behind each node, where no gradient flows

    def down(self) -> Miss:
        if self.refused is not None:
            return Miss(self.refused, self.last, word(self.last))
        node = self.last.next
        while node.op != "output":
            read = any(name in self.number for name in node.all_input_nodes)
            if not read and is_barrier(node):
                return Miss("it may write to what the tail reads, or changes a mode", node, word(node))
            miss = self.read(node) if read else None
            if miss is not None:
                return miss
            node = node.next
        return Miss("the value leaves the graph", node, word(node))

    def instructions(
        self, value: int, kept: int | None = None
    ) -> tuple[tuple[Instruction, ...], tuple[fx.Node, ...], int | None]:
        """Those that ``value``, and ``kept`` before it, are made of, the tensors that they read, and ``kept``.

        All of them numbered anew.
        """
        last = self._plain(value)
        needed = {last} if kept is None else {last, self._plain(kept)}
        for each in range(last, 0, -1):  # inputs have smaller numbers
            if each in needed:
                needed.update(self._plain(x) for x in self.made_of(each).values if x >= 0)
        numbers: dict[int, int] = {0: 0}
        result: list[Instruction] = []
        tensors: list[fx.Node] = []

        def number(value: int) -> int:
            if value >= 0:
                return numbers[self._plain(value)]
            tensor = self.tensors[-1 - value]
            tensors.extend([tensor] if tensor not in tensors else [])
            return -1 - tensors.index(tensor)

        for each in sorted(needed - {0}):
            made = self.made_of(each)
            result.append(Instruction(made.name, tuple(map(number, made.values)), made.parameters))
            numbers[each] = len(result)
        return tuple(result), tuple(tensors), None if kept is None else number(kept)

    def _plain(self, value: int) -> int:
        """The value that this one is another name of."""
        while value and self.values[value].is_name:
            value = self.values[value].base
        return value

    def made_of(self, value: int) -> Instruction:
        made = self.values[value]
        return made.instruction or Instruction("affine", (made.base,), _parameters(made.form))

    def writes_to(self, node: fx.Node, name: fx.Node) -> bool:
        """Whether ``node``, which has been read, writes to the memory of ``name``."""
        call = read_call(node)
        return call is not None and call.in_place and self.memory[node] == self.memory[name]

    def read(self, node: fx.Node) -> Miss | None:
        read = self.value_of(node)
        if isinstance(read, Miss):
            return read
        self._name(node, *read)
        return None

    def value_of(self, node: fx.Node) -> tuple[Call, _Value] | Miss:
        """The call that ``node`` is, and what it makes; or why it is no step."""
        call = read_call(node)
        if call is None:
            return Miss("no step of a tail", node, word(node))
        most = MOST_TRAINED if self.trains else MOST_VALUES
        if len(self.values) > most:
            return Miss(f"it is behind {most} others, and a kernel holds no more", node, word(node))
        places = [name for name, each in call.arguments.items() if isinstance(each, fx.Node) and each in self.number]
        if {call.arguments[place] for place in places} != {n for n in node.all_input_nodes if n in self.number}:
            return Miss("no step of a tail", node, word(node))
        if call.in_place and call.arguments.get("input") not in self.number:
            return Miss("it writes to another tensor", node, word(node))
        before, after = self.convolution.value, value_of(node)
        if not is_tensor(after) or after.dtype != before.dtype or not same_shape(after.shape, before.shape):
            return Miss("its result differs from the convolution's in shape or dtype", node, word(node))
        if needs_gradient(after) and not self.trains:
            return Miss("a gradient flows through it", node, word(node))
        if self.trains and call.in_place and self._has_other_names(call.arguments["input"]):
            return Miss("it writes to what is detached as well", node, word(node))
        made = self._made(call, places)
        if isinstance(made, str):
            return Miss(made, node, word(node))
        return call, made

    def _made(self, call: Call, places: list[str]) -> _Value | str:
        """The value that ``call`` makes, or why it is no step."""
        inputs = [self.number[call.arguments[place]] for place in places]
        if call.operation == "detach" and self.trains:
            return "it detaches in place" if call.in_place else _made_by("detach", inputs[0])
        if call.operation in ("detach", "reshape", "clone"):
            return _Value(inputs[0])
        if len(places) == 2 and call.operation in (*BINARY, "rsub"):
            return self._binary(call)
        if call.row.activation:
            return "the value is not its input" if places != ["input"] else self._activation(call, inputs[0])
        if len(places) != 1:
            return "it combines more values than two"
        steps = read_steps(call, [call.arguments[places[0]]], self.convolution)
        if not isinstance(steps, str):
            return self._folded(inputs[0], steps)
        beside = call.arguments.get("other" if places == ["input"] else "input")
        if not isinstance(beside, fx.Node) or not self._is_like_the_result(beside):
            return steps
        if call.operation not in (*BINARY, "rsub"):
            return steps
        return self._with_tensor(call, inputs[0], beside, places == ["input"])

    def _binary(self, call: Call) -> _Value | str:
        """input ± alpha * other and the like; rsub is other - alpha * input."""
        names = ("other", "input") if call.operation == "rsub" else ("input", "other")
        x, y = (self.number[call.arguments[name]] for name in names)
        alpha = call.arguments.get("alpha", 1)
        if call.arguments.get("rounding_mode") is not None:
            return f"rounding_mode={call.arguments['rounding_mode']!r} is no step"
        if not isinstance(alpha, (int, float)):
            return "alpha is not a constant number"
        if alpha != 1:
            scaled = self._folded(y, [Scale(float(alpha))])
            if isinstance(scaled, str):
                return scaled
            self.values.append(scaled)
            y = len(self.values) - 1
        return _made_by("sub" if call.operation == "rsub" else call.operation, x, y)

    def _is_like_the_result(self, operand: fx.Node) -> bool:
        """A tensor of the convolution's shape, dtype, device and strides."""
        known, value = value_of(operand), self.convolution.value
        if not isinstance(known, torch.Tensor) or not isinstance(value, torch.Tensor):
            return False
        alike = (known.dtype, known.device) == (value.dtype, value.device)
        return alike and same_shape(known.shape, value.shape) and same_shape(known.stride(), value.stride())

    def _with_tensor(self, call: Call, x: int, tensor: fx.Node, value_first: bool) -> _Value | str:
        if call.arguments.get("rounding_mode") is not None:
            return f"rounding_mode={call.arguments['rounding_mode']!r} is no step"
        if call.arguments.get("alpha", 1) != 1:
            return "alpha beside a tensor of the result's shape"
        if tensor not in self.tensors:
            self.tensors.append(tensor)
        most = MOST_TENSORS - 1 if self.trains else MOST_TENSORS
        if len(self.tensors) > most:
            nth = "second" if self.trains else "third"
            return f"it is the {nth} tensor of the result's shape, and {most} are read at most"
        y = -1 - self.tensors.index(tensor)
        if call.operation == "rsub":
            value_first = not value_first
        return _made_by("sub" if call.operation == "rsub" else call.operation, *((x, y) if value_first else (y, x)))

    def _activation(self, call: Call, x: int) -> _Value | str:
        given = {name: value for name, value in call.arguments.items() if name != "input"}
        varies = any(isinstance(value, fx.Node) for value in given.values())
        if varies and call.operation not in ("prelu", "leaky_relu"):
            return "its parameters vary between calls"
        assert call.row.activation is not None
        step = call.row.activation(**given)
        if isinstance(step, str):
            return step
        name, *parameters = step
        read = [self._parameter(parameter, word(call.node)) for parameter in parameters]
        for parameter in read:
            if isinstance(parameter, str):
                return parameter
        return _Value(0, instruction=Instruction(name, (x,), tuple(read)))  # type: ignore[arg-type]

    def _parameter(self, parameter: Any, operation: str) -> Coefficient | str:
        """PReLU's weight is [C] or one element; that of the kernel behind it broadcasts like any tensor."""
        value, dim = self.convolution.value, self.convolution.channel_dim
        known: Any = value_of(parameter) if isinstance(parameter, fx.Node) else None
        vector = is_tensor(known) and len(known.shape) == 1 and not same_shape(known.shape, (1,))
        if vector and operation != "_prelu_kernel":
            if dim != 1 or not same_shape(known.shape, (value.shape[1],)):
                return f"a parameter of shape {tuple(known.shape)} is not one value per channel"
            return read_vector(parameter)
        read = read_operand(parameter, value, dim)
        if isinstance(read, float) and not abs(read) <= LARGEST:
            return f"a parameter of {read} is not finite in float32"
        return read

    def _folded(self, x: int, steps: list[Step]) -> _Value | str:
        """``steps`` behind the form that made x; where algebra refuses these together, behind x itself."""
        if self.trains:
            return self._one_by_one(x, steps)
        made = self.values[x]
        single = is_single(self.convolution.value)
        together = algebra.fold(steps, single, made.form) if made.instruction is None else None
        if isinstance(together, NormalForm):
            return _Value(made.base, together)
        alone = algebra.fold(steps, single)
        return alone.reason if isinstance(alone, Refusal) else _Value(x, alone)

    def _one_by_one(self, x: int, steps: Sequence[Step]) -> _Value | str:
        """``steps`` behind x, of which each bound is an instruction; the value is another name of the last."""
        single = is_single(self.convolution.value)
        for step in (algebra.rounded(step, single) for step in steps):
            x = self._plain(x)
            made = self.values[x]
            value: _Value | str
            if isinstance(step, Clamp):
                value = _bounded(x, step)
            else:
                together = algebra.apply(made.form, step, single) if made.instruction is None else None
                alone = algebra.apply(IDENTITY, step, single)
                if isinstance(together, NormalForm):
                    value = _Value(made.base, together)
                else:
                    value = alone.reason if isinstance(alone, Refusal) else _Value(x, alone)
            if isinstance(value, str):
                return value
            self.values.append(value)
            x = len(self.values) - 1
        return _Value(x)

    def _has_other_names(self, name: fx.Node) -> bool:
        """Whether its memory has names that are another value: those behind a detach."""
        return any(
            memory == self.memory[name] and self._plain(self.number[other]) != self._plain(self.number[name])
            for other, memory in self.memory.items()
        )

    def _name(self, node: fx.Node, call: Call, made: _Value) -> None:
        source: Any = call.arguments.get("input")
        if call.operation == "reshape" or (call.operation == "detach" and not self.trains):
            self.number[node], self.memory[node] = self.number[source], self.memory[source]
        elif call.operation == "detach":
            self.values.append(made)
            self.number[node], self.memory[node] = len(self.values) - 1, self.memory[source]
        else:
            self.values.append(made)
            new = len(self.values) - 1
            self.memory[node] = self.memory[source] if call.in_place else new
            renamed = [name for name in self.number if call.in_place and self.memory[name] == self.memory[node]]
            self.number.update(dict.fromkeys([*renamed, node], new))
        self.nodes.append(node)
        if not self.trains:
            self.states.append(State(len(self.nodes), dict(self.number), dict(self.memory), len(self.values)))
        here = (self.number[node], self.memory[node])  # what is detached is another value in the same memory
        names = tuple(name for name in self.number if (self.number[name], self.memory[name]) == here)
        others = [name for name in self.number if name not in names]
        if self.trains and not needs_gradient(value_of(node)):
            return
        if all(user in self.number for name in others for user in name.users):
            self.closed.append((len(self.nodes), self.number[node], names))


def _bounded(x: int, clamp: Clamp) -> _Value | str:
    bounds = [None if c == none else c for c, none in ((clamp.lo, -math.inf), (clamp.hi, math.inf))]
    if any(isinstance(c, float) and not math.isfinite(c) for c in bounds):
        return "its bounds are not finite in float32"
    if any(leaf.learned for leaf in co.leaves(*(c for c in bounds if c is not None))):
        return "a learned bound"
    return _Value(0, instruction=Instruction(BOUNDS[clamp.gradient], (x,), tuple(bounds)))


def _made_by(name: str, *values: int) -> _Value:
    return _Value(0, instruction=Instruction(name, values))


def _parameters(form: NormalForm) -> tuple[Coefficient | None, ...]:
    """None for the coefficients that are the identity's."""
    identities: Iterator[float] = iter((1.0, 0.0, -math.inf, math.inf))
    return tuple(None if c == identity else c for c, identity in zip(form.coefficients, identities, strict=True))

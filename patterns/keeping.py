"""Where a tail may end with a second value that others read, too: that one is kept, and stored beside the result.

    h = conv_transpose(x)             kept
    a = leaky_relu(h, 0.1)            the result
    r = conv(a) + h
    b = leaky_relu(h, 0.1)            a repeat of a: the same instruction on the same value
    s = conv(b) + h

Behind any of its nodes the walk of ``program`` can stop if others read no more than two of its values: that of the last
node, and one that is made before it. All other readers stand behind that node, for the walk reads nodes in graph order.

A repeat behind that place is replaced by what it repeats, if no value is left that has other readers then. Between the
two nothing may write to what a repeat reads. In eager it has memory of its own, so nobody may be able to tell: where
names in several memories become one tensor, nothing writes to these or to views of them, and none leaves the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx

from fusion_backend.patterns import coefficient as co
from fusion_backend.patterns.barrier import is_barrier
from fusion_backend.patterns.source import may_share_memory
from fusion_backend.patterns.vocabulary import read_call

if TYPE_CHECKING:
    from fusion_backend.patterns.program import Walk


@dataclass(frozen=True)
class State:
    """Of a walk that has read ``count`` nodes: what they name, the memory that is in, and how many values there are."""

    count: int
    number: dict[fx.Node, int]
    memory: dict[fx.Node, int]
    values: int


@dataclass(frozen=True)
class Closing:
    """A place where a tail may end, as ``Program`` has it; ``value`` is the result's number."""

    count: int
    value: int
    aliases: tuple[fx.Node, ...]
    kept: int | None = None
    held: tuple[fx.Node, ...] = ()
    repeats: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> int:
        return self.count + len(self.repeats)


def closings(walk: Walk) -> Iterator[Closing]:
    """At most one for each node of the walk, in order."""
    for state in walk.states:
        repeats = _repeats(walk, state)
        closing = _close(walk, state, repeats) or (_close(walk, state, {}) if repeats else None)
        if closing is not None:
            yield closing


def _close(walk: Walk, state: State, repeats: dict[fx.Node, int]) -> Closing | None:
    first = _first_equals(walk)
    nodes = walk.nodes[: state.count]
    replaced = {*nodes, *repeats}
    number = {name: first[value] for name, value in state.number.items()} | repeats
    memory: dict[fx.Node, object] = {**state.memory, **{node: node for node in repeats}}
    result = number[nodes[-1]]
    read = [name for name in number if not replaced.issuperset(name.users)]
    leaving = {number[name] for name in read}
    others = leaving - {result}
    if len(others) > 1 or any(other > result for other in others) or (others and result not in leaving):
        return None
    for value in (result, *others):
        names = [name for name in read if number[name] == value]
        if len({memory[name] for name in names}) > 1 and _shows(names, replaced):
            return None
    kept = next(iter(others), None)
    aliases, held = (tuple(n for n in number if number[n] == value) for value in (result, kept))
    return Closing(state.count, result, aliases, kept, held, tuple(repeats))


def _repeats(walk: Walk, state: State) -> dict[fx.Node, int]:
    """The nodes behind those of ``state`` that make a value of it anew, and its number."""
    fork = copy.copy(walk)
    fork.number, fork.memory = dict(state.number), dict(state.memory)
    fork.values, fork.tensors = list(walk.values), list(walk.tensors)
    repeats: dict[fx.Node, int] = {}
    node = here = walk.nodes[state.count - 1]
    written = False
    while (node := node.next).op != "output":
        value = _repeated(fork, node, state.values)
        if value is None:
            continue
        while (here := here.next) is not node:
            if is_barrier(here):
                written = True
                if _may_write_to(here, fork.number):
                    return repeats
        if written and not _reads_numbers_alone(fork, value):
            return repeats
        repeats[node] = fork.number[node] = value
    return repeats


def _repeated(fork: Walk, node: fx.Node, known: int) -> int | None:
    """The first of so many values that ``node`` makes anew."""
    if not any(name in fork.number for name in node.all_input_nodes):
        return None
    values, tensors = len(fork.values), len(fork.tensors)
    read = fork.value_of(node)
    value = None
    if isinstance(read, tuple) and not read[0].in_place and not read[1].is_name:
        fork.values.append(read[1])
        value = _first_equals(fork)[-1]
    del fork.values[values:], fork.tensors[tensors:]
    return value if value is not None and value < known else None


def _first_equals(walk: Walk) -> list[int]:
    """For each value the first that is made as it is."""
    known: dict[object, int] = {}
    first: list[int] = []
    for number, value in enumerate(walk.values):
        if number == 0 or value.is_name:
            first.append(first[value.base] if number else 0)
            continue
        made = walk.made_of(number)
        inputs = tuple(first[each] if each >= 0 else each for each in made.values)
        key = (made.name, inputs, tuple(map(_key, made.parameters)))
        first.append(known.setdefault(key, number))
    return first


def _key(c: co.Coefficient | None) -> object:
    """Equal for equal numbers, of a zero with its sign, and for leaves that are one node; formulas are not compared."""
    if isinstance(c, co.Leaf):
        return c.value, c.per_channel
    return repr(c) if isinstance(c, float) else c


def _reads_numbers_alone(walk: Walk, value: int) -> bool:
    """Whether numbers are all that the value's instruction reads beside values of the tail."""
    made = walk.made_of(value)
    return all(each >= 0 for each in made.values) and not any(True for _ in co.leaves(*_coefficients(made.parameters)))


def _coefficients(parameters: Iterable[co.Coefficient | None]) -> list[co.Coefficient]:
    return [p for p in parameters if p is not None]


def _may_write_to(barrier: fx.Node, names: Iterable[fx.Node]) -> bool:
    """Not where it is a step in place, of a tensor in other memory."""
    call = read_call(barrier)
    target = call.arguments.get("input") if call is not None and call.in_place else None
    return not isinstance(target, fx.Node) or any(may_share_memory(target, name) for name in names)


def _shows(names: Iterable[fx.Node], replaced: set[fx.Node]) -> bool:
    """Whether what they name, or a view of it, may be written to, or leaves the graph."""
    seen = list(names)
    for name in seen:
        for user in name.users.keys() - replaced:
            if user.op == "output" or is_barrier(user):
                return True
            if user not in seen and may_share_memory(user, name):
                seen.append(user)
    return False

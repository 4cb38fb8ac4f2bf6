"""A site: a transposed convolution and the longest run of affine and clamp operations behind it.

What comes behind that run, activations and values with several users, is its ``program``, and what is done to the
convolution's input before it its ``prologue``: kernels of ours take these, everything else leaves them as they are.

The walk goes down from the convolution as long as the value has one user and the algebra can fold what that user does.
An in-place operation leaves the names its value had before: ``y.add_(1); y.relu()`` reads the convolution's node twice,
and both readers see one value. So the walk carries the set of nodes that name the value, and an in-place user may stand
in front of other users. A node between the convolution and the end of the tail that writes to memory, or changes a mode
such as the gradient's, ends the tail before it: the rewrite moves the tail's operations behind that node.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fusion_backend.patterns import algebra, gradient
from fusion_backend.patterns.algebra import Clamp, NormalForm, Refusal, Shift, Step
from fusion_backend.patterns.barrier import is_barrier
from fusion_backend.patterns.convolution import Convolution, read_convolution
from fusion_backend.patterns.gradient import Gate
from fusion_backend.patterns.operand import read_vector
from fusion_backend.patterns.program import Program, read_program
from fusion_backend.patterns.prologue import Prologue, read_prologue
from fusion_backend.patterns.source import Miss, is_single, is_tensor, needs_gradient, same_shape, value_of
from fusion_backend.patterns.steps import read_steps
from fusion_backend.patterns.vocabulary import Call, read_call, word


@dataclass(frozen=True)
class Site:
    """A transposed convolution and the pointwise tail behind it.

    ``tail``    the folded nodes, first to last; may be empty where the convolution has a bias, or is bare
    ``aliases`` the nodes that name the tail's result (the last of the tail, and what it updated in place; the
                convolution where there is no tail)
    ``steps``   what the tail does, one entry an affine or clamp step
    ``form``    the normal form of ``steps``: from the convolution's value, bias included, to the tail's
    ``biased``  the same from the convolution's value without its bias; equal to ``form`` where it has none
    ``gate``    where the gradient passes; None where no gradient flows through the site
    ``end``     why the tail goes no further
    ``program`` what is done to the tail's result behind it, by steps of other kinds; None where that is nothing. Where
                a gradient flows it begins at the tail's first bound
    ``prologue`` what is done to the convolution's input before it; None where that is nothing, and where a gradient
                flows
    ``keeping`` in the place of the program, for who can store two: a longer one, of which a value is kept; or None
    ``repeats`` nodes behind the tail that make values of it once more
    """

    convolution: Convolution
    tail: tuple[fx.Node, ...]
    aliases: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    form: NormalForm
    biased: NormalForm
    gate: Gate | None
    end: Miss
    program: Program | None = None
    prologue: Prologue | None = None
    keeping: Program | None = None
    repeats: tuple[fx.Node, ...] = ()

    @property
    def replaced(self) -> tuple[fx.Node, ...]:
        """In graph order, all that becomes another implementation's but the convolution itself."""
        return (*self.tail, *self.repeats)

    @property
    def x(self) -> fx.Node:
        """What a kernel reads."""
        return self.prologue.x if self.prologue is not None else self.convolution.x

    @property
    def whole(self) -> Site:
        """The site with the nodes of its program in the tail, for what replaces all of them."""
        if self.program is None:
            return self
        tail, repeats = (*self.tail, *self.program.nodes), self.program.repeats
        whole = replace(self, tail=tail, aliases=self.program.aliases, repeats=repeats)
        if self.gate is None:
            return whole
        steps = _before_bounds(self.steps)
        form, biased = _forms(_bias(self.convolution), steps, is_single(self.convolution.value))
        return replace(whole, steps=tuple(steps), form=form, biased=biased, gate=Gate())

    @property
    def is_shorter_folded(self) -> bool:
        """Whether the normal form takes fewer operations than the tail as the user wrote it.

        Arithmetic on coefficients counts as much: Inductor does it once an element, in the kernel that reads them.
        """
        return self.form.operations < len(self.tail)

    @property
    def last(self) -> fx.Node:
        return self.tail[-1] if self.tail else self.convolution.node


def functions(module: fx.GraphModule) -> frozenset[str]:
    """The names of all functions that ``module`` and the graph modules nested in it call."""
    children = [child for child in module.modules() if isinstance(child, fx.GraphModule)]
    return frozenset(
        getattr(node.target, "__name__", "")
        for child in children
        for node in child.graph.nodes
        if callable(node.target)
    )


def find_convolutions(module: fx.GraphModule) -> Iterator[fx.Node]:
    """Each transposed convolution of ``module`` and of the graph modules nested in it, in graph order."""
    for child in module.modules():  # each module once
        if isinstance(child, fx.GraphModule):
            yield from (node for node in child.graph.nodes if read_convolution(node) is not None)


def find_sites(module: fx.GraphModule) -> Iterator[Site | Miss]:
    """What each transposed convolution of ``module`` is, in graph order."""
    return map(match, find_convolutions(module))


def match(node: fx.Node, bare: bool = False) -> Site | Miss:
    """The site that starts at ``node``, or why there is none.

    ``bare``: a convolution with neither bias nor tail is one too, unless a gradient flows through it and there is no
    program. There is nothing to fold in it, but another convolution may be faster.
    """
    convolution = read_convolution(node)
    if convolution is None:
        return Miss("not a transposed convolution", node, word(node))
    if isinstance(convolution, Miss):
        return convolution
    walk = _Walk(convolution)
    end = walk.down()
    bias = _bias(convolution)
    bounds = walk.steps[len(_before_bounds(walk.steps)) :] if walk.trains else None
    program, keeping = read_program(convolution, walk.names, walk.last, bounds)
    if not walk.tail and bias is None and not (bare and (program or not walk.trains)):
        return end
    form, biased = _forms(bias, walk.steps, walk.single)
    gate = walk.gate if walk.trains else None
    before = None if walk.trains else read_prologue(convolution)
    return Site(
        convolution, tuple(walk.tail), tuple(walk.names), tuple(walk.steps), form, biased, gate, end, program,
        before if isinstance(before, Prologue) else None, keeping,
    )  # fmt: skip


def _forms(bias: list[Step] | None, steps: Sequence[Step], single: bool) -> tuple[NormalForm, NormalForm]:
    form, biased = algebra.fold(steps, single), algebra.fold([*(bias or ()), *steps], single)
    if isinstance(form, Refusal) or isinstance(biased, Refusal):
        raise AssertionError(f"{steps} were folded one by one, but not together")
    return form, biased


def _before_bounds(steps: Sequence[Step]) -> list[Step]:
    return list(itertools.takewhile(lambda step: not isinstance(step, Clamp), steps))


class _Walk:
    """One walk down from a convolution: ``names`` are the nodes that name the value the walk stands at."""

    def __init__(self, convolution: Convolution):
        self.convolution = convolution
        self.tail: list[fx.Node] = []
        self.steps: list[Step] = []
        self.names: list[fx.Node] = [convolution.node]
        self.form = NormalForm()
        self.gate = Gate()
        self.trains = needs_gradient(convolution.value)
        self.single = is_single(convolution.value)

    @property
    def last(self) -> fx.Node:
        return self.tail[-1] if self.tail else self.convolution.node

    def down(self) -> Miss:
        order = {node: i for i, node in enumerate(self.convolution.node.graph.nodes)}
        while True:
            end = self._step(order)
            if end is not None:
                return end

    def _step(self, order: dict[fx.Node, int]) -> Miss | None:
        here = self.last
        users = sorted({user for name in self.names for user in name.users} - set(self.tail), key=order.__getitem__)
        if not users:
            return Miss("nothing uses its value", here, word(here))
        user = users[0]
        call = read_call(user)
        writes = call is not None and call.writes_to(self.names)
        if len(users) > 1 and not writes:
            kind = "its value is also returned" if users[-1].op == "output" else f"its value has {len(users)} users"
            return Miss(kind, here, word(here))
        barrier = next((node for node in _between(here, user) if is_barrier(node)), None)
        if barrier is not None:
            return Miss(f"{word(barrier)} stands between this and what comes before", user, word(user))
        steps = self._read(user, call)
        if isinstance(steps, Miss):
            return steps
        trains = self.trains or needs_gradient(value_of(user))
        folded = _fold(self.form, self.gate, steps, trains, self.single)
        if isinstance(folded, Refusal):
            return Miss(folded.reason, user, word(user))
        self.form, self.gate, self.trains = *folded, trains
        self.tail.append(user)
        self.steps.extend(steps)
        self.names = [*self.names, user] if writes else [user]
        return None

    def _read(self, user: fx.Node, call: Call | None) -> list[Step] | Miss:
        if user.op == "output":
            return Miss("the value leaves the graph", user, word(user))
        if call is None:
            return Miss("no step of a tail", user, word(user))
        if call.in_place and not call.writes_to(self.names):
            return Miss("it writes to another tensor", user, word(user))
        steps = read_steps(call, self.names, self.convolution)
        if isinstance(steps, str):
            return Miss(steps, user, word(user))
        before, after = self.convolution.value, value_of(user)
        if not is_tensor(after) or after.dtype != before.dtype or not same_shape(after.shape, before.shape):
            return Miss("its result differs from the convolution's in shape or dtype", user, word(user))
        return steps


def _fold(
    form: NormalForm, gate: Gate, steps: list[Step], trains: bool, single: bool
) -> tuple[NormalForm, Gate] | Refusal:
    """The normal form and the gate with ``steps`` behind them. The gate is kept where a gradient flows."""
    for step in (algebra.rounded(step, single) for step in steps):
        gated = gradient.apply(gate, form, step) if trains else gate
        folded = algebra.apply(form, step, single)
        if isinstance(gated, Refusal):
            return gated
        if isinstance(folded, Refusal):
            return folded
        form, gate = folded, gated
    return form, gate


def _bias(convolution: Convolution) -> list[Step] | None:
    """The convolution's own bias [C_out] as a shift, or None where it has none that can be taken out."""
    bias = convolution.bias
    if bias is None:
        return None
    return [Shift(read_vector(bias))]


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next

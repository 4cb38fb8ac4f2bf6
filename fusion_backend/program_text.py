"""A program as our operators take it: text (see ``kernels/program.py``), and a column for each vector in it."""

from __future__ import annotations

import torch
from torch import fx

from fusion_backend.patterns.coefficient import Coefficient, leaves
from fusion_backend.patterns.program import Instruction
from fusion_backend.patterns.site import Site
from fusion_backend.patterns.source import is_tensor, needs_gradient, value_of
from fusion_backend.patterns.vocabulary import read_call

# Of these eager keeps the result itself, as of any in place, so nobody may write to that before the backward.
_KEPT_BY_EAGER = ("tanh", "sigmoid", "exp", "sqrt")


def trained(site: Site) -> tuple[Instruction, ...]:
    """The site's instructions where a gradient flows.

    Behind a single activation an operator keeps the result, where that tells the derivative. If others may write to it
    before the backward, as eager allows where it keeps the activation's input, a step that does nothing comes last:
    the result of two instructions tells nothing.
    """
    assert site.program is not None
    instructions, nodes = site.program.instructions, site.program.nodes
    eager_keeps = len(nodes) == 1 and (instructions[0].name in _KEPT_BY_EAGER or _is_in_place(nodes[0]))
    if len(instructions) > 1 or eager_keeps or not _may_be_written(site):
        return instructions
    return (*instructions, Instruction("affine", (1,), (None,) * 4))


def _may_be_written(site: Site) -> bool:
    """Whether the result, or a view of it, leaves the graph, or is written to in it."""
    names, tail = list(site.whole.aliases), {*site.whole.tail}
    for name in names:
        for user in name.users.keys() - tail:
            if user.op == "output" or _is_in_place(user):
                return True
            if _is_view(user, name):
                names.append(user)
    return False


def rereads(site: Site) -> bool:
    """Whether the backward reads a tensor that eager does not keep, and that others may write to before it.

    Of a sum eager keeps neither part. Our backward makes what is behind a sum anew, and reads the tensor for that.
    """
    from fusion_backend.kernels.program_training import takes  # which needs triton

    assert site.program is not None
    instructions = trained(site)
    text, columns = written(instructions)
    wanted = [f"c{i}" for i, column in enumerate(columns) if any(leaf.learned for leaf in leaves(column))]
    wanted += ["t0" for tensor in site.program.tensors if needs_gradient(value_of(tensor))]
    if not site.program.tensors or not takes(text, "t1", wanted):
        return False
    eager_keeps = any(-1 in each.values and each.name not in ("add", "sub") for each in instructions)
    return not eager_keeps and any(map(_is_at_hand, site.program.tensors))


def _is_at_hand(tensor: fx.Node) -> bool:
    """Whether it, or what it is a view of, comes into the graph or leaves it."""
    graph = tensor.graph
    ends = {*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr"), *graph.output_node().all_input_nodes}
    return any(each is tensor or (is_tensor(value_of(each)) and _is_view(tensor, each)) for each in ends)


def _is_in_place(node: fx.Node) -> bool:
    call = read_call(node)
    return call is not None and call.in_place


def _is_view(node: fx.Node, of: fx.Node) -> bool:
    value = value_of(node)
    parts = value if isinstance(value, (tuple, list)) else [value]
    is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]
    return any(is_tensor(part) and is_alias_of(part, value_of(of)) for part in parts)


def written(instructions: tuple[Instruction, ...]) -> tuple[str, list[Coefficient]]:
    """The text, and the coefficients that it calls c0, c1, ..."""
    columns: list[Coefficient] = []

    def word(c: Coefficient | None) -> str:
        if c is None or isinstance(c, float):
            return "-" if c is None else repr(c)
        columns.append(c)
        return f"c{len(columns) - 1}"

    lines = [
        [each.name, *(f"v{v}" if v >= 0 else f"t{-1 - v}" for v in each.values), *map(word, each.parameters)]
        for each in instructions
    ]
    return "; ".join(map(" ".join, lines)), columns

"""A program as our operators take it: text (see ``kernels/program.py``), and a column for each vector in it."""

from __future__ import annotations

from fusion_backend.patterns.coefficient import Coefficient
from fusion_backend.patterns.program import Instruction


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

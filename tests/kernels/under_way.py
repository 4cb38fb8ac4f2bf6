"""Read PTX for a race that results rarely show: registers written while a product that reads them is still under way.

``wgmma.mma_async`` may read its first operand from registers, and does so until a ``wgmma.wait_group`` says that it is
done; that nothing writes them until then is left to whoever makes the PTX (PTX ISA, "Asynchronous Warpgroup Level
Matrix Instructions"). Every path through the kernel is followed, until what is under way there repeats. Accumulators
and operands in shared memory are not looked at.
"""

import re
from dataclasses import dataclass

# Registers that products read which have not been waited for, a group each. The last group is not committed yet.
Groups = tuple[frozenset[str], ...]

# What a loop commits and does not wait for would never repeat: of so many groups the first two count as one.
MOST_GROUPS = 16


@dataclass(frozen=True)
class Instruction:
    """``following``: where it may go on, in lines of the same program."""

    text: str
    following: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.text.partition(" ")[0]

    @property
    def written(self) -> frozenset[str]:
        operands = self.text.partition(" ")[2]
        return registers(re.match(r"\{[^}]*\}|[^,\[]*", operands).group())


def overwritten(ptx: str) -> list[str]:
    """The instructions that write a register too early."""
    program = instructions(ptx)
    found: dict[str, None] = {}
    seen: set[tuple[int, Groups]] = set()
    todo: list[tuple[int, Groups]] = [(0, (frozenset(),))]
    while todo:
        state = at, groups = todo.pop()
        if at == len(program) or state in seen:
            continue
        seen.add(state)
        each = program[at]
        if any(each.written & group for group in groups):
            found[each.text] = None
        after = behind(each, groups)
        todo += [(following, after) for following in each.following]
    reached = {at for at, _ in seen}
    products = [at for at, each in enumerate(program) if each.name.startswith("wgmma.mma_async")]
    assert len(products) == ptx.count("wgmma.mma_async"), "a product that was not read"
    assert reached.issuperset(products), "a product on no path that was found"
    return list(found)


def behind(each: Instruction, groups: Groups) -> Groups:
    *committed, last = groups
    if each.name.startswith("wgmma.mma_async"):
        return (*committed, last | registers_read(each.text))
    if each.name.startswith("wgmma.commit_group"):
        first, *others = groups
        if len(groups) == MOST_GROUPS:
            first, *others = first | others[0], *others[1:]
        return (first, *others, frozenset())
    if each.name.startswith("wgmma.wait_group"):
        pending = int(each.text.split()[1])
        return (*committed[max(len(committed) - pending, 0) :], last)
    return groups


def registers_read(product: str) -> frozenset[str]:
    """Of its first operand, which stands behind the accumulators; none where that is in shared memory."""
    _, *operand = re.findall(r"\{[^}]*\}", product)
    return registers(operand[0]) if operand else frozenset()


def registers(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"%\w+", text))


def instructions(ptx: str) -> list[Instruction]:
    """Without guards, labels, directives and braces around blocks."""
    labels: dict[str, list[int]] = {}
    tables: dict[str, list[str]] = {}
    lines: list[tuple[str, bool]] = []
    _, _, body = re.sub(r"//.*", "", ptx).partition(".entry")
    body = re.sub(r"\.branchtargets[^;]*", lambda found: " ".join(found.group().split()), body)
    for line in re.split(r"[;\n]", body[body.index("\n{") :]):
        label, text = re.fullmatch(r"[\s{}]*(?:([$\w]+):)?[\s{]*(.*?)\s*", line).groups()
        if label:
            labels.setdefault(label, []).append(len(lines))
        if text.startswith(".branchtargets"):
            tables[label] = re.findall(r"[$\w]+", text.partition(" ")[2])
        guard, text = re.fullmatch(r"(@\S+\s+)?(.*)", text).groups()
        if re.match(r"[a-z]\w*(\.|\s|$)", text):
            lines.append((" ".join(text.split()), guard is not None))

    def following(at: int) -> tuple[int, ...]:
        text, guarded = lines[at]
        name, *operands = text.split()
        names = operands[:1] if name.startswith("bra") else tables[operands[-1]] if name.startswith("brx") else []
        # A label in a block of its own may be there several times.
        targets = [min(labels[label], key=lambda place: abs(place - at)) for label in names]
        ends = name.startswith(("bra", "brx")) or name in ("ret", "exit", "trap")
        return (*targets, *([at + 1] if guarded or not ends else []))

    return [Instruction(text, following(at)) for at, (text, _) in enumerate(lines)]

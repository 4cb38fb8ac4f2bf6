"""What the backend does to a model, in words: one row for each transposed convolution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fusion_backend.choice import taken
from fusion_backend.patterns.convolution import Convolution, read_convolution
from fusion_backend.patterns.source import Miss, source_line
from fusion_backend.plan import Decision


@dataclass(frozen=True)
class SiteReport:
    """What became of one transposed convolution.

    ``matched``  whether a tail (be it only the bias) was found and folded to its normal form; ``reason`` says whether
                 that changed the graph, or left a tail as written that is as short as its normal form
    ``kernel``   "fused", "epilogue", "inductor", or None where the graph stays as the user wrote it
    ``reason``   why this kernel, and why the tail goes no further; or why nothing was matched
    ``equation`` the normal form of the tail, x being the convolution without its bias, and behind it the steps of the
                 program that a kernel of ours takes, such as "v1 = tanh(y)"; "" for a miss
    ``prologue`` what that kernel does to the convolution's input first, such as "v1 = leaky_relu(input, 0.1)"; ""
                 where that is nothing
    ``source``   file:line of the user's lines, the convolution's first
    ``convolution`` channels and shape of the convolution
    """

    matched: bool
    kernel: str | None
    reason: str
    equation: str
    source: str
    convolution: str
    prologue: str = ""


@dataclass(frozen=True)
class Report:
    """Every transposed convolution of a model, in graph order; prints as a table."""

    sites: tuple[SiteReport, ...]

    def __str__(self) -> str:
        if not self.sites:
            return "fused_post: no transposed convolution found"
        matched = sum(site.matched for site in self.sites)
        lines = [f"fused_post: {len(self.sites)} transposed convolution(s), {matched} matched"]
        for number, site in enumerate(self.sites, 1):
            rows = (
                ("source", site.source),
                ("before", site.prologue),
                ("tail", site.equation),
                ("kernel", site.kernel or "none"),
                ("reason", site.reason),
            )
            lines.append(f"{number:>3}  {'matched' if site.matched else 'missed '}  {site.convolution}")
            lines.extend(f"       {name:<7} {text}" for name, text in rows if text)
        return "\n".join(lines)


def describe(decisions: Iterable[Decision]) -> Report:
    """The report on a plan, read off the graph before it is rewritten."""
    return Report(tuple(_describe(decision) for decision in decisions))


def _describe(decision: Decision) -> SiteReport:
    node, found, choice = decision.node, decision.found, decision.choice
    if isinstance(found, Miss):
        return SiteReport(False, None, found.reason, "", source_line(node), _convolution(node))
    assert choice is not None, "a site always has a choice"
    site = taken(found, choice.kernel, choice.relayout, choice.program, choice.prologue, choice.keeps)
    before = site.prologue.nodes if site.prologue else ()
    equation = f"{site.biased}; {site.program}" if site.program else str(site.biased)
    reason = f"{choice.why} (the tail ends at {(site.program or site).end.reason})"
    lines = dict.fromkeys(line for line in map(source_line, (node, *before, *site.replaced)) if line)
    return SiteReport(
        choice.kernel is not None, choice.kernel, reason, equation, ", ".join(lines), _convolution(node),
        str(site.prologue or ""),
    )  # fmt: skip


def _convolution(node: fx.Node) -> str:
    convolution = read_convolution(node)
    if not isinstance(convolution, Convolution):
        return node.name
    shape = "x".join(str(size) for size in convolution.value.shape)
    stride = "x".join(str(size) for size in convolution.stride)
    return f"{node.name}: {convolution.rank}d, stride {stride}, output {shape} {convolution.value.dtype}"

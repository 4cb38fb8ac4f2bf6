"""Which implementation a site gets, and why.

``auto`` takes a kernel of ours only where a measurement shows it to be faster than Inductor. The epilogue kernel moves
the same bytes as the pointwise kernel that Inductor makes of the tail, so there is no such measurement, and ``auto``
leaves every site to Inductor, with the tail folded.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusion_backend.kernels.support import why_unsupported
from fusion_backend.patterns.site import Site
from fusion_backend.patterns.source import is_tensor, value_of


@dataclass(frozen=True)
class Choice:
    """``kernel`` is "epilogue", "inductor", or None where the site stays as the user wrote it."""

    kernel: str | None
    why: str


def choose(site: Site, requested: str) -> Choice:
    if _needs_gradient(site):
        return Choice(None, "a gradient flows through it, and folding would change gradients at the bounds")
    if requested == "inductor":
        return _inductor(site, "asked for")
    if requested == "auto":
        return _inductor(site, "no kernel here is measured to be faster than Inductor's own")
    problem = why_no_epilogue(site)
    if problem:
        return _inductor(site, f"the epilogue kernel cannot run: {problem}")
    return Choice("epilogue", "asked for")


def _inductor(site: Site, why: str) -> Choice:
    before, after = len(site.tail), site.form.operations
    tail = f"{before} operations folded into {after}" if site.is_shorter_folded else "the tail as written"
    return Choice("inductor", f"{why}; {tail}")


def why_no_epilogue(site: Site) -> str | None:
    """Why the epilogue kernel cannot run the site, or None where it can."""
    value = site.convolution.value
    device = getattr(value, "device", None)
    if device is None:
        return "the graph does not record a device"
    if site.convolution.channel_dim != 1:
        return "the convolution has no batch dimension"
    if not isinstance(value.shape[1], int):
        return "the number of channels varies between calls"
    return why_unsupported(device, value.dtype)


def _needs_gradient(site: Site) -> bool:
    """Whether a gradient (or, with forward-mode differentiation somewhere in the graph, a tangent) flows through it."""
    values = [value_of(node) for node in (site.convolution.node, *site.tail)]
    if any(is_tensor(value) and value.requires_grad for value in values):
        return True
    return any(getattr(node.target, "__name__", "") == "_make_dual" for node in site.convolution.node.graph.nodes)

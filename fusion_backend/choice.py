"""Which implementation a site gets, and why.

``auto`` takes a kernel of ours only where a measurement shows it to be faster than Inductor. There is none yet: the
epilogue kernel moves the same bytes as the pointwise kernel that Inductor makes of the tail, and the fused kernel has
not been timed. So ``auto`` leaves every site to Inductor, with the tail folded.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusion_backend.kernels.support import why_unsupported
from fusion_backend.patterns.site import Site
from fusion_backend.patterns.source import is_tensor, value_of


@dataclass(frozen=True)
class Choice:
    """``kernel`` is "fused", "epilogue", "inductor", or None where the site stays as the user wrote it."""

    kernel: str | None
    why: str


def choose(site: Site, requested: str, functions: frozenset[str] = frozenset()) -> Choice:
    """``requested`` is the user's ``fused_post.kernel``; ``functions`` are the names that the whole graph calls."""
    if _needs_gradient(site) or "_make_dual" in functions:
        return Choice(None, "a gradient flows through it, and folding would change gradients at the bounds")
    if requested == "inductor":
        return _inductor(site, "asked for")
    if requested == "auto":
        return _inductor(site, "no kernel here is measured to be faster than Inductor's own")
    problem = why_no_kernel(site)
    if not problem and "_vmap_increment_nesting" in functions:
        problem = "it has no batching rule for torch.vmap"
    if not problem and requested == "fused" and site.convolution.weight is None:
        problem = "the convolution is a module call, which keeps its weight to itself"
    if problem:
        return _inductor(site, f"the {requested} kernel cannot run: {problem}")
    return Choice(requested, "asked for")


def _inductor(site: Site, why: str) -> Choice:
    before, after = len(site.tail), site.form.operations
    tail = f"{before} operations folded into {after}" if site.is_shorter_folded else "the tail as written"
    return Choice("inductor", f"{why}; {tail}")


def why_no_kernel(site: Site) -> str | None:
    """Why no Triton kernel of ours can run the site, or None where one can."""
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
    values = [value_of(node) for node in (site.convolution.node, *site.tail)]
    return any(is_tensor(value) and value.requires_grad for value in values)

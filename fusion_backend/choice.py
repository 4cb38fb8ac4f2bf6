"""Which implementation a site gets, and why.

``auto`` takes a kernel of ours only where a measurement shows it to be faster than Inductor. There is none yet: the
epilogue kernel moves the same bytes as the pointwise kernel that Inductor makes of the tail, and the fused kernel has
not been timed. So ``auto`` leaves every site to Inductor, with the tail folded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from fusion_backend.kernels.support import why_unsupported
from fusion_backend.patterns.coefficient import is_infinite, leaves
from fusion_backend.patterns.gradient import Gate
from fusion_backend.patterns.site import Site
from fusion_backend.patterns.source import needs_gradient, value_of

LEARNED_SCALE = "its scale is learned, and without the convolution's value the gradient of that takes a convolution"


@dataclass(frozen=True)
class Choice:
    """``kernel`` is "fused", "epilogue", "inductor", or None where the site stays as the user wrote it.

    ``training``: by ``fused_post::conv_transpose_training``, which keeps one bit an element for the backward.
    """

    kernel: str | None
    why: str
    training: bool = False

    @property
    def uses_operator(self) -> bool:
        """Whether an operator of ours comes into the graph."""
        return self.training or self.kernel not in (None, "inductor")


def choose(site: Site, requested: str, functions: frozenset[str] = frozenset()) -> Choice:
    """``requested`` is the user's ``fused_post.kernel``; ``functions`` are the names that the whole graph calls."""
    if "_make_dual" in functions:
        return Choice(None, "a forward-mode tangent flows through it, and folding would change it at the bounds")
    if "_vmap_increment_nesting" in functions and torch.is_grad_enabled():
        return Choice(None, "inside torch.vmap the graph does not record whether a gradient flows through it")
    trains = site.gate is not None
    transform = next((name for name in _TRANSFORMS if name in functions), None)
    problem = f"it has no rule for {_TRANSFORMS[transform]}" if transform else None
    saves = trains and not problem and not why_no_bits(site) and site.convolution.value.device.type == "cpu"
    if requested in ("auto", "inductor"):
        why = "asked for" if requested == "inductor" else "no kernel here is measured to be faster than Inductor's own"
        return _inductor(site, why, saves)
    problem = problem or why_no_kernel(site)
    if trains and not problem and any(leaf.learned for leaf in leaves(site.form.scale)):
        problem = LEARNED_SCALE
    if not problem and (requested == "fused" or trains) and site.convolution.weight is None:
        problem = "the convolution is a module call, which keeps its weight to itself"
    if problem:
        return _inductor(site, f"the {requested} kernel cannot run: {problem}", saves)
    return Choice(requested, "asked for", training=trains)


# Which of Dynamo's calls begin a transform that our operators have no rule for.
_TRANSFORMS = {"_vmap_increment_nesting": "torch.vmap", "_grad_increment_nesting": "torch.func.grad"}


def _inductor(site: Site, why: str, saves_bits: bool) -> Choice:
    if saves_bits:
        return Choice("inductor", f"{why}; folded, and one bit an element kept for the backward", training=True)
    before, after = len(site.tail), site.form.operations
    folded = f"{before} operations folded into {after}" if site.is_shorter_folded else "the tail as written"
    return Choice("inductor", f"{why}; {folded}")


def why_no_bits(site: Site) -> str | None:
    """Why the backward of the site needs no bits, or cannot keep them; None where it can."""
    convolution, form = site.convolution, site.form
    if convolution.weight is None:
        return "the convolution is a module call, which keeps its weight to itself"
    if convolution.channel_dim != 1:
        return "the convolution has no batch dimension"
    if is_infinite(form.lo) and is_infinite(form.hi):
        return "the tail has no bounds"
    if not any(needs_gradient(value_of(node)) for node in (convolution.x, convolution.weight)):
        return "the convolution itself learns nothing"
    if any(leaf.learned for leaf in leaves(form.scale)):
        return LEARNED_SCALE
    if form.lo == 0.0 and is_infinite(form.hi) and site.gate == Gate(lo_open=True):
        return "its result, which the next operation keeps, tells where the gradient of a relu passes"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


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

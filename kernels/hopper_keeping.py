"""The operator of the product on Hopper that also writes a value of its program: see ``hopper`` and ``program``."""

import torch

from fusion_backend.kernels import hopper
from fusion_backend.kernels.coefficients import Tensors
from fusion_backend.kernels.hopper import call_of


def _conv_transpose_hopper_keeping(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    vectors: torch.Tensor | None,
    call: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``conv_transpose_hopper`` returns, and the value that is kept.

    Where the product cannot run after all, ``conv_transpose_keeping`` does, by the rule for the other kernels.
    """
    tensors: Tensors = (scale, shift, lo, hi)
    vectors = None if vectors is None else vectors.contiguous()
    asked = call_of(call)
    assert asked.kept is not None, "there is a value that is kept"
    ran = hopper.run(x, weight, packed, tensors, vectors, call)
    if ran is None:
        how = (asked.channels_last, asked.allow_tf32, None, asked.program, vectors)
        return torch.ops.fused_post.conv_transpose_keeping.default(
            x, weight, *asked.axes, 1, *tensors, *asked.numbers, *how, kept=asked.kept
        )
    y, kept = ran
    assert kept is not None, "there is a value that is kept"
    return y, kept


NAME = "fused_post::conv_transpose_hopper_keeping"
SCHEMA = torch.library.infer_schema(_conv_transpose_hopper_keeping, mutates_args=())
torch.library.define(NAME, SCHEMA, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
torch.library.impl(NAME, "default", _conv_transpose_hopper_keeping)
conv_transpose_hopper_keeping = torch.ops.fused_post.conv_transpose_hopper_keeping.default


@torch.library.register_fake(NAME)
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    vectors: torch.Tensor | None,
    call: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = hopper.fake(x, weight, (scale, shift, lo, hi), vectors, call_of(call))
    return y, torch.empty_like(y)

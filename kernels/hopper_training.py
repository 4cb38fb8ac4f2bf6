"""The operator of the march on Hopper that also writes the bits of a gate: see ``hopper`` and ``gate``."""

import torch

from fusion_backend.kernels import hopper
from fusion_backend.kernels.arguments import axes_for
from fusion_backend.kernels.coefficients import Tensors
from fusion_backend.kernels.gate import pack, unpack
from fusion_backend.kernels.hopper import Call, call_of
from fusion_backend.kernels.layout import empty, is_channels_last
from fusion_backend.kernels.plans import choose_plan
from fusion_backend.kernels.problem import problem_for
from fusion_backend.kernels.rounding import cdiv


def _conv_transpose_hopper_training(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    call: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``conv_transpose_hopper`` returns, and uint8 [ceil(numel / 8)] in its order of memory.

    Where the march cannot run after all, ``conv_transpose_training`` does, by the rule for the other kernels.
    """
    tensors: Tensors = (scale, shift, lo, hi)
    ran = hopper.run(x, weight, packed, tensors, None, call)
    if ran is None:
        return _otherwise(x, weight, tensors, call_of(call))
    y, bits = ran
    assert bits is not None, "there is a gate"
    return y, bits


def _otherwise(
    x: torch.Tensor, weight: torch.Tensor, tensors: Tensors, call: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    assert call.gate is not None, "there is a gate"
    channels_last, allow_tf32 = call.channels_last, call.allow_tf32
    axes = axes_for(x.dim() - 2, weight.shape[2:], *call.axes)
    problem = problem_for(x, weight, axes, 1, channels_last, allow_tf32)
    y, bits = torch.ops.fused_post.conv_transpose_training.default(
        x, weight, None, *call.axes, 1, *tensors, *call.numbers, *call.gate,
        True, channels_last, allow_tf32, choose_plan(problem, tuple(x.shape)).name,
    )  # fmt: skip
    came_last = bool(is_channels_last(y))
    if came_last == channels_last:
        return y, bits
    return empty(y.shape, y, channels_last).copy_(y), pack(unpack(bits, y.shape, came_last), channels_last)


NAME = "fused_post::conv_transpose_hopper_training"
SCHEMA = torch.library.infer_schema(_conv_transpose_hopper_training, mutates_args=())
torch.library.define(NAME, SCHEMA, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
torch.library.impl(NAME, "default", _conv_transpose_hopper_training)
conv_transpose_hopper_training = torch.ops.fused_post.conv_transpose_hopper_training.default


@torch.library.register_fake(NAME)
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    call: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = hopper.fake(x, weight, (scale, shift, lo, hi), None, call_of(call))
    return y, y.new_empty(cdiv(y.numel(), 8), dtype=torch.uint8)

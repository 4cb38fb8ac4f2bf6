"""The operator of the march on Hopper that also writes the bits of a gate: see ``hopper`` and ``gate``."""

from collections.abc import Sequence

import torch

from fusion_backend.kernels import hopper
from fusion_backend.kernels.arguments import axes_for
from fusion_backend.kernels.coefficients import Numbers, Tensors
from fusion_backend.kernels.gate import Gate, pack, unpack
from fusion_backend.kernels.layout import empty, is_channels_last
from fusion_backend.kernels.plans import choose_plan
from fusion_backend.kernels.problem import problem_for
from fusion_backend.kernels.rounding import cdiv


def _conv_transpose_hopper_training(
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    scale_number: float,
    shift_number: float,
    lo_number: float | None,
    hi_number: float | None,
    lo_open: bool,
    hi_open: bool,
    passes_nan: bool,
    channels_last: bool,
    allow_tf32: bool,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``conv_transpose_hopper`` returns, and uint8 [ceil(numel / 8)] in its order of memory.

    Where the march cannot run after all, ``conv_transpose_training`` does, by the rule for the other kernels.
    """
    tensors: Tensors = (scale, shift, lo, hi)
    numbers: Numbers = (scale_number, shift_number, lo_number, hi_number)
    axes_of = tuple(tuple(sizes) for sizes in (stride, padding, output_padding, dilation))
    gate = Gate(lo_open, hi_open, passes_nan)
    ran = hopper.run(x, weight, packed, axes_of, tensors, numbers, channels_last, allow_tf32, plan, gate)
    if ran is not None:
        y, bits = ran
        assert bits is not None, "there is a gate"
        return y, bits
    return _otherwise(x, weight, axes_of, tensors, numbers, gate, channels_last, allow_tf32)


def _otherwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    axes_of: tuple[tuple[int, ...], ...],
    tensors: Tensors,
    numbers: Numbers,
    gate: Gate,
    channels_last: bool,
    allow_tf32: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    axes = axes_for(x.dim() - 2, weight.shape[2:], *axes_of)
    problem = problem_for(x, weight, axes, 1, channels_last, allow_tf32)
    flags = (gate.lo_open, gate.hi_open, gate.passes_nan)
    y, bits = torch.ops.fused_post.conv_transpose_training.default(
        x, weight, None, *axes_of, 1, *tensors, *numbers, *flags,
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
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    scale_number: float,
    shift_number: float,
    lo_number: float | None,
    hi_number: float | None,
    lo_open: bool,
    hi_open: bool,
    passes_nan: bool,
    channels_last: bool,
    allow_tf32: bool,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    axes_of = (stride, padding, output_padding, dilation)
    y = hopper.fake(x, weight, axes_of, (scale, shift, lo, hi), channels_last)
    return y, y.new_empty(cdiv(y.numel(), 8), dtype=torch.uint8)

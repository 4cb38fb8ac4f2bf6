"""What the tests of whole models check: the accuracy rule, and what became of each transposed convolution."""

from __future__ import annotations

import re
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.cases import CONV
from benchmarks.measure import TOLERANCE, relative_rmse
from benchmarks.whole import RoundedToTF32
from fusion_backend import explain, fused_post

Found = tuple[str, str]  # the tail's equation ("" for a miss), and where it ends and why


def assert_accurate(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """RMSE(ours) <= 2 * RMSE(eager) + a tenth of the tolerance, against float64 and relative to it."""
    expected = model(*inputs)
    result = torch.compile(model, backend=fused_post, options={"fused_post.strict": True})(*inputs)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    allowed = 2 * relative_rmse(expected, model, inputs) + TOLERANCE[result.dtype] / 10
    assert relative_rmse(result, model, inputs) <= allowed


def assert_an_error_would_show(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The result varies, and weights that are off by a hundredth are not taken for TF32's rounding."""
    result = model(*inputs)
    assert result.std() > 0.001 * result.mean().abs() and result.unique().numel() > result.numel() / 20
    with RoundedToTF32():
        rounded = deepcopy(model).double()(*(tensor.double() for tensor in inputs))
    allowed = 2 * relative_rmse(rounded, model, inputs) + TOLERANCE[torch.float32] / 10
    off = deepcopy(model)
    for module in off.modules():
        if isinstance(module, tuple(CONV.values())):
            weight = max(module.parameters(), key=Tensor.numel)  # which weight_norm calls by another name
            weight.add_(0.01 * weight.std() * torch.randn_like(weight))
    assert relative_rmse(off(*inputs), model, inputs) > allowed


def sites(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Found]:
    """Equation and end of each site, without the lines of files that are not ours."""
    return [(site.equation, _end(site.reason)) for site in explain(model, *inputs).sites]


def _end(reason: str) -> str:
    end = re.search(r"\(the tail ends at (.*)\)$", reason)
    return re.sub(r" at \w+\.py:\d+(?=: )", "", end[1] if end else reason)

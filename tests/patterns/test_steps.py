"""BatchNorm in eval as a scale and a shift; the other operations are in ``test_spellings`` and ``test_near_misses``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS, call, dynamo
from torch import Tensor, nn

from fusion_backend import fused_post, rewrite
from fusion_backend.patterns.site import Site, find_sites
from fusion_backend.patterns.source import Miss

CONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Up(nn.Module):
    """A convolution, a BatchNorm with statistics that are not those of a new one, and a tail."""

    def __init__(self, rank: int = 2, tail: Callable[[Tensor], Tensor] = F.relu, **norm: Any) -> None:
        super().__init__()
        self.up = CONV[rank](4, 6, 3, 2, bias=norm.pop("bias", True))
        self.norm = NORM[rank](6, **norm)
        for statistic in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            if statistic is not None:
                nn.init.normal_(statistic)
        if self.norm.running_var is not None:
            nn.init.uniform_(self.norm.running_var, 0.1, 4)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(self.up(x)))


@pytest.mark.parametrize("dialect", ["dynamo", "export"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"eps": 0.1, "bias": False}], ids=str)
def test_a_batch_norm_in_eval_is_a_scale_and_a_shift(norm: dict[str, Any], rank: int, dialect: str) -> None:
    model, x = Up(rank, **norm).eval(), torch.randn(2, 4, *(3, 4, 5)[:rank])
    with torch.no_grad():
        expected = model(x)
        gm = DIALECTS[dialect](model, x)
        (site,) = find_sites(gm)
        assert isinstance(site, Site) and len(site.tail) == 2, site
        rewrite.use_epilogue(site)
        gm.graph.lint()
        gm.recompile()
        torch.testing.assert_close(call(gm, x), expected)


def test_what_comes_before_and_behind_is_folded_with_it() -> None:
    model = Up(tail=lambda y: (y.clamp(-1, 1) + 1) / 2).eval()
    model.up.register_forward_hook(lambda module, inputs, y: y * 2 - 1)
    x = torch.randn(2, 4, 5, 3)
    with torch.no_grad():
        gm = dynamo(model, x)
        (site,) = find_sites(gm)
        assert isinstance(site, Site) and len(site.tail) == 6
        rewrite.use_epilogue(site)
        gm.recompile()
        torch.testing.assert_close(call(gm, x), model(x))


def test_a_scale_of_unknown_sign_behind_bounds() -> None:
    """A BatchNorm's weight may be negative, or zero."""
    model = Up().eval()
    model.norm.weight.data = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.0])
    model.up.register_forward_hook(lambda module, inputs, y: y.clamp(-0.5, 0.25))
    x = torch.randn(2, 4, 5, 3)
    with torch.no_grad():
        gm = dynamo(model, x)
        (site,) = find_sites(gm)
        rewrite.use_epilogue(site)
        gm.recompile()
        torch.testing.assert_close(call(gm, x), model(x))


@pytest.mark.parametrize("tail", [F.relu, F.relu6, lambda y: y.clamp(-1, 1) * 2], ids=["relu", "relu6", "clamp"])
def test_a_frozen_batch_norm_trains(tail: Callable[[Tensor], Tensor]) -> None:
    """Its weight and bias are learned, its statistics stand still."""
    model, x = Up(tail=tail).eval().double(), torch.randn(2, 4, 5, 3).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fused_post, options={"fused_post.strict": True})
    parameters = list(model.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), parameters) for f in (compiled, model)))


def reason(model: nn.Module, x: Tensor) -> str:
    with torch.no_grad():
        (found,) = find_sites(dynamo(model, x))
    return (found if isinstance(found, Miss) else found.end).reason


def test_near_misses() -> None:
    x = torch.randn(2, 4, 5, 3)
    batch = "it normalises by the statistics of the batch"
    assert batch in reason(Up(track_running_stats=False).eval(), x)
    by_batch = Up(tail=lambda y: F.batch_norm(y, torch.zeros(6), torch.ones(6), training=True)).eval()
    assert batch in reason(by_batch, x)
    unbatched = Up(1).eval()
    unbatched.norm = nn.BatchNorm1d(7).eval()
    assert "another dimension than the channels" in reason(unbatched, torch.randn(4, 3))


def test_statistics_are_kept_up_to_date_by_a_model_in_training() -> None:
    model, x = Up(), torch.randn(8, 4, 5, 3)
    before = model.norm.running_mean.clone()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fused_post, options={"fused_post.strict": True})
    compiled(x).sum().backward()
    assert not torch.equal(model.norm.running_mean, before)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))

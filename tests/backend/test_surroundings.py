"""What stands behind a site: whether a pass for the site's tail is saved, or one that does it is needed anyway."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS
from torch import Tensor, nn

from fusion_backend import choice, explain
from fusion_backend.kernels import problem
from fusion_backend.patterns.site import Site, find_convolutions, match
from fusion_backend.surroundings import saves_a_pass

W = torch.randn(5, 6, 1, 1)


class Before(nn.Module):
    """A site, and behind it what reads its result."""

    def __init__(self, behind: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, 2, bias=bias)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.up(x))


SAVED = {
    "returned": lambda y: y,
    "a program, returned": torch.tanh,
    "a convolution": lambda y: F.conv2d(y.relu(), W),
    "two convolutions": lambda y: F.conv2d(y, W) + F.conv2d(y, W + 1),
    "a pool": lambda y: F.max_pool2d(y, 2),
    "a product of matrices that reads a view": lambda y: y.tanh().flatten(2).transpose(1, 2) @ W[0, :, 0],
    "a linear layer": lambda y: F.linear(y.permute(0, 2, 3, 1), W[:, :, 0, 0]),
}
SHARED = {
    "a mean": lambda y: y.mean((2, 3)),
    "a minimum with its indices": lambda y: torch.min(y, dim=1)[0],
    "a norm": lambda y: F.group_norm(y * 2, 2),
    "a norm behind a program": lambda y: F.group_norm(F.gelu(y), 2),
    "a norm of a view": lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (6,)),
    "a concatenation": lambda y: torch.cat([y, y.detach() * 2], 1),
    "a mean by the name of a pool": lambda y: F.adaptive_avg_pool2d(y, 1),
    "an interpolation": lambda y: F.interpolate(y, scale_factor=2.0),
    "parts of it": lambda y: y.chunk(2, 1)[0].softmax(1),
    "a value that is kept": lambda y: F.conv2d(F.leaky_relu(y, 0.1), W).mean() + y,
    "a pool and a mean": lambda y: F.max_pool2d(y, 2).mean() + y.mean(),
}


@pytest.mark.parametrize("behind", [*SAVED, *SHARED])
@torch.no_grad()
def test_a_pass_is_saved_unless_one_is_needed_anyway(behind: str) -> None:
    assert saves(Before((SAVED | SHARED)[behind])) == (behind in SAVED)


@torch.no_grad()
def test_without_bias_and_tail_there_is_no_pass_to_save() -> None:
    assert not saves(Before(lambda y: F.conv2d(y, W), bias=False))
    assert saves(Before(lambda y: F.conv2d(y.relu(), W), bias=False))
    assert not saves(Before(lambda y: F.max_pool2d(y.relu(), 2), bias=False))


def saves(model: nn.Module) -> bool:
    graph = DIALECTS["dynamo"](model, torch.randn(2, 4, 3, 4))
    (site,) = (match(node, bare=True) for node in find_convolutions(graph))
    assert isinstance(site, Site)
    return saves_a_pass(site.whole)


@torch.no_grad()
def test_auto_counts_the_pass_that_a_site_does_not_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured peers have one. At this rate of copies it takes as long as they do."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    monkeypatch.setattr(choice, "gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(problem, "shared_memory_limit", lambda device: 227 * 1024)
    up, x = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1), torch.randn(16, 64, 64, 64)
    kernels = {}
    for rate in (1e11, 1e9):
        monkeypatch.setattr(choice, "copy_rate", lambda gpu, rate=rate: rate)
        for name, behind in (("returned", nn.ReLU()), ("a norm", nn.GroupNorm(2, 64))):
            (site,) = explain(nn.Sequential(up, behind), x).sites
            kernels[name, rate] = site.kernel
    assert kernels == {
        ("returned", 1e11): "fused",
        ("a norm", 1e11): "fused",
        ("returned", 1e9): "fused",
        ("a norm", 1e9): "inductor",
    }

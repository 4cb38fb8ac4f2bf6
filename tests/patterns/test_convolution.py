"""Every way to write a transposed convolution is read as one, with the arguments it was written with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS, call, dynamo, export, symbolic
from torch import Tensor, nn

from fusion_backend import rewrite
from fusion_backend.patterns.site import Site, find_sites


class Plain(nn.Module):
    """Any module, then relu and a scale."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.up = convolution

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) * 0.5


class WithOutputSize(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x, output_size=[10, 14])) * 0.5


class Functional(nn.Module):
    """A functional call with a weight that is a buffer and no bias."""

    def __init__(self, rank: int, **arguments: Any):
        super().__init__()
        self.rank, self.arguments = rank, arguments
        groups = arguments.get("groups", 1)
        self.register_buffer("weight", torch.randn(4, 6 // groups, *(3,) * rank))

    def forward(self, x: Tensor) -> Tensor:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.rank - 1]
        return function(x, self.weight, **self.arguments).clamp(-1, 1) + 1


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(input=x, weight=self.weight, bias=self.bias, stride=2, output_padding=1)
        return (y * 2).relu()


class Computed(nn.Module):
    """A weight that the model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv_transpose2d(x, weight, None, 2).clamp(0, 1) * 2


class General(nn.Module):
    """torch.convolution with transposed=True."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.convolution(x, self.weight, None, [2, 1], [1, 0], [1, 2], True, [1, 0], 1).relu() * 2


@dataclass(frozen=True)
class Row:
    name: str
    build: Callable[[], nn.Module]
    rank: int
    expected: dict[str, Any]


def weight_norm(module: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(module)


ROWS = [
    Row("1d", lambda: Plain(nn.ConvTranspose1d(4, 6, 4, 2, 1)), 1, {"stride": (2,), "padding": (1,)}),
    Row("2d", lambda: Plain(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)), 2, {"stride": (2, 2), "output_padding": (1, 1)}),
    Row("3d", lambda: Plain(nn.ConvTranspose3d(4, 6, 2, 2)), 3, {"stride": (2, 2, 2), "groups": 1}),
    Row("no bias", lambda: Plain(nn.ConvTranspose2d(4, 6, 3, bias=False)), 2, {"stride": (1, 1), "bias": None}),
    Row("groups", lambda: Plain(nn.ConvTranspose2d(4, 6, 3, 2, groups=2)), 2, {"groups": 2}),
    Row("depthwise", lambda: Plain(nn.ConvTranspose2d(4, 4, 3, 2, groups=4)), 2, {"groups": 4}),
    Row("dilation", lambda: Plain(nn.ConvTranspose2d(4, 6, 3, 2, dilation=(2, 3))), 2, {"dilation": (2, 3)}),
    Row(
        "uneven",
        lambda: Plain(nn.ConvTranspose2d(4, 6, (3, 5), (2, 1), (1, 2))),
        2,
        {"stride": (2, 1), "padding": (1, 2)},
    ),
    Row("output_size", lambda: WithOutputSize(nn.ConvTranspose2d(4, 6, 3, 2, 1)), 2, {"stride": (2, 2)}),
    Row("functional 1d", lambda: Functional(1, stride=2), 1, {"stride": (2,), "bias": None}),
    Row("functional 2d", lambda: Functional(2, stride=(2, 1), padding=1), 2, {"stride": (2, 1), "padding": (1, 1)}),
    Row("functional 3d", lambda: Functional(3, dilation=2), 3, {"dilation": (2, 2, 2)}),
    Row("functional, groups", lambda: Functional(2, groups=2), 2, {"groups": 2}),
    Row("functional, keywords", Keywords, 2, {"stride": (2, 2), "output_padding": (1, 1)}),
    Row("computed weight", Computed, 2, {"stride": (2, 2)}),
    Row(
        "torch.convolution",
        General,
        2,
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "output_padding": (1, 0)},
    ),
    Row("weight_norm", lambda: Plain(weight_norm(nn.ConvTranspose2d(4, 6, 3, 2))), 2, {"stride": (2, 2)}),
    Row(
        "weight_norm by hook",
        lambda: Plain(nn.utils.weight_norm(nn.ConvTranspose2d(4, 6, 3, 2))),
        2,
        {"stride": (2, 2)},
    ),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_convolution_is_read(row: Row, dialect: str) -> None:
    torch.manual_seed(0)
    model = row.build().eval()
    x = torch.randn(2, 4, *(5, 7, 6)[: row.rank])
    with torch.no_grad():
        gm = DIALECTS[dialect](model, x)
        (site,) = find_sites(gm)
        assert isinstance(site, Site), site.reason
        assert site.convolution.rank == row.rank and site.convolution.channel_dim == 1
        assert len(site.tail) == 2
        for name, value in row.expected.items():
            assert getattr(site.convolution, name) == value
        rewrite.fold(site)
        gm.recompile()
        torch.testing.assert_close(call(gm, x), model(x))


@pytest.mark.parametrize("dialect", ["dynamo", "make_fx", "export"])
def test_the_bias_is_part_of_the_site_where_the_graph_shows_it(dialect: str) -> None:
    model = Plain(nn.ConvTranspose2d(4, 6, 3))
    with torch.no_grad():
        (site,) = find_sites(DIALECTS[dialect](model, torch.randn(1, 4, 5, 5)))
    assert site.convolution.bias is not None
    assert site.biased.shift != 0.0 and site.form.shift == 0.0


def test_a_bias_alone_is_a_site() -> None:
    with torch.no_grad():
        (site,) = find_sites(dynamo(nn.ConvTranspose2d(4, 6, 3), torch.randn(1, 4, 5, 5)))
    assert isinstance(site, Site) and site.tail == () and site.form.operations == 0
    assert str(site.biased) == "y = x + bias[c]"


def test_a_convolution_with_nothing_to_fold_is_none() -> None:
    with torch.no_grad():
        (miss,) = find_sites(dynamo(nn.ConvTranspose2d(4, 6, 3, bias=False), torch.randn(1, 4, 5, 5)))
    assert "the value leaves the graph" in miss.reason


def test_an_unbatched_convolution_has_its_channels_first() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, 2)
            self.bias = nn.Parameter(torch.randn(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return ((self.up(x) + self.bias) * self.bias).relu()

    model, x = Unbatched(), torch.randn(4, 5, 7)
    for dialect in (dynamo, export, symbolic):  # make_fx writes an unsqueeze and a squeeze around it
        with torch.no_grad():
            gm = dialect(model, x)
            (site,) = find_sites(gm)
            assert site.convolution.channel_dim == 0 and len(site.tail) == 3
            rewrite.fold(site)
            gm.recompile()
            torch.testing.assert_close(call(gm, x), model(x))

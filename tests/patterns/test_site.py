"""The walk: aliases of an in-place value, writes in between, numbers that vary, nested graphs, several sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dialects import call, dynamo
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fusion_backend import fused_post, rewrite
from fusion_backend.patterns.site import Site, find_sites

STRICT = {"fused_post.strict": True}


class Up(nn.Module):
    def __init__(self, tail: Any = None, bias: bool = False):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 5, 2, 2, bias=bias)
        self.register_buffer("b", torch.randn(5, 1, 1))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.up(x))


def fold_and_compare(model: nn.Module, x: Tensor) -> Site:
    with torch.no_grad():
        gm = dynamo(model, x)
        (site,) = find_sites(gm)
        assert isinstance(site, Site), site.reason
        assert rewrite.fold(site)
        gm.graph.lint()
        gm.recompile()
        torch.testing.assert_close(call(gm, x), model(x))
    return site


def test_statements_in_place_are_one_value() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        y.add_(3)
        y.mul_(2)
        y.sub_(1)
        y.clamp_(0, 1)
        return y

    site = fold_and_compare(Up(tail), torch.randn(2, 3, 4, 4))
    assert [node.target for node in site.tail] == ["add_", "mul_", "sub_", "clamp_"]
    assert site.aliases == (site.convolution.node, *site.tail)


def test_a_second_name_of_an_in_place_value_is_the_same_value() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        z = y.add_(1)
        y.mul_(3)
        z.relu_()
        return y * 0.5

    site = fold_and_compare(Up(tail), torch.randn(2, 3, 4, 4))
    assert str(site.form) == "y = max(1.5*x + 1.5, 0)"


def test_both_names_of_an_in_place_value_may_be_read_behind_the_tail() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        z = y.add_(3)
        z.mul_(2)
        y.sub_(1)
        return torch.tanh(y) + torch.tanh(z)

    site = fold_and_compare(Up(tail), torch.randn(2, 3, 4, 4))
    assert len(site.tail) == 3


def test_a_read_before_an_in_place_write_is_kept() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        before = y * 2
        y.add_(1)
        return before + y

    model, x = Up(tail), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend=fused_post, options=STRICT)
        torch.testing.assert_close(compiled(x), model(x))
        (found,) = find_sites(dynamo(model, x))
    assert not isinstance(found, Site)


def test_a_write_to_an_operand_ends_the_tail_before_it() -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        b = m.b + 0
        y = (y + b) * 2
        b.add_(100)
        return (y - b).relu()

    site_model, x = Up(tail), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        gm = dynamo(site_model, x)
        (site,) = find_sites(gm)
        assert len(site.tail) == 2 and "add_ stands between" in site.end.reason
        compiled = torch.compile(site_model, backend=fused_post, options=STRICT)
        torch.testing.assert_close(compiled(x), site_model(x))


def test_a_write_to_the_convolutions_input_ends_the_tail_before_it() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 5, 2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            x.zero_()
            return y.relu() * 2

    model = Reused()
    with torch.no_grad():
        compiled = torch.compile(model, backend=fused_post, options=STRICT)
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(compiled(x.clone()), model(x.clone()))


def test_a_write_that_no_name_shows_ends_the_tail_before_it() -> None:
    def batch_norm(b: Tensor) -> None:
        F.batch_norm(torch.arange(40.0).view(8, 5), b, torch.ones(5), training=True)

    def instance_norm(b: Tensor) -> None:
        F.instance_norm(torch.arange(80.0).view(2, 5, 8), b, torch.ones(5))

    def relu(b: Tensor) -> None:
        F.relu(b, True)

    def dropout(b: Tensor) -> None:
        F.dropout(b, 1.0, True, True)

    def embedding(b: Tensor) -> None:
        F.embedding(torch.tensor([0, 1]), b.view(-1, 1), max_norm=0.01)

    def normalize(b: Tensor) -> None:
        F.normalize(b, 2.0, 0, 1e-12, b)

    weight, x = torch.randn(3, 5, 2, 2), torch.randn(2, 3, 4, 4)
    for write in (batch_norm, instance_norm, relu, dropout, embedding, normalize):

        def model(x: Tensor, b: Tensor, write: Any = write) -> Tensor:
            z = ((F.conv_transpose2d(x, weight) + 1) + b.view(-1, 1, 1)) * 2
            write(b)
            return z * 2 + 1

        b = torch.linspace(-3, 3, 5)
        torch._dynamo.reset()
        with torch.no_grad():
            expected = model(x, b.clone())
            compiled = torch.compile(model, backend=fused_post, options=STRICT)
            torch.testing.assert_close(compiled(x, b.clone()), expected)


def test_a_write_to_another_tensor_is_no_part_of_a_tail() -> None:
    weight = torch.randn(3, 5, 1, 1)

    def model(x: Tensor, average: Tensor) -> Tensor:
        average.mul_(0.9)
        average.add_(F.conv_transpose2d(x, weight).mul(0.5).mul(0.2))
        return x + 1

    x, averages = torch.randn(1, 3, 1, 1), [torch.ones(1, 5, 1, 1), torch.ones(1, 5, 1, 1)]
    with torch.no_grad():
        model(x, averages[0])
        torch.compile(model, backend=fused_post, options=STRICT)(x, averages[1])
    torch.testing.assert_close(averages[1], averages[0])


def test_sites_that_read_each_other_are_rewritten_one_after_the_other() -> None:
    first, second, third = nn.ConvTranspose2d(3, 5, 1), nn.ConvTranspose2d(3, 5, 1), nn.ConvTranspose2d(3, 5, 3)

    def skip(x: Tensor) -> Tensor:
        return (((first(x) + 1) * 2) + ((second(x) + 1) * 2 + 1)) * 2 + 1

    def gate(x: Tensor) -> Tensor:
        g = (first(x.mean((2, 3), keepdim=True)) + 1).add(2).relu()
        return ((third(x) + 1) * 2 + 1) * g

    for model, x in ((skip, torch.randn(1, 3, 1, 1)), (gate, torch.randn(1, 3, 4, 4))):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model, backend=fused_post, options=STRICT)(x), model(x))


def test_many_scales_of_unknown_sign_stay_small() -> None:
    scales = [torch.rand(5, 1, 1) - 0.5 for _ in range(24)]

    def tail(m: Any, y: Tensor) -> Tensor:
        y = y.clamp(0, 1)
        for scale in scales:
            y = y * scale
        return y * 2 + 1

    model, x = Up(tail), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        gm = dynamo(model, x)
        (site,) = find_sites(gm)
        assert isinstance(site, Site) and len(site.tail) == 27
        assert not site.is_shorter_folded and site.form.operations < 200
        assert len(str(site.form)) < 2000
        gm_nodes = len(gm.graph.nodes)
        rewrite.use_epilogue(site)
        assert len(gm.graph.nodes) < gm_nodes + 15 * len(scales)


@pytest.mark.parametrize("kind", [float, int])
def test_a_number_that_varies_between_calls_is_a_coefficient(kind: type) -> None:
    class Varying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 5, 2, 2)

        def forward(self, x: Tensor, k: float) -> Tensor:
            return (self.up(x).clamp(-1, 2) * k + 1) * 0.5

    model, x = Varying(), torch.randn(2, 3, 4, 4)
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        seen.extend(find_sites(gm))
        return fused_post(gm, example_inputs, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options=STRICT)
    with torch.no_grad():
        for k in (3, 4, -2, 7, 5, -6, 8):
            torch.testing.assert_close(compiled(x, kind(k)), model(x, kind(k)))
        varying = len(seen)
        torch.testing.assert_close(compiled(x, kind(0)), model(x, kind(0)))  # Dynamo compiles 0 as a constant
    assert [getattr(found, "reason", len(getattr(found, "tail", ()))) for found in seen[:varying]] == [4] * varying
    assert varying < 7, "the graph was compiled anew for every number"


def test_a_checkpointed_block_is_walked() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.ConvTranspose2d(3, 5, 2, 2), nn.ReLU(), nn.Hardtanh(-1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False) + 1

    model, x = Checkpointed(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        (site,) = find_sites(dynamo(model, x))
        assert isinstance(site, Site) and len(site.tail) == 2
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend=fused_post, options=STRICT)(x), model(x))


def test_the_branches_of_a_cond_are_walked() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 5, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(
                x.sum() > 0, lambda x: (self.up(x) * 2).relu() * 3, lambda x: (self.up(x) + 1).clamp(0, 1) - 1, (x,)
            )

    model = Branches()
    with torch.no_grad():
        for x in (torch.rand(2, 3, 4, 4), -torch.rand(2, 3, 4, 4)):
            sites = list(find_sites(dynamo(model, x)))
            assert [len(site.tail) for site in sites] == [3, 3]
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(model, backend=fused_post, options=STRICT)(x), model(x))


def test_sites_in_a_row_are_each_found() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 5, 2, 2), nn.ReLU(), nn.Hardtanh(), nn.ConvTranspose2d(5, 4, 3), nn.ReLU6(), nn.ReLU()
    )
    x = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        gm = dynamo(model, x)
        sites = list(find_sites(gm))
        assert [len(site.tail) for site in sites] == [2, 2]
        for site in sites:
            rewrite.fold(site)
        gm.recompile()
        torch.testing.assert_close(call(gm, x), model(x))


def test_a_block_used_twice_is_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return (self.up((self.up(x) + 1).relu()) + 2).relu()

    with torch.no_grad():
        assert len(list(find_sites(dynamo(Twice(), torch.randn(1, 3, 4, 4))))) == 2


def test_sizes_that_vary_are_no_obstacle() -> None:
    model = Up(lambda m, y: (y + m.b).clamp(0, 1) * 2, bias=True)
    compiled = torch.compile(model, backend=fused_post, dynamic=True, options=STRICT)
    with torch.no_grad():
        for size in (4, 6, 9):
            x = torch.randn(size, 3, size, size + 1)
            torch.testing.assert_close(compiled(x), model(x))


def test_arithmetic_on_sizes_that_vary_does_not_end_a_tail() -> None:
    model = Up(lambda m, y: ((y / (y.shape[-1] + y.shape[-2] + 1) + 1).relu() * 2).clamp(0, 1), bias=True)
    lengths: list[int] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        lengths.extend(len(site.tail) for site in find_sites(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=record, dynamic=True)(torch.randn(1, 3, 4, 5))
    assert lengths == [5]

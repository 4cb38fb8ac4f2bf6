"""``explain``: what it says, and what it leaves untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusion_backend import Report, explain, fused_post


class Seed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.bias = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_transpose(x)
        x = x + self.bias
        x = torch.clamp(x, 0.0, 1.0) * 2.0
        return torch.clamp(x, 0.0, 1.0) / 2.0


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Seed()
        self.second = nn.ConvTranspose2d(6, 4, 2, 2, bias=False)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = self.second(self.first(x))
        return y.relu() + y * scale


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def test_a_site_says_everything_that_is_promised() -> None:
    with torch.no_grad():
        report = explain(Seed(), torch.randn(1, 8, 4, 4))
    assert isinstance(report, Report) and isinstance(report.sites, tuple)
    (site,) = report.sites
    assert site.matched is True and site.kernel == "inductor"
    assert site.equation == "y = min(max(x + conv_transpose.bias[c] + bias[c], 0), 0.5)"
    lines = site.source.split(", ")
    first = Seed.forward.__code__.co_firstlineno + 1
    assert lines == [f"test_explain.py:{first + i}" for i in range(4)]
    assert (
        "no kernel of ours is taken: device type cpu is not a CUDA or ROCm GPU; 5 operations folded into 2"
        in site.reason
    )


def test_a_miss_says_why_and_where() -> None:
    with torch.no_grad():
        hit, miss = explain(Decoder(), torch.randn(1, 8, 4, 4), scale=2.0).sites
    assert hit.matched and not miss.matched
    assert miss.kernel is None and miss.equation == ""
    assert "its value has 2 users" in miss.reason
    line = f"test_explain.py:{Decoder.forward.__code__.co_firstlineno + 1}"
    assert line in miss.reason and miss.source == line
    assert miss.convolution == "y: 2d, stride 2x2, output 1x4x16x16 torch.float32"


def test_the_report_prints_as_a_table() -> None:
    with torch.no_grad():
        text = str(explain(Decoder(), torch.randn(1, 8, 4, 4)))
    assert "2 transposed convolution(s), 1 matched" in text
    assert "y = min(max(x + first.conv_transpose.bias[c] + first.bias[c], 0), 0.5)" in text
    assert "its value has 2 users" in text and "test_explain.py:" in text
    assert str(Report(())) == "fused_post: no transposed convolution found"


def test_a_function_can_be_explained() -> None:
    model = Seed()
    with torch.no_grad():
        (site,) = explain(lambda x: model(x) * 3.0, torch.randn(1, 8, 4, 4)).sites
    assert site.equation.endswith("1.5)")


def test_a_compiled_module_is_explained_with_its_own_options() -> None:
    x = torch.randn(1, 8, 4, 4)
    compiled = torch.compile(Seed(), backend=fused_post, options={"fused_post.kernel": "epilogue"})
    with torch.no_grad():
        compiled(x)
        (site,) = explain(compiled, x).sites
    assert "the epilogue kernel cannot run" in site.reason


def test_a_compiled_function_can_be_explained() -> None:
    model = Seed()

    @torch.compile(backend=fused_post)
    def compiled(x: Tensor) -> Tensor:
        return model(x)

    with torch.no_grad():
        assert explain(compiled, torch.randn(1, 8, 4, 4)).sites[0].matched


def test_explaining_leaves_the_users_compiled_code_alone() -> None:
    from torch._dynamo.utils import counters

    model, x = Seed(), torch.randn(1, 8, 4, 4)
    compiled = torch.compile(model, backend=fused_post)
    with torch.no_grad():
        expected = compiled(x)
        for _ in range(2 * torch._dynamo.config.recompile_limit):
            assert explain(model, x).sites[0].matched
            assert explain(compiled, x).sites[0].matched
        counters.clear()
        torch.testing.assert_close(compiled(x), expected)
        assert counters["stats"].get("unique_graphs", 0) == 0, "the model was compiled again"


def test_explaining_a_model_with_a_graph_break_leaves_it_room_to_be_compiled() -> None:
    from torch._dynamo.utils import counters

    class Broken(Seed):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            torch._dynamo.graph_break()
            return y * 2

    model, x = Broken(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        for _ in range(torch._dynamo.config.recompile_limit + 1):
            assert explain(model, x).sites[0].matched
        counters.clear()
        torch.compile(model, backend=fused_post)(x)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_model_of_torchs_modules_alone_has_no_source() -> None:
    with torch.no_grad():
        (site,) = explain(
            nn.Sequential(nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.ReLU()), torch.randn(1, 8, 4, 4)
        ).sites
    assert site.source == "" and site.equation == "y = max(x + 0.bias[c], 0)"


def test_explaining_ignores_the_stance() -> None:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert explain(Seed(), torch.randn(1, 8, 4, 4)).sites[0].matched


def test_explaining_changes_no_parameter_and_returns_no_gradient() -> None:
    model = Seed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, torch.randn(1, 8, 4, 4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_explaining_one_model_leaves_nothing_behind_for_the_next() -> None:
    for size in (5, 7, 9):
        (site,) = explain(torch.nn.ConvTranspose2d(4, 4, 2, 2), torch.randn(1, 4, size, size)).sites
        assert f"output 1x4x{2 * size}x{2 * size}" in site.convolution

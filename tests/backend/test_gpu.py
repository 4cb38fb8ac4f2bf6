"""The whole way on a GPU: the fused kernel in a compiled model, writes to its weights, and CUDA graphs."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import TOLERANCE, relative_rmse
from fusion_backend import evidence, explain, fused_post

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.usefixtures("_reset"),
]
FUSED = {"fused_post.strict": True, "fused_post.kernel": "fused"}


@pytest.fixture
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Up(nn.Module):
    """A site that the march takes, one that the general kernel takes, and one with neither bias nor tail."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(64, 256, 3, 2, 1, 1)
        self.second = nn.ConvTranspose2d(256, 32, 4, 2, 1)
        self.third = nn.ConvTranspose2d(32, 16, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.third(self.second(self.first(x).relu()).clamp(0, 1) * 2))


def setting(dtype: torch.dtype = torch.float32, last: bool = False) -> tuple[nn.Module, Tensor]:
    model, x = Up().eval().to("cuda", dtype), torch.randn(4, 64, 17, 32, device="cuda", dtype=dtype)
    return (
        (model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)) if last else (model, x)
    )


def assert_accurate(result: Tensor, model: nn.Module, x: Tensor) -> None:
    allowed = 2 * relative_rmse(model(x), model, (x,)) + TOLERANCE[x.dtype] / 10
    if x.dtype == torch.float32:
        allowed = max(allowed, 1e-3)  # three convolutions in TF32, where cuDNN may take none
    assert relative_rmse(result, model, (x,)) <= allowed


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_numbers_and_the_kernels_of_a_model(dtype: torch.dtype, last: bool) -> None:
    """Three kernels of ours; Inductor's own pack the weights, make coefficients, and compute the tanh."""
    from torch._inductor.utils import run_and_get_code

    model, x = setting(dtype, last)
    assert [site.kernel for site in explain(torch.compile(model, backend=fused_post, options=FUSED), x).sites] == [
        "fused"
    ] * 3
    result, codes = run_and_get_code(torch.compile(model, backend=fused_post, options=FUSED), x)
    assert_accurate(result, model, x)
    assert result.stride() == model(x).stride()
    launched = [name for code in codes for name in re.findall(r"^ *(\w+)\.run\(", code, re.MULTILINE)]
    ours = [name for name in launched if re.match(r"_(conv_transpose|row_march)_kernel", name)]
    turning = [name for name in launched if name.startswith("_transpose_kernel")]
    assert len(ours) == 3 and len(launched) - len(turning) <= 3 + 3 + 2 + 1, launched
    assert not any("torch.ops.fused_post" in code or "extern_kernels.conv" in code for code in codes)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@torch.no_grad()
def test_every_change_of_a_weight_is_seen(mode: str | None) -> None:
    model, x = setting(torch.bfloat16)
    options: dict[str, Any] = FUSED | ({"triton.cudagraphs": True} if mode else {})
    compiled, other = torch.compile(model, backend=fused_post, options=options), copy.deepcopy(model)
    for _ in range(3):
        assert_accurate(compiled(x).clone(), model, x)
    model.first.weight.mul_(-1)
    model.second.weight.data.mul_(2)
    for _ in range(3):
        assert_accurate(compiled(x).clone(), model, x)
    model.load_state_dict(other.state_dict())
    assert_accurate(compiled(x).clone(), model, x)
    model.second.weight = nn.Parameter(torch.randn_like(model.second.weight) / 16)
    assert_accurate(compiled(x).clone(), model, x)


@torch.no_grad()
def test_a_graph_that_the_user_captured_sees_the_weight_as_it_is_at_its_replay() -> None:
    model, x = setting(torch.bfloat16)
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compiled(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(x)
    for factor in (1, -1):
        model.first.weight.mul_(factor)
        graph.replay()
        assert_accurate(y.clone(), model, x)


@torch.no_grad()
def test_sizes_that_vary() -> None:
    model, _ = setting(torch.bfloat16)
    compiled = torch.compile(model, backend=fused_post, options=FUSED, dynamic=True)
    for shape in ((4, 64, 17, 32), (2, 64, 9, 48), (1, 64, 33, 7)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        assert_accurate(compiled(x), model, x)


@torch.no_grad()
def test_autocast() -> None:
    model, x = setting()
    compiled = torch.compile(model, backend=fused_post, options=FUSED)
    with torch.autocast("cuda", torch.bfloat16):
        result, expected = compiled(x), model(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.1, atol=0.03)


@torch.no_grad()
def test_auto_takes_the_fused_kernel_where_this_gpu_is_measured() -> None:
    conv = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1).to("cuda", torch.bfloat16)
    x = torch.randn(32, 64, 64, 64, device="cuda", dtype=torch.bfloat16)
    (site,) = explain(conv, x).sites
    known = bool(evidence.measured(torch.cuda.get_device_name()))
    assert site.kernel == ("fused" if known else "inductor"), site.reason
    result = torch.compile(conv, backend=fused_post, options={"fused_post.strict": True})(x)
    assert_accurate(result, conv, x)

"""The backend as torch.compile calls it: numbers, options, modes, gradients, mistakes of ours and of users."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from fusion_backend import backend as backend_module
from fusion_backend import explain, fused_post
from fusion_backend.options import KERNELS

STRICT = {"fused_post.strict": True}


class Model(nn.Module):
    """KernelBench level 2, problem 2, small."""

    def __init__(self, rank: int = 2, dtype: torch.dtype = torch.float32):
        super().__init__()
        convolution = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.conv_transpose = convolution(8, 6, 3, stride=2, padding=1, output_padding=1, dtype=dtype)
        self.bias = nn.Parameter(torch.randn(6, *(1,) * rank, dtype=dtype))
        self.scaling_factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_transpose(x)
        x = x + self.bias
        x = torch.clamp(x, min=0.0, max=1.0)
        x = x * self.scaling_factor
        x = torch.clamp(x, min=0.0, max=1.0)
        return x / self.scaling_factor


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def assert_accurate(model: nn.Module, compiled: Any, x: Tensor) -> None:
    """RMSE(ours) <= 2 * RMSE(eager) + a tenth of the tolerance, against float64: Dynamo's accuracy rule."""
    import copy

    exact = copy.deepcopy(model).double()(x.double())
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(x.dtype, 1e-2)

    def rmse(y: Tensor) -> float:
        return float((y.double() - exact).square().mean().sqrt())

    result = compiled(x)
    assert result.dtype == x.dtype and result.shape == exact.shape
    assert rmse(result) <= 2 * rmse(model(x)) + tolerance / 10


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_numbers_are_eagers(rank: int, dtype: torch.dtype) -> None:
    model = Model(rank, dtype).eval()
    x = torch.randn(2, 8, *(5, 7, 6)[:rank], dtype=dtype)
    with torch.no_grad():
        assert_accurate(model, torch.compile(model, backend=fused_post, options=STRICT), x)
        (site,) = explain(model, x).sites
    assert site.matched and site.kernel == "inductor"


def test_strides_are_eagers() -> None:
    model = Model().eval()
    x = torch.randn(2, 8, 5, 7)
    compiled = torch.compile(model, backend=fused_post, options=STRICT)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=memory_format)
            assert compiled(x).stride() == model(x).stride()


def test_nan_and_infinities_are_eagers() -> None:
    model = Model().eval()
    x = torch.randn(2, 8, 5, 7)
    x[0, 0, 1, 1], x[0, 1, 3, 3], x[1, 2, 2, 2] = math.nan, math.inf, -math.inf
    with torch.no_grad():
        compiled = torch.compile(model, backend=fused_post, options=STRICT)
        torch.testing.assert_close(compiled(x), model(x), equal_nan=True)


def test_half_precision_is_folded_in_float32() -> None:
    model = nn.ConvTranspose2d(4, 6, 3, bias=False).half()
    model.weight.data.fill_(25.0)
    x = torch.ones(1, 4, 5, 5, dtype=torch.half)

    def tail(x: Tensor) -> Tensor:
        return ((model(x) - 900) * 50) * 2 + 0.5

    options = {"emulate_precision_casts": True, **STRICT}
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(tail, backend=fused_post, options=options)(x), tail(x))


def test_the_graph_that_inductor_gets_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []

    def record(mode: Any, options: Any) -> Any:
        def inductor(gm: Any, example_inputs: Any) -> Any:
            seen.append([node.target for node in gm.graph.nodes if node.op.startswith("call")])
            return gm.forward

        inductor.config = {}  # type: ignore[attr-defined]
        return inductor

    monkeypatch.setattr(backend_module.opt, "inductor", record)
    model = Model().eval()
    with torch.no_grad():
        torch.compile(model, backend=fused_post, options=STRICT)(torch.randn(1, 8, 4, 4))
    ((convolution, *rest),) = seen
    assert convolution is torch.conv_transpose2d
    assert [target for target in rest if target not in ("reshape", "to")] == [torch.add, torch.clamp]


def test_a_gradient_of_the_tail_alone_counts() -> None:
    model = Model()
    model.conv_transpose.requires_grad_(False)
    x = torch.randn(1, 8, 4, 4)
    compiled = torch.compile(model, backend=fused_post, options=STRICT)
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), model.bias) for f in (compiled, model)))
    (site,) = explain(model, x).sites
    assert site.matched and "kept for the backward" not in site.reason, "it would not pay"


def test_functional_gradients_and_tangents_count() -> None:
    weight = torch.randn(3, 4, 2, 2)

    def loss(x: Tensor) -> Tensor:
        return ((F.conv_transpose2d(x, weight) * 2).clamp(0, 1) + 1).relu().sum()

    x = torch.randn(1, 3, 4, 4)

    def nested(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)

    functions = [(torch.func.grad(loss), True), (lambda x: torch.func.jvp(loss, (x,), (x,))[1], False)]
    if torch.__version__ >= "2.13":  # before, checkpoint has no forward-mode formula
        functions.append((lambda x: torch.func.jvp(nested, (x,), (x,))[1], False))
    for function, matched in functions:
        torch._dynamo.reset()
        (site,) = explain(function, x).sites
        assert site.matched == matched
        assert "kept for the backward" not in site.reason, "our operators have no rule for torch.func.grad"
        torch.testing.assert_close(torch.compile(function, backend=fused_post, options=STRICT)(x), function(x))


def test_vmap_is_eagers() -> None:
    weight = torch.randn(3, 4, 2, 2)

    def decode(x: Tensor, b: Tensor) -> Tensor:
        return (((F.conv_transpose2d(x, weight) + b) * 2).clamp(0, 1) + 1).relu()

    x, b = torch.randn(5, 1, 3, 4, 4), torch.randn(5, 4, 1, 1)
    function = torch.vmap(decode)
    with torch.no_grad():
        assert explain(function, x, b).sites[0].matched
        torch.testing.assert_close(torch.compile(function, backend=fused_post, options=STRICT)(x, b), function(x, b))


def test_one_compiled_module_serves_inference_and_training() -> None:
    model = Model()
    x = torch.randn(2, 8, 5, 7)
    compiled = torch.compile(model, backend=fused_post, options=STRICT)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model.bias.grad is not None
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))


def test_autocast_is_eagers() -> None:
    model = Model().eval()
    x = torch.randn(2, 8, 5, 7)
    compiled = torch.compile(model, backend=fused_post, options=STRICT)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result, expected = compiled(x), model(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_of_inductor_are_taken(mode: str) -> None:
    model, x = Model().eval(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=fused_post, mode=mode)(x), model(x))


def test_options_of_inductor_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def compile_fx(gm: Any, example_inputs: Any, config_patches: dict[str, Any], **kwargs: Any) -> Any:
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    options = {"max_fusion_size": 7, "epilogue-fusion": False, **STRICT}
    with torch.no_grad():
        torch.compile(Model().eval(), backend=fused_post, options=options)(torch.randn(1, 8, 4, 4))
    assert seen == {"max_fusion_size": 7, "epilogue_fusion": False}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fused_post.kernl": "auto"}, ["fused_post.kernl", "fused_post.kernel", "fused_post.strict"]),
        ({"fused_post.kernel": "fastest"}, ["'fastest'", "auto", "epilogue", "inductor"]),
        ({7: "auto"}, ["option 7 is not a str"]),
        ({"fused_post.strict": "yes"}, ["'yes'", "True", "False"]),
        ({"max_fusion_sizes": 7}, ["max_fusion_sizes", "max_fusion_size", "fused_post.kernel"]),
        ({"max_fusion_size": "seven"}, ["max_fusion_size", "str", "int"]),
    ],
)
def test_a_wrong_option_is_an_error_that_lists_the_known_ones(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        torch.compile(Model().eval(), backend=fused_post, options=options)(torch.randn(1, 8, 4, 4))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_may_be_asked_for_on_every_device(kernel: str) -> None:
    model, x = Model().eval(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend=fused_post, options={"fused_post.kernel": kernel, **STRICT})
        torch.testing.assert_close(compiled(x), model(x))
        (site,) = explain(compiled, x).sites
    assert site.matched and site.kernel == "inductor"
    if kernel in ("fused", "epilogue"):
        assert f"the {kernel} kernel cannot run: device type cpu is not a CUDA or ROCm GPU" in site.reason


def broken(*arguments: Any) -> Any:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("place", ["make_plan", "rewrite.fold"])
def test_a_mistake_of_ours_does_not_break_the_model(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Model().eval(), torch.randn(1, 8, 4, 4)
    target: Any = backend_module
    *path, name = place.split(".")
    for attribute in path:
        target = getattr(target, attribute)
    with monkeypatch.context() as patch, torch.no_grad(), caplog.at_level(logging.ERROR):
        patch.setattr(target, name, broken)
        torch.testing.assert_close(torch.compile(model, backend=fused_post)(x), model(x))
        assert "report this traceback" in caplog.text and "planted" in caplog.text
        torch._dynamo.reset()
        with pytest.raises(Exception, match="planted"):
            torch.compile(model, backend=fused_post, options=STRICT)(x)


def test_a_rewrite_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.ReLU())
    x = torch.randn(1, 3, 4, 4)
    fold, calls = backend_module.rewrite.fold, []

    def fails_at_the_second(site: Any) -> bool:
        calls.append(site)
        if len(calls) == 2:
            raise ZeroDivisionError("planted")
        return fold(site)

    monkeypatch.setattr(backend_module.rewrite, "fold", fails_at_the_second)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=fused_post)(x), model(x))
    assert len(calls) == 2


def test_models_without_transposed_convolutions_are_inductors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(2, 3, 6, 6)
    model(x)
    compiled = torch.compile(model, backend=fused_post, options=STRICT)
    torch.testing.assert_close(compiled(x), model(x))
    assert explain(model, x).sites == ()


def test_zero_sized_batches_run() -> None:
    model = Model().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend=fused_post, options=STRICT)
        assert compiled(torch.randn(0, 8, 4, 4)).shape == (0, 6, 8, 8)


def test_the_fold_is_the_same_on_a_warm_cache() -> None:
    model, x = Model().eval(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(model, backend=fused_post, options=STRICT)(x), expected)
            (site,) = explain(model, x).sites
            assert site.matched


def test_several_graphs_are_all_rewritten() -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            torch._dynamo.graph_break()
            return F.conv_transpose2d(y, self.conv_transpose.weight.transpose(0, 1)).relu().clamp(0, 1)

    model, x = Broken().eval(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend=fused_post, options=STRICT)
        torch.testing.assert_close(compiled(x), model(x))
        assert [site.matched for site in explain(model, x).sites] == [True, True]


def test_reset_is_forwarded_to_inductor() -> None:
    assert callable(fused_post.reset)
    fused_post.reset()


def test_one_info_line_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="fusion_backend"):
        torch.compile(Model().eval(), backend=fused_post, options=STRICT)(torch.randn(1, 8, 4, 4))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fusion_backend")]
    assert lines == ["1 transposed convolutions, 1 matched, 1 rewritten"]

"""Programs in training through the whole backend: eager's gradients, what is kept, and the ways in which users train.

On a CPU tensor an operator computes its reference, so that all of it can be tested without a GPU.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import triton

from benchmarks.measure import TOLERANCE
from fusion_backend import backend as backend_module
from fusion_backend import choice, explain, fused_post
from fusion_backend.kernels import conv_transpose, epilogue, epilogue_backward
from fusion_backend.kernels.tf32 import round_to_tf32
from tests.kernels.compiling import CHIPS
from tests.kernels.implementations import GPU_MARKS, every_device

KERNELS = ("fused", "epilogue")


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are taken to run on a CPU."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_codegen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's rewrite and AOTAutograd, but no generated C++: the same graphs, run operation by operation."""

    def compiler(gm: Any, example_inputs: Any) -> Any:
        return aot_eager(gm, example_inputs)

    compiler.reset, compiler.config = (lambda: None), {}  # type: ignore[attr-defined]
    monkeypatch.setattr(backend_module.opt, "inductor", lambda mode, options: compiler)


class Model(nn.Module):
    def __init__(self, tail: Callable[..., Tensor], rank: int = 2, bias: bool = True) -> None:
        super().__init__()
        convolution = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        self.up = convolution(4, 6, 3, 2, 1, 1, bias=bias)
        self.b = nn.Parameter(torch.randn(6, *(1,) * rank))
        self.gain = nn.Parameter(0.5 + torch.rand(6, *(1,) * rank))
        self.one = nn.Parameter(torch.rand(1))
        self.slope = nn.Parameter(torch.rand(6))
        self.register_buffer("shift", torch.randn(6, *(1,) * rank))
        self.tail = tail

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.tail(self, self.up(x), *others)


def original_kept(m: Any, y: Tensor) -> Tensor:
    original = y.clone().detach()
    return ((y + m.b + original) * original) + original


def in_place(m: Any, y: Tensor) -> Tensor:
    y = y + m.b
    return F.silu(y.tanh_()).mul_(2)


def dac(m: Any, y: Tensor) -> Tensor:
    z = y.reshape(*y.shape[:2], -1, *y.shape[3:])
    return (z + torch.sin(m.gain * z) ** 2 / m.gain).reshape(y.shape)


TAILS: dict[str, Callable[..., Tensor]] = {
    "tanh": lambda m, y: torch.tanh(y - m.b),
    "leaky_relu": lambda m, y: F.leaky_relu((y + m.b) * 2, 0.2),
    "a gain of a buffer": lambda m, y: torch.sigmoid(y * m.shift + m.b),
    "mish, clamp": lambda m, y: F.hardtanh(F.mish(y + m.b) + 0.5, -1, 1) * 2,
    "clamps, gelu": lambda m, y: F.gelu(F.relu6(y + m.b).clamp(max=3) - 1),
    "min, gelu": lambda m, y: F.gelu(torch.min(y + 0.5, torch.tensor(0.0))) * 2,
    "hardswish": lambda m, y: y * F.hardswish(y),
    "the original kept": original_kept,
    "prelu": lambda m, y: F.prelu(y, m.slope) * m.gain + m.b,
    "prelu of one": lambda m, y: F.prelu(F.relu6(y), m.one) + m.gain + m.b,
    "snake": lambda m, y: y + torch.sin(m.gain * y) ** 2 / m.gain,
    "in place": in_place,
    "reshaped": dac,
}
every_tail = pytest.mark.parametrize("name", TAILS)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def compiled(model: Any, kernel: str, **kwargs: Any) -> Any:
    options = {"fused_post.strict": True, "fused_post.kernel": kernel}
    return torch.compile(model, backend=fused_post, options=options, fullgraph=True, **kwargs)


def step(forward: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    """The output, and the gradients of inputs and parameters; None where there is none."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = forward(*leaves)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y, wanted, grad, materialize_grads=True, allow_unused=True)]


def assert_takes_the_program(forward: Any, kernel: str, *inputs: Tensor) -> None:
    (site,) = explain(forward, *inputs).sites
    assert site.kernel == kernel and "; v1 = " in site.equation, site
    assert "the value leaves the graph" in site.reason


@every_kernel
@every_tail
def test_gradients_are_eagers(without_codegen: None, name: str, kernel: str) -> None:
    rank = 1 + list(TAILS).index(name) % 3
    model, x = Model(TAILS[name], rank, bias=name != "hardswish"), torch.randn(2, 4, *(5, 4, 3)[:rank])
    forward = compiled(model, kernel)
    if kernel == "fused" or name != "hardswish":  # a bare convolution is a site for the fused kernel alone
        assert_takes_the_program(forward, kernel, x)
    torch.testing.assert_close(step(forward, model, x), step(model, model, x))


@pytest.mark.parametrize(("name", "kernel"), [("prelu", "epilogue"), ("the original kept", "fused")])
def test_gradients_are_eagers_in_generated_code(name: str, kernel: str) -> None:
    model, x = Model(TAILS[name]), torch.randn(2, 4, 5, 4)
    torch.testing.assert_close(step(compiled(model, kernel), model, x), step(model, model, x))


def added_first(m: Any, y: Tensor, t: Tensor) -> Tensor:
    z = y + t * 2  # which nobody else may write to
    return z * F.hardswish(z)


RESIDUALS: dict[str, Callable[..., Tensor]] = {
    "added": lambda m, y, t: torch.tanh(y) + t,
    "added first": added_first,
    "a mask": lambda m, y, t: F.silu(y + m.b) * t,
    "both ways": lambda m, y, t: torch.maximum(y * t, t - y),
}


@every_kernel
@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals_have_gradients(without_codegen: None, name: str, kernel: str) -> None:
    model, x, t = Model(RESIDUALS[name]), torch.randn(2, 4, 5, 4), torch.randn(2, 6, 10, 8)
    forward = compiled(model, kernel)
    assert_takes_the_program(forward, kernel, x, t)
    torch.testing.assert_close(step(forward, model, x, t), step(model, model, x, t))


@every_device
@every_kernel
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("tail", [lambda m, y, t: F.silu(y + t), lambda m, y, t: F.gelu(y) - t], ids=["first", "last"])
def test_a_residual_that_is_written_to_before_the_backward(
    without_codegen: None, tail: Callable[..., Tensor], learned: bool, kernel: str, device: str
) -> None:
    """Eager keeps neither part of a sum. Behind a gelu AOTAutograd itself would read it again: there none can help."""
    model = Model(tail).to(device)
    x, t = torch.randn(2, 4, 5, 4, device=device), torch.randn(2, 6, 10, 8, device=device)

    def gradients(forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        residual = t.clone().requires_grad_(learned) * 1
        y = forward(x, residual)
        with torch.no_grad():
            residual.add_(3)
        return torch.autograd.grad(y.sum(), list(model.up.parameters()))

    tolerances = {} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-2}  # both take TF32
    torch.testing.assert_close(gradients(compiled(model, kernel)), gradients(model), **tolerances)


def test_what_may_be_written_to_is_not_read_again(without_codegen: None) -> None:
    """But what the graph makes and keeps to itself is."""

    class Two(nn.Module):
        def __init__(self, made: bool) -> None:
            super().__init__()
            self.up, self.made = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), made

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return F.silu(F.gelu(self.up(x)) + (torch.cos(t) if self.made else t.view(t.shape)))

    x, t = torch.randn(2, 4, 5, 4), torch.randn(2, 6, 10, 8)
    (site,) = explain(compiled(Two(made=False), "fused"), x, t).sites
    assert site.kernel == "fused" and "v1" not in site.equation
    assert "what is added to it may be written to before the backward" in site.reason
    assert_takes_the_program(compiled(Two(made=True), "fused"), "fused", x, t)


BOUNDARY = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 6.0, math.nan, -0.0, 0.25])


@pytest.mark.parametrize(
    "tail",
    [
        lambda y: F.leaky_relu(y, 0.5),
        lambda y: F.leaky_relu(y.clamp(-1, 1) * 2, 0.5),
        lambda y: F.leaky_relu(F.relu6(y - 1), 0.5),
        lambda y: F.hardswish(F.relu(y)),
        lambda y: torch.abs(torch.minimum(y, torch.tensor(1.0))),
        lambda y: torch.maximum(y, torch.square(y)),
        lambda y: F.hardsigmoid(y),
    ],
    ids=["leaky_relu", "clamp", "relu6", "relu, hardswish", "minimum, abs", "maximum of two", "hardsigmoid"],
)
def test_on_the_bounds_and_at_nan_the_gradient_is_eagers(without_codegen: None, tail: Any) -> None:
    """Through a convolution by 1, which changes no value."""
    weight = torch.ones(1, 1, 1)

    def function(x: Tensor) -> Tensor:
        return tail(F.conv_transpose1d(x, weight))

    def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    values = torch.cat([BOUNDARY, *(torch.nextafter(BOUNDARY, torch.tensor(to)) for to in (math.inf, -math.inf))])
    expected = torch.cat([gradient(function, value.view(1, 1, 1)) for value in values], 2)
    result = gradient(compiled(function, "fused"), values.view(1, 1, -1))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0, equal_nan=True)


def kept(forward: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """What is kept for the backward beside the result, inputs and parameters."""
    tensors: list[Tensor] = []
    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        y = forward(x)
    own = {t.data_ptr() for t in (x, y, *model.parameters())}
    return [t for t in tensors if t.data_ptr() not in own]


@pytest.mark.parametrize(("name", "value"), [("tanh", False), ("clamps, gelu", True)])
def test_what_is_kept(without_codegen: None, name: str, value: bool) -> None:
    """Of the output's size nothing, or the convolution's result alone. What the fused kernel keeps, a GPU shows."""
    model, x = Model(TAILS[name]), torch.randn(2, 4, 8, 8)
    y = model(x)
    sizes = [t.numel() for t in kept(compiled(model, "epilogue"), model, x)]
    assert sizes.count(y.numel()) == value
    assert sum(sizes) - value * y.numel() <= x.numel() + model.up.weight.numel() + 3 * 6
    assert sum(t.nbytes for t in kept(model, model, x)) >= y.nbytes * (1 - (name == "tanh"))


@pytest.mark.parametrize(
    ("name", "kernel", "sizes"),
    [
        ("tanh", "fused", ["y"]),
        ("tanh", "epilogue", ["y"]),
        ("leaky_relu", "fused", []),
        ("leaky_relu", "epilogue", ["v"]),
        ("clamps, gelu", "fused", []),
        ("clamps, gelu", "epilogue", ["v"]),
        ("prelu", "fused", []),
        ("hardswish", "fused", []),
    ],
)
def test_what_a_gpu_keeps(name: str, kernel: str, sizes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the result's size, y or v, the convolution's value; by the graphs that Inductor gets, launches included."""
    graphs: list[fx.GraphModule] = []

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        kwargs["compiler"] = "inductor"
        graphs.extend(min_cut_rematerialization_partition(joint, *args, **kwargs))
        raise KeyboardInterrupt  # nothing is to run

    compiler = aot_autograd(fw_compiler=lambda gm, _: gm, partition_fn=partition, decompositions=select_decomp_table())
    compiler = functools.partial(lambda compiler, gm, inputs: compiler(gm, inputs), compiler)
    compiler.reset, compiler.config = (lambda: None), {}  # type: ignore[attr-defined]
    monkeypatch.setattr(backend_module.opt, "inductor", lambda mode, options: compiler)
    for module in (conv_transpose, epilogue, epilogue_backward):
        monkeypatch.setattr(module, "runs", lambda kernel, x: True)
    driver = SimpleNamespace(get_current_target=lambda: CHIPS["sm_90"].target)  # enough of one to write a kernel down
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    model, x = Model(TAILS[name]), torch.randn(2, 4, 8, 8, requires_grad=True)
    with pytest.raises(KeyboardInterrupt):
        compiled(model, kernel)(x)
    (results,) = graphs[0].graph.find_nodes(op="output")[0].args
    y, *others = results
    assert y.meta["val"].shape == (2, 6, 16, 16)
    of_its_size = [node for node in others if getattr(node.meta["val"], "shape", ()) == y.meta["val"].shape]
    assert ["y" if _source(node) is _source(y) else "v" for node in of_its_size] == sizes
    assert all(any("triton_kernel" in str(node.target) for node in graph.graph.nodes) for graph in graphs)


def _source(node: fx.Node) -> fx.Node:
    return (
        _source(node.args[0]) if node.target in (torch.ops.aten.alias.default, torch.ops.aten.detach.default) else node
    )


@every_kernel
def test_autocast_is_no_further_from_float64_than_eager(without_codegen: None, kernel: str) -> None:
    for name in ("tanh", "leaky_relu", "prelu", "snake"):
        torch._dynamo.reset()
        model, x = Model(TAILS[name]), torch.randn(2, 4, 16, 16)
        double = copy.deepcopy(model).double()
        exact = step(double, double, x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours, eager = step(compiled(model, kernel), model, x), step(model, model, x)
        for mine, theirs, true in zip(ours, eager, exact, strict=True):
            assert mine.dtype == theirs.dtype
            errors = [(t.double() - true).square().mean().sqrt() for t in (mine, theirs)]
            assert errors[0] <= 2 * errors[1] + TOLERANCE[torch.bfloat16] / 10 * true.square().mean().sqrt()


def test_a_gradient_scaler_steps_as_in_eager(without_codegen: None) -> None:
    x, weights, start = torch.randn(2, 4, 8, 8), [], Model(TAILS["tanh"])
    for compile_it in (True, False):
        model = copy.deepcopy(start)
        forward = compiled(model, "fused") if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*weights, rtol=2e-2, atol=2e-3)


def test_checkpointed(without_codegen: None) -> None:
    """The tail is computed again, and nothing is kept."""
    model, x = Model(TAILS["prelu"]), torch.randn(2, 4, 8, 8)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False).square()

    forward = compiled(checkpointed, "epilogue")
    torch.testing.assert_close(step(forward, model, x), step(checkpointed, model, x))
    assert not [t for t in kept(forward, model, x) if t.numel() >= model(x).numel()]


@pytest.mark.parametrize("frozen", [["up.weight"], ["up.bias", "b"], ["slope", "gain"], ["up.weight", "up.bias", "b"]])
def test_frozen_parameters(without_codegen: None, frozen: list[str]) -> None:
    for name in ("prelu", "tanh"):
        model, x = Model(TAILS[name]), torch.randn(2, 4, 5, 4)
        for parameter in frozen:
            model.get_parameter(parameter).requires_grad_(False)
        torch.testing.assert_close(step(compiled(model, "fused"), model, x), step(model, model, x))


def test_where_the_convolution_learns_nothing_its_program_is_inductors() -> None:
    model, x = Model(TAILS["tanh"]).requires_grad_(False), torch.randn(2, 4, 5, 4)
    model.b.requires_grad_(True)
    (site,) = explain(compiled(model, "fused"), x).sites
    assert ";" not in site.equation


@every_tail
def test_gradients_accumulate(without_codegen: None, name: str) -> None:
    """Two coefficients may have one gradient, and must not share its memory."""
    model = Model(TAILS[name], bias=name != "hardswish")
    twin = copy.deepcopy(model)
    forward = compiled(model, "epilogue")
    for x in torch.randn(3, 2, 4, 5, 4):
        forward(x).square().sum().backward()
        twin(x).square().sum().backward()
    torch.testing.assert_close(*([p.grad for p in m.parameters() if p.grad is not None] for m in (model, twin)))


def test_one_compiled_module_serves_every_mode(without_codegen: None) -> None:
    model, x = Model(TAILS["clamps, gelu"]), torch.randn(2, 4, 5, 4)
    forward = compiled(model, "fused")
    for mode in (model.train, model.eval):
        mode()
        torch.testing.assert_close(step(forward, model, x), step(model, model, x))
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                torch.testing.assert_close(forward(x), model(x))


WRITTEN: dict[str, Callable[..., Tensor]] = {
    "leaky_relu": lambda m, y: F.leaky_relu(y + m.b, 0.2),
    "a view": lambda m, y: F.elu(y).flatten(1),
    "one in place, copied": lambda m, y: F.leaky_relu(y, 0.2, inplace=True).clone(),
    "a copy": lambda m, y: torch.tanh(y) * 1,
}


@every_kernel
@pytest.mark.parametrize("name", WRITTEN)
def test_the_result_may_be_written_to_before_the_backward(without_codegen: None, name: str, kernel: str) -> None:
    """Where eager keeps another tensor than the one that leaves."""
    model, x = Model(WRITTEN[name]), torch.randn(2, 4, 5, 4)

    def written(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: forward(x).mul_(2)

    forward = compiled(model, kernel)
    (site,) = explain(forward, x).sites
    assert site.kernel == kernel and "; v1 = " in site.equation
    torch.testing.assert_close(step(written(forward), model, x), step(written(model), model, x))


@pytest.mark.parametrize("leaves", [False, True])
def test_a_result_that_stays_in_the_graph_is_all_that_is_kept(without_codegen: None, leaves: bool) -> None:
    def tail(m: Any, y: Tensor) -> Tensor:
        y = F.leaky_relu(y, 0.2)
        return y if leaves else F.avg_pool2d(y, 2)

    model, x = Model(tail), torch.randn(2, 4, 5, 4)
    (site,) = explain(compiled(model, "epilogue"), x).sites
    assert ("its result tells the gradient" in site.reason) is not leaves


@every_kernel
@pytest.mark.parametrize("tail", [torch.sin, F.relu6], ids=["program", "bits"])
def test_what_is_detached_in_place_later_has_its_gradient(without_codegen: None, tail: Any, kernel: str) -> None:
    def detached(m: Any, y: Tensor) -> Tensor:
        shift = m.b * 1
        y = y + shift
        shift.detach_()
        return tail(y) + shift

    model, x = Model(detached), torch.randn(2, 4, 5, 4)
    torch.testing.assert_close(step(compiled(model, kernel), model, x), step(model, model, x))


def test_sizes_that_vary(without_codegen: None) -> None:
    model = Model(TAILS["prelu"])
    forward = compiled(model, "fused", dynamic=True)
    for shape in ((2, 4, 5, 4), (3, 4, 7, 6), (1, 4, 9, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(step(forward, model, x), step(model, model, x))


def test_a_second_derivative_is_an_error_in_words(without_codegen: None) -> None:
    model, x = Model(TAILS["tanh"]), torch.randn(1, 4, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(compiled(model, "fused")(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):  # AOTAutograd's own
        first.sum().backward()


@pytest.mark.parametrize("name", ["tanh", "clamps, gelu", "hardswish"])
def test_what_is_not_measured_stays_as_it_was(name: str) -> None:
    model, x = Model(TAILS[name]), torch.randn(2, 4, 5, 4)
    for kernel in ("auto", "inductor"):
        torch._dynamo.reset()
        (site,) = explain(compiled(model, kernel), x).sites
        assert site.kernel in ("inductor", None) and ";" not in site.equation


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [pytest.param(kernel, marks=GPU_MARKS) for kernel in KERNELS])
@pytest.mark.parametrize("name", ["tanh", "leaky_relu", "clamps, gelu", "prelu", "the original kept"])
def test_on_a_gpu(name: str, kernel: str, dtype: torch.dtype, last: bool) -> None:
    """By the rule of Dynamo's own accuracy check; kernels of ours compute all of it, launched without Python."""
    from torch._inductor.utils import run_and_get_code

    memory_format = torch.channels_last if last else torch.contiguous_format
    model = Model(TAILS[name])
    model.up = nn.ConvTranspose2d(32, 6, 3, 2, 1, 1).to(memory_format=memory_format)
    model = model.to("cuda", dtype)
    x = torch.randn(8, 32, 32, 48, device="cuda", dtype=dtype).to(memory_format=memory_format)

    def in_float64(rounded: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            exact.up.weight.copy_(rounded(model.up.weight))
        return step(exact, exact, rounded(x).double())

    forward = compiled(model, kernel)
    assert_takes_the_program(forward, kernel, x)
    torch._dynamo.reset()
    ours, codes = run_and_get_code(step, forward, model, x)
    assert not any("torch.ops.fused_post" in code for code in codes)
    of_results_size = [t for t in kept(forward, model, x) if t.numel() == ours[0].numel()]
    assert len(of_results_size) == (kernel == "epilogue" and name != "tanh")
    eager = step(model, model, x)
    # Where ours takes TF32 and cuDNN, which may too, takes none, its rounding is the measure.
    tf32 = in_float64(round_to_tf32) if dtype == torch.float32 else eager
    for mine, *theirs, true in zip(ours, eager, tf32, in_float64(lambda tensor: tensor), strict=True):
        assert (mine.dtype, mine.shape) == (theirs[0].dtype, theirs[0].shape)
        size = true.square().mean().sqrt()
        error, *allowed = [(t.double() - true).square().mean().sqrt() for t in (mine, *theirs)]
        assert error <= 2 * max(allowed) + TOLERANCE[dtype] / 10 * size

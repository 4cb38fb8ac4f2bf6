"""The operator for training: gradients against float64 autograd, what it keeps, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from fusion_backend.kernels import (
    conv_transpose,
    epilogue,
    epilogue_backward,
    epilogue_backward_turned,
    gate,
    hopper_training,
    problem,
    row_march,
)
from fusion_backend.kernels import conv_transpose_training as kernels
from fusion_backend.kernels.conv_transpose import CONV_TRANSPOSE
from fusion_backend.kernels.hopper import call_of
from tests.kernels.compiling import on_chip, record_launches
from tests.kernels.interpreting import interpreted

GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
PATHS = [
    pytest.param("cpu", False, id="cpu"),
    pytest.param("cuda", False, id="gpu-epilogue", marks=GPU_MARKS),
    pytest.param("cuda", True, id="gpu-fused", marks=GPU_MARKS),
]
every_path = pytest.mark.parametrize(("device", "fused"), PATHS)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU_MARKS)])

# x's shape, C_out, kernel, stride, padding, output_padding, dilation, groups
CONVOLUTIONS = {
    "1d": ((2, 4, 7), 6, 5, 3, 1, 1, 1, 1),
    "2d": ((2, 4, 5, 3), 6, 3, 2, 1, 1, 1, 1),
    "3d": ((1, 4, 2, 3, 4), 2, 2, 2, 0, 0, 1, 1),
    "groups": ((2, 4, 5, 3), 6, 3, 2, 1, 0, 1, 2),
    "depthwise": ((2, 4, 5, 3), 4, 4, 2, 1, 0, 1, 4),
    "dilation": ((2, 4, 5, 3), 3, 3, 2, 2, 1, 2, 1),
    "one of each": ((1, 1, 1), 1, 1, 1, 0, 0, 1, 1),
    "odd rows": ((2, 16, 3, 5), 16, 3, 2, 1, 0, 1, 1),
}
every_convolution = pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def setting(
    convolution: tuple[Any, ...], device: str, dtype: torch.dtype, channels_last: bool = False
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """x, weight, and the operator's further arguments up to groups."""
    shape, C_out, kernel, *sizes, groups = convolution
    generator = torch.Generator().manual_seed(0)
    rank = len(shape) - 2
    x = torch.randn(shape, generator=generator).to(device, dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.randn(shape[1], C_out // groups, *(kernel,) * rank, generator=generator).to(device, dtype)
    return x.requires_grad_(), weight.requires_grad_(), (*([size] for size in sizes), groups)


def coefficients(
    C: int, device: str, dtype: torch.dtype, names: Sequence[str] = ("scale", "shift", "lo", "hi")
) -> dict[str, Tensor]:
    """One value a channel each, with gradients; bounds that are hit often."""
    generator = torch.Generator().manual_seed(C)
    made = {
        "scale": torch.randn(C, generator=generator),
        "shift": torch.randn(C, generator=generator),
        "lo": -torch.rand(C, generator=generator),
        "hi": torch.rand(C, generator=generator),
        "bias": torch.randn(C, generator=generator),
    }
    return {name: made[name].to(device, dtype).requires_grad_() for name in names}


def eager(x: Tensor, weight: Tensor, sizes: tuple[Any, ...], given: dict[str, Tensor | float]) -> Tensor:
    """Closed bounds, by autograd."""
    stride, padding, output_padding, dilation, groups = sizes
    y = CONV_TRANSPOSE[x.dim()](x, weight, given.get("bias"), stride, padding, output_padding, groups, dilation)

    def per_channel(name: str) -> Any:
        value = given[name]
        return value.view(-1, *(1,) * (x.dim() - 2)) if isinstance(value, Tensor) else value

    if "scale" in given:
        y = y * per_channel("scale")
    if "shift" in given:
        y = y + per_channel("shift")
    if "lo" in given:
        y = torch.clamp(y, min=per_channel("lo"))
    return torch.clamp(y, max=per_channel("hi")) if "hi" in given else y


def ours(x: Tensor, weight: Tensor, sizes: tuple[Any, ...], given: dict[str, Tensor | float], **flags: bool) -> Tensor:
    tail = {name: value for name, value in given.items() if name != "bias"}
    arguments = {name if isinstance(value, Tensor) else f"{name}_number": value for name, value in tail.items()}
    flags = {"passes_nan": False, **flags} if "lo" in given or "hi" in given else flags
    y, _ = torch.ops.fused_post.conv_transpose_training(x, weight, given.get("bias"), *sizes, **arguments, **flags)
    return y


LEARNED = [
    {},
    {"shift"},
    {"scale"},
    {"scale", "shift", "lo"},
    {"shift", "hi"},
    {"bias"},
    {"bias", "scale", "hi"},
]


@every_convolution
@pytest.mark.parametrize("learned", LEARNED, ids=lambda names: " ".join(sorted(names)) or "no coefficient")
def test_the_reference_path_passes_gradcheck(convolution: tuple[Any, ...], learned: set[str]) -> None:
    x, weight, sizes = setting(convolution, "cpu", torch.float64)
    given = coefficients(convolution[1], "cpu", torch.float64, sorted(learned))
    names = list(given)

    def function(x: Tensor, weight: Tensor, *values: Tensor) -> Tensor:
        return ours(x, weight, sizes, dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, (x, weight, *given.values()), fast_mode=True)


@every_path
@every_convolution
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_no_further_from_float64_than_eagers(
    convolution: tuple[Any, ...], channels_last: bool, dtype: torch.dtype, device: str, fused: bool
) -> None:
    """The rule of Dynamo's own accuracy check. The bounds are far from most values, so that few gates may differ.

    Without TF32, which cuDNN takes for one convolution and not for the next, so that eager is no measure.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compare_gradients(convolution, channels_last, dtype, device, fused)


def compare_gradients(
    convolution: tuple[Any, ...], channels_last: bool, dtype: torch.dtype, device: str, fused: bool
) -> None:
    for learned in LEARNED:
        x, weight, sizes = setting(convolution, device, dtype, channels_last)
        compute = torch.promote_types(dtype, torch.float32)
        given = coefficients(convolution[1], device, compute, sorted(learned))
        if "bias" in given:
            given["bias"] = given["bias"].detach().to(dtype).requires_grad_()
        given |= {} if given.keys() & {"lo", "hi"} else {"lo": -3.0, "hi": 3.5}
        leaves = [x, weight, *(value for value in given.values() if isinstance(value, Tensor))]
        exact_given = {
            n: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v for n, v in given.items()
        }
        exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
        exact_leaves = [exact_x, exact_weight, *(v for v in exact_given.values() if isinstance(v, Tensor))]
        exact_y = eager(exact_x, exact_weight, sizes, exact_given)
        grad = torch.randn(exact_y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        exact = torch.autograd.grad(exact_y, exact_leaves, grad.double())
        result = torch.autograd.grad(ours(x, weight, sizes, given, fused=fused, allow_tf32=False), leaves, grad)
        peer = torch.autograd.grad(eager(x, weight, sizes, given), leaves, grad.to(compute))
        for name, mine, theirs, true in zip(["x", "weight", *sorted(learned)], result, peer, exact, strict=True):
            errors = [(g.double() - true).square().mean().sqrt().item() for g in (mine, theirs)]
            scale = true.square().mean().sqrt().item()
            assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(dtype).eps * scale, (name, learned)


BOUNDARY = torch.tensor([-1.0, 0.0, 1.0, 6.0, 0.5, -0.0, math.nan, math.inf, -math.inf])
BOUNDARY = torch.cat([BOUNDARY, *(torch.nextafter(BOUNDARY[:4], torch.tensor(to)) for to in (math.inf, -math.inf))])

RULES = {
    "clamp": (lambda x: x.clamp(0, 1), {"lo": 0.0, "hi": 1.0}, (False, False, False)),
    "clamp_min": (lambda x: x.clamp_min(0), {"lo": 0.0}, (False, False, False)),
    "clamp_max": (lambda x: x.clamp_max(1), {"hi": 1.0}, (False, False, False)),
    "relu": (F.relu, {"lo": 0.0}, (True, False, True)),
    "relu6": (F.relu6, {"lo": 0.0, "hi": 6.0}, (True, True, True)),
    "hardtanh": (F.hardtanh, {"lo": -1.0, "hi": 1.0}, (True, True, True)),
}


def one_by_one(function: Any, x: Tensor) -> Tensor:
    """The gradient of one element: where the CPU takes several at a time, hardtanh treats a NaN otherwise."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@every_path
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_bits_are_eagers_on_the_bounds(rule: tuple[Any, ...], device: str, fused: bool) -> None:
    """Through a convolution by 1, which changes no value."""
    function, bounds, (lo_open, hi_open, passes_nan) = rule
    x = BOUNDARY.to(device).view(1, 1, -1)
    expected = torch.stack([one_by_one(function, value) for value in x.flatten()]).view_as(x)
    flags = {"lo_open": lo_open, "hi_open": hi_open, "passes_nan": passes_nan, "fused": fused}
    numbers = {f"{name}_number": bound for name, bound in bounds.items()}
    one = torch.ones(1, 1, 1, device=device)
    y, bits = torch.ops.fused_post.conv_transpose_training(x, one, None, [1], [0], [0], [1], **numbers, **flags)
    assert torch.equal(gate.unpack(bits, x.shape, False), expected.bool())
    torch.testing.assert_close(y, function(x), rtol=0, atol=0, equal_nan=True)


@every_path
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_of_the_outputs_size_is_kept_but_the_bits(channels_last: bool, device: str, fused: bool) -> None:
    x, weight, sizes = setting(CONVOLUTIONS["2d"], device, torch.float32, channels_last)
    given = coefficients(6, device, torch.float32, ["scale", "shift"]) | {"lo": 0.0, "hi": 1.0}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(x, weight, sizes, given, fused=fused)
    assert sorted(t.nbytes for t in kept) == sorted(
        [x.nbytes, weight.nbytes, given["scale"].nbytes, -(-y.numel() // 8)]
    )


@every_device
def test_only_what_is_asked_for_is_computed(device: str) -> None:
    for wanted in itertools.product((False, True), repeat=3):
        if not any(wanted):
            continue
        x, weight, sizes = setting(CONVOLUTIONS["2d"], device, torch.float32)
        given = coefficients(6, device, torch.float32, ["shift"]) | {"lo": 0.0}
        leaves = (x, weight, given["shift"])
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        ours(x, weight, sizes, given).sum().backward()
        assert tuple(leaf.grad is not None for leaf in leaves) == wanted


@every_device
def test_a_learned_scale_of_zero_has_a_gradient(device: str) -> None:
    x, weight, sizes = setting(CONVOLUTIONS["groups"], device, torch.float32)
    scale = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.5, 0.0], device=device, requires_grad=True)
    leaves = (x, weight, scale)
    given = {"scale": scale, "lo": -0.5, "hi": 2.0}
    grads = [torch.autograd.grad(f(x, weight, sizes, given).square().sum(), leaves) for f in (ours, eager)]
    torch.testing.assert_close(*grads)


@every_device
def test_a_second_derivative_is_refused_in_words(device: str) -> None:
    x, weight, sizes = setting(CONVOLUTIONS["2d"], device, torch.float32)
    y = ours(x, weight, sizes, {"lo": 0.0, "hi": 1.0})
    with pytest.raises(RuntimeError, match="no second derivative, and create_graph=True asks for one"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_learned_bound_beside_another_is_refused() -> None:
    x, weight, sizes = setting(CONVOLUTIONS["2d"], "cpu", torch.float32)
    given = coefficients(6, "cpu", torch.float32, ["lo", "hi"])
    with pytest.raises(ValueError, match="lo and hi are both given"):
        ours(x, weight, sizes, given)


@pytest.fixture
def in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of these modules run on CPU tensors, called by the operators as on a GPU."""
    for module, names in (
        (conv_transpose, ["_conv_transpose_kernel"]),
        (epilogue, ["_flat_kernel", "_transpose_kernel"]),
        (epilogue_backward, ["_backward_kernel"]),
        (epilogue_backward_turned, ["_turned_backward_kernel"]),
    ):
        twin = interpreted(module)
        for name in names:
            monkeypatch.setattr(module, name, getattr(twin, name))


ODD_ROWS = {
    "2d": ((2, 16, 5, 3), 24, 3, 2, 1, 0, 1, 1),
    "3d": ((1, 32, 2, 3, 4), 16, 3, 2, 1, 0, 1, 1),
    "dilated": ((2, 20, 3, 6), 16, 2, 1, 0, 0, 3, 1),
    "1d": ((2, 16, 9), 16, 3, 2, 1, 0, 1, 1),
    "few channels": ((2, 17, 5, 3), 8, 3, 2, 1, 0, 1, 1),
    "groups": ((2, 32, 5, 3), 32, 3, 2, 1, 0, 1, 2),
    "12 channels": ((2, 16, 5, 3), 20, 3, 2, 1, 0, 1, 1),
    "whole bytes": ((2, 16, 5, 4), 16, 3, 2, 1, 1, 1, 1),
}


@pytest.mark.usefixtures("in_the_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ODD_ROWS)
def test_the_bits_of_odd_rows_are_written_before_the_result_is_turned(name: str, dtype: torch.dtype) -> None:
    """On whole numbers: the result and every gradient are those of float64. Elsewhere the epilogue writes them."""
    convolution, turned = ODD_ROWS[name], name in ("2d", "3d", "dilated")
    fused = turned or name == "whole bytes"
    x, weight, sizes = setting(convolution, "cpu", torch.float32)
    x, weight = (t.detach().clamp(-2, 2).round().to(dtype).requires_grad_() for t in (x, weight))
    shift = torch.arange(convolution[1]).remainder(5).sub(2).float().requires_grad_()
    of = (x, weight, shift)
    kwargs = {"lo_number": -1.0, "hi_number": 3.0, "passes_nan": False, "fused": True, "channels_last": False}
    with mock.patch.object(torch, "convolution", wraps=torch.convolution) as pytorchs:
        y, bits = torch.ops.fused_post.conv_transpose_training(x, weight, None, *sizes, shift=shift, **kwargs)
    assert pytorchs.called != fused
    assert y.is_contiguous() and bits.shape == ((1,) if turned else ()) + (math.ceil(y.numel() / 8),)
    exact = [t.detach().double().requires_grad_() for t in of]
    z = eager(*exact[:2], sizes, {"shift": exact[2]})
    assert torch.equal(gate.unpack(bits, y.shape, False), (z >= -1) & (z <= 3))
    grad = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = torch.autograd.grad(y, of, grad)
    expected = torch.autograd.grad(z.clamp(-1, 3), exact, grad.double())
    for ours, true in zip((y, *result), (z.clamp(-1, 3), *expected), strict=True):
        assert torch.equal(ours, true.to(ours.dtype))


# As above; whether the result is channels_last, and whether all gradients are asked for.
IN_PARTS = {
    "contiguous": (((8, 16, 3, 4), 16, 3, 2, 1, 1, 1, 1), False, True),
    "channels_last": (((8, 16, 3, 4), 16, 3, 2, 1, 1, 1, 1), True, True),
    "3d, odd rows": (((4, 16, 2, 3, 4), 16, 3, 2, 1, 0, 1, 1), False, True),
    "groups": (((8, 8, 5), 8, 4, 2, 1, 0, 1, 2), False, True),
    "of x alone": (((8, 16, 3, 4), 16, 3, 2, 1, 1, 1, 1), True, False),
}


@pytest.mark.usefixtures("in_the_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_a_large_batch_goes_back_in_parts(name: str, dtype: torch.dtype) -> None:
    """On whole numbers, so that the order of sums is of no account: every gradient is that of float64."""
    convolution, last, everything = IN_PARTS[name]
    x, weight, sizes = setting(convolution, "cpu", torch.float32, last)
    x, weight = (t.detach().clamp(-2, 2).round().to(dtype).requires_grad_(t is x or everything) for t in (x, weight))
    shift = torch.arange(convolution[1]).remainder(5).sub(2).float().requires_grad_(everything)
    of = [each for each in (x, weight, shift) if each.requires_grad]
    kwargs = {"lo_number": -1.0, "hi_number": 3.0, "passes_nan": False, "fused": True, "channels_last": last}
    y, _ = torch.ops.fused_post.conv_transpose_training(x, weight, None, *sizes, shift=shift, **kwargs)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, shift)]
    z = eager(*exact[:2], sizes, {"shift": exact[2]}).clamp(-1, 3)
    grad = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grad = grad.movedim(1, -1).contiguous().movedim(-1, 1) if last else grad
    masked = mock.patch.object(kernels, "epilogue_backward", side_effect=epilogue_backward.epilogue_backward)
    with masked as launches, mock.patch.object(kernels, "LEAST_PART", 1):
        result = torch.autograd.grad(y, of, grad)
    assert [call.args[0].shape[0] for call in launches.call_args_list] == [x.shape[0] // kernels.PARTS] * kernels.PARTS
    expected = torch.autograd.grad(z, [each for each in exact if each.requires_grad], grad.double())
    for ours, true in zip(result, expected, strict=True):
        assert torch.equal(ours, true.to(ours.dtype)) and ours.shape == true.shape
    assert (result[0].movedim(1, -1) if last else result[0]).is_contiguous()


@every_device
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool, device: str) -> None:
    for name in ("1d", "2d", "groups", "odd rows"):
        x, weight, sizes = setting(CONVOLUTIONS[name], device, torch.float32, channels_last)
        values = coefficients(CONVOLUTIONS[name][1], device, torch.float32)
        for kwargs in (
            {"lo_number": 0.0, "lo_open": True},
            {
                "scale": values["scale"],
                "shift": values["shift"],
                "lo_number": 0.0,
                "hi_number": 1.0,
                "passes_nan": False,
            },
            {"shift": values["shift"], "lo": values["lo"]},
            {"shift": values["shift"]},
        ):
            torch.library.opcheck(
                torch.ops.fused_post.conv_transpose_training.default,
                (x, weight, None, *sizes),
                kwargs | {"fused": name == "odd rows"},
            )


@pytest.mark.parametrize("program", ["", "tanh v0", "silu v0"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpu_gets_one_kernel_forward_and_one_backward(channels_last: bool, fused: bool, program: str) -> None:
    """Without the march on Hopper, beside PyTorch's convolutions, at the seed's shape; a contiguous x is turned.

    Bits are read in parts of the batch, which is large there.
    Behind a silu the fused kernel is the backward's, too, and what it writes is turned behind it.
    """

    def step() -> None:
        x, weight = torch.empty(128, 64, 128, 128, device="cuda"), torch.empty(64, 64, 3, 3, device="cuda")
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        bounds = (None, None) if program else (0.0, 0.5)
        coefficients = (None, torch.empty(64, device="cuda"), None, None, 1.0, 0.0, *bounds)
        inputs = (x, weight, None, [2], [1], [1], [1], 1, *coefficients)
        flags = (False, False, bool(program), fused, channels_last, True, None, program, None, None, None)
        y, bits = kernels.conv_transpose_training._init_fn(*inputs, *flags)
        assert bits.numel() == ((0 if fused or "tanh" in program else y.numel()) if program else y.numel() // 8)
        ctx = SimpleNamespace(needs_input_grad=[True, True, False, *[False] * 6, True])
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        kernels._save(ctx, (*inputs, *flags), (y, bits))
        gradients = [gradient for gradient in kernels._backward(ctx, y, None) if gradient is not None]
        assert [gradient.shape for gradient in gradients] == [x.shape, weight.shape, (64,)]

    launches = []

    def recorded(module: Any, run: Any) -> Any:
        return lambda: launches.extend(record_launches(module, run))

    with on_chip("sm_90"), torch.no_grad(), mock.patch.object(problem, "is_hopper", return_value=False):
        for module in (conv_transpose, row_march, epilogue, epilogue_backward, epilogue_backward_turned):
            step = recorded(module, step)
        step()
    names = sorted(launch.kernel.fn.__name__ for launch in launches)
    backward = ["_backward_kernel"] if channels_last else ["_transpose_kernel", "_turned_backward_kernel"]
    if program == "silu v0" and fused:
        backward = ["_row_march_kernel"] if channels_last else ["_row_march_kernel", *["_transpose_kernel"] * 2]
    parts = 1 if program else kernels.PARTS
    expected = ["_row_march_kernel" if fused else "_flat_kernel", *backward * parts]
    # The gradient for a turned x comes channels_last from cuDNN, and from the fake convolution of torch 2.11 alone.
    back = [] if channels_last else ["_transpose_kernel"] * parts
    assert names in (sorted(expected), sorted([*expected, *back]))


@pytest.mark.parametrize("hopper", [False, True], ids=["elsewhere", "on Hopper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_turns_odd_rows_once_on_each_side_and_no_gradient_in_a_pass_of_its_own(
    dtype: torch.dtype, hopper: bool
) -> None:
    """At kb100_3d, whose rows have 63 elements. The backward turns x, and the gradient as it masks it."""
    march = hopper_training.conv_transpose_hopper_training

    def step() -> None:
        x = torch.empty(16, 32, 16, 32, 32, dtype=dtype, device="cuda")
        weight = torch.empty(32, 16, 3, 3, 3, dtype=dtype, device="cuda")
        coefficients = (None, torch.empty(16, device="cuda"), None, None, 1.0, 0.0, 0.0, 0.5)
        inputs = (x, weight, None, [2], [1], [0], [1], 1, *coefficients)
        flags = (False, False, False, True, False, True, None, "", None, None, None)
        y, bits = kernels.conv_transpose_training._init_fn(*inputs, *flags)
        assert (y.shape, bits.shape) == ((16, 16, 31, 63, 63), (1, y.numel() // 8)) and y.is_contiguous()
        ctx = SimpleNamespace(needs_input_grad=[False, True, False, *[False] * 6, True])
        ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
        kernels._save(ctx, (*inputs, *flags), (y, bits))
        assert sum(gradient is not None for gradient in kernels._backward(ctx, y, None)) == 2

    launches = []

    def recorded(module: Any, run: Any) -> Any:
        return lambda: launches.extend(record_launches(module, run))

    modules = (conv_transpose, row_march, epilogue, epilogue_backward, epilogue_backward_turned)
    run = functools.reduce(lambda run, module: recorded(module, run), modules, step)
    with (
        on_chip("sm_90"),
        torch.no_grad(),
        mock.patch.object(problem, "is_hopper", return_value=hopper),
        mock.patch.object(hopper_training, "conv_transpose_hopper_training", side_effect=march) as marched,
    ):
        run()
    names = sorted(launch.kernel.fn.__name__ for launch in launches)
    products = [name for name in names if name in ("_conv_transpose_kernel", "_row_march_kernel")]
    assert len(products) == (not hopper) and marched.call_count == hopper
    turns = ["_transpose_kernel"] * 3  # x and y forward, x again in the backward
    assert [name for name in names if name not in products] == [*turns, "_turned_backward_kernel"]
    if hopper:
        of_x, *_, call = marched.call_args.args
        assert call_of(call).channels_last and of_x.stride(1) == 1


X, W = torch.zeros(2, 4, 5, 3), torch.zeros(4, 6, 3, 3)
MISTAKES = [
    ((X[0], W), {}, ValueError, "x has rank 3|weight has shape"),
    ((X.int(), W), {}, TypeError, "x has dtype torch.int32; allowed are .*torch.float64"),
    ((X, W.half()), {}, TypeError, "weight has dtype torch.float16"),
    ((X, W), {"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\) .*allowed is \[C_out\] = \(6,\)"),
    ((X, W), {"bias": torch.zeros(6).half()}, ValueError, "bias has .*dtype torch.float16"),
    ((X, W), {"shift": torch.zeros(4)}, ValueError, r"shift has shape \(4,\); allowed is \[C\] = \(6,\)"),
    ((X, W), {"scale": torch.zeros(6).double()}, TypeError, "scale has dtype torch.float64"),
    ((X.double(), W.double()), {"scale": torch.zeros(6)}, TypeError, "scale has dtype torch.float32"),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_mistakes_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], error: type, message: str) -> None:
    kwargs = dict(kwargs)
    bias = kwargs.pop("bias", None)
    with pytest.raises(error, match=message):
        kernels.conv_transpose_training(*args, bias, [2], [1], [1], [1], 1, **kwargs)

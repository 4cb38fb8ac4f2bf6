"""The operator for training behind a program: gradients against autograd's, what is kept, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from fusion_backend.kernels.activations import ACTIVATIONS
from fusion_backend.kernels.conv_transpose import CONV_TRANSPOSE
from fusion_backend.kernels.layout import is_channels_last
from tests.kernels.activations import line, parameters_of
from tests.kernels.implementations import GPU_MARKS
from tests.kernels.test_conv_transpose_training import CONVOLUTIONS as SMALL
from tests.kernels.test_conv_transpose_training import coefficients, every_path, setting

OPERATOR = torch.ops.fused_post.conv_transpose_training


def spread(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (x.dim() - 2))


# What each program is in eager, of the value u and of the tensor t; c is its column.
PROGRAMS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "tanh": ("tanh v0", lambda u, t, c: torch.tanh(u)),
    "leaky_relu": ("leaky_relu v0 0.2", lambda u, t, c: F.leaky_relu(u, 0.2)),
    "prelu": ("leaky_relu v0 c0", lambda u, t, c: F.prelu(u, c.to(u.dtype))),
    "gelu, scale": ("gelu v0; affine v1 2.0 - - -", lambda u, t, c: F.gelu(u) * 2),
    "u * hardswish(u)": ("hardswish v0; mul v0 v1", lambda u, t, c: u * F.hardswish(u)),
    "residual": ("add v0 t0", lambda u, t, c: u + t),
    "residual, u * hardswish(u)": ("add v0 t0; hardswish v1; mul v1 v2", lambda u, t, c: (u + t) * F.hardswish(u + t)),
    "mask": ("silu v0; mul t0 v1", lambda u, t, c: t * F.silu(u)),
    "the original kept": (
        "detach v0; affine v0 - c0 - -; add v2 v1; mul v3 v1; add v4 v1",
        lambda u, t, c: (u + spread(c, u) + u.detach()) * u.detach() + u.detach(),
    ),
    "bounds": (
        "clamp v0 -0.5 1.0; mish v1; hardtanh v2 -0.2 -; minmax v3 - c0",
        lambda u, t, c: torch.minimum(F.hardtanh(F.mish(u.clamp(-0.5, 1)), -0.2, math.inf), spread(c, u)),
    ),
    "all that two values do": (
        "sigmoid v0; sub v0 v1; minimum v2 v0; maximum v3 v1; exp v1; div v4 v5",
        lambda u, t, c: torch.maximum(torch.minimum(u - u.sigmoid(), u), u.sigmoid()) / u.sigmoid().exp(),
    ),
    "snake": (
        "affine v0 c0 - - -; sin v1; square v2; affine v3 2.0 - - -; add v0 v4",
        lambda u, t, c: u + torch.sin(u * spread(c, u)) ** 2 * 2,
    ),
}
# A gate that falls the other way is an error of its own: it takes many elements for the rates to be compared.
CONVOLUTIONS = SMALL | {"many": ((4, 4, 16, 16), 6, 3, 2, 1, 1, 1, 1)}
every_program = pytest.mark.parametrize("name", PROGRAMS)
TOLD = ("tanh", "leaky_relu")  # by their results


def inputs(
    name: str, convolution: str, device: str, dtype: torch.dtype, last: bool, given: tuple[str, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...], dict[str, Any]]:
    """x and weight, the sizes, and what the operator takes by name; all that may learn does."""
    x, weight, sizes = setting(CONVOLUTIONS[convolution], device, dtype, last)
    text, _ = PROGRAMS[name]
    C = CONVOLUTIONS[convolution][1]
    compute = torch.promote_types(dtype, torch.float32)
    kwargs: dict[str, Any] = {"program": text, **coefficients(C, device, compute, given)}
    generator = torch.Generator().manual_seed(1)
    if " c0" in text:
        kwargs["vectors"] = (0.25 + torch.rand(C, 1, generator=generator)).to(device, compute)
        kwargs["vectors"].requires_grad_("minmax" not in text)
    if " t0" in text:
        y = CONV_TRANSPOSE[x.dim()](x, weight, None, *sizes[:3], sizes[4], sizes[3]).detach()
        kwargs["tensor_0"] = torch.randn(y.shape, generator=generator).to(y)
        if last:
            kwargs["tensor_0"] = kwargs["tensor_0"].movedim(1, -1).contiguous().movedim(-1, 1)
        kwargs["tensor_0"].requires_grad_()
    return (x, weight), sizes, kwargs


def eager(name: str, x: Tensor, weight: Tensor, sizes: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    stride, padding, output_padding, dilation, groups = sizes
    u = CONV_TRANSPOSE[x.dim()](x, weight, None, stride, padding, output_padding, groups, dilation)
    u = u * (spread(kwargs["scale"], u) if "scale" in kwargs else kwargs.get("scale_number", 1.0))
    u = u + spread(kwargs["shift"], u) if "shift" in kwargs else u
    column = kwargs["vectors"][:, 0] if "vectors" in kwargs else u.new_ones(u.shape[1])
    return PROGRAMS[name][1](u, kwargs.get("tensor_0", u), column)


def ours(x: Tensor, weight: Tensor, sizes: tuple[Any, ...], kwargs: dict[str, Any], **flags: bool) -> Tensor:
    return OPERATOR(x, weight, None, *sizes, **kwargs, **flags)[0]


def leaves(x: Tensor, weight: Tensor, kwargs: dict[str, Any]) -> list[Tensor]:
    return [x, weight, *(v for v in kwargs.values() if isinstance(v, Tensor) and v.requires_grad)]


@every_program
@pytest.mark.parametrize("given", [(), ("scale", "shift")], ids=" ".join)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_in_float64_are_autograds(name: str, given: tuple[str, ...], last: bool) -> None:
    for convolution in ("3d", "groups"):
        (x, weight), sizes, kwargs = inputs(name, convolution, "cpu", torch.float64, last, given)
        kwargs |= {} if "scale" in given else {"scale_number": -1.5}
        results = [f(x, weight, sizes, kwargs) for f in (ours, lambda *a: eager(name, *a))]
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9, check_stride=False)  # eager's 1/6 is a float
        grad = torch.randn(results[0].shape, dtype=torch.float64)
        of = leaves(x, weight, kwargs)
        gradients = [torch.autograd.grad(y, of, grad) for y in results]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9, check_stride=False)


@every_path
@every_program
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_exact_as_eagers(name: str, dtype: torch.dtype, device: str, fused: bool) -> None:
    """By the rule of Dynamo's own accuracy check."""
    for last in (False, True):
        (x, weight), sizes, kwargs = inputs(name, "many", device, dtype, last, ("shift",))
        y = ours(x, weight, sizes, kwargs, fused=fused, channels_last=last, allow_tf32=False)
        assert is_channels_last(y) is last
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        tensors = {name: each for name, each in kwargs.items() if isinstance(each, Tensor)}
        doubles = {name: each.detach().double().requires_grad_(each.requires_grad) for name, each in tensors.items()}
        exact_of = [each.detach().double().requires_grad_() for each in (x, weight)]
        exact = torch.autograd.grad(eager(name, *exact_of, sizes, doubles), leaves(*exact_of, doubles), grad.double())
        of = leaves(x, weight, kwargs)
        rounded = {name: each.to(dtype) for name, each in tensors.items()}
        theirs = torch.autograd.grad(eager(name, x, weight, sizes, rounded), of, grad)
        mine = torch.autograd.grad(y, of, grad)
        for result, peer, true, leaf in zip(mine, theirs, exact, of, strict=True):
            assert result.dtype == leaf.dtype and result.shape == leaf.shape
            errors = [(g.double() - true).square().mean().sqrt().item() for g in (result, peer)]
            size = true.square().mean().sqrt().item()
            assert errors[0] <= 2 * errors[1] + 0.2 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("fused", [False, True])
@every_program
def test_what_is_kept(name: str, fused: bool) -> None:
    """Nothing but the convolution's value, and that not where the fused kernel or the result tells."""
    (x, weight), sizes, kwargs = inputs(name, "2d", "cpu", torch.float32, False, ("shift",))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(x, weight, sizes, kwargs, fused=fused)
    own = {t.data_ptr() for t in (x, weight, y, *(v for v in kwargs.values() if isinstance(v, Tensor)))}
    new = [t for t in kept if t.data_ptr() not in own]
    assert [t.shape for t in new] == ([] if fused or name in (*TOLD, "residual") else [y.shape])
    assert any(t.data_ptr() == y.data_ptr() for t in kept) == (name in TOLD)
    residual = kwargs.get("tensor_0")
    assert residual is None or any(t is residual for t in kept) == (name != "residual")


def test_what_is_kept_is_not_more_where_a_mask_learns_nothing() -> None:
    (x, weight), sizes, kwargs = inputs("mask", "2d", "cpu", torch.float32, False, ())
    text = {"program": "mul v0 t0"}
    for learns in (False, True):
        kept: list[Tensor] = []
        kwargs["tensor_0"].requires_grad_(learns)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = ours(x, weight, sizes, kwargs | text)
        assert len([t for t in kept if t.shape == y.shape]) == 1 + learns


@every_path
@pytest.mark.parametrize("name", [*TOLD, "gelu, scale", "residual, u * hardswish(u)"])
def test_the_same_bits_on_every_run(name: str, device: str, fused: bool) -> None:
    (x, weight), sizes, kwargs = inputs(name, "2d", device, torch.float32, True, ("shift",))
    of = leaves(x, weight, kwargs)[2:]  # the convolution's own gradients are PyTorch's
    runs = [torch.autograd.grad(ours(x, weight, sizes, kwargs, fused=fused).square().sum(), of) for _ in range(4)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


def test_only_the_columns_that_are_named_learn() -> None:
    (x, weight), sizes, _ = inputs("tanh", "2d", "cpu", torch.float64, False, ())
    vectors = torch.rand(6, 3, dtype=torch.float64).requires_grad_()
    text = "silu v0; affine v1 c0 c1 - -; leaky_relu v2 c2; affine v3 c1 - - -"
    y = torch.ops.aten.convolution(x, weight, None, *(sizes[i] for i in (0, 1, 3)), True, sizes[2], sizes[4])
    a, b, slope = (spread(column, y) for column in vectors.unbind(1))
    z = F.silu(y) * a + b
    expected = torch.where(z > 0, z, z * slope) * b
    grad = torch.randn_like(y)
    (all_of_them,) = torch.autograd.grad(expected, vectors, grad)
    for learned in (None, [0, 1, 2], [1], [2, 0]):
        mine = OPERATOR(x, weight, None, *sizes, program=text, vectors=vectors, learned=learned)[0]
        (result,) = torch.autograd.grad(mine, vectors, grad)
        named = torch.tensor([learned is None or column in learned for column in range(3)])
        torch.testing.assert_close(result, torch.where(named, all_of_them, 0.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clamp v0 c0 -", "c0 of clamp has no gradient; allowed are those of affine and leaky_relu"),
        ("elu v0 c0 1.0 1.0", "c0 of elu has no gradient"),
    ],
)
def test_columns_that_cannot_learn(text: str, message: str) -> None:
    (x, weight), sizes, _ = inputs("tanh", "2d", "cpu", torch.float32, False, ())
    kwargs = {"program": text, "vectors": torch.ones(6, 1).requires_grad_()}
    with pytest.raises(ValueError, match=message):
        ours(x, weight, sizes, kwargs)
    assert ours(x, weight, sizes, kwargs | {"learned": []}).requires_grad


def test_only_what_is_asked_for_is_computed() -> None:
    for wanted in range(1, 16):
        (x, weight), sizes, kwargs = inputs("mask", "2d", "cpu", torch.float32, False, ("shift",))
        of = leaves(x, weight, kwargs)
        for bit, leaf in enumerate(of):
            leaf.requires_grad_(bool(wanted >> bit & 1))
        ours(x, weight, sizes, kwargs).sum().backward()
        assert [leaf.grad is not None for leaf in of] == [bool(wanted >> bit & 1) for bit in range(4)]


def test_behind_nothing_but_a_detach_the_gradient_is_zero() -> None:
    (x, weight), sizes, kwargs = inputs("tanh", "2d", "cpu", torch.float32, False, ("shift",))
    y = ours(x, weight, sizes, kwargs | {"program": "detach v0; tanh v1"})
    for gradient in torch.autograd.grad(y.sum(), leaves(x, weight, kwargs)):
        assert not gradient.any()


def test_a_second_derivative_is_refused_in_words() -> None:
    (x, weight), sizes, kwargs = inputs("gelu, scale", "2d", "cpu", torch.float32, False, ())
    y = ours(x, weight, sizes, kwargs)
    with pytest.raises(RuntimeError, match="no second derivative, and create_graph=True asks for one"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize(("device", "fused"), [("cpu", False), pytest.param("cuda", True, marks=GPU_MARKS)])
@pytest.mark.parametrize("name", ["tanh", "mask"])
def test_opcheck(name: str, device: str, fused: bool) -> None:
    (x, weight), sizes, kwargs = inputs(name, "2d", device, torch.float32, False, ("scale", "shift"))
    torch.library.opcheck(OPERATOR.default, (x, weight, None, *sizes), kwargs | {"fused": fused})


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"program": "tanh v0", "lo_number": 0.0}, ValueError, "allowed are bounds inside the program"),
        ({"program": "swoosh v0"}, ValueError, "allowed are abs"),
        (
            {"program": "affine v0 2.0 - 0.0 -"},
            ValueError,
            "with bounds .* has no gradient; allowed are clamp, hardtanh",
        ),
        ({"program": "add v0 t0"}, ValueError, "given are"),
        ({"program": "add v0 t0", "tensor_0": torch.zeros(2, 6, 3, 3)}, ValueError, "allowed is what the result is"),
    ],
)
def test_mistakes_are_named(kwargs: dict[str, Any], error: type, message: str) -> None:
    (x, weight), sizes, _ = inputs("tanh", "2d", "cpu", torch.float32, False, ())
    with pytest.raises(error, match=message):
        ours(x, weight, sizes, kwargs)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_its_gradient(name: str) -> None:
    for parameters in parameters_of(name):
        (x, weight), sizes, kwargs = inputs("tanh", "2d", "cpu", torch.float64, False, ("shift",))
        kwargs["program"] = line(name, parameters)
        y = ours(x, weight, sizes, kwargs)
        of = leaves(x, weight, kwargs)
        u = CONV_TRANSPOSE[4](x, weight, None, *sizes[:3], sizes[4], sizes[3])
        expected = ACTIVATIONS[name].meaning(u + spread(kwargs["shift"], u), *parameters)
        known = expected.isfinite() & y.isfinite()
        grad = torch.where(known, torch.randn_like(y), 0.0)
        if not known.all():  # sqrt and log1p of less than nothing
            continue
        gradients = [torch.autograd.grad(each, of, grad) for each in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)

"""Every row of the table: its derivative against autograd, and its Triton form against its meaning."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fusion_backend.kernels import epilogue, epilogue_backward
from fusion_backend.kernels.activations import ACTIVATIONS
from fusion_backend.kernels.epilogue_backward import Back
from fusion_backend.kernels.program import Program
from tests.kernels.activations import line, parameters_of
from tests.kernels.implementations import every
from tests.kernels.interpreting import interpreted

# NumPy, which interprets, speaks of every overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

every_activation = pytest.mark.parametrize("name", ACTIVATIONS)

EAGER: dict[str, Any] = {
    "elu": lambda x, alpha, scale, input_scale: torch.ops.aten.elu(x, alpha, scale, input_scale),
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "softsign": F.softsign,
}

BACKWARD = interpreted(epilogue_backward)

# Also -0.0, what underflows, both sides of each threshold, and where exp overflows.
SPECIAL = (
    0.0, -0.0, 1e-30, -1e-30, 1e-8, -1e-8, 1e-4, -1e-4, 0.1, -0.1, 0.24, 0.26, 0.29, 0.31, -0.29, -0.31, 0.49, -0.49,
    0.51, -0.51, 0.62, -0.62, 0.63, -0.63, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0, 9.0, -9.0, 19.9, 20.1, -20.0, 50.0, -50.0,
    100.0, -100.0, 1e10, -1e10, math.inf, -math.inf, math.nan, 0.2, 0.3, 0.4, 0.7,
)  # fmt: skip


def values() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.tensor(SPECIAL), 3 * torch.randn(160), torch.linspace(-8, 8, 112)]).view(1, 4, 80)


def test_every_parameter_is_tested() -> None:
    for name, activation in ACTIVATIONS.items():
        assert all(len(each) == len(activation.parameters) for each in parameters_of(name)), name


@every_activation
def test_the_meaning_is_eagers(name: str) -> None:
    eager = EAGER.get(name, ACTIVATIONS[name].meaning)
    for dtype in (torch.float32, torch.float64):
        for parameters in parameters_of(name):
            x = values().to(dtype)
            torch.testing.assert_close(
                ACTIVATIONS[name].meaning(x, *parameters), eager(x, *parameters), equal_nan=True, rtol=1e-5, atol=1e-7
            )


def slope(name: str, x: torch.Tensor, parameters: tuple[float, ...]) -> torch.Tensor:
    """Eager's, one by one: where the CPU takes several at a time, it treats a NaN otherwise."""
    eager = EAGER.get(name, ACTIVATIONS[name].meaning)
    leaves = [each.detach().requires_grad_() for each in x.flatten()]
    return torch.stack(torch.autograd.grad([eager(each, *parameters) for each in leaves], leaves)).view_as(x)


@every_activation
def test_the_derivative_is_autograds(name: str) -> None:
    """At NaN too; where eager's is itself NaN at a number, what is there does not count."""
    for parameters in parameters_of(name):
        x = values().double().flatten()
        x = x[(x.abs() < 1e4) | x.isnan()]
        expected = slope(name, x, parameters)
        derivative = ACTIVATIONS[name].derivative(x, *parameters)
        torch.testing.assert_close(derivative, expected, equal_nan=True, rtol=1e-7, atol=1e-9)  # eager's 1/6 is a float


@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.of_result])
def test_a_result_that_tells_the_derivative_tells_it(name: str) -> None:
    row = ACTIVATIONS[name]
    assert row.of_result is not None
    for parameters in parameters_of(name):
        x = values().double().flatten()
        x = x[(x.abs() < 30) & ~row.derivative(x, *parameters).isnan()]
        told = row.of_result(row.meaning(x, *parameters), *parameters)
        right = torch.isclose(told, row.derivative(x, *parameters), rtol=1e-6, atol=1e-6)
        assert right.all() or not row.tells(*parameters)
    assert any(row.tells(*parameters) for parameters in parameters_of(name))


def test_parameters_for_which_a_result_does_not_tell() -> None:
    assert not ACTIVATIONS["leaky_relu"].tells(0.0) and not ACTIVATIONS["leaky_relu"].tells(-0.1)
    assert not ACTIVATIONS["elu"].tells(-1.0, 1.0, 1.0) and not ACTIVATIONS["softplus"].tells(1.0, 5.0)


def back_in_interpreter(grad: torch.Tensor, value: torch.Tensor, program: str) -> torch.Tensor:
    return BACKWARD._backward(grad, None, None, 1.0, False, False, False, None, Back(program, value))[0]


def back_on_gpu(grad: torch.Tensor, value: torch.Tensor, program: str) -> torch.Tensor:
    rest = {"program": program, "value": value.cuda()}
    return torch.ops.fused_post.epilogue_backward(grad.cuda(), None, None, 1.0, False, False, False, **rest)[0].cpu()


@every(interpreter=back_in_interpreter, gpu=back_on_gpu)
@every_activation
def test_the_kernels_derivative_has_the_accuracy_of_eager(name: str, run: Any) -> None:
    """Element by element, at x and, where that tells it, at y; corners and NaN are eager's."""
    row = ACTIVATIONS[name]
    for parameters in parameters_of(name):
        x, words = values(), "".join(f" {p}" for p in parameters)
        exact, eager = (slope(name, each, parameters).double() for each in (x.double(), x))
        moderate = x.abs() < 1e4
        backs = [(x, f"{name}_backward t0 v0{words}", moderate | x.isnan())]
        if row.of_result is not None and row.tells(*parameters):
            backs.append((row.meaning(x, *parameters), f"{name}_backward_of_result t0 v0{words}", moderate))
        for value, program, known in backs:
            slopes = run(torch.ones_like(x), value, program).double()
            expected = exact.float().double()  # which may overflow
            torch.testing.assert_close(slopes[known], expected[known], equal_nan=True, rtol=5e-5, atol=5e-6)
            known = known & expected.isfinite()
            units = exact.abs().clamp(min=1)
            ours, theirs = (((each - exact) / units)[known].square().mean().sqrt() for each in (slopes, eager))
            assert ours <= 2 * theirs + 1e-6


@every(interpreter=back_in_interpreter, gpu=back_on_gpu)
def test_a_gradient_that_is_not_finite_ends_where_eagers_does(run: Any) -> None:
    x = torch.tensor([-4.0, -3.0, 0.5, 3.0, 4.0]).view(1, 1, 5)
    for name in ("hardsigmoid", "hardswish"):
        for g in (math.inf, math.nan):
            grad = torch.full_like(x, g)
            leaf = x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(ACTIVATIONS[name].meaning(leaf), leaf, grad)
            result = run(grad, x, f"{name}_backward t0 v0")
            torch.testing.assert_close(result, expected, equal_nan=True)


def in_interpreter(x: torch.Tensor, program: str, vectors: torch.Tensor | None = None) -> torch.Tensor:
    return interpreted(epilogue)._out_of_place(x, (None,) * 4, (1.0, 0.0, None, None), None, Program(program, vectors))


def on_gpu(x: torch.Tensor, program: str, vectors: torch.Tensor | None = None) -> torch.Tensor:
    vectors = None if vectors is None else vectors.cuda()
    return torch.ops.fused_post.epilogue(x.cuda(), program=program, vectors=vectors).cpu()


@every(interpreter=in_interpreter, gpu=on_gpu)
@every_activation
def test_the_kernels_form_has_the_accuracy_of_eager(name: str, run: Any) -> None:
    """Element by element, NaN and infinities included; the fast exp is off by |x| times a rounding."""
    for parameters in parameters_of(name):
        x = values()
        y = run(x, line(name, parameters))
        exact = ACTIVATIONS[name].meaning(x.double(), *parameters)
        torch.testing.assert_close(y, exact.float(), equal_nan=True, rtol=2e-5, atol=1e-6)
        eager = ACTIVATIONS[name].meaning(x, *parameters)
        finite = exact.isfinite() & eager.isfinite() & (x.abs() < 1e4)
        # In units of the value where that is above one, lest the largest exp be all that counts.
        units = exact.abs().clamp(min=1)
        ours, theirs = (((each.double() - exact) / units)[finite].square().mean().sqrt() for each in (y, eager))
        assert ours <= 2 * theirs + 1e-6


@every(interpreter=in_interpreter, gpu=on_gpu)
@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.parameters])
def test_a_parameter_may_differ_by_channel(name: str, run: Any) -> None:
    x = values()
    rows = [(parameters_of(name) * 4)[channel] for channel in range(4)]
    vectors = torch.tensor(rows)
    words = " ".join(f"c{column}" for column in range(vectors.shape[1]))
    y = run(x, f"{name} v0 {words}", vectors)
    for channel, parameters in enumerate(rows):
        expected = ACTIVATIONS[name].meaning(x[:, channel].double(), *parameters).float()
        torch.testing.assert_close(y[:, channel], expected, equal_nan=True, rtol=2e-5, atol=1e-6)
    half = run(x.bfloat16(), f"{name} v0 {words}", vectors)
    expected = ACTIVATIONS[name].meaning(x.bfloat16().float(), *(v.view(-1, 1) for v in vectors.unbind(1))).bfloat16()
    torch.testing.assert_close(half, expected, equal_nan=True)

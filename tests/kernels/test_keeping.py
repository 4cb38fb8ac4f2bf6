"""A value of a program that is stored beside the result. One body for interpreter, operator and GPU."""

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose, hopper_strips, row_march
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.conv_transpose import reference
from fusion_backend.kernels.hopper import Call
from fusion_backend.kernels.hopper_keeping import conv_transpose_hopper_keeping
from fusion_backend.kernels.plans import Plan, plans_for
from fusion_backend.kernels.problem import Problem, problem_for
from fusion_backend.kernels.program import Program, reference_values
from fusion_backend.kernels.strips import Config, march_for
from tests.kernels.convolutions import PUBLIC, Conv, coefficients, tf32
from tests.kernels.implementations import GPU_MARKS, every, split
from tests.kernels.interpreting import interpreted
from tests.kernels.layouts import is_laid_out, laid_out
from tests.kernels.test_program import program_for

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Programs, and which value is kept.
KEEPING = {
    "HiFi-GAN": ("leaky_relu v0 0.1", 0),
    "snake, its sine": ("affine v0 c0 - - -; sin v1; square v2; affine v3 c1 - - -; add v0 v4", 2),
    "in front of the last": ("silu v0; affine v1 - c1 c0 c2; tanh v2", 2),
    "a residual": ("add v0 t0; hardswish v1; mul v1 v2", 1),
    "a value that the result does not read": ("sigmoid v0; leaky_relu v0 c0", 1),
}

Both = tuple[torch.Tensor, torch.Tensor]
Kernel = Callable[..., Both]
TWIN, MARCH_TWIN = (interpreted(module) for module in (conv_transpose, row_march))


def sizes_of(conv: Conv) -> tuple[Any, ...]:
    return (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups)


def by_operator(
    x: torch.Tensor, weight: torch.Tensor, conv: Conv, values: Any, program: Program, last: bool, plan: Any = None
) -> Both:
    tensors, numbers = split(values)
    steps = (program.text, program.vectors, *program.tensors)
    return torch.ops.fused_post.conv_transpose_keeping(
        x, weight, *sizes_of(conv), *tensors, *numbers, last, True, plan, *steps, kept=program.kept
    )


def general_in_interpreter(
    x: torch.Tensor, weight: torch.Tensor, conv: Conv, values: Any, program: Program, last: bool
) -> Both:
    return TWIN.run(x, weight, *sizes_of(conv), *split(values), last, True, None, None, program)


def march_in_interpreter(
    x: torch.Tensor, weight: torch.Tensor, conv: Conv, values: Any, program: Program, last: bool
) -> Both:
    out, kept = (laid_out(torch.full(conv.y, math.nan, dtype=x.dtype), last) for _ in range(2))
    problem = problem_for(x, weight, conv.axes, conv.groups, last, True, compiled=False)
    march = march_for(problem, x.shape, Config(64, 16, 4, 2))
    packed = MARCH_TWIN.pack(weight, problem, march.config)
    with mock.patch.object(row_march, "wrap_triton", lambda kernel: kernel):
        given = coefficients_for(out, *split(values))
        MARCH_TWIN.launch(out, x, packed, problem, march, given, program=program, kept=kept)
    return out, kept


def check(run: Kernel, conv: Conv, name: str, dtype: torch.dtype, last: bool, device: str = "cpu") -> None:
    """Both against float64, from inputs that are rounded to TF32 where the kernel does that."""
    x, weight = conv.tensors(dtype, device, last)
    weight = weight / math.sqrt(conv.x[1] * math.prod(weight.shape[2:]))
    scale, shift, *_ = coefficients(conv.C_out, device)
    text, kept = KEEPING[name]
    given = program_for(text, conv.y, x, last)
    program = Program(given.text, given.vectors, given.tensors, kept)
    found = run(x, weight, conv, (scale, shift), program, last)
    exact = (
        tf32(x, weight, conv) if device == "cuda" else reference(x.double(), weight.double(), conv.axes, conv.groups)
    )
    spread = (-1, *(1,) * conv.rank)
    z = exact * scale.double().view(spread) + shift.double().view(spread)
    values = reference_values(z, program)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for tensor, expected in zip(found, (values[-1], values[kept]), strict=True):
        assert (tensor.shape, tensor.dtype) == (conv.y, dtype) and is_laid_out(tensor, last)
        torch.testing.assert_close(tensor, expected.to(dtype), **tolerance, check_stride=False)
    assert found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()


SMALL = {
    1: Conv((2, 5, 7), 6, (4,), (2,), (1,)),
    2: Conv((1, 17, 4, 5), 6, (3,), (2,), (1,), (1,)),
    3: Conv((1, 3, 2, 3, 4), 6, (2,), (2,)),
}
VARIANTS = list(itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)))


@every(operator=by_operator, interpreter=general_in_interpreter)
@pytest.mark.parametrize("rank", SMALL)
@pytest.mark.parametrize("name", KEEPING)
def test_the_general_kernel(run: Kernel, name: str, rank: int) -> None:
    for i in (0, 3):  # each dtype, each layout
        dtype, last = VARIANTS[(list(KEEPING).index(name) + 2 * rank + i) % len(VARIANTS)]
        check(run, SMALL[rank], name, dtype, last)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_phases_that_are_shared_joined_or_stored_one_by_one(last: bool) -> None:
    for conv in (
        Conv((1, 4, 3), 6, (16,), (8,), (4,)),
        Conv((1, 4, 5), 6, (5,), (3,), (1,)),
        Conv((1, 4, 3, 2), 5, (4, 2), (4, 2)),
        Conv((1, 4, 1, 1), 5, (3,), (2,), (1,)),
    ):
        check(general_in_interpreter, conv, "HiFi-GAN", torch.float32, last)


def test_groups_and_channels_one_by_one() -> None:
    for groups, C_out in ((2, 34), (4, 4)):
        conv = Conv((1, 4 * groups if groups == 2 else 4, 5), C_out, (3,), (2,), (1,), groups=groups)
        check(general_in_interpreter, conv, "snake, its sine", torch.float32, groups == 2)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", KEEPING)
def test_the_march(name: str, rank: int) -> None:
    dtype, last = VARIANTS[(list(KEEPING).index(name) + rank) % len(VARIANTS)]
    conv = Conv((1, 17, 3, 4, 5)[: rank + 2], 20, (3,), (2,), (1,), (1,))
    check(march_in_interpreter, conv, name, dtype, last)


@every(operator=by_operator, interpreter=general_in_interpreter)
def test_what_is_kept_is_rounded_once_and_the_result_goes_on_from_what_is_not(run: Kernel) -> None:
    conv = SMALL[2]
    x, weight = conv.tensors(torch.bfloat16, "cpu")
    program = Program("affine v0 1000.0 - - -; sin v1", kept=0)
    y, kept = run(x, weight, conv, (), program, False)
    z = reference(x.float(), weight.float(), conv.axes)
    torch.testing.assert_close(kept, z.bfloat16())
    assert not torch.allclose(y, reference_values(kept.float(), program)[-1].bfloat16(), atol=0.1)
    torch.testing.assert_close(y, reference_values(z, program)[-1].bfloat16(), atol=2e-2, rtol=0)


@pytest.mark.parametrize("kept", [-1, 1, 2])
def test_what_cannot_be_kept(kept: int) -> None:
    x, weight = SMALL[1].tensors(torch.float32, "cpu")
    message = rf"kept is {kept}; allowed for program 'tanh v0' are values in front of the result, from 0 to 0"
    with pytest.raises(ValueError, match=message):
        by_operator(x, weight, SMALL[1], (), Program("tanh v0", kept=kept), False)


@pytest.mark.parametrize("name", ["HiFi-GAN", "snake, its sine", "a residual"])
def test_the_operator_passes_torchs_own_checks(name: str) -> None:
    conv, (text, kept) = SMALL[2], KEEPING[name]
    x, weight = conv.tensors(torch.float32, "cpu")
    program = program_for(text, conv.y, x)
    options = {"program": text, "vectors": program.vectors, "tensor_0": program.tensors[0], "kept": kept}
    operator = torch.ops.fused_post.conv_transpose_keeping.default
    torch.library.opcheck(operator, (x, weight, [2], [1], [1], [1]), options)


def test_the_operator_for_hopper_passes_torchs_own_checks_and_does_without_one() -> None:
    conv = SMALL[2]
    x, weight = conv.tensors(torch.float32, "cpu")
    axes = tuple(tuple(int(getattr(axis, name)) for axis in conv.axes) for name in conv_transpose.AXIS)
    numbers = (1.0, 0.0, None, 0.5)
    call = Call(axes, numbers, True, True, "product 128x64", "tanh v0", kept=0)
    given = (x, weight, weight, None, torch.randn(6), None, None, None)
    torch.library.opcheck(conv_transpose_hopper_keeping, (*given, call.text))
    found = conv_transpose_hopper_keeping(*given, call.text)
    values = (given[3], given[4], None, 0.5)
    expected = by_operator(x, weight, conv, values, Program("tanh v0", kept=0), True)
    for ours, true in zip(found, expected, strict=True):
        assert is_laid_out(ours, True) and torch.equal(ours, true)


def test_kernels_that_store_one_tensor_are_no_plans_for_it() -> None:
    def problem(conv: Conv, last: bool, kept: bool) -> Problem:
        x, weight, _ = conv.fakes(torch.float32, last, last)
        given = problem_for(x, weight, conv.axes, 1, last, True)
        return Problem(**{**vars(given), "hopper": True, "shared_limit": 227 * 1024, "kept": kept})

    def kinds(conv: Conv, last: bool, kept: bool) -> set[tuple[bool, bool, bool]]:
        return {(plan.is_hopper, plan.is_product, plan.back) for plan in plans_for(problem(conv, last, kept))}

    with torch._subclasses.FakeTensorMode():
        for name in ("seed", "hifigan_up1"):
            both = [kinds(PUBLIC[name], last, False) for last in (False, True)]
            assert any(True in kind for each in both for kind in each)
            kept = {*kinds(PUBLIC[name], False, True), *kinds(PUBLIC[name], True, True)}
            assert kept == {(False, False, False), (True, True, False)}
        given = problem(PUBLIC["seed"], True, True)
    assert hopper_strips.why_not(given) == "a value is kept"


WIDE = Conv((2, 32, 17, 24), 40, (3,), (2,), (1,), (1,))
LONG = Conv((2, 64, 37), 48, (16,), (8,), (4,))


def fits(plan: Plan, march: bool) -> bool:
    return plan.is_march == march and not plan.is_hopper and not plan.turned and not plan.back


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("march", [False, True], ids=["general", "march"])
@pytest.mark.parametrize(("dtype", "last"), VARIANTS, ids=str)
@pytest.mark.parametrize("name", KEEPING)
def test_both_kernels_on_a_gpu(name: str, dtype: torch.dtype, last: bool, march: bool, device: str) -> None:
    for conv in (WIDE,) if march else (WIDE, LONG):
        x, weight = conv.tensors(dtype, device, last)
        plans = plans_for(problem_for(x, weight, conv.axes, 1, last, True))
        plan = next((plan.name for plan in plans if fits(plan, march)), None)
        if plan is None:
            pytest.skip(f"the march does not take {conv}")
        check(lambda *given, plan=plan: by_operator(*given, plan), conv, name, dtype, last, device)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("march", [False, True], ids=["general", "march"])
def test_inductor_launches_it_without_python(march: bool, device: str) -> None:
    from torch._inductor.utils import run_and_get_code

    x, weight = WIDE.tensors(torch.bfloat16, device)
    problem = problem_for(x, weight, WIDE.axes, 1, False, True)
    plan = next(plan.name for plan in plans_for(problem) if fits(plan, march))

    def function(x: torch.Tensor) -> Both:
        return torch.ops.fused_post.conv_transpose_keeping(
            x * 0.25, weight, [2], [1], [1], [1], channels_last=False, plan=plan, program="leaky_relu v0 0.1"
        )

    found, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), x)
    for ours, expected in zip(found, function(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
    assert ("_row_march_kernel" if march else "_conv_transpose_kernel") in code
    assert "torch.ops.fused_post" not in code

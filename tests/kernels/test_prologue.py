"""Prologues: each kernel does to x what the reference does, and only where x is. One body for interpreter and GPU."""

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose, problem, row_march
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.conv_transpose import reference
from fusion_backend.kernels.plans import Plan, choose_plan, plans_for
from fusion_backend.kernels.problem import Problem, problem_for
from fusion_backend.kernels.program import NO_PROGRAM, Program
from fusion_backend.kernels.program import reference as run_program
from fusion_backend.kernels.strips import Config, march_for
from tests.kernels.convolutions import PUBLIC, Conv, coefficients, tf32
from tests.kernels.implementations import GPU_MARKS, every, split
from tests.kernels.interpreting import interpreted
from tests.kernels.layouts import is_laid_out, laid_out
from tests.kernels.test_program import vectors_for

# NumPy, which interprets, speaks of every overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# What models have before a transposed convolution, and what is not zero at zero: padding is.
PROLOGUES = {
    "HiFi-GAN: leaky_relu": "leaky_relu v0 0.1",
    "EnCodec: elu": "elu v0 1.0 1.0 1.0",
    "BigVGAN: snake": "affine v0 c0 - - -; sin v1; square v2; affine v3 c1 - - -; add v0 v4",
    "sigmoid": "sigmoid v0",
    "exp": "exp v0",
    "BatchNorm, relu": "affine v0 c0 c1 0.0 -",
    "x * hardsigmoid(x) + 1": "hardsigmoid v0; mul v0 v1; affine v2 - 1.0 - -",
}
TAIL = "tanh v0; mul v0 v1"
TWIN, MARCH_TWIN = (interpreted(module) for module in (conv_transpose, row_march))
TWIN.launch_plan.__globals__["epilogue"] = interpreted(conv_transpose.epilogue)


def in_interpreter(x: Any, weight: Any, conv: Conv, values: Any, prologue: Program, last: bool, tail: str) -> Any:
    sizes = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
    program = Program(tail)
    return TWIN.run(x, weight, *sizes, conv.groups, *split(values), last, True, None, None, program, prologue)[0]


def operator(
    x: Any, weight: Any, conv: Conv, values: Any, prologue: Program, last: bool, tail: str, plan: str | None = None
) -> Any:
    sizes = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
    tensors, numbers = split(values)
    steps = {"program": tail, "prologue": prologue.text, "prologue_vectors": prologue.vectors}
    return torch.ops.fused_post.conv_transpose(
        x, weight, *sizes, conv.groups, *tensors, *numbers, last, True, plan, **steps
    )


def march_in_interpreter(x: Any, weight: Any, conv: Conv, values: Any, prologue: Program, last: bool, tail: str) -> Any:
    out = laid_out(torch.empty(conv.y, dtype=x.dtype), last)
    problem = problem_for(x, weight, conv.axes, conv.groups, last, True, compiled=False)
    march = march_for(replace(problem, prologue=True), x.shape, Config(64, 16, 4, 2))
    packed = MARCH_TWIN.pack(weight, problem, march.config)
    given = coefficients_for(out, *split(values))
    with mock.patch.object(row_march, "wrap_triton", lambda kernel: kernel):
        MARCH_TWIN.launch(out, x, packed, problem, march, given, program=Program(tail), prologue=prologue)
    return out


def turned_in_interpreter(
    x: Any, weight: Any, conv: Conv, values: Any, prologue: Program, last: bool, tail: str
) -> Any:
    """The pass that turns x does the prologue; the kernel behind it knows nothing of it."""
    out = laid_out(torch.empty(conv.y, dtype=x.dtype), last)
    problem = replace(problem_for(x, weight, conv.axes, 1, last, True, compiled=False), prologue=True)
    plan = next(plan for plan in plans_for(problem) if plan.turned and not plan.is_march)
    given, seen = coefficients_for(out, *split(values)), []
    launch = TWIN.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TWIN.launch_plan.__globals__, "launch", lambda *args: seen.append(args) or launch(*args))
        packed = TWIN.pack_for(plan, weight, problem)
        TWIN.launch_plan(out, x, packed, problem, plan, given, program=Program(tail), prologue=prologue)
    ((*_, before, kept),) = seen
    assert before == NO_PROGRAM and kept is None
    return out


def check(run: Any, conv: Conv, text: str, dtype: torch.dtype, last: bool, device: str = "cpu", tail: str = "") -> None:
    """Against float64 from the activated x as the dtype has it; on a GPU, as TF32 has it."""
    x, weight = conv.tensors(dtype, device, last)
    weight = weight / math.sqrt(conv.x[1] * math.prod(weight.shape[2:]))
    scale, shift, *_ = coefficients(conv.C_out, device)
    prologue = Program(text, vectors_for(text, conv.x[1], device))
    y = run(x, weight, conv, (scale, shift), prologue, last, tail)
    assert (y.shape, y.dtype) == (conv.y, dtype) and is_laid_out(y, last)
    activated = run_program(x.double(), prologue).to(dtype)
    if device == "cuda" and dtype == torch.float32:
        z = tf32(activated, weight, conv)
    else:
        z = reference(activated.double(), weight.double(), conv.axes, conv.groups)
    z = z * scale.view(-1, *(1,) * conv.rank) + shift.view(-1, *(1,) * conv.rank)
    expected = run_program(z, Program(tail)).to(dtype)
    # An fp32 value beside a boundary of a narrower format's rounding falls to either side of it.
    near = 1e-4 if dtype == torch.float32 and device == "cpu" else 2e-2 if dtype == torch.bfloat16 else 4e-3
    torch.testing.assert_close(y, expected, rtol=near, atol=near, check_stride=False)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = {
    1: Conv((2, 5, 7), 6, (4,), (2,), (1,)),
    2: Conv((1, 17, 4, 5), 6, (3,), (2,), (1,), (1,)),
    3: Conv((1, 3, 2, 3, 4), 6, (2,), (2,)),
}


@every(operator=operator, interpreter=in_interpreter)
@pytest.mark.parametrize("rank", SMALL)
@pytest.mark.parametrize("name", PROLOGUES)
def test_the_general_kernel(run: Any, name: str, rank: int) -> None:
    turn = list(PROLOGUES).index(name) + rank
    check(run, SMALL[rank], PROLOGUES[name], DTYPES[turn % 3], bool(turn % 2), tail=TAIL if turn % 4 else "")


@pytest.mark.parametrize("name", PROLOGUES)
def test_groups_channels_one_by_one_and_taps_far_apart(name: str) -> None:
    for conv, dtype, last in (
        (Conv((1, 8, 5), 34, (3,), (2,), (1,), groups=2), torch.float32, True),
        (Conv((1, 4, 5), 4, (3,), (2,), (1,), groups=4), torch.bfloat16, False),
        (Conv((2, 33, 4, 6), 5, (3,), (1,), (2,), dilation=(2,)), torch.bfloat16, False),
        (Conv((1, 17, 6), 3, (16,), (8,), (4,)), torch.float16, True),
    ):
        check(in_interpreter, conv, PROLOGUES[name], dtype, last)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", PROLOGUES)
def test_the_march(name: str, rank: int) -> None:
    turn = list(PROLOGUES).index(name) + rank
    conv = Conv((1, 17, 3, 4, 5)[: rank + 2], 20, (3,), (2,), (1,), (1,))
    check(march_in_interpreter, conv, PROLOGUES[name], DTYPES[turn % 3], bool(turn % 2), tail=TAIL if turn % 4 else "")


@pytest.mark.parametrize("name", PROLOGUES)
def test_where_x_is_turned_that_pass_does_it(name: str) -> None:
    conv = Conv((2, 16, 5, 6), 6, (4,), (2,), (1,))
    check(turned_in_interpreter, conv, PROLOGUES[name], DTYPES[list(PROLOGUES).index(name) % 3], False)


@pytest.mark.parametrize("run", [operator, in_interpreter], ids=["operator", "interpreter"])
def test_half_precision_is_rounded_once_before_the_product(run: Any) -> None:
    """+ 256 and - 256 again would leave nothing of a value that is rounded in between; 1 x 1 taps show the rounding."""
    conv = Conv((1, 16, 9), 16, (1,), (1,))
    x, _ = conv.tensors(torch.bfloat16, "cpu")
    weight = torch.eye(16, dtype=torch.bfloat16).view(16, 16, 1)
    text = "affine v0 - 256.0 - 400.0; abs v1; affine v2 1.2345 -256.0 - -"
    y = run(x, weight, conv, (), Program(text), False, "affine v0 1024.0 - - -")
    expected = run_program(x.float(), Program(text)).to(torch.bfloat16)
    assert torch.equal(y, (expected.float() * 1024).to(torch.bfloat16))
    assert not torch.equal(expected, run_program(x, Program(text)))


def test_nan_and_infinities_are_those_of_the_steps() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0, -1.0]).view(6, 1, 1).repeat(1, 16, 1)
    weight = torch.ones(16, 16, 1)
    for name, text in PROLOGUES.items():
        prologue = Program(text, vectors_for(text, 16, "cpu"))
        y = in_interpreter(x, weight, Conv((6, 16, 1), 16, (1,), (1,)), (), prologue, False, "")
        expected = run_program(x.double(), prologue).sum(1, keepdim=True).expand(6, 16, 1).float()
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5, msg=name)


def test_what_is_no_prologue() -> None:
    x, weight = torch.randn(1, 4, 5), torch.randn(4, 3, 2)
    for text, vectors, message in (
        ("swoosh v0", None, "program has the instruction 'swoosh v0'"),
        ("add v0 t0", None, r"names \['t0'\], given are \[\]"),
        ("leaky_relu v0 c0", None, "allowed are numbers where vectors is None"),
        ("leaky_relu v0 c0", torch.randn(3, 1), r"vectors has shape \(3, 1\); allowed .* is \(4, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.fused_post.conv_transpose(x, weight, [2], [0], [0], [1], prologue=text, prologue_vectors=vectors)


def test_the_operator_passes_torchs_own_checks() -> None:
    conv, text = SMALL[2], PROLOGUES["BigVGAN: snake"]
    x, weight = conv.tensors(torch.float32, "cpu")
    options = {"prologue": text, "prologue_vectors": vectors_for(text, 17, "cpu")}
    torch.library.opcheck(torch.ops.fused_post.conv_transpose.default, (x, weight, [2], [1], [1], [1]), options)


def plans(dtype: torch.dtype, last: bool, **changes: Any) -> tuple[Problem, list[Plan]]:
    with (
        FakeTensorMode(),
        mock.patch.object(problem, "is_hopper", return_value=True),
        mock.patch.object(problem, "shared_memory_limit", return_value=227 * 1024),
    ):
        x, weight, _ = PUBLIC["seed"].fakes(dtype, last, last)
        found = replace(problem_for(x, weight, PUBLIC["seed"].axes, 1, last, True), **changes)
        return found, list(plans_for(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plans_of_a_problem_with_a_prologue(dtype: torch.dtype) -> None:
    """None is new, so that what is measured without one is found; on Hopper only a pass that turns x does the steps."""
    for last in (False, True):
        _, without = plans(dtype, last)
        found, those = plans(dtype, last, prologue=True)
        assert set(those) < set(without)
        assert any(plan.is_hopper and not plan.turned for plan in without)
        assert all(plan.turned for plan in those if plan.is_hopper)
        assert any(plan.is_march for plan in those) and any(plan.turned for plan in those) != last
        for plan in those:
            assert plan.turned != plan.problem(found).prologue
        ruled = choose_plan(found, PUBLIC["seed"].x)
        assert ruled in those and ruled.is_march and ruled.turned == (dtype == torch.bfloat16 and not last)


WIDE = Conv((2, 32, 17, 24), 40, (3,), (2,), (1,), (1,))
LONG = Conv((2, 64, 50), 32, (16,), (8,), (4,))


# Every kind of plan meets every dtype and layout, but not every program meets all of them: that would take minutes.
PAIRED = [(torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("second", [False, True], ids=["wide", "long"])
@pytest.mark.parametrize("name", PROLOGUES)
def test_every_kind_of_plan_on_a_gpu(name: str, second: bool, device: str) -> None:
    conv = LONG if second else WIDE
    dtype, last = PAIRED[(list(PROLOGUES).index(name) + second) % 4]
    x, weight = conv.tensors(dtype, device, last)
    problem = replace(problem_for(x, weight, conv.axes, 1, last, True), prologue=True)
    kinds = {(plan.is_march, plan.turned, plan.back): plan.name for plan in plans_for(problem)}
    for plan in kinds.values():
        check(lambda *args, plan=plan: operator(*args, plan), conv, PROLOGUES[name], dtype, last, device, TAIL)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_inductor_launches_a_kernel_with_a_prologue_without_python(last: bool, device: str) -> None:
    from torch._inductor.utils import run_and_get_code

    text = PROLOGUES["BigVGAN: snake"]
    vectors = vectors_for(text, 32, device)
    x, weight = WIDE.tensors(torch.bfloat16, device, last)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fused_post.conv_transpose(
            x * 0.25, weight, [2], [1], [1], [1], channels_last=last, prologue=text, prologue_vectors=vectors
        )

    y, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), x)
    torch.testing.assert_close(y, function(x), rtol=2e-2, atol=2e-2)
    assert "torch.ops.fused_post" not in code

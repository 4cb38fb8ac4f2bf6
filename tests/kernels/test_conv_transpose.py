"""One body for every implementation: the operator on the CPU, the kernel in the interpreter, the kernel on a GPU."""

import contextlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

import triton

from fusion_backend.kernels import conv_transpose as kernels
from fusion_backend.kernels import epilogue, launching, row_march
from fusion_backend.kernels.coefficients import reference as pointwise
from fusion_backend.kernels.conv_transpose import reference
from fusion_backend.kernels.gate import Gate, pack, passes
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.plans import plans_for, plans_for_bits
from fusion_backend.kernels.problem import Problem, problem_for
from fusion_backend.kernels.tiling import Tiling, choose_tiling, tilings
from tests.kernels.convolutions import PUBLIC, Conv, assert_close, coefficients, eager, tf32
from tests.kernels.implementations import DTYPES, Value, every, every_device, split
from tests.kernels.interpreting import interpreted
from tests.kernels.layouts import is_laid_out, laid_out, unflattened


@dataclass(frozen=True)
class Implementation:
    """The operator on ``device``, or where there is a ``twin``, the functions of that instead."""

    device: str
    twin: Any = None

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        conv: Conv,
        *values: Value,
        channels_last: bool | None = None,
        allow_tf32: bool = True,
        **plan: Any,
    ) -> torch.Tensor:
        tensors, numbers = split(values)
        parameters = (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups)
        if self.twin:
            return self.twin.run(x, weight, *parameters, tensors, numbers, channels_last, allow_tf32)[0]
        return torch.ops.fused_post.conv_transpose(
            x, weight, *parameters, *tensors, *numbers, channels_last=channels_last, allow_tf32=allow_tf32, **plan
        )

    def gated(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        conv: Conv,
        values: tuple[Value, ...],
        last: bool,
        gate: Gate,
        plan: str | None = None,
        **options: bool,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        parameters = (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups)
        with contextlib.ExitStack() as stack:
            for module in (kernels, row_march, epilogue):
                stack.enter_context(mock.patch.object(module, "wrap_triton", lambda kernel: kernel))
            if self.twin:
                stack.enter_context(mock.patch.object(epilogue, "_transpose_kernel", EPILOGUE._transpose_kernel))
            run = (self.twin or kernels).run
            return run(x, weight, *parameters, *split(values), last, True, gate, plan, **options)

    def problem(
        self, x: torch.Tensor, weight: torch.Tensor, conv: Conv, last: bool, allow_tf32: bool = True
    ) -> Problem:
        return problem_for(x, weight, conv.axes, conv.groups, last, allow_tf32, compiled=not self.twin)

    def launch(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        problem: Problem,
        values: tuple[Value, ...],
        tiling: Tiling,
    ) -> None:
        module = self.twin or kernels
        given = module.coefficients_for(out, *split(values))
        with mock.patch.object(kernels, "wrap_triton", lambda kernel: kernel):
            module.launch(out, x, module.pack(weight, problem, tiling), problem, tiling, given)


ON_CPU = Implementation("cpu")
INTERPRETED = Implementation("cpu", interpreted(kernels))
EPILOGUE = interpreted(epilogue)
ON_GPU = Implementation("cuda")

every_kernel = every(interpreter=INTERPRETED, gpu=ON_GPU)
every_implementation = every(operator=ON_CPU, interpreter=INTERPRETED, gpu=ON_GPU)


def check(
    run: Implementation, conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool, tf32: bool = True
) -> None:
    x, weight = conv.tensors(dtype, run.device, from_last)
    values = coefficients(conv.C_out, run.device)
    y = run(x, weight, conv, *values, channels_last=to_last, allow_tf32=tf32)
    assert (y.shape, y.dtype) == (conv.y, dtype)
    assert is_laid_out(y, to_last)
    assert_close(y, x, weight, conv, values, tf32)


def grid() -> Iterator[tuple[Conv, torch.dtype, bool, bool]]:
    """Every combination along one dimension, each with another number of channels, groups, dtype and layouts."""
    channels = itertools.cycle([(3, 5, 1), (5, 3, 1), (2, 2, 2), (17, 1, 1), (6, 34, 2), (1, 7, 1), (3, 3, 3)])
    variants = itertools.cycle(itertools.product(DTYPES, (False, True), (False, True)))
    for kernel, stride, padding, dilation in itertools.product(range(1, 5), range(1, 4), range(3), range(1, 4)):
        for output_padding in {0, max(stride, dilation) - 1}:
            C_in, C_out, groups = next(channels)
            size = 7 if dilation * (kernel - 1) + output_padding < 2 * padding else 5
            numbers = ((kernel,), (stride,), (padding,), (output_padding,), (dilation,))
            yield Conv((2, C_in, size), C_out, *numbers, groups), *next(variants)


# A convolution, and whether its bits can be written into a contiguous and into a channels_last output.
GATED = {
    "1d": (Conv((2, 3, 16), 16, (4,), (2,), (1,)), (True, True)),
    "stride 8": (Conv((1, 5, 6), 8, (16,), (8,), (4,)), (True, True)),
    "stride 16": (Conv((1, 5, 3), 8, (16,), (16,)), (True, True)),
    "stride 3": (Conv((1, 5, 8), 8, (3,), (3,)), (False, True)),
    "the seed's": (Conv((2, 16, 5, 8), 16, (3, 3), (2, 2), (1, 1), (1, 1)), (True, True)),
    "kernel == stride": (Conv((1, 17, 3, 4), 24, (2, 2), (2, 2)), (True, True)),
    "3d": (Conv((1, 2, 2, 3, 4), 8, (2, 2, 2), (2, 2, 2)), (True, True)),
    "odd rows": (Conv((1, 3, 5, 5), 8, (3, 3), (2, 2), (1, 1)), (False, True)),
    "12 channels": (Conv((1, 3, 4, 8), 12, (4, 4), (2, 2), (1, 1)), (True, False)),
    "groups": (Conv((1, 8, 4, 8), 32, (4, 4), (2, 2), (1, 1), groups=2), (True, True)),
    "depthwise": (Conv((1, 16, 4, 8), 16, (4, 4), (2, 2), (1, 1), groups=16), (True, True)),
}


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("conv", "possible"), GATED.values(), ids=GATED)
def test_the_bits_of_a_gate(run: Implementation, conv: Conv, possible: tuple[bool, bool], dtype: torch.dtype) -> None:
    """On whole numbers, with which every sum is exact and both bounds are hit. Dtypes swap the gates of the layouts."""
    x, weight, shift = conv.whole_numbers(dtype, run.device)
    values = (None, shift, -1.0, 3.0)
    z = reference(x, weight, conv.axes, conv.groups, None, shift)
    gates = (Gate(True, False, False), Gate(False, True))
    for last, written, gate in zip((0, 1), possible, gates if dtype == torch.float32 else gates[::-1], strict=True):
        result = run.gated(laid_out(x, bool(last)), weight, conv, values, bool(last), gate)
        assert (result is not None) == written
        if result is not None:
            y, bits = result
            assert torch.equal(y.float(), z.float().clamp(-1, 3))
            assert torch.equal(bits, pack(passes(z.float(), -1.0, 3.0, gate), bool(last)))


# Convolutions of a contiguous x whose results have no rows of whole bytes.
ODD_ROWS = {
    "1d": Conv((2, 16, 9), 16, (3,), (2,), (1,)),
    "stride 3": Conv((1, 17, 5), 8, (3,), (3,)),
    "2d": Conv((2, 16, 5, 3), 24, (3,), (2,), (1,)),
    "one row": Conv((1, 20, 1, 5), 8, (1, 4), (1, 2), (0, 1)),
    "8 pixels": Conv((3, 16, 1, 2), 16, (2,), (2,)),
    "kb100_3d": Conv((1, 32, 2, 3, 4), 16, (3,), (2,), (1,)),
    "dilated": Conv((1, 16, 3, 6), 40, (2,), (1,), (0,), (0,), (3,)),
    "rows with whole bytes in other dimensions": Conv((1, 16, 4, 8, 3), 8, (2,), (2,)),
}


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", ODD_ROWS.values(), ids=ODD_ROWS)
def test_bits_in_channels_last_order_where_rows_have_no_whole_bytes(
    run: Implementation, conv: Conv, dtype: torch.dtype
) -> None:
    """On whole numbers and NaN, to the bit; only where that is allowed, and channels are whole bytes."""
    x, weight, shift = conv.whole_numbers(dtype, run.device)
    x.view(-1)[0] = math.nan
    z = reference(x.double(), weight.double(), conv.axes, conv.groups, None, shift.double())
    for gate in (Gate(True, False, False), Gate(False, True)):
        given = (x, weight, conv, (None, shift, -1.0, 3.0), False, gate)
        assert run.gated(*given) is None
        y, bits = run.gated(*given, turned_bits=True)
        assert is_laid_out(y, False)
        torch.testing.assert_close(y.double(), z.clamp(-1, 3), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(bits, pack(passes(z, -1.0, 3.0, gate), True)[None])
    assert run.gated(laid_out(x, True), *given[1:], turned_bits=True) is None
    seven = replace(conv, C_out=conv.C_out - 1)
    assert run.gated(x, weight[:, 1:], seven, (None, shift[1:], 0.0, 3.0), False, gate, turned_bits=True) is None


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_bits_are_in_the_results_order_where_that_can_be(last: bool) -> None:
    conv = GATED["the seed's"][0]
    x, weight, shift = conv.whole_numbers(torch.float32, "cpu")
    given = (laid_out(x, last), weight, conv, (None, shift, -1.0, 3.0), last, Gate())
    for ours, theirs in zip(INTERPRETED.gated(*given, turned_bits=True), INTERPRETED.gated(*given), strict=True):
        assert torch.equal(ours, theirs)


LARGER = {
    "k3s2": Conv((5, 64, 17, 32), 64, (3,), (2,), (1,), (1,)),
    "k2s2": Conv((3, 128, 24, 48), 64, (2,), (2,)),
    "k4s2": Conv((9, 256, 8, 8), 128, (4,), (2,), (1,)),
    "k16s8": Conv((3, 512, 40), 256, (16,), (8,), (4,)),
    "k3s2_3d": Conv((3, 32, 5, 8, 16), 16, (3,), (2,), (1,), (1,)),
    "k3s2_3d_odd": Conv((3, 32, 5, 8, 16), 16, (3,), (2,), (1,)),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", LARGER.values(), ids=LARGER)
def test_every_plan_writes_the_bits_of_a_gate(conv: Conv, dtype: torch.dtype, last: bool) -> None:
    """On whole numbers again, in five launches each. The march on Hopper has tests of its own."""
    x, weight, shift = conv.whole_numbers(dtype, "cuda", largest=1)
    x = laid_out(x, last)
    problem = problem_for(x, weight, conv.axes, conv.groups, last, True)
    gate, numbers = Gate(lo_open=True, passes_nan=False), (1.0, 0.0, -1.0, 3.0)
    z = reference(x.double(), weight.double(), conv.axes, conv.groups, None, shift.double())
    wrong: list[str] = []
    plans = [
        plan
        for plan in dict.fromkeys((*plans_for(problem), *plans_for_bits(problem, conv.x, True)))
        if (plan.back or not plan.turned) and not plan.is_hopper and not kernels.why_no_bits(plan, problem, conv.y[-1])
    ]
    for plan in plans:
        expected = pack(passes(z, -1.0, 3.0, gate), last or plan.back)
        given = kernels.pack_for(plan, weight, problem)
        for _ in range(5):
            y, bits = empty(conv.y, x, last).fill_(math.nan), torch.full_like(expected, 255)
            with contextlib.ExitStack() as stack:
                for module in (kernels, row_march, epilogue):
                    stack.enter_context(mock.patch.object(module, "wrap_triton", lambda kernel: kernel))
                coefficients = kernels.coefficients_for(y, (None, shift, None, None), numbers)
                kernels.launch_plan(y, x, given, problem, plan, coefficients, bits, gate)
            bad = [int((y.double() != z.clamp(-1, 3)).sum()), int((bits != expected).sum())]
            if any(bad):
                wrong.append(f"{plan.name}: {bad[0]} of {y.numel()} elements, {bad[1]} of {bits.numel()} bytes")
    assert plans and not wrong, "\n".join(wrong)


@every_implementation
@pytest.mark.parametrize("part", range(6))
def test_every_combination_along_one_dimension(run: Implementation, part: int) -> None:
    for conv, dtype, from_last, to_last in list(grid())[part::6]:
        check(run, conv, dtype, from_last, to_last)


@st.composite
def convs(draw: st.DrawFn, rank: int) -> Conv:
    """Anisotropic, with ungainly sizes. Where kernel == stride there is no overlap, which is another path."""

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    stride = each(1, 3)
    kernel = draw(st.sampled_from([stride, each(1, 4)]))
    dilation = draw(st.sampled_from([(1,), each(1, 3)]))
    limits = [max(s, d) - 1 for s, d in zip(stride, dilation * (rank // len(dilation)), strict=True)]
    output_padding = tuple(draw(st.integers(0, limit)) for limit in limits)
    groups, C_in, C_out = draw(st.sampled_from([(1, 3, 5), (1, 1, 3), (1, 17, 2), (2, 4, 9), (3, 1, 1), (1, 5, 40)]))
    x = (draw(st.integers(1, 2)), groups * C_in, *each(1, 6))
    return Conv(x, groups * C_out, kernel, stride, each(0, 2), output_padding, dilation, groups)


def drawn(rank: int) -> Any:
    return given(
        conv=convs(rank),
        dtype=st.sampled_from(DTYPES),
        from_last=st.booleans(),
        to_last=st.booleans(),
        tf32=st.booleans(),
    )


few = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@every_implementation
@settings(max_examples=25, **few)
@drawn(rank=2)
def test_drawn_combinations_in_two_dimensions(
    run: Implementation, conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool, tf32: bool
) -> None:
    assume(min(conv.y) > 0)
    check(run, conv, dtype, from_last, to_last, tf32)


@every_implementation
@settings(max_examples=8, **few)
@drawn(rank=3)
def test_drawn_combinations_in_three_dimensions(
    run: Implementation, conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool, tf32: bool
) -> None:
    assume(min(conv.y) > 0)
    check(run, conv, dtype, from_last, to_last, tf32)


# Each way of cutting a problem into programs.
K3S2 = Conv((2, 20, 5, 7), 24, (3,), (2,), (1,), (1,))
K4S2 = Conv((2, 20, 5, 7), 24, (4,), (2,), (1,))
K2S2 = Conv((2, 20, 5, 7), 24, (2,), (2,))
K3S3 = Conv((2, 20, 3, 5), 24, (3,), (3,))
K16S8 = Conv((2, 20, 13), 24, (16,), (8,), (4,))
K9S5 = Conv((2, 20, 13), 24, (9,), (5,), (2,), (3,))
K3S2_3D = Conv((1, 20, 2, 3, 5), 24, (3,), (2,), (1,))
K2S2_3D = Conv((1, 20, 2, 3, 5), 24, (2,), (2,))
GROUPED = Conv((2, 40, 5, 7), 48, (3,), (2,), (1,), groups=2)
DEPTHWISE = Conv((2, 5, 5, 7), 5, (4,), (2,), (1,), groups=5)
MULTIPLIER = Conv((2, 2, 3, 5), 6, (3,), (2,), (1,), groups=2)
MANY_GROUPS = Conv((1, 33, 3), 33, (2,), (1,), groups=33)
ONE_TO_MANY = Conv((2, 1, 9), 5, (4,), (4,))
MANY_TO_ONE = Conv((2, 64, 5, 7), 1, (4,), (2,), (1,))
SPARSE = Conv((2, 20, 5, 7), 24, (2,), (3,), (0,), (2,))  # phases without a tap
DILATED = Conv((2, 20, 5, 7), 24, (3,), (2,), (2,), (1,), (2,))
WIDE = Conv((1, 20, 130), 24, (3,), (1,), (1,))

KINDS = {
    "k3s2": K3S2,
    "k4s2": K4S2,
    "k2s2": K2S2,
    "k3s3": K3S3,
    "k16s8": K16S8,
    "k9s5": K9S5,
    "k3s2_3d": K3S2_3D,
    "k2s2_3d": K2S2_3D,
    "grouped": GROUPED,
    "depthwise": DEPTHWISE,
    "multiplier": MULTIPLIER,
    "many_groups": MANY_GROUPS,
    "one_to_many": ONE_TO_MANY,
    "many_to_one": MANY_TO_ONE,
    "sparse": SPARSE,
    "dilated": DILATED,
    "wide": WIDE,
}
every_kind = pytest.mark.parametrize("conv", KINDS.values(), ids=KINDS)


@every_implementation
@every_kind
def test_any_layout_to_any_layout(run: Implementation, conv: Conv) -> None:
    for (from_last, to_last), dtype in zip(
        itertools.product((False, True), repeat=2), (*DTYPES, DTYPES[2]), strict=True
    ):
        check(run, conv, dtype, from_last, to_last)


@every_kernel
@every_kind
def test_every_configuration_writes_every_element_and_nothing_else(run: Implementation, conv: Conv) -> None:
    """Memory is NaN before, also to both sides of the output. Dtypes and layouts take turns."""
    problems = itertools.cycle(itertools.product((False, True), DTYPES, (False, True)))
    values = coefficients(conv.C_out, run.device)
    for exact in (False, True):
        done = set()
        for to_last, dtype, from_last in itertools.islice(problems, 12):
            x, weight = conv.tensors(torch.float32 if exact else dtype, run.device, from_last)
            problem = run.problem(x, weight, conv, to_last, allow_tf32=not exact)
            tiling = next((tiling for tiling in tilings(problem) if tiling.config not in done), None)
            if tiling is None:
                continue
            done.add(tiling.config)
            memory = torch.full((math.prod(conv.y) + 128,), math.nan, dtype=x.dtype, device=run.device)
            out = unflattened(memory[64:-64], conv.y, to_last)
            run.launch(out, x, weight, problem, values, tiling)
            assert_close(out, x, weight, conv, values, tf32=not exact)
            assert memory[:64].isnan().all()
            assert memory[-64:].isnan().all()


@every_kernel
@pytest.mark.parametrize("conv", [K3S2, K16S8, DEPTHWISE], ids=["k3s2", "k16s8", "depthwise"])
def test_offsets_of_64_bits(run: Implementation, conv: Conv) -> None:
    with mock.patch.object(launching, "LONG", 0):
        for from_last, to_last in itertools.product((False, True), repeat=2):
            check(run, conv, torch.float32, from_last, to_last)


SIZES = [
    Conv((1, 1, 1), 1, (1,), (1,)),
    Conv((1, 1, 1), 1, (1,), (5,), output_padding=(4,)),  # more phases than inputs
    Conv((1, 3, 1), 5, (1,), (4,)),  # more phases than outputs
    Conv((3, 3, 4, 1), 5, (3, 1), (2, 1), (1, 0)),
    Conv((1, 16, 1, 1), 16, (3,), (2,), (1,)),  # one output
    Conv((3, 16, 3, 3), 16, (2,), (2,)),  # many images a tile
    Conv((2, 7, 13, 11), 3, (5,), (2,), (2,), (1,)),
    Conv((1, 65, 3, 3), 65, (2,), (2,)),  # one more than a tile
    Conv((2, 3, 4, 4), 2, (1,), (1,), (1,)),  # padding cuts inputs off
    Conv((0, 3, 4, 4), 5, (3,), (2,)),
]


@every_implementation
@pytest.mark.parametrize("conv", SIZES, ids=str)
def test_any_size(run: Implementation, conv: Conv) -> None:
    for from_last, to_last in ((False, False), (True, True)):
        check(run, conv, torch.float16, from_last, to_last)


@every_implementation
def test_every_coefficient_can_be_missing_a_number_or_a_tensor(run: Implementation) -> None:
    conv = Conv((1, 3, 5), 4, (3,), (2,), (1,))
    x, weight = conv.tensors(torch.float32, run.device)
    tensors, numbers, none = coefficients(4, run.device), (-1.7, 0.3, -0.9, 0.8), (None,) * 4
    for choice in itertools.product((none, numbers, tensors), repeat=2):
        for first, second in ((0, 2), (1, 3)):
            values: list[Value] = [None] * 4
            values[first], values[second] = choice[0][first], choice[1][second]
            assert_close(run(x, weight, conv, *values), x, weight, conv, tuple(values), tf32=True)


@every_implementation
@pytest.mark.parametrize("conv", [K3S2, K2S2, DEPTHWISE], ids=["k3s2", "k2s2", "depthwise"])
def test_nan_goes_through_to_the_outputs_it_belongs_to_and_infinities_clamp(run: Implementation, conv: Conv) -> None:
    for last, number in itertools.product((False, True), (math.nan, math.inf, -math.inf)):
        x, weight = conv.tensors(torch.float32, run.device, last)
        x[0, 1, 2, 3] = number
        y = run(x, weight, conv, None, None, -1.0, 1.0)
        expected = reference(x.double(), weight.double(), conv.axes, conv.groups, None, None, -1.0, 1.0)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.double()[expected.abs() == 1.0].sign(), expected[expected.abs() == 1.0])


@every_implementation
def test_infinite_and_nan_coefficients(run: Implementation) -> None:
    conv = Conv((1, 3, 5), 4, (3,), (2,), (1,))
    x, weight = conv.tensors(torch.float32, run.device)
    for place, number in itertools.product(range(1, 4), [math.nan, math.inf, -math.inf]):
        # As tensors: torch 2.11 ignores a bound that is the number NaN.
        tensors = [torch.full((4,), value, device=run.device) for value in (1.0, 0.0, -0.5, 0.5)]
        tensors[place] = torch.full((4,), number, device=run.device)
        expected = reference(x, weight, conv.axes, 1, *tensors)
        for value in (number, tensors[place]):
            values: list[Value] = [None, None, -0.5, 0.5]
            values[place] = value
            torch.testing.assert_close(run(x, weight, conv, *values), expected, equal_nan=True, rtol=1e-2, atol=1e-2)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", [K3S2, K2S2, DEPTHWISE], ids=["k3s2", "k2s2", "depthwise"])
def test_half_precision_is_rounded_exactly_once(run: Implementation, conv: Conv, dtype: torch.dtype) -> None:
    """Small integers and 64ths add up exactly in fp32, in any order: a shift may be where a product begins to add."""
    x, weight = (tensor.mul(4).round() for tensor in conv.tensors(dtype, run.device))
    shift = torch.linspace(-9, 9, conv.C_out, device=run.device).mul(64).round() / 64
    exact = pointwise(eager(x.double(), weight.double(), conv).float(), None, shift)
    for last in (False, True):
        assert torch.equal(run(x, weight, conv, None, shift, channels_last=last), exact.to(dtype))


@every_implementation
def test_inputs_that_are_not_dense(run: Implementation) -> None:
    conv = Conv((2, 4, 5, 6), 3, (3,), (2,), (1,))
    dense = torch.randn(2, 8, 7, 12).to(run.device)
    _, weight = conv.tensors(torch.float32, run.device)
    for x in (
        dense[:, ::2, :5, :6],
        dense[:, :4, 1:6, ::2],
        laid_out(dense, True)[:, 2:6, 2:, 3:9],
        dense[:1, :4, :5, :6].expand(2, -1, -1, -1),
    ):
        for last in (None, True):
            y = run(x, weight, conv, channels_last=last)
            assert_close(y, x, weight, conv, tf32=True)
            assert is_laid_out(y, bool(last))
    transposed = weight.transpose(2, 3).contiguous().transpose(2, 3)
    x, _ = conv.tensors(torch.float32, run.device)
    assert_close(run(x, transposed, conv), x, transposed, conv, tf32=True)


@every_implementation
def test_addresses_that_16_does_not_divide(run: Implementation) -> None:
    memory = torch.randn(2 * 16 * 8 * 8 + 1).to(run.device, torch.bfloat16)
    for last in (False, True):
        conv = Conv((2, 16, 8, 8), 16, (2,), (2,))
        x = unflattened(memory[1:], conv.x, last)
        _, weight = conv.tensors(torch.bfloat16, run.device)
        assert_close(run(x, weight, conv), x, weight, conv)


@every_implementation
def test_the_memory_format_is_xs_own_unless_it_is_chosen(run: Implementation) -> None:
    conv = Conv((2, 4, 3, 3), 6, (2,), (2,))
    for last in (False, True):
        x, weight = conv.tensors(torch.float32, run.device, last)
        assert is_laid_out(run(x, weight, conv), last)
        for chosen in (False, True):
            assert is_laid_out(run(x, weight, conv, channels_last=chosen), chosen)


# What a user can get wrong, each with the message's first words.
X, W = torch.zeros(2, 4, 5, 5), torch.zeros(4, 3, 3, 3)
ONES, ZEROS = [1], [0]
PLAIN = (ONES, ZEROS, ZEROS, ONES)
MISTAKES = [
    ((torch.zeros(4, 5), W, *PLAIN), {}, ValueError, r"x has rank 2 \(shape \(4, 5\)\); allowed are ranks 3 to 5"),
    ((X.double(), W.double(), *PLAIN), {}, TypeError, "x has dtype torch.float64; allowed are torch.float32"),
    ((X, W.half(), *PLAIN), {}, TypeError, "weight has dtype torch.float16; allowed is x's, torch.float32"),
    ((X, W.to("meta"), *PLAIN), {}, ValueError, "weight is on meta; allowed is x's device, cpu"),
    ((X, W[:3], *PLAIN), {}, ValueError, r"weight has shape \(3, 3, 3, 3\); allowed is \[C_in, C_out / groups"),
    ((X, W[..., 0], *PLAIN), {}, ValueError, r"weight has shape \(4, 3, 3\)"),
    ((X, W[:, :0], *PLAIN), {}, ValueError, r"weight has shape \(4, 0, 3, 3\)"),
    (
        (X, W, [1, 1, 1], ZEROS, ZEROS, ONES),
        {},
        ValueError,
        r"stride is \[1, 1, 1\]; allowed is one number, or one for",
    ),
    ((X, W, [0], ZEROS, ZEROS, ONES), {}, ValueError, r"stride is \[0\]; allowed are numbers from 1"),
    ((X, W, ONES, [-1], ZEROS, ONES), {}, ValueError, r"padding is \[-1\]; allowed are numbers from 0"),
    (
        (X, W, [2], ZEROS, [2], ONES),
        {},
        ValueError,
        "output_padding is 2; allowed are numbers below stride 2 or dilation",
    ),
    ((X, W, ONES, ZEROS, ZEROS, [0]), {}, ValueError, r"dilation is \[0\]; allowed are numbers from 1"),
    (
        (X, W, ONES, [4], ZEROS, ONES),
        {},
        ValueError,
        r"the output would have sizes \[-1, -1\]; allowed are sizes from 1",
    ),
    ((X, W, *PLAIN, 3), {}, ValueError, "groups is 3; allowed are divisors of C_in = 4"),
    ((X, W, *PLAIN, 0), {}, ValueError, "groups is 0; allowed are divisors of C_in = 4"),
    ((X, W, *PLAIN), {"scale": torch.ones(4)}, ValueError, r"scale has shape \(4,\); allowed is \[C\] = \(3,\)"),
    ((X, W, *PLAIN), {"hi": torch.ones(3).half()}, TypeError, "hi has dtype torch.float16; allowed is torch.float32"),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_mistakes_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        torch.ops.fused_post.conv_transpose(*args, **kwargs)


def test_the_operator_has_the_agreed_schema() -> None:
    parameters = "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, SymInt groups=1"
    tensors = "Tensor? scale=None, Tensor? shift=None, Tensor? lo=None, Tensor? hi=None"
    numbers = "float scale_number=1., float shift_number=0., float? lo_number=None, float? hi_number=None"
    assert str(torch.ops.fused_post.conv_transpose.default._schema) == (
        f"fused_post::conv_transpose(Tensor x, Tensor weight, {parameters}, {tensors}, {numbers}, "
        "bool? channels_last=None, bool allow_tf32=True, str? plan=None, "
        'str program="", Tensor? vectors=None, Tensor? tensor_0=None, Tensor? tensor_1=None, '
        'str prologue="", Tensor? prologue_vectors=None) -> Tensor'
    )


@every_device
@pytest.mark.parametrize("conv", [K3S2, K16S8, K2S2_3D, DEPTHWISE], ids=["2d", "1d", "3d", "depthwise"])
def test_opcheck(conv: Conv, device: str) -> None:
    for last in (False, True):
        x, weight = conv.tensors(torch.float32, device, last)
        shift = coefficients(conv.C_out, device)[1]
        args = (x, weight, conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups, None, shift)
        for kwargs in ({}, {"channels_last": not last, "lo_number": 0.0, "hi_number": 6.0}):
            torch.library.opcheck(torch.ops.fused_post.conv_transpose.default, args, kwargs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("channels_last", [None, False, True])
@every_kind
def test_fake_tensors_need_no_gpu(conv: Conv, channels_last: bool | None, device: str) -> None:
    parameters = (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups)
    kwargs = {"hi_number": 1.0, "channels_last": channels_last}
    x, weight = conv.tensors(torch.bfloat16, "cpu")
    real = torch.ops.fused_post.conv_transpose(x, weight, *parameters, **kwargs)
    with FakeTensorMode():
        fakes = (torch.empty(each.shape, dtype=each.dtype, device=device) for each in (x, weight))
        fake = torch.ops.fused_post.conv_transpose(*fakes, *parameters, **kwargs)
    assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, device)
    assert fake.stride() == real.stride()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@every_kind
def test_batch_and_spatial_sizes_can_be_symbolic(conv: Conv, device: str) -> None:
    parameters = (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups)
    x, weight = conv.tensors(torch.bfloat16, "cpu")
    larger = torch.empty([size + 3 for size in x.shape])
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        sizes = mode.from_tensor(larger).shape
        fake_x = torch.empty((sizes[0], x.shape[1], *sizes[2:]), dtype=x.dtype, device=device)
        fake_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        y = torch.ops.fused_post.conv_transpose(fake_x, fake_weight, *parameters)
    for axis, size, symbolic in zip(conv.axes, x.shape[2:], y.shape[2:], strict=True):
        assert isinstance(symbolic, torch.SymInt)
        assert symbolic.node.hint == axis.output_size(size + 3)
    assert y.shape[1] == conv.C_out


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_on_a_cpu_inductor_compiles_the_reference(dynamic: bool) -> None:
    x, weight = K3S2.tensors(torch.float32, "cpu")
    values = coefficients(24, "cpu")

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def function(x: torch.Tensor, weight: torch.Tensor, *values: Value) -> torch.Tensor:
        return torch.ops.fused_post.conv_transpose(x * 2, weight, [2], [1], [1], [1], 1, *values, channels_last=True)

    y = function(x, weight, *values)
    assert_close(y, x * 2, weight, K3S2, values)
    assert is_laid_out(y, True)


@pytest.mark.skipif(triton.__version__ < "3.7", reason="Triton's own interpreter fails on loops with NumPy 2.4")
def test_under_triton_interpret_the_operator_runs_the_kernel() -> None:
    code = """
import torch
from triton.runtime.interpreter import InterpretedFunction
from fusion_backend.kernels import conv_transpose as kernels

ran = []
run = InterpretedFunction.run
InterpretedFunction.run = lambda self, *args, **kwargs: (ran.append(self.__name__), run(self, *args, **kwargs))
x, weight, shift = torch.randn(1, 6, 5, 4), torch.randn(6, 8, 3, 3), torch.randn(8)
axes = [kernels.Axis(3, 2, 1)] * 2
y = torch.ops.fused_post.conv_transpose(x, weight, [2], [1], [0], [1], 1, None, shift, lo_number=0.0)
torch.testing.assert_close(y, kernels.reference(x, weight, axes, 1, None, shift, 0.0))
print(*ran)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "_conv_transpose_kernel\n", run.stderr


every_public_case = pytest.mark.parametrize("conv", PUBLIC.values(), ids=PUBLIC)
every_layout = pytest.mark.parametrize(("from_last", "to_last"), list(itertools.product((False, True), repeat=2)))


@pytest.mark.usefixtures("empty_gpu")
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_public_case
def test_no_element_is_ever_wrong_in_60_launches(
    conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool
) -> None:
    x, weight = conv.tensors(dtype, "cuda", from_last)
    shift = coefficients(conv.C_out, "cuda")[1]
    values = (None, shift, -8.0, 8.0)
    expected = pointwise(eager(x, weight, conv), *values)
    terms = eager(x.abs(), weight.abs(), conv)
    first = torch.full_like(laid_out(expected, to_last), math.nan)
    problem = ON_GPU.problem(x, weight, conv, to_last)
    ON_GPU.launch(first, x, weight, problem, values, choose_tiling(problem))
    wrong = 0
    rounding = 2.0**-9 if dtype == torch.float32 else 2.0**-20
    for ours, theirs, size in zip(first.split(8), expected.split(8), terms.split(8), strict=True):
        # Eager rounds the convolution, and then the sum; its convolution may round to TF32 as well.
        bound = 2 * torch.finfo(dtype).eps * (theirs.float().abs() + 9) + rounding * (size.float() + 1)
        wrong += int((~((ours.float() - theirs.float()).abs() <= bound)).sum())
    assert wrong == 0
    changed = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(first)
    for _ in range(60):
        out.fill_(math.nan)
        ON_GPU.launch(out, x, weight, problem, values, choose_tiling(problem))
        changed += (out != first).sum()
    assert changed.item() == 0


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("conv", [PUBLIC["seed"], PUBLIC["unet_up2"]], ids=["seed", "unet_up2"])
def test_every_configuration_never_changes_its_mind_at_full_size(conv: Conv, last: bool, dtype: torch.dtype) -> None:
    x, weight = conv.tensors(dtype, "cuda", last)
    problem = ON_GPU.problem(x, weight, conv, last)
    expected = ON_GPU(x, weight, conv)
    for tiling in tilings(problem):
        changed = torch.zeros((), dtype=torch.int64, device="cuda")
        first = torch.full_like(expected, math.nan)
        ON_GPU.launch(first, x, weight, problem, (), tiling)
        torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-2)
        out = torch.empty_like(first)
        for _ in range(10):
            out.fill_(math.nan)
            ON_GPU.launch(out, x, weight, problem, (), tiling)
            changed += (out != first).sum()
        assert changed.item() == 0, tiling


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@every_public_case
def test_as_accurate_as_cudnn(conv: Conv, last: bool, dtype: torch.dtype) -> None:
    """Without the tail, which only adds roundings to eager's result.

    For some convolutions cuDNN takes no TF32 although it may. Ours does, with the error of that rounding alone.
    """
    x, weight = replace(conv, x=(2, *conv.x[1:])).tensors(dtype, "cuda", last)
    exact = eager(x.double(), weight.double(), conv)

    def rmse(y: torch.Tensor) -> float:
        return ((y.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    assert rmse(ON_GPU(x, weight, conv)) <= 1.1 * max(rmse(eager(x, weight, conv)), rmse(tf32(x, weight, conv)))


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_without_tf32_fp32_is_exact_fp32(last: bool) -> None:
    for conv in (K3S2, K2S2, GROUPED, replace(PUBLIC["dcgan_64"], x=(2, 256, 16, 16))):
        x, weight = conv.tensors(torch.float32, "cuda", last)
        assert_close(ON_GPU(x, weight, conv, allow_tf32=False), x, weight, conv, tf32=False)


@pytest.mark.usefixtures("empty_gpu")
@every_layout
def test_more_than_2_to_the_31_elements(from_last: bool, to_last: bool) -> None:
    conv = Conv((3, 16, 6016, 3008), 16, (2,), (2,))
    assert math.prod(conv.y) > 2**31
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("16 GiB of GPU memory are not free")
    x = empty(conv.x, torch.empty(0, dtype=torch.bfloat16, device="cuda"), from_last).normal_()
    weight = conv.tensors(torch.bfloat16, "cuda")[1]
    y = ON_GPU(x, weight, conv, channels_last=to_last)
    assert is_laid_out(y, to_last)
    # Without overlap rows do not depend on each other.
    for image, row in itertools.product((0, 1, 2), (0, 3000, 6000)):
        part = x[image : image + 1, :, row : row + 16]
        assert_close(y[image : image + 1, :, 2 * row : 2 * row + 32], part, weight, replace(conv, x=tuple(part.shape)))


PLANS = {
    "128x32x64, 4 warps, 4 stages": ["_conv_transpose_kernel"],
    "march 64x32, 4 warps, 3 stages": ["_row_march_kernel"],
    "turned 128x32x64, 4 warps, 4 stages": ["_transpose_kernel", "_conv_transpose_kernel"],
}


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_launches_the_kernels_without_python(dtype: torch.dtype, plan: str, dynamic: bool) -> None:
    """One kernel of Inductor's for x * 2, one that packs the weight, then ours: no call of the operator."""
    from torch._inductor.utils import run_and_get_code

    conv = Conv((2, 16, 40, 32), 32, (3,), (2,), (1,), (1,))
    _, weight = conv.tensors(dtype, "cuda")
    shift = torch.randn(32, device="cuda")

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fused_post.conv_transpose(
            x * 2, weight, [2], [1], [1], [1], 1, None, shift, lo_number=0.0, channels_last=False, plan=plan
        )

    compiled = torch.compile(function, backend="inductor", fullgraph=True, dynamic=dynamic)
    for height in (40, 56):
        sized = replace(conv, x=(2, 16, height, 32))
        x, _ = sized.tensors(dtype, "cuda")
        y, codes = run_and_get_code(compiled, x)
        assert_close(y, x * 2, weight, sized, (None, shift, 0.0), tf32=True)
        assert is_laid_out(y, False)
        for code in codes:
            assert all(re.search(rf"\b{kernel}_\d\.run\(", code) for kernel in PLANS[plan])
            assert "torch.ops.fused_post" not in code


@pytest.mark.usefixtures("empty_gpu")
@every_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", [K3S2, K2S2, K16S8, K2S2_3D], ids=["k3s2", "k2s2", "k16s8", "k2s2_3d"])
def test_every_plan_computes_the_same(conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool) -> None:
    x, weight = conv.tensors(dtype, "cuda", from_last)
    values = coefficients(conv.C_out, "cuda")
    problem = ON_GPU.problem(x, weight, conv, to_last)
    for plan in plans_for(problem):
        y = ON_GPU(x, weight, conv, *values, channels_last=to_last, plan=plan.name)
        assert is_laid_out(y, to_last)
        assert_close(y, x, weight, conv, values, tf32=True)


def test_a_plan_for_another_layout_of_x_gives_way_to_the_rules() -> None:
    conv = Conv((1, 128, 8, 8), 64, (4,), (2,), (1,))
    with FakeTensorMode():
        x, weight = torch.empty(conv.x, device="cuda"), torch.empty(128, 64, 4, 4, device="cuda")
        turned = next(plan.name for plan in plans_for(ON_GPU.problem(x, weight, conv, False)) if plan.turned)
        last = x.to(memory_format=torch.channels_last)
        y = torch.ops.fused_post.conv_transpose(last, weight, [2], [1], [0], [1], channels_last=False, plan=turned)
    assert y.shape == conv.y


def test_a_residual_is_added_to_the_result_and_not_to_a_workspace() -> None:
    x, weight = K16S8.tensors(torch.float32, "cpu", True)
    problem = problem_for(x, weight, K16S8.axes, 1, False, True)
    back = next(plan for plan in plans_for(problem) if plan.back)
    assert kernels._plan(problem, x, back.name) == back
    assert not kernels._plan(problem, x, back.name, tensors=1).back


def test_an_unknown_plan_is_an_error_that_lists_the_known_ones() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(1, 16, 8, 8, device="cuda"), torch.empty(16, 16, 3, 3, device="cuda")
        with pytest.raises(ValueError, match=r"plan is 'fast'; allowed for this convolution are \['march"):
            torch.ops.fused_post.conv_transpose(x, weight, *PLAIN, plan="fast")

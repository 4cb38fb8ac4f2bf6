"""The march on Hopper on a GPU, against float64; and which problems it takes, how it cuts them, and its operator."""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose as kernels
from fusion_backend.kernels import hopper as on_hopper
from fusion_backend.kernels import hopper_launch, hopper_march, hopper_training, problem
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.coefficients import reference as pointwise
from fusion_backend.kernels.conv_transpose import conv_transpose, reference
from fusion_backend.kernels.conv_transpose_training import conv_transpose_training
from fusion_backend.kernels.gate import Gate, passes, unpack
from fusion_backend.kernels.gate import pack as pack_bits
from fusion_backend.kernels.hopper import Call, call_of, conv_transpose_hopper
from fusion_backend.kernels.hopper_launch import why_no_gluon
from fusion_backend.kernels.hopper_march import launch, pack
from fusion_backend.kernels.hopper_strips import (
    CONFIGS,
    Config,
    configs_for,
    march_for,
    why_no_bits,
    why_not,
    why_not_shape,
)
from fusion_backend.kernels.hopper_training import conv_transpose_hopper_training
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.plans import plans_for
from fusion_backend.kernels.problem import Problem, is_hopper, problem_for
from tests.kernels.convolutions import PUBLIC, Conv, assert_close, coefficients, eager
from tests.kernels.implementations import DTYPES, GPU_MARKS, Value, split
from tests.kernels.layouts import is_laid_out, laid_out, unflattened

LAYOUTS = tuple(itertools.product((False, True), repeat=2))
HOPPER = 227 * 1024
PROCESSORS = 132


@pytest.fixture(params=[pytest.param("cuda", marks=GPU_MARKS)])
def hopper(request: pytest.FixtureRequest) -> str:
    """A GPU's name, where that is a Hopper with a triton that knows it."""
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("no Hopper")
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    torch.cuda.empty_cache()
    return request.param


def run(
    conv: Conv,
    x: torch.Tensor,
    weight: torch.Tensor,
    values: Sequence[Value] = (),
    last: bool = False,
    config: Config | None = None,
    length: int | None = None,
) -> torch.Tensor:
    """y; memory is NaN before, and must still be to both sides of y."""
    memory = torch.full((math.prod(conv.y) + 128,), math.nan, dtype=x.dtype, device=x.device)
    y = unflattened(memory[64:-64], conv.y, last)
    launched(y, conv, x, weight, values, last, config, length)
    assert memory[:64].isnan().all() and memory[-64:].isnan().all()
    return y


def launched(
    y: torch.Tensor,
    conv: Conv,
    x: torch.Tensor,
    weight: torch.Tensor,
    values: Sequence[Value],
    last: bool,
    config: Config | None = None,
    length: int | None = None,
) -> None:
    problem = problem_for(x, weight, conv.axes, conv.groups, last, True)
    config = config or configs_for(problem)[0]
    march = march_for(problem, x.shape, config, PROCESSORS, length)
    assert why_not_shape(problem, x.shape, march) is None
    launch(y, x, pack(weight, problem, config), problem, march, coefficients_for(y, *split(values)))


def check(conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool, config: Config | None = None) -> None:
    """In runs of several lengths: one row, some, and what is chosen."""
    x, weight = conv.tensors(dtype, "cuda", from_last)
    values = coefficients(conv.C_out, "cuda")
    for length in (None, 1, 4):
        y = run(conv, x, weight, values, to_last, config, length)
        assert_close(y, x, weight, conv, values, tf32=True)


ODD = Conv((3, 48, 6, 37), 40, (3,), (2,), (1,))  # short rows and strips, channels that fill no block
K3S2 = Conv((3, 64, 5, 66), 64, (3,), (2,), (1,), (1,))

KINDS = {
    "odd": (ODD, torch.float32, True, True),
    "small": (Conv((7, 32, 4, 16), 16, (3,), (2,), (1,), (1,)), torch.bfloat16, False, False),
    "k4s2": (Conv((2, 64, 5, 38), 64, (4,), (2,), (1,)), torch.bfloat16, True, True),
    "k4s2_32": (Conv((2, 32, 5, 38), 24, (4,), (2,), (1,)), torch.float32, False, False),
    "k2s2": (Conv((2, 128, 3, 9), 64, (2,), (2,)), torch.float32, True, False),
    "k5s2": (Conv((1, 32, 5, 7), 24, (5,), (2,), (2,), (1,)), torch.bfloat16, False, True),
    "k3s1": (Conv((2, 32, 5, 7), 32, (3,), (1,), (1,)), torch.bfloat16, True, False),
    "k4s4": (Conv((1, 16, 3, 5), 16, (4,), (4,)), torch.float32, False, False),
    "k1s3": (Conv((1, 32, 3, 5), 16, (1,), (3,), (0,), (2,)), torch.bfloat16, True, True),  # outputs without a tap
    "mixed": (Conv((2, 16, 3, 66), 24, (3, 4), (1, 2), (1, 1)), torch.float16, False, False),
    "k3s2_3d": (Conv((2, 32, 3, 4, 5), 16, (3,), (2,), (1,)), torch.float32, True, True),
    "k3s2_3d_contiguous": (Conv((1, 16, 3, 3, 10), 16, (3,), (2,), (1,), (1,)), torch.bfloat16, False, False),
    "flat_3d": (Conv((1, 32, 2, 3, 9), 24, (1, 3, 3), (1, 2, 2), (0, 1, 1)), torch.bfloat16, True, False),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_in_runs_of_any_length(hopper: str, name: str) -> None:
    check(*KINDS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
def test_any_layout_to_any_layout_in_every_order(
    hopper: str, dtype: torch.dtype, from_last: bool, to_last: bool
) -> None:
    x, weight = K3S2.tensors(dtype, "cuda", from_last)
    first, *others = configs_for(problem_for(x, weight, K3S2.axes, 1, to_last, True))
    for config in (first, *(each for each in others if (each.channels, each.slots) == (first.channels, first.slots))):
        check(K3S2, dtype, from_last, to_last, config)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_nan_goes_through_to_the_outputs_it_belongs_to_and_infinities_clamp(hopper: str, last: bool) -> None:
    for number in (math.nan, math.inf, -math.inf):
        x, weight = K3S2.tensors(torch.float32, "cuda", last)
        x[0, 1, 2, 3] = number
        y = run(K3S2, x, weight, (None, None, -1.0, 1.0), last, length=4)
        expected = reference(x.double(), weight.double(), K3S2.axes, 1, None, None, -1.0, 1.0)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.double()[expected.abs() == 1.0].sign(), expected[expected.abs() == 1.0])


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_rounds_exactly_once_also_on_the_bounds(hopper: str, last: bool) -> None:
    """Small integers add up exactly in fp32, in any order, and many of the sums are bounds."""
    x, weight = (tensor.mul(4).round() for tensor in K3S2.tensors(torch.bfloat16, "cuda", last))
    values = (None, torch.linspace(-9, 9, K3S2.C_out, device="cuda"), -40.0, 40.0)
    exact = reference(x.float(), weight.float(), K3S2.axes, 1, *values)
    assert torch.equal(run(K3S2, x, weight, values, last), exact.to(torch.bfloat16))


def test_addresses_that_16_does_not_divide(hopper: str) -> None:
    memory = torch.randn(math.prod(K3S2.x) + 1).to("cuda", torch.bfloat16)
    _, weight = K3S2.tensors(torch.bfloat16, "cuda")
    x = unflattened(memory[1:], K3S2.x, False)
    assert_close(run(K3S2, x, weight), x, weight, K3S2)
    x = unflattened(memory[1:], K3S2.x, True)
    with mock.patch.object(hopper_march, "launched", side_effect=AssertionError("the copy engine cannot")):
        config, *_ = configs_for(problem_for(x, weight, K3S2.axes, 1, False, True))
        assert_close(operator(K3S2, x, weight, False, config), x, weight, K3S2, RELU)
    assert not on_hopper._broken


@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_element_is_ever_wrong_in_60_launches(
    hopper: str, dtype: torch.dtype, from_last: bool, to_last: bool
) -> None:
    conv = PUBLIC["seed"]
    x, weight = conv.tensors(dtype, "cuda", from_last)
    values = (None, coefficients(conv.C_out, "cuda")[1], -8.0, 8.0)
    expected = pointwise(eager(x, weight, conv), *values)
    first = torch.full_like(laid_out(expected, to_last), math.nan)
    launched(first, conv, x, weight, values, to_last)
    # Both round each term to TF32 at the most, and eager rounds the convolution of half precision as well.
    bound = 0.15 if dtype == torch.float32 else 0.3
    assert sum(int((~((a - b).abs() <= bound)).sum()) for a, b in zip(first, expected, strict=True)) == 0
    del expected
    changed = torch.zeros((), dtype=torch.int64, device="cuda")
    out = torch.empty_like(first)
    for _ in range(60):
        out.fill_(math.nan)
        launched(out, conv, x, weight, values, to_last)
        changed += (out != first).sum()
    assert changed.item() == 0


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_as_accurate_as_cudnn(hopper: str, last: bool) -> None:
    """Without the tail, which only adds roundings to eager's result."""
    conv = replace(PUBLIC["seed"], x=(2, 64, 128, 128))
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = conv.tensors(dtype, "cuda", last)
        y = empty(conv.y, x, last)
        launched(y, conv, x, weight, (), last)
        exact = eager(x.double(), weight.double(), conv)
        ours, theirs = (((each.double() - exact).square().mean()).sqrt() for each in (y, eager(x, weight, conv)))
        assert ours <= 1.1 * theirs


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(hopper: str, last: bool) -> None:
    conv = Conv((3, 16, 6016, 3008), 16, (2,), (2,))
    assert math.prod(conv.y) > 2**31
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("16 GiB of GPU memory are not free")
    x = laid_out(torch.randn(conv.x, device="cuda", dtype=torch.bfloat16), last)
    _, weight = replace(conv, x=(1, 16, 1, 1)).tensors(torch.bfloat16, "cuda")
    y = torch.full_like(laid_out(torch.empty(conv.y, device="cuda", dtype=torch.bfloat16), last), math.nan)
    launched(y, conv, x, weight, (), last)
    corner = replace(conv, x=(1, 16, 8, 8))
    for n, h, w in ((0, 0, 0), (2, 6008, 3000), (2, 0, 3000), (1, 3000, 1500)):
        part = x[n : n + 1, :, h : h + 8, w : w + 8].contiguous()
        assert_close(y[n : n + 1, :, 2 * h : 2 * h + 16, 2 * w : 2 * w + 16], part, weight, corner)
    assert not y.isnan().any()


def trained(
    conv: Conv,
    x: torch.Tensor,
    weight: torch.Tensor,
    values: Sequence[Value],
    gate: Gate,
    last: bool,
    config: Config,
    length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and its bits; memory on both sides of the bits stays as it is."""
    problem = problem_for(x, weight, conv.axes, 1, last, True)
    assert why_no_bits(problem, conv.y[-1]) is None
    march = march_for(problem, x.shape, config, PROCESSORS, length, bits=True)
    y = laid_out(torch.full(conv.y, math.nan, dtype=x.dtype, device=x.device), last)
    memory = torch.full((math.prod(conv.y) // 8 + 128,), 0xA5, dtype=torch.uint8, device=x.device)
    bits = memory[64:-64]
    packed = pack(weight, problem, config)
    launch(y, x, packed, problem, march, coefficients_for(y, *split(values)), bits, gate)
    assert (memory[:64] == 0xA5).all() and (memory[-64:] == 0xA5).all()
    return y, bits


# Bounds that many of the values are on, as numbers and as tensors, and what passes there.
BOUNDS = (
    ((-1.0, 3.0), Gate(lo_open=True, passes_nan=False)),
    ((0.0, None), Gate(lo_open=True)),
    (("tensor", "tensor"), Gate(hi_open=True, passes_nan=False)),
    ((None, "tensor"), Gate(hi_open=True)),
    (("tensor", 2.0), Gate(passes_nan=False)),
    ((-2.0, 2.0), Gate(lo_open=True, hi_open=True)),
)


def check_bits(
    conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool, bounds: int, channels: int | None = None
) -> None:
    """To the bit, on whole numbers and NaN; by the first configuration, or the first of so many channels."""
    x, weight, shift = conv.whole_numbers(dtype, "cuda", largest=1)
    x[0, 1, 2, 3] = math.nan
    x = laid_out(x, from_last)
    z = reference(x.double(), weight.double(), conv.axes, 1, None, shift.double())
    by_channel = torch.arange(conv.C_out, device="cuda").remainder(5).float()
    ends, gate = BOUNDS[bounds]
    tensors = (by_channel - 4, by_channel)
    lo, hi = (tensor if end == "tensor" else end for tensor, end in zip(tensors, ends, strict=True))
    spread = (b.view(-1, *(1,) * conv.rank) if isinstance(b, torch.Tensor) else b for b in (lo, hi))
    exact = pack_bits(passes(z, *spread, gate), to_last)
    clamped = pointwise(z, None, None, *(b.double() if isinstance(b, torch.Tensor) else b for b in (lo, hi)))
    fitting = configs_for(problem_for(x, weight, conv.axes, 1, to_last, True))
    config = next(config for config in fitting if channels in (None, config.channels))
    for length in (None, 1, 4):
        y, bits = trained(conv, x, weight, (None, shift, lo, hi), gate, to_last, config, length)
        wrong = int((bits != exact).sum())
        assert wrong == 0, f"{wrong} of {bits.numel()} bytes, {config}, {length}, {ends}, {gate}"
        torch.testing.assert_close(y.double(), clamped, rtol=0, atol=0, equal_nan=True, check_stride=False)


WHOLE_BYTES = {
    "k3s2": (Conv((3, 48, 6, 36), 40, (3,), (2,), (1,), (1,)), torch.float32, False, False),
    "odd": (ODD, torch.float32, True, True),
    "odd_turned": (ODD, torch.bfloat16, False, True),
    "small": (Conv((7, 32, 4, 4), 16, (3,), (2,), (1,), (1,)), torch.bfloat16, False, False),
    "k4s2": (Conv((2, 64, 5, 36), 64, (4,), (2,), (1,)), torch.bfloat16, True, False),
    "k2s2": (Conv((2, 128, 3, 12), 64, (2,), (2,)), torch.float32, True, False),
    "k2s2_last": (Conv((2, 128, 3, 9), 24, (2,), (2,)), torch.float16, False, True),
    "k3s1": (Conv((2, 32, 5, 24), 32, (3,), (1,), (1,)), torch.bfloat16, False, False),
    "k3s1_turned": (Conv((2, 32, 5, 24), 32, (3,), (1,), (1,)), torch.float32, True, False),
    "k4s4": (Conv((1, 16, 3, 6), 16, (4,), (4,)), torch.float32, False, False),
    "k4s4_turned": (Conv((1, 16, 3, 6), 16, (4,), (4,)), torch.bfloat16, True, False),
    "k1s3": (Conv((1, 32, 3, 5), 16, (1,), (3,), (0,), (2,)), torch.bfloat16, True, True),
    "mixed": (Conv((2, 16, 3, 64), 24, (3, 4), (1, 2), (1, 1)), torch.float16, False, False),
    "k3s2_3d": (Conv((2, 32, 3, 4, 5), 16, (3,), (2,), (1,)), torch.float32, True, True),
    "k3s2_3d_contiguous": (Conv((1, 16, 3, 4, 12), 16, (3,), (2,), (1,), (1,)), torch.bfloat16, False, False),
}


@pytest.mark.parametrize("name", WHOLE_BYTES)
def test_the_bits_of_every_kind_in_runs_of_any_length(hopper: str, name: str) -> None:
    check_bits(*WHOLE_BYTES[name], list(WHOLE_BYTES).index(name) % len(BOUNDS))


K3S2_BYTES = Conv((3, 64, 5, 68), 64, (3,), (2,), (1,), (1,))


@pytest.mark.parametrize("channels", [64, 32, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
def test_the_bits_of_any_layout_in_every_width(
    hopper: str, dtype: torch.dtype, from_last: bool, to_last: bool, channels: int
) -> None:
    bounds = LAYOUTS.index((from_last, to_last)) + channels.bit_length() + (dtype == torch.float32)
    check_bits(K3S2_BYTES, dtype, from_last, to_last, bounds % len(BOUNDS), channels)


@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_is_ever_wrong_in_60_launches(hopper: str, dtype: torch.dtype, from_last: bool, to_last: bool) -> None:
    conv = PUBLIC["seed"]
    _, weight, shift = replace(conv, x=(1, *conv.x[1:])).whole_numbers(dtype, "cuda", largest=1)
    x = laid_out(torch.randint(-1, 2, conv.x, device="cuda", dtype=dtype), from_last)
    gate, bounds = Gate(lo_open=True, passes_nan=False), (-1.0, 3.0)
    z = torch.cat([eager(part.double(), weight.double(), conv).float() for part in x.split(8)])
    z += shift.view(-1, 1, 1)
    exact, y_exact = pack_bits(passes(z, *bounds, gate), to_last), laid_out(z.clamp(*bounds).to(dtype), to_last)
    del z
    config, *_ = configs_for(problem_for(x, weight, conv.axes, 1, to_last, True))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(60):
        y, bits = trained(conv, x, weight, (None, shift, *bounds), gate, to_last, config)
        wrong += (bits != exact).sum() + (y != y_exact).sum()
    assert wrong.item() == 0


@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
def test_training_runs_the_march_and_its_gradients_are_right(hopper: str, from_last: bool, to_last: bool) -> None:
    """Those of another kernel, to the bit, called as it is and compiled by Inductor."""
    x, weight, shift = K3S2_BYTES.whole_numbers(torch.bfloat16, hopper, largest=1)
    leaves = [laid_out(x, from_last).requires_grad_(), weight.requires_grad_(), shift.requires_grad_()]
    grad = torch.randint(-1, 2, K3S2_BYTES.y, device=hopper).to(torch.bfloat16)

    def forward(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, plan: str | None) -> torch.Tensor:
        return conv_transpose_training(
            x, weight, None, [2], [1], [1], [1], shift=shift, lo_number=-1.0, hi_number=3.0, passes_nan=False,
            fused=True, channels_last=to_last, plan=plan,
        )[0]  # fmt: skip

    problem = problem_for(leaves[0], weight, K3S2_BYTES.axes, 1, to_last, True)
    general = next(plan.name for plan in plans_for(problem) if not (plan.is_hopper or plan.is_march or plan.turned))
    results = []
    with mock.patch.object(hopper_march, "launched", side_effect=hopper_march.launched) as launched:
        for run, plan, count in (
            (forward, None, 1),
            (torch.compile(forward, fullgraph=True), None, 2),
            (forward, general, 2),
        ):
            y = run(*leaves, plan)
            assert launched.call_count == count and not on_hopper._broken
            assert is_laid_out(y, to_last)
            results.append((y, *torch.autograd.grad(y, leaves, grad)))
    assert launched.call_args.args[4][1] is not None, "the bits"
    for ours in results[:2]:
        for each, other in zip(ours, results[2], strict=True):
            torch.testing.assert_close(each, other, rtol=0, atol=0, check_stride=False)


ODD_BYTES = {
    "2d": Conv((3, 64, 5, 66), 64, (3,), (2,), (1,), (1,)),
    "3d": Conv((2, 32, 3, 8, 32), 16, (3,), (2,), (1,)),
}


@pytest.mark.parametrize("conv", ODD_BYTES.values(), ids=ODD_BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_runs_the_march_channels_last_where_rows_have_no_whole_bytes(
    hopper: str, conv: Conv, dtype: torch.dtype
) -> None:
    """The gradients of the epilogue's bits, to the bit, called as it is and compiled by Inductor."""
    x, weight, shift = conv.whole_numbers(dtype, hopper, largest=1)
    leaves = [t.requires_grad_() for t in (x, weight, shift)]
    grad = torch.randint(-1, 2, conv.y, device=hopper).to(dtype)
    axis = conv.axes[0]
    sizes = ([axis.stride], [axis.padding], [axis.output_padding], [axis.dilation])

    def forward(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, fused: bool) -> tuple[torch.Tensor, ...]:
        return conv_transpose_training(
            x, weight, None, *sizes, shift=shift, lo_number=-1.0, hi_number=3.0, passes_nan=False,
            fused=fused, channels_last=False,
        )  # fmt: skip

    results = []
    with mock.patch.object(hopper_march, "launched", side_effect=hopper_march.launched) as launched:
        for run, fused, count in (
            (forward, True, 1),
            (torch.compile(forward, fullgraph=True), True, 2),
            (forward, False, 2),
        ):
            y, bits = run(*leaves, fused)
            assert launched.call_count == count and not on_hopper._broken
            assert is_laid_out(y, False) and bits.dim() == 1 + fused
            results.append((y, unpack(bits, y.shape, False), *torch.autograd.grad(y, leaves, grad)))
    for ours in results[:2]:
        for each, other in zip(ours, results[2], strict=True):
            torch.testing.assert_close(each, other, rtol=0, atol=0, check_stride=False)


def operator(
    conv: Conv, x: torch.Tensor, weight: torch.Tensor, last: bool, config: Config, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """With a bound of 0 below."""
    problem = problem_for(x, weight, conv.axes, 1, last, True)
    axes = zip(*((axis.stride, axis.padding, axis.output_padding, axis.dilation) for axis in conv.axes), strict=True)
    call = Call(tuple(axes), (1.0, 0.0, 0.0, None), last, True, config.name)
    packed = pack(weight, problem, config)
    return conv_transpose_hopper(x, weight, packed, None, shift, None, None, None, call.text)


RELU = (None, None, 0.0, None)


@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
def test_the_operator_runs_the_march(hopper: str, from_last: bool, to_last: bool) -> None:
    """Also where x, or the packed weight, comes in another layout than was asked for."""
    x, weight = K3S2.tensors(torch.bfloat16, hopper, from_last)
    for config in configs_for(problem_for(x, weight, K3S2.axes, 1, to_last, True)):
        for given in (x, laid_out(x, not from_last), laid_out(x, from_last)[:, :, :, 3:40]):
            conv = replace(K3S2, x=tuple(given.shape))
            with mock.patch.object(hopper_march, "launched", side_effect=hopper_march.launched) as launched:
                y, again = (operator(conv, given, weight, to_last, config) for _ in range(2))
            assert launched.call_count == 2, "the march takes it"
            assert is_laid_out(y, to_last)
            assert torch.equal(y, again)
            assert_close(y, given, weight, conv, RELU)


def test_inductor_compiles_around_the_operator(hopper: str) -> None:
    x, weight = K3S2.tensors(torch.bfloat16, hopper, True)
    config, *_ = configs_for(problem_for(x, weight, K3S2.axes, 1, True, True))

    def model(x: torch.Tensor) -> torch.Tensor:
        y = conv_transpose(x * 2, weight, [2], [1], [1], [1], lo_number=0.0, channels_last=True, plan=config.name)
        return y * 2

    with mock.patch.object(hopper_march, "launched", side_effect=hopper_march.launched) as launched:
        y = torch.compile(model, fullgraph=True)(x)
    assert launched.call_count == 1
    assert is_laid_out(y, True)
    assert_close(y, x * 2, weight, K3S2, (2.0, None, 0.0, None))


def test_the_operator_gives_gluon_up_once_it_fails(hopper: str, caplog: pytest.LogCaptureFixture) -> None:
    x, weight = K3S2.tensors(torch.bfloat16, hopper)
    with (
        mock.patch.object(on_hopper, "_broken", []),
        mock.patch.object(hopper_march, "launched", side_effect=RuntimeError("no such\ninstruction")) as fails,
        caplog.at_level(logging.WARNING),
    ):
        for _ in range(2):
            assert_close(operator(K3S2, x, weight, False, CONFIGS[0]), x, weight, K3S2, RELU)
        assert fails.call_count == 1
    (record,) = caplog.records
    assert record.getMessage().endswith("from now on others do: RuntimeError: no such instruction")


def test_the_general_operator_runs_the_march_by_its_name(hopper: str) -> None:
    """Called as it is, and none of its errors is lost."""
    x, weight = K3S2.tensors(torch.bfloat16, hopper)
    sizes = ([2], [1], [1], [1])
    with mock.patch.object(hopper_march, "launched", side_effect=hopper_march.launched) as launched:
        y = conv_transpose(x, weight, *sizes, plan="hopper 64, 2 slots")
    assert launched.call_count == 1
    assert_close(y, x, weight, K3S2)
    with pytest.raises(ValueError, match=r"plan is 'hopper 5 slots'; allowed for this convolution are .*hopper 64, 2"):
        conv_transpose(x, weight, *sizes, plan="hopper 5 slots")
    empty = conv_transpose(x[:0], weight, *sizes, plan="hopper 64, 2 slots")
    assert empty.shape == (0, *K3S2.y[1:])


def problem_of(conv: Conv, dtype: torch.dtype, last: bool, allow_tf32: bool = True) -> Problem:
    with FakeTensorMode(), mock.patch.object(problem, "shared_memory_limit", return_value=HOPPER):
        x, weight, _ = conv.fakes(dtype, last, last)
        return problem_for(x, weight, conv.axes, conv.groups, last, allow_tf32)


SEED = PUBLIC["seed"]
REASONS = [
    (replace(SEED, groups=2), False, {}, "it has 2 groups"),
    (replace(SEED, dilation=(2,)), False, {}, "it is dilated"),
    (PUBLIC["hifigan_up1"], False, {}, "no dimension but W has a kernel"),
    (Conv((2, 3, 8, 8), 5, (3,), (2,)), False, {}, "3 times 5 channels are too few"),
    (SEED, False, {"allow_tf32": False}, "float32 without TF32"),
    (Conv((2, 18, 8, 8), 16, (3,), (2,)), True, {}, "pixels of 18 channels are not multiples of 16 bytes"),
    (PUBLIC["dcgan_64"], True, {}, "16 taps times 256 channels are too much for 232448 bytes"),
]


@pytest.mark.parametrize(("conv", "last", "options", "reason"), REASONS, ids=[reason for *_, reason in REASONS])
def test_says_what_it_does_not_take(conv: Conv, last: bool, options: dict[str, bool], reason: str) -> None:
    assert str(why_not(problem_of(conv, torch.float32, last, **options))).startswith(reason)


@pytest.mark.parametrize(
    ("conv", "last", "reason"),
    [
        (K3S2_BYTES, False, None),
        (K3S2, False, "rows of 132 elements are not made of whole bytes"),
        (Conv((2, 16, 8, 8), 16, (3,), (3,)), False, "3 phases of a row are stored one by one"),
        (Conv((2, 16, 8, 8), 16, (8,), (8,)), False, "8 phases of a row are stored one by one"),
        (Conv((2, 16, 7, 7), 24, (3,), (3,)), True, None),
        (Conv((2, 16, 8, 8), 20, (3,), (2,)), True, "20 channels are not a multiple of 8"),
    ],
)
def test_says_where_it_writes_no_bits(conv: Conv, last: bool, reason: str | None) -> None:
    assert why_no_bits(problem_of(conv, torch.bfloat16, last), conv.y[-1]) == reason


@pytest.mark.parametrize(("stride", "pixels"), [(1, 8), (2, 4), (4, 2)])
def test_strips_of_whole_bytes(stride: int, pixels: int) -> None:
    """For rows of 8 elements, of which a strip could hold more than it must."""
    conv = Conv((64, 16, 16, 8 // stride), 16, (4,), (stride,), (1,) if stride == 2 else (0,))
    for last, sizes in itertools.product((False, True), range(1, 40)):
        problem = problem_of(conv, torch.bfloat16, last)
        x = (*conv.x[:3], sizes)
        box = march_for(problem, x, configs_for(problem)[0], PROCESSORS, bits=True).box
        assert math.prod(box) == 64 and box[2] >= (2 if last else pixels)


def test_says_that_images_are_too_large_for_31_bits() -> None:
    problem = problem_of(SEED, torch.bfloat16, True)
    shape = (1, 64, 4096, 4096)
    march = march_for(problem, shape, configs_for(problem)[0], PROCESSORS)
    assert str(why_not_shape(problem, shape, march)).startswith("the images of a strip have 4294967296 elements")
    assert why_not_shape(problem, SEED.x, march) is None


def test_says_where_triton_has_no_gluon() -> None:
    with mock.patch.object(hopper_launch, "gluon_language", side_effect=ImportError("no module named gluon")):
        assert why_no_gluon() == "this triton has no Gluon that the kernels know: no module named gluon"


@pytest.mark.parametrize(
    ("conv", "dtype", "last", "config"),
    [
        (SEED, torch.float32, True, Config(64, 1, together=True)),
        (SEED, torch.float32, False, Config(64, 1)),
        (SEED, torch.bfloat16, True, Config(64, 2, together=True)),
        (SEED, torch.bfloat16, False, Config(64, 2)),
        (PUBLIC["kb_small"], torch.bfloat16, False, Config(16, 2)),
        (PUBLIC["unet_up2"], torch.float32, False, Config(32, 2)),
        (PUBLIC["kb100_3d"], torch.float32, True, Config(16, 2, together=True)),
    ],
)
def test_what_is_chosen(conv: Conv, dtype: torch.dtype, last: bool, config: Config) -> None:
    assert configs_for(problem_of(conv, dtype, last))[0] == config


def test_x_may_come_in_another_layout_than_the_plan_is_for() -> None:
    """Then a configuration takes it that reads the same packed weight, or none does, and the call goes elsewhere."""
    wide = problem_of(Conv((8, 128, 32, 32), 64, (3,), (2,), (1,), (1,)), torch.bfloat16, True)
    turned = replace(wide, x_last=False)
    here, there = ({config.channels for config in configs_for(each)} for each in (wide, turned))
    assert 64 in here and there == {16, 32}
    assert on_hopper._config(wide, "hopper 64, 1 slots") == Config(64, 1)
    assert on_hopper._config(turned, "hopper 32, 1 slots, together").channels == 32
    assert on_hopper._config(turned, "hopper 64, 1 slots") is None
    with pytest.raises(ValueError, match="plan is 'hopper 5 slots'; allowed for this convolution are"):
        on_hopper._config(turned, "hopper 5 slots")


def test_names_tell_configurations_apart() -> None:
    assert len({config.name for config in CONFIGS}) == len(CONFIGS)
    assert Config(64, 2).name == "hopper 64, 2 slots"


@pytest.mark.parametrize(
    ("x", "box", "whole"),
    [
        ((128, 64, 128, 128), (1, 1, 64), True),
        ((128, 64, 16, 16), (4, 1, 16), True),
        ((127, 64, 16, 16), (4, 1, 16), False),
        ((2, 64, 16, 65), (2, 1, 32), False),
        ((1, 64, 16, 128), (1, 1, 64), True),
        ((3, 64, 16, 64), (1, 1, 64), False),  # a group lacks a strip
    ],
)
def test_strips_cover_an_image_with_little_beyond_it(x: tuple[int, ...], box: tuple[int, ...], whole: bool) -> None:
    problem = problem_of(replace(SEED, x=x), torch.bfloat16, True)
    march = march_for(problem, x, configs_for(problem)[0], PROCESSORS)
    assert (march.box, march.whole) == (box, whole)
    assert march.length * (march.grid[0] - 1) < march.total <= march.length * march.grid[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_every_value_once_and_zeros_beyond(dtype: torch.dtype) -> None:
    for conv, last in itertools.product((ODD, K3S2), (False, True)):
        problem = problem_of(conv, dtype, last)
        _, weight = conv.tensors(dtype, "cpu")
        for config in configs_for(problem):
            packed = pack(weight, replace(problem, tf32=False), config)
            columns = -(-conv.C_out // config.channels) * config.channels
            assert packed.shape == (9 * columns, 64) and packed.is_contiguous()
            tap = packed.view(9, columns, 64)[5, :, : conv.x[1]]
            expected = weight[:, :, 1, 2].t()
            assert torch.equal(tap[tap.abs().sum(1) > 0].sort(0).values, expected.sort(0).values)
            if not last:
                assert torch.equal(tap[: conv.C_out], expected)


CPU = Conv((2, 16, 4, 5), 8, (3,), (2,), (1,), (1,))
AXES = ((2,), (1,), (1,), (1,))
SMALLEST = next(config for config in CONFIGS if config.channels == 16)


def test_a_call_is_read_as_it_was_written() -> None:
    for numbers in ((1.0, 0.1, None, math.inf), (-3e-45, 1 / 3, -math.inf, None)):
        for gate in (None, (True, False, True)):
            call = Call(AXES, numbers, True, False, SMALLEST.name, "silu v0", gate)
            assert call_of(call.text) == call
            assert '"' not in call.text, "Inductor's C++ has the text in a string, and escapes nothing"


def test_vectors_without_a_program_are_refused_before_any_launch() -> None:
    """A kernel that was compiled without them would take them for something else."""
    call = Call(AXES, (1.0, 0.0, 0.0, None), False, True, SMALLEST.name)
    with (
        FakeTensorMode(),
        mock.patch.object(on_hopper, "is_hopper", return_value=True),
        mock.patch.object(on_hopper, "why_no_gluon", return_value=None),
        mock.patch.object(problem, "shared_memory_limit", return_value=HOPPER),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=mock.Mock(multi_processor_count=132)),
    ):
        x, weight, _ = CPU.fakes(torch.bfloat16, False, False)
        vectors = x.new_empty(8, 1, dtype=torch.float32)
        with pytest.raises(ValueError, match="vectors has shape"):
            on_hopper.run(x, weight, weight, (None,) * 4, vectors, call.text)


def test_the_operator_is_the_general_one_where_there_is_no_hopper() -> None:
    x, weight = CPU.tensors(torch.float32, "cpu")
    shift = torch.randn(8)
    y = operator(CPU, x, weight, True, SMALLEST, shift)
    assert is_laid_out(y, True)
    assert torch.equal(y, conv_transpose(x, weight, [2], [1], [1], [1], shift=shift, lo_number=0.0, channels_last=True))
    with pytest.raises(ValueError, match="shift has shape"):
        operator(CPU, x, weight, True, SMALLEST, torch.randn(7))
    with pytest.raises(ValueError, match="the output would have sizes"):
        operator(replace(CPU, padding=(9,)), x, weight, True, SMALLEST)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(last: bool) -> None:
    x, weight = CPU.tensors(torch.float32, "cpu", last)
    packed = pack(weight, problem_for(x, weight, CPU.axes, 1, last, True), SMALLEST)
    tensors = (None, torch.randn(8), None, None)
    for channels_last in (False, True):
        call = Call(AXES, (1.0, 0.0, None, 0.5), channels_last, True, SMALLEST.name)
        torch.library.opcheck(conv_transpose_hopper, (x, weight, packed, *tensors, None, call.text))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_training_operator_is_the_general_one_where_there_is_no_hopper(last: bool, channels_last: bool) -> None:
    x, weight = CPU.tensors(torch.float32, "cpu", last)
    packed = pack(weight, problem_for(x, weight, CPU.axes, 1, channels_last, True), SMALLEST)
    call = Call(AXES, (1.0, 0.0, 0.0, 0.5), channels_last, True, SMALLEST.name, gate=(True, False, False))
    arguments = (x, weight, packed, None, torch.randn(8), None, None, call.text)
    y, bits = conv_transpose_hopper_training(*arguments)
    assert is_laid_out(y, channels_last)
    rest = (*call.numbers, *(call.gate or ()), True, channels_last, True)
    expected, other_bits = conv_transpose_training(x, weight, None, *AXES, 1, *arguments[3:7], *rest)
    assert torch.equal(y, expected)
    assert torch.equal(unpack(bits, CPU.y, channels_last), unpack(other_bits, CPU.y, last))
    torch.library.opcheck(conv_transpose_hopper_training, arguments)


def test_training_takes_the_march_where_it_writes_bits_and_a_named_plan_before_that() -> None:
    sizes = ([2], [1], [1], [1])
    gate = Gate(lo_open=True)
    with (
        FakeTensorMode(),
        mock.patch.object(problem, "is_hopper", return_value=True),
        mock.patch.object(problem, "shared_memory_limit", return_value=HOPPER),
        mock.patch.object(
            hopper_training, "conv_transpose_hopper_training", side_effect=conv_transpose_hopper_training
        ) as march,
        mock.patch.object(kernels, "launch_plan"),
    ):
        for conv, plan, turned, taken in (
            (K3S2_BYTES, None, False, True),
            (K3S2_BYTES, None, True, True),
            (K3S2_BYTES, "128x64x128, 4 warps, 3 stages", False, False),
            (ODD_BYTES["2d"], None, False, False),
            (ODD_BYTES["2d"], None, True, True),
            (ODD_BYTES["2d"], "128x64x128, 4 warps, 3 stages", True, False),
        ):
            x, weight, _ = conv.fakes(torch.bfloat16, False, False)
            rest = ((None,) * 4, (1.0, 0.0, 0.0, None), False, True)
            before = march.call_count
            ran = kernels.run(x, weight, *sizes, 1, *rest, gate, plan, turned_bits=turned)
            assert march.call_count - before == taken
            if taken:
                order = (1,) if conv is ODD_BYTES["2d"] else ()
                assert [each.shape for each in ran] == [conv.y, (*order, math.prod(conv.y) // 8)]
                assert is_laid_out(ran[0], False)

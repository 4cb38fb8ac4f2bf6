"""One body for every implementation: the operator on the CPU, the kernels in the interpreter, the kernels on a GPU."""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from fusion_backend.kernels import epilogue as kernels
from fusion_backend.kernels.blocks import FLAT_CONFIGS, TRANSPOSE_CONFIGS, VECTOR_BYTES, Config, choose_config
from fusion_backend.kernels.epilogue import reference
from fusion_backend.kernels.gate import Gate, pack, passes, unpack
from tests.kernels.implementations import DTYPES, Value, every, every_device, split
from tests.kernels.interpreting import interpreted
from tests.kernels.layouts import is_laid_out, laid_out
from tests.kernels.test_gate import GATES, on_and_around


@dataclass(frozen=True)
class Implementation:
    """The operators on ``device``, or where there is a ``twin``, the functions of that instead."""

    device: str
    twin: Any = None

    def __call__(self, x: torch.Tensor, *values: Value, channels_last: bool | None = None) -> torch.Tensor:
        tensors, numbers = split(values)
        if self.twin:
            return self.twin._out_of_place(x, tensors, numbers, channels_last)
        return torch.ops.fused_post.epilogue(x, *tensors, *numbers, channels_last)

    def in_place(self, x: torch.Tensor, *values: Value) -> None:
        tensors, numbers = split(values)
        if self.twin:
            assert self.twin._in_place(x, tensors, numbers) is None
        else:
            assert torch.ops.fused_post.epilogue_(x, *tensors, *numbers) is None

    def gated(self, y: torch.Tensor, values: tuple[Value, ...], gate: Gate | None) -> torch.Tensor:
        with mock.patch.object(kernels, "wrap_triton", lambda kernel: kernel):
            return (self.twin or kernels).gated_(y, *split(values), gate)

    def launch(self, out: torch.Tensor, x: torch.Tensor, values: list[Value], config: Config, *bits: Any) -> None:
        module = self.twin or kernels
        given = module.coefficients_for(x, *split(values))
        with mock.patch.object(kernels, "wrap_triton", lambda kernel: kernel):
            module.launch(out, x, given, config, *bits)


ON_CPU = Implementation("cpu")
INTERPRETED = Implementation("cpu", interpreted(kernels))
ON_GPU = Implementation("cuda")

every_kernel = every(interpreter=INTERPRETED, gpu=ON_GPU)
every_implementation = every(operator=ON_CPU, interpreter=INTERPRETED, gpu=ON_GPU)


def random(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator)).to(device, dtype)


def coefficients(C: int, device: str, kinds: tuple[str, ...] = ("tensor",) * 4) -> list[Value]:
    """scale, shift, lo, hi of the given kinds (none, number or tensor); both bounds are hit often."""
    generator = torch.Generator().manual_seed(C)
    tensors = [
        torch.randn(C, generator=generator),
        torch.randn(C, generator=generator),
        -torch.rand(C, generator=generator),
        torch.rand(C, generator=generator),
    ]
    numbers = [-1.7, 0.3, -0.9, 0.8]
    made = {"none": [None] * 4, "number": numbers, "tensor": [tensor.to(device) for tensor in tensors]}
    return [made[kind][place] for place, kind in enumerate(kinds)]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one rounding of the dtype; the fused multiply-add of a GPU may round the fp32 sum differently."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(
        actual, expected, rtol=torch.finfo(actual.dtype).eps, atol=1e-6, equal_nan=True, check_stride=False
    )


@every_implementation
@pytest.mark.parametrize("to_last", [False, True], ids=["to_contiguous", "to_channels_last"])
@pytest.mark.parametrize("from_last", [False, True], ids=["from_contiguous", "from_channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 11), (2, 5, 6, 4), (1, 16, 3, 4, 8)], ids=["1d", "2d", "3d"])
def test_computes_the_formula_in_every_rank_dtype_and_layout(
    run: Implementation, shape: tuple[int, ...], dtype: torch.dtype, from_last: bool, to_last: bool
) -> None:
    x = laid_out(random(shape, dtype, run.device), from_last)
    values = coefficients(shape[1], run.device)
    y = run(x, *values, channels_last=to_last)
    assert_same(y, reference(x, *values))
    assert is_laid_out(y, to_last)
    kept = run(x, *values)
    assert torch.equal(kept, y)
    assert kept.stride() == x.stride()


@every_implementation
@pytest.mark.parametrize("turn", [False, True], ids=["flat", "transpose"])
def test_every_coefficient_can_be_missing_a_number_or_a_tensor(run: Implementation, turn: bool) -> None:
    x = random((2, 3, 4, 5), torch.float32, run.device)
    for kinds in itertools.product(("none", "number", "tensor"), repeat=4):
        values = coefficients(3, run.device, kinds)
        assert_same(run(x, *values, channels_last=turn), reference(x, *values))


SIZES = [
    (1, 1, 1),  # one element
    (5, 1, 1, 1),
    (1, 1, 17),  # one channel
    (2, 7, 13, 11),  # primes: nothing divides anything
    (1, 3, 41, 43),  # a row spans blocks, a block spans two rows
    (3, 2, 1031),
    (1, 2, 2051),  # bfloat16: a row longer than the smallest block, and no multiple of a vector
    (2, 3, 32, 32),  # rows that are blocks
    (7, 64, 3, 3),  # many rows a block; channels_last: whole pixels a block
    (3, 4, 5, 6),  # half precision: fewer channels than a vector holds
    (2, 24, 4, 9),  # vectors divide the channels, blocks do not
    (1, 2050, 5),  # more channels than a block holds
    (2, 2048, 1, 3),
    (2, 65, 33),  # one more than a tile
    (0, 3, 4, 4),
    (2, 0, 4, 4),
    (2, 3, 0, 4),
]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_any_size_in_every_layout(run: Implementation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = coefficients(shape[1], run.device)
    for from_last, to_last in itertools.product((False, True), repeat=2):
        x = laid_out(random(shape, dtype, run.device), from_last)
        expected = reference(x, *values)
        assert_same(run(x, *values, channels_last=to_last), expected)
        run.in_place(x, *values)
        assert_same(x, expected)


def name_of(config: Config) -> str:
    return f"{config.block_bytes}x{config.num_warps}"


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_last", [False, True], ids=["from_contiguous", "from_channels_last"])
@pytest.mark.parametrize(
    ("config", "turn"),
    [
        *(pytest.param(config, False, id=f"flat-{name_of(config)}") for config in FLAT_CONFIGS),
        *(pytest.param(config, True, id=f"transpose-{name_of(config)}") for config in TRANSPOSE_CONFIGS),
    ],
)
def test_every_configuration_writes_every_element_and_nothing_else(
    run: Implementation, config: Config, turn: bool, from_last: bool, dtype: torch.dtype
) -> None:
    """Three blocks and a third; memory is NaN before, also to both sides of the output."""
    block, margin = config.elements(dtype), 64
    to_last = from_last != turn
    for C, L in ((2, block * 5 // 3), (block * 10 // 3, 1), (18, block * 5 // 27), (64, block * 5 // 96)):
        x = laid_out(random((1, C, L), dtype, run.device), from_last)
        values = coefficients(C, run.device)
        memory = torch.full((C * L + 2 * margin,), math.nan, dtype=dtype, device=run.device)
        inner = memory[margin:-margin]
        out = inner.view(1, L, C).transpose(1, 2) if to_last else inner.view(1, C, L)
        run.launch(out, x, values, config)
        assert_same(out, reference(x, *values))
        assert memory[:margin].isnan().all()
        assert memory[-margin:].isnan().all()


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_and_beyond_the_bounds(run: Implementation, dtype: torch.dtype) -> None:
    on_and_around = torch.tensor([-0.5, -0.50390625, -0.49609375, 0.0, 0.25, 0.2490234375, 0.2509765625, 9.0])
    x = on_and_around.to(run.device, dtype).view(1, 1, 2, 4)
    expected = x.clamp(-0.5, 0.25)
    assert torch.equal(run(x, None, None, -0.5, 0.25), expected)
    bounds = torch.tensor([-0.5], device=run.device), torch.tensor([0.25], device=run.device)
    assert torch.equal(run(x, None, None, *bounds), expected)


@every_implementation
def test_where_the_bounds_cross_the_upper_one_wins(run: Implementation) -> None:
    x = random((2, 3, 4), torch.float32, run.device)
    assert torch.equal(run(x, None, None, 1.0, -1.0), torch.clamp(x, 1.0, -1.0))
    assert torch.equal(run(x, None, None, 1.0, -1.0), torch.full_like(x, -1.0))


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turn", [False, True], ids=["flat", "transpose"])
def test_nan_goes_through_and_infinities_clamp(run: Implementation, dtype: torch.dtype, turn: bool) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, math.nan, -1.0], device=run.device, dtype=dtype).view(1, 2, 3)
    for kinds in itertools.product(("none", "number", "tensor"), repeat=4):
        values = coefficients(2, run.device, kinds)
        assert_same(run(x, *values, channels_last=turn), reference(x, *values))
    clamped = run(x, None, None, 0.0, 1.0, channels_last=turn)
    expected = torch.tensor([math.nan, 1, 0, 1, math.nan, 0], device=run.device, dtype=dtype).view(1, 2, 3)
    torch.testing.assert_close(clamped, expected, equal_nan=True, rtol=0, atol=0, check_stride=False)


@every_implementation
def test_coefficients_that_are_not_finite(run: Implementation) -> None:
    """Expected is what tensors do: before 2.13 ``torch.clamp`` overlooks a bound that is the number NaN on CPUs."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0, -1.0], device=run.device).view(1, 2, 3)
    for place, number in itertools.product(range(4), [math.nan, math.inf, -math.inf]):
        values: list[Value] = [None] * 4
        values[place] = torch.full((2,), number, device=run.device)
        expected = reference(x, *values)
        assert_same(run(x, *values), expected)
        values[place] = number
        assert_same(run(x, *values), expected)
        if math.isinf(number):
            values[place] = math.copysign(1e300, number)  # infinite in fp32
            assert_same(run(x, *values), expected)


@every_implementation
def test_the_sign_of_zero_is_kept(run: Implementation) -> None:
    zeros = torch.tensor([-0.0, 0.0], device=run.device).view(1, 1, 2)
    for values in ((), (3.0,), (None, None, -1.0, 1.0), (None, 0.0)):
        assert torch.equal(run(zeros, *values).signbit(), zeros.signbit())


@every_implementation
@pytest.mark.parametrize("channels_last", [None, False, True])
def test_sliced_and_expanded_inputs(run: Implementation, channels_last: bool | None) -> None:
    dense = random((3, 8, 6, 10), torch.float32, run.device)
    values = coefficients(4, run.device)
    inputs = [
        dense[:, ::2],
        dense[:, 2:6],
        dense[:, :4, 1:, 3:9],
        laid_out(dense, True)[:, :4],
        laid_out(dense, True)[:, :4, ::2],
        dense[:, :4].permute(0, 1, 3, 2),
        dense[:1, :4].expand(3, 4, 6, 10),
        dense[:, :1].expand(3, 4, 6, 10),
    ]
    for x in inputs:
        y = run(x, *values, channels_last=channels_last)
        assert_same(y, reference(x, *values))
        assert is_laid_out(y, bool(channels_last))


@every_implementation
def test_in_place_on_a_slice_leaves_the_rest_alone(run: Implementation) -> None:
    values = coefficients(4, run.device)
    for part in (slice(None, None, 2), slice(2, 6)):
        for channels_last in (False, True):
            x = laid_out(random((3, 8, 6, 10), torch.float32, run.device), channels_last)
            expected = x.clone()
            expected[:, part] = reference(x[:, part], *values)
            run.in_place(x[:, part], *values)
            assert_same(x, expected)


@every_implementation
def test_in_place_on_memory_shared_by_elements_is_refused_as_in_eager(run: Implementation) -> None:
    x = torch.zeros(1, 3, 1, device=run.device).expand(2, 3, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        run.in_place(x, 2.0)


@every_implementation
def test_addresses_that_16_does_not_divide(run: Implementation) -> None:
    memory = random((2 * 4 * 24 + 1,), torch.bfloat16, run.device)
    x = memory[1:].view(2, 4, 24)
    values = coefficients(4, run.device)
    assert_same(run(x, *values), reference(x, *values))
    assert_same(run(x, *values, channels_last=True), reference(x, *values))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [("none", "tensor"), ("tensor", "none")], ids=["shift", "scale"])
def test_half_precision_is_rounded_exactly_once(
    run: Implementation, dtype: torch.dtype, kinds: tuple[str, str]
) -> None:
    """With one operation before the clamp there is no multiply-add, so fp32 is exact to the bit everywhere."""
    x = random((4, 6, 40), dtype, run.device)
    values = coefficients(6, run.device, (*kinds, "tensor", "number"))
    for turn in (False, True):
        once = reference(x.float(), *values).to(dtype)
        assert torch.equal(run(x, *values, channels_last=turn), once)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_float64_than_eager(run: Implementation, dtype: torch.dtype) -> None:
    """The rule of Dynamo's own accuracy check, for the chain of the seed: + bias, clamp, * s, clamp, / s."""
    x = random((4, 16, 20, 20), dtype, run.device)
    bias = random((16,), dtype, run.device, seed=1)

    def chain(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ((x + bias.view(-1, 1, 1)).clamp(0, 1) * 2.0).clamp(0, 1) / 2.0

    exact = chain(x.double(), bias.double())

    def rmse(y: torch.Tensor) -> float:
        return (y.double() - exact).square().mean().sqrt().item()

    ours = run(x, None, bias.float(), 0.0, 0.5)
    assert rmse(ours) <= 2 * rmse(chain(x, bias)) + torch.finfo(dtype).eps / 10


@every_implementation
@pytest.mark.parametrize("channels_last", [False, True])
def test_in_place_writes_where_x_lies(run: Implementation, channels_last: bool) -> None:
    x = laid_out(random((2, 8, 6, 5), torch.float32, run.device), channels_last)
    values = coefficients(8, run.device)
    expected, address, strides = reference(x, *values), x.data_ptr(), x.stride()
    run.in_place(x, *values)
    assert_same(x, expected)
    assert (x.data_ptr(), x.stride()) == (address, strides)


def around(shape: tuple[int, ...], *bounds: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Filled with what lies on and around the bounds, over and over."""
    values = on_and_around(*bounds, dtype=dtype)
    numel = math.prod(shape)
    return values.repeat(numel // len(values) + 1)[:numel].view(shape).to(device)


def expected_bits(x: torch.Tensor, lo: Value, hi: Value, gate: Gate, channels_last: bool) -> torch.Tensor:
    lo, hi = (bound.view(-1, *(1,) * (x.dim() - 2)) if isinstance(bound, torch.Tensor) else bound for bound in (lo, hi))
    return pack(passes(x.float(), lo, hi, gate), channels_last)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_bits_of_any_size_in_both_layouts(run: Implementation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    lo, hi = (torch.full((shape[1],), bound, device=run.device) for bound in (-0.5, 0.75))
    for channels_last, gate in ((False, Gate(lo_open=True)), (True, Gate(hi_open=True, passes_nan=False))):
        x = laid_out(around(shape, -0.5, 0.75, dtype=dtype, device=run.device), channels_last)
        y = x.clone()
        bits = run.gated(y, (None, None, lo, hi), gate)
        assert torch.equal(bits, expected_bits(x, lo, hi, gate, bool(kernels.is_channels_last(x))))
        assert_same(y, reference(x, None, None, lo, hi))
        assert y.stride() == x.stride()


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_bits_of_every_gate_and_pair_of_bounds(run: Implementation, gate: Gate, dtype: torch.dtype) -> None:
    x = around((2, 3, 3, 5), -0.5, 0.75, dtype=dtype, device=run.device)
    los, his = ((None, bound, torch.full((3,), bound, device=run.device)) for bound in (-0.5, 0.75))
    for lo, hi in ((None, None), (los[1], None), (None, his[2]), (los[2], his[1])):
        bits = run.gated(x.clone(), (None, None, lo, hi), gate)
        assert torch.equal(bits, expected_bits(x, lo, hi, gate, False))


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_of_the_value_before_it_is_clamped_and_rounded(run: Implementation, dtype: torch.dtype) -> None:
    """1 + 2^-20 is beyond a bound of 1, though it is 1 in half precision."""
    x = torch.tensor([1.0, -1.0] * 5, device=run.device, dtype=dtype).view(1, 2, 5)
    beyond = torch.tensor([2.0**-20, -(2.0**-20)], device=run.device)
    bits = run.gated(x.clone(), (1.0, beyond, None, 1.0), Gate())
    assert torch.equal(bits, pack(x * 1.0 + beyond.view(2, 1) <= 1.0, False))
    assert bits.sum().item() not in (0, 255 + 3)
    doubled = run.gated(x.clone(), (torch.full((2,), 2.0, device=run.device), None, -2.0, 1.5), Gate(lo_open=True))
    assert torch.equal(doubled, pack((2 * x > -2) & (2 * x <= 1.5), False))


@every_implementation
def test_a_bound_that_is_no_bound_blocks_nothing(run: Implementation) -> None:
    x = torch.tensor([math.inf, -math.inf, 0.0, math.nan], device=run.device).view(1, 1, 4)
    bits = run.gated(x.clone(), (None, None, -math.inf, math.inf), Gate(lo_open=True, hi_open=True))
    assert bits.tolist() == [0b1111]


@every_implementation
@pytest.mark.parametrize("channels_last", [False, True])
def test_without_a_gate_there_are_no_bits(run: Implementation, channels_last: bool) -> None:
    x, values = laid_out(random((2, 3, 4, 5), torch.float32, run.device), channels_last), coefficients(3, run.device)
    y = x.clone()
    bits = run.gated(y, tuple(values), None)
    assert (bits.shape, bits.dtype) == ((0,), torch.uint8)
    assert_same(y, reference(x, *values))


def test_bits_of_float64_are_those_of_float64() -> None:
    """1/3 is another number in float32."""
    x = torch.tensor([1 / 3, math.nextafter(1 / 3, 0), math.nextafter(1 / 3, 1)], dtype=torch.float64).view(1, 1, 3)
    y = x.clone()
    assert kernels.gated_(y, (None,) * 4, (1.0, 0.0, None, 1 / 3), Gate()).tolist() == [0b011]
    assert y.flatten().tolist() == [*x.flatten()[:2].tolist(), 1 / 3]


def test_bits_of_memory_with_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"y has strides \(24, 12, 2\) for shape \(2, 2, 6\); allowed: contiguous or"):
        kernels.gated_(torch.zeros(2, 2, 12)[:, :, ::2], (None,) * 4, (1.0, 0.0, 0.0, None), Gate())


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", FLAT_CONFIGS, ids=lambda config: name_of(config))
def test_every_configuration_writes_every_bit_and_nothing_else(
    run: Implementation, config: Config, dtype: torch.dtype
) -> None:
    """Two blocks and a third; memory is NaN before, of the bits 0b10101010, also to both sides."""
    block, margin = config.elements(dtype), 64
    for channels_last, C, L in ((False, 2, block * 7 // 6), (False, 18, block * 5 // 27), (True, 64, block * 5 // 96)):
        x = laid_out(random((1, C, L), dtype, run.device), channels_last)
        values = coefficients(C, run.device, ("none", "none", "tensor", "tensor"))
        gate = Gate(hi_open=True)
        expected = expected_bits(x, values[2], values[3], gate, channels_last)
        outs = torch.full((C * L + 2 * margin,), math.nan, dtype=dtype, device=run.device)
        bytes_ = torch.full((len(expected) + 2 * margin,), 0b10101010, dtype=torch.uint8, device=run.device)
        inner = outs[margin:-margin]
        out = inner.view(1, L, C).transpose(1, 2) if channels_last else inner.view(1, C, L)
        run.launch(out, x, values, config, bytes_[margin:-margin], gate)
        assert_same(out, reference(x, *values))
        assert torch.equal(bytes_[margin:-margin], expected)
        for side in (slice(margin), slice(-margin, None)):
            assert outs[side].isnan().all()
            assert (bytes_[side] == 0b10101010).all()


# What a user can get wrong, each with the message's first words.
X = torch.zeros(2, 3, 4, 4)
MISTAKES = [
    ((torch.zeros(2, 3),), {}, ValueError, r"x has rank 2 \(shape \(2, 3\)\); allowed are ranks 3 to 5"),
    ((torch.zeros(1, 2, 1, 1, 1, 1),), {}, ValueError, "x has rank 6"),
    ((X.double(),), {}, TypeError, "x has dtype torch.float64; allowed are torch.float32, torch.float16, "),
    ((X.to(torch.complex64),), {}, TypeError, "x has dtype torch.complex64"),
    ((X.int(),), {}, TypeError, "x has dtype torch.int32"),
    ((X, torch.ones(4)), {}, ValueError, r"scale has shape \(4,\); allowed is \[C\] = \(3,\)"),
    ((X, None, torch.ones(1)), {}, ValueError, r"shift has shape \(1,\)"),
    ((X,), {"lo": torch.ones(3, 1, 1)}, ValueError, r"lo has shape \(3, 1, 1\)"),
    ((X,), {"hi": torch.tensor(1.0)}, ValueError, r"hi has shape \(\)"),
    ((X,), {"hi": torch.ones(3).half()}, TypeError, "hi has dtype torch.float16; allowed is torch.float32"),
    ((X,), {"lo": torch.ones(3, device="meta")}, ValueError, "lo is on meta; allowed is x's device, cpu"),
    ((X,), {"shift": torch.ones(6)[::2]}, ValueError, "shift has stride 2; allowed is 1: call .contiguous"),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_mistakes_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], error: type, message: str) -> None:
    for operator in (torch.ops.fused_post.epilogue, torch.ops.fused_post.epilogue_):
        with pytest.raises(error, match=message):
            operator(*args, **kwargs)


def test_the_operators_have_the_agreed_schemas() -> None:
    tensors = "Tensor? scale=None, Tensor? shift=None, Tensor? lo=None, Tensor? hi=None"
    numbers = "float scale_number=1., float shift_number=0., float? lo_number=None, float? hi_number=None"
    program = 'str program="", Tensor? vectors=None, Tensor? tensor_0=None, Tensor? tensor_1=None'
    assert str(torch.ops.fused_post.epilogue.default._schema) == (
        f"fused_post::epilogue(Tensor x, {tensors}, {numbers}, bool? channels_last=None, {program}) -> Tensor"
    )
    assert str(torch.ops.fused_post.epilogue_.default._schema) == (
        f"fused_post::epilogue_(Tensor(a0!) x, {tensors}, {numbers}, {program}) -> ()"
    )


@every_device
@pytest.mark.parametrize("from_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 8, 4, 4), (1, 3, 2, 3, 4)], ids=["1d", "2d", "3d"])
def test_opcheck(shape: tuple[int, ...], from_last: bool, device: str) -> None:
    values = coefficients(shape[1], device)
    x = laid_out(random(shape, torch.float32, device), from_last)
    torch.library.opcheck(torch.ops.fused_post.epilogue_.default, (x.clone(), *values))
    for kwargs in ({"channels_last": True}, {"channels_last": False}, {"lo_number": 0.0, "hi_number": 6.0}):
        torch.library.opcheck(torch.ops.fused_post.epilogue.default, (x, None, values[1]), kwargs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("channels_last", [None, False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 8, 4, 4), (1, 3, 2, 3, 4), (2, 0, 3)], ids=str)
def test_fake_tensors_need_no_gpu(shape: tuple[int, ...], channels_last: bool | None, device: str) -> None:
    with FakeTensorMode():
        x = torch.empty(shape, device=device, dtype=torch.bfloat16)
        y = torch.ops.fused_post.epilogue(x, hi_number=1.0, channels_last=channels_last)
        assert torch.ops.fused_post.epilogue_(x, hi_number=1.0) is None
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    real = torch.ops.fused_post.epilogue(torch.empty(shape, dtype=torch.bfloat16), channels_last=channels_last)
    assert y.stride() == real.stride()


@pytest.mark.parametrize("channels_last", [False, True])
def test_sizes_that_vary_are_traced_into_one_launch(channels_last: bool) -> None:
    """All but the channels may vary; what is fixed is whether a tensor is large and whether vectors divide rows."""
    x = laid_out(random((2, 16, 40, 32), torch.float32, "cpu"), channels_last)

    def shifted_relu(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return kernels._out_of_place(x, (None, shift, None, None), (1.0, 0.0, 0.0, None), None)

    with mock.patch.object(kernels, "runs_kernel", return_value=True):
        graph = make_fx(shifted_relu, tracing_mode="symbolic")(x, torch.ones(16))
    launches = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(launches) == 1
    assert len(graph.shape_env.guards) <= 3


@pytest.mark.parametrize("channels_last", [False, True])
def test_bits_of_sizes_that_vary_are_traced_into_one_launch(channels_last: bool) -> None:
    x = laid_out(random((2, 16, 40, 32), torch.float32, "cpu"), channels_last)

    def gated_relu(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + 1
        bits = kernels.gated_(y, (None, shift, None, None), (1.0, 0.0, 0.0, None), Gate(lo_open=True))
        return y, bits

    with mock.patch.object(kernels, "runs_kernel", return_value=True):
        graph = make_fx(gated_relu, tracing_mode="symbolic")(x, torch.ones(16))
    launches = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(launches) == 1
    assert len(graph.shape_env.guards) <= 3


@pytest.mark.parametrize("channels_last", [False, True])
def test_on_a_cpu_inductor_fuses_the_reference_of_the_bits(channels_last: bool) -> None:
    x = laid_out(around((2, 3, 5, 7), -0.5, 0.75, dtype=torch.float32, device="cpu"), channels_last)

    @torch.compile(fullgraph=True)
    def gated(x: torch.Tensor, hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = kernels.Coefficients((None, None, None, hi), (0.0, 0.0, -0.5, 0.0), (False, False, True, True))
        return kernels.gated_reference(x * 1, given, Gate(hi_open=True), channels_last)

    hi = torch.full((3,), 0.75)
    y, bits = gated(x, hi)
    assert_same(y, reference(x, None, None, -0.5, hi))
    assert torch.equal(bits, expected_bits(x, -0.5, hi, Gate(hi_open=True), channels_last))


def test_on_a_cpu_inductor_fuses_the_reference() -> None:
    x, values = random((2, 8, 6, 6), torch.float32, "cpu"), coefficients(8, "cpu")

    @torch.compile(fullgraph=True)
    def twice(x: torch.Tensor, *values: Value) -> torch.Tensor:
        y = torch.ops.fused_post.epilogue(x * 2, *values, channels_last=True)
        torch.ops.fused_post.epilogue_(y, None, values[1])
        return y

    y = twice(x, *values)
    assert_same(y, reference(reference(x * 2, *values), None, values[1]))
    assert is_laid_out(y, True)


def test_under_triton_interpret_the_operators_run_the_kernels() -> None:
    code = """
import torch
from triton.runtime.interpreter import InterpretedFunction
from fusion_backend.kernels import epilogue as kernels

ran = []
run = InterpretedFunction.run
InterpretedFunction.run = lambda self, *args, **kwargs: (ran.append(self.__name__), run(self, *args, **kwargs))
x, shift = torch.randn(2, 8, 5, 5), torch.randn(8)
expected = kernels.reference(x, None, shift, 0.0)
for channels_last in (False, True):
    y = torch.ops.fused_post.epilogue(x, None, shift, lo_number=0.0, channels_last=channels_last)
    torch.testing.assert_close(y, expected)
torch.ops.fused_post.epilogue_(x, None, shift, lo_number=0.0)
torch.testing.assert_close(x, expected)
torch.library.opcheck(torch.ops.fused_post.epilogue.default, (x, None, shift))
print(*ran[:3])
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "_flat_kernel _transpose_kernel _flat_kernel\n", run.stderr


def test_large_tensors_get_large_blocks_where_tiles_are_turned_or_rows_are_no_whole_vectors() -> None:
    for transposing, aligned in ((False, False), (True, False), (True, True)):
        small, large = TRANSPOSE_CONFIGS if transposing else FLAT_CONFIGS
        assert [choose_config(transposing, size, aligned) for size in (0, 2**20, 2**24, 2**40)] == [small] * 2 + [
            large
        ] * 2
    assert {choose_config(False, size) for size in (0, 2**24, 2**40)} == {FLAT_CONFIGS[0]}


def test_configurations_are_whole_vectors_a_thread() -> None:
    for config in (*FLAT_CONFIGS, *TRANSPOSE_CONFIGS):
        assert config.block_bytes % (VECTOR_BYTES * 32 * config.num_warps) == 0
        assert config.block_bytes & (config.block_bytes - 1) == 0


def wrong_elements(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """How many elements differ by more than one rounding; chunk by chunk, for tensors that fill the memory."""
    eps = torch.finfo(actual.dtype).eps
    count = 0
    for ours, theirs in zip(actual.split(1), expected.split(1), strict=True):
        ours, theirs = ours.float(), theirs.float()
        count += int((~((ours - theirs).abs() <= eps * theirs.abs() + 1e-6)).sum())
    return count


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("from_last", [False, True], ids=["from_contiguous", "from_channels_last"])
@pytest.mark.parametrize("C", [7, 16])
def test_more_than_2_to_the_31_elements(C: int, from_last: bool) -> None:
    shape = (3, C, 2**31 // (3 * C * 4096) + 1, 4096)
    numel = math.prod(shape)
    assert numel > 2**31
    if torch.cuda.mem_get_info()[0] < 10 * 2 * numel:
        pytest.skip(f"{10 * 2 * numel / 2**30:.0f} GiB of GPU memory are not free")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    x = laid_out(x, from_last)
    values = coefficients(C, "cuda")
    expected = torch.empty_like(x)
    for image in range(shape[0]):
        expected[image] = reference(x[image : image + 1], *values)[0]
    for to_last in (False, True):
        y = ON_GPU(x, *values, channels_last=to_last)
        assert is_laid_out(y, to_last)
        assert wrong_elements(y, expected) == 0
        del y
    bits = ON_GPU.gated(x, tuple(values), Gate())
    assert wrong_elements(x, expected) == 0
    # A value that was clamped lies on a bound now, and hardly any other does.
    passing = unpack(bits, shape, from_last)
    lo, hi = (values[place].view(-1, 1, 1).to(x.dtype) for place in (2, 3))
    for image in range(shape[0]):
        on_a_bound = (x[image] == lo) | (x[image] == hi)
        assert (passing[image] | on_a_bound).all()
        assert (passing[image] & on_a_bound).float().mean().item() < 0.05


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("from_last", [False, True], ids=["from_contiguous", "from_channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_is_ever_wrong_in_repeated_launches(dtype: torch.dtype, from_last: bool) -> None:
    x = laid_out(torch.randn(32, 64, 128, 128, device="cuda").to(dtype), from_last)
    values = coefficients(64, "cuda", ("none", "none", "tensor", "tensor"))
    gate = Gate(lo_open=True)
    expected = expected_bits(x, values[2], values[3], gate, from_last)
    for config in FLAT_CONFIGS:
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(30):
            out, bits = torch.full_like(x, math.nan), torch.full_like(expected, 0b10101010)
            ON_GPU.launch(out, x, values, config, bits, gate)
            wrong += (bits != expected).sum()
        assert wrong.item() == 0, f"{wrong.item()} wrong bytes with {config}"


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("from_last", [False, True], ids=["from_contiguous", "from_channels_last"])
@pytest.mark.parametrize("turn", [False, True], ids=["flat", "transpose"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_element_is_ever_wrong_in_repeated_launches(dtype: torch.dtype, turn: bool, from_last: bool) -> None:
    x = laid_out(torch.randn(32, 64, 128, 128, device="cuda").to(dtype), from_last)
    values = coefficients(64, "cuda")
    expected = laid_out(reference(x, *values), from_last != turn)
    for config in TRANSPOSE_CONFIGS if turn else FLAT_CONFIGS:
        first = torch.full_like(expected, math.nan)
        ON_GPU.launch(first, x, values, config)
        assert wrong_elements(first, expected) == 0
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(30):
            out = torch.full_like(expected, math.nan)
            ON_GPU.launch(out, x, values, config)
            wrong += (out != first).sum()
        assert wrong.item() == 0, f"{wrong.item()} wrong elements with {config}"


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["out_of_place", "in_place", "transpose"])
def test_inductor_launches_the_kernel_without_python(kind: str, dynamic: bool) -> None:
    """One kernel of Inductor's for ``x * 2``, then ours: no copies, and no call of the operator."""
    from torch._inductor.utils import run_and_get_code

    shift = torch.randn(16, device="cuda")

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        if kind == "in_place":
            torch.ops.fused_post.epilogue_(x, None, shift, lo_number=0.0)
            return x
        channels_last = True if kind == "transpose" else None
        return torch.ops.fused_post.epilogue(x, None, shift, lo_number=0.0, channels_last=channels_last)

    compiled = torch.compile(function, backend="inductor", fullgraph=True, dynamic=dynamic)
    kernel = "_transpose_kernel" if kind == "transpose" else "_flat_kernel"
    for height in (40, 56):
        x = torch.randn(2, 16, height, 32, device="cuda")
        y, codes = run_and_get_code(compiled, x)
        assert_same(y, reference(x * 2, None, shift, 0.0))
        for code in codes:
            assert f"{kernel}_0.run(" in code
            assert "torch.ops.fused_post" not in code
            assert code.count("async_compile.triton(") == 2


@every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SIZES, (3, 70, 16, 8), (0, 3, 4, 5)], ids=str)
def test_turned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Values of ``after`` do not matter, NaN ones neither."""
    x = random(shape, dtype, device)
    after = torch.full((1, shape[1], 1), math.nan, dtype=dtype, device=device)
    for last, to_last, waits in itertools.product((False, True), (False, True), (after, None)):
        y = torch.ops.fused_post.turned(laid_out(x, last), waits, to_last)
        assert torch.equal(y, x) and is_laid_out(y, to_last)
    torch.library.opcheck(torch.ops.fused_post.turned.default, (x, after, True))

"""The march in the interpreter and on a GPU, against float64; and which problems it takes, and how it cuts them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

from fusion_backend.kernels import launching, problem, row_march
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.coefficients import reference as pointwise
from fusion_backend.kernels.conv_transpose import reference
from fusion_backend.kernels.gate import Gate, pack, passes
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.problem import Problem, problem_for
from fusion_backend.kernels.strips import CONFIGS, Config, choose_march, configs_for, march_for, why_no_bits, why_not
from tests.kernels.compiling import record_launches
from tests.kernels.convolutions import PUBLIC, Conv, assert_close, coefficients, eager, tf32
from tests.kernels.implementations import DTYPES, Value, every, split
from tests.kernels.interpreting import interpreted
from tests.kernels.layouts import laid_out, unflattened

LAYOUTS = tuple(itertools.product((False, True), repeat=2))
HOPPER, ADA = 227 * 1024, 99 * 1024
NARROW = Config(64, 16, 4, 2)


@dataclass(frozen=True)
class Run:
    """The launcher on ``device``, or where there is a ``twin``, that of the interpreter."""

    device: str
    twin: Any = None

    def problem(self, conv: Conv, x: torch.Tensor, weight: torch.Tensor, last: bool) -> Problem:
        problem = problem_for(x, weight, conv.axes, conv.groups, last, True)
        # The interpreter knows no TF32, and the machine that it runs on no limit.
        return replace(problem, tf32=False, shared_limit=HOPPER) if self.twin else problem

    def launch(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        problem: Problem,
        values: Sequence[Value] = (),
        config: Config | None = None,
        segments: int | None = None,
        *gated: Any,
    ) -> None:
        """With the configuration that is chosen, unless one is given; ``gated``: bits to fill, and their gate."""
        module = self.twin or row_march
        given = coefficients_for(out, *split(values))
        march = march_for(problem, x.shape, config, segments) if config else choose_march(problem, x.shape)
        with mock.patch.object(row_march, "wrap_triton", lambda kernel: kernel):
            module.launch(out, x, module.pack(weight, problem, march.config), problem, march, given, *gated)

    def __call__(
        self,
        conv: Conv,
        x: torch.Tensor,
        weight: torch.Tensor,
        values: Sequence[Value] = (),
        last: bool = False,
        config: Config | None = NARROW,
        segments: int | None = None,
    ) -> torch.Tensor:
        """y; memory is NaN before, and must still be to both sides of y."""
        memory = torch.full((math.prod(conv.y) + 128,), math.nan, dtype=x.dtype, device=x.device)
        y = unflattened(memory[64:-64], conv.y, last)
        self.launch(y, x, weight, self.problem(conv, x, weight, last), values, config, segments)
        assert memory[:64].isnan().all() and memory[-64:].isnan().all()
        return y


INTERPRETED = Run("cpu", interpreted(row_march))
ON_GPU = Run("cuda")

every_run = every(interpreter=INTERPRETED, gpu=ON_GPU)


def check(run: Run, conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool, **options: Any) -> None:
    x, weight = conv.tensors(dtype, run.device, from_last)
    values = coefficients(conv.C_out, run.device)
    y = run(conv, x, weight, values, to_last, **options)
    assert_close(y, x, weight, conv, values, tf32=x.is_cuda)


GATED = {
    "k3s2": (Conv((2, 16, 3, 8), 16, (3,), (2,), (1,), (1,)), (True, True)),
    "k2s2": (Conv((1, 17, 3, 4), 24, (2,), (2,)), (True, True)),
    "k4s4": (Conv((1, 5, 2, 6), 8, (4,), (4,)), (True, True)),
    "k3s1": (Conv((2, 5, 3, 8), 8, (3,), (1,), (1,)), (True, True)),
    "3d": (Conv((1, 9, 2, 3, 4), 16, (3,), (2,), (1,), (1,)), (True, True)),
    "odd rows": (Conv((1, 5, 3, 5), 8, (3,), (2,), (1,)), (False, True)),
    "stride 3": (Conv((1, 5, 3, 8), 8, (3,), (3,)), (False, True)),
    "12 channels": (Conv((1, 5, 3, 8), 12, (2,), (2,)), (True, False)),
}


@every_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("conv", "possible"), GATED.values(), ids=GATED)
def test_the_bits_of_a_gate(run: Run, conv: Conv, possible: tuple[bool, bool], dtype: torch.dtype) -> None:
    """On whole numbers, with which every sum is exact and both bounds are hit; from either layout to either."""
    x, weight, shift = conv.whole_numbers(dtype, run.device)
    z = reference(x, weight, conv.axes, 1, None, shift).float()
    for last, gate in ((False, Gate(True, False, False)), (True, Gate(False, True))):
        problem = run.problem(conv, laid_out(x, not last), weight, last)
        reason = why_no_bits(problem, NARROW, conv.y[-1])
        assert (reason is None) == possible[last], reason
        if reason is None:
            y = torch.full(conv.y, math.nan, dtype=dtype, device=run.device)
            y, bits = laid_out(y, last), torch.full((-(-y.numel() // 8),), 255, dtype=torch.uint8, device=run.device)
            run.launch(y, laid_out(x, not last), weight, problem, (None, shift, -1.0, 3.0), NARROW, None, bits, gate)
            assert torch.equal(y.float(), z.clamp(-1, 3))
            assert torch.equal(bits, pack(passes(z, -1.0, 3.0, gate), last))


def along_one_dimension() -> list[tuple[int, int, int, int]]:
    """Kernel, stride, padding and output padding."""
    return [
        (kernel, stride, padding, output_padding)
        for kernel, stride, padding in itertools.product(range(1, 6), range(1, 5), range(3))
        for output_padding in {0, stride - 1}
        if stride * 2 + kernel - 2 * padding + output_padding > 0
    ]


def grid() -> Iterator[tuple[Conv, torch.dtype, bool, bool]]:
    """Each combination along the march, with another along the row, other channels, dtype and layouts."""
    channels = itertools.cycle([(3, 17), (17, 3), (3, 3), (1, 17), (17, 17)])
    variants = itertools.cycle(itertools.product(DTYPES, (False, True), (False, True)))
    batches = itertools.cycle((1, 3))
    combinations = along_one_dimension()
    for index, march in enumerate(combinations):
        row = combinations[(7 * index + 3) % len(combinations)]
        C_in, C_out = next(channels)
        yield Conv((next(batches), C_in, 2 + (march[2] == 2), 3), C_out, *zip(march, row, strict=True)), *next(variants)


@every_run
@pytest.mark.parametrize("part", range(4))
def test_every_combination_along_one_dimension(run: Run, part: int) -> None:
    for conv, dtype, from_last, to_last in list(grid())[part::4]:
        if (conv.kernel[0], conv.stride[0]) != (1, 1):
            check(run, conv, dtype, from_last, to_last)


KINDS = {
    "k3s2": Conv((2, 20, 5, 7), 24, (3,), (2,), (1,), (1,)),
    "k4s2": Conv((2, 20, 5, 7), 24, (4,), (2,), (1,)),
    "k2s2": Conv((2, 20, 5, 7), 24, (2,), (2,)),
    "k5s2": Conv((1, 20, 5, 7), 24, (5,), (2,), (2,), (1,)),
    "k3s1": Conv((2, 20, 5, 7), 24, (3,), (1,), (1,)),
    "k4s4": Conv((1, 20, 3, 5), 24, (4,), (4,)),
    "k1s3": Conv((1, 20, 3, 5), 24, (1,), (3,), (0,), (2,)),  # outputs without a tap
    "k3s2_3d": Conv((1, 20, 3, 2, 5), 24, (3,), (2,), (1,), (1,)),
    "k2s2_3d": Conv((1, 20, 3, 2, 5), 24, (2,), (2,)),
    "flat_3d": Conv((1, 20, 2, 3, 5), 24, (1, 3, 3), (1, 2, 2), (0, 1, 1)),  # marches along H
}
every_kind = pytest.mark.parametrize("conv", KINDS.values(), ids=KINDS)


@every_run
@every_kind
def test_any_layout_to_any_layout(run: Run, conv: Conv) -> None:
    for (from_last, to_last), dtype in zip(LAYOUTS, (*DTYPES, torch.bfloat16), strict=True):
        check(run, conv, dtype, from_last, to_last)


@every_run
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(run: Run, config: Config) -> None:
    conv = Conv((3, 17, 3, 30), config.channels + 1, (3,), (2,), (1,), (1,))
    for from_last, to_last in ((False, False), (True, True)):
        check(run, conv, torch.bfloat16, from_last, to_last, config=config)


@every_run
@pytest.mark.parametrize("name", ["k3s2", "k4s2", "k2s2", "k5s2", "k3s2_3d"])
def test_strips_in_any_number_of_segments(run: Run, name: str) -> None:
    conv = KINDS[name]
    lengths = set()
    for segments in range(1, 7):
        x, weight = conv.tensors(torch.float32, run.device, True)
        march = march_for(run.problem(conv, x, weight, True), x.shape, NARROW, segments)
        if march.length not in lengths:
            check(run, conv, torch.float32, True, True, segments=segments)
        lengths.add(march.length)
    assert 1 in lengths and len(lengths) >= 2


SIZES = [
    Conv((1, 16, 1, 1), 16, (3,), (2,), (1,)),  # one output
    Conv((1, 17, 1, 1), 1, (4,), (2,), (1,)),
    Conv((3, 17, 1, 13), 3, (3,), (2,), (1,), (1,)),  # one row
    Conv((3, 3, 13, 1), 17, (3,), (2,), (1,), (1,)),  # one column, many images a strip
    Conv((1, 3, 2, 67), 3, (3,), (2,), (1,), (1,)),  # more than one strip a row
    Conv((1, 1, 11, 7), 17, (2,), (2,)),
    Conv((1, 17, 4, 4), 3, (2,), (2,), (1,)),  # padding cuts inputs off
    Conv((1, 17, 7, 4), 3, (4, 2), (2, 2), (4, 0)),  # more padding than kernel
    Conv((3, 65, 3, 5), 33, (3,), (2,), (1,), (1,)),
    Conv((0, 3, 4, 4), 17, (3,), (2,)),
]


@every_run
@pytest.mark.parametrize("conv", SIZES, ids=str)
def test_any_size(run: Run, conv: Conv) -> None:
    for from_last, to_last in ((False, False), (True, True)):
        check(run, conv, torch.float16, from_last, to_last)


@every_run
@pytest.mark.parametrize("name", ["k3s2", "k2s2_3d"])
def test_offsets_of_64_bits(run: Run, name: str) -> None:
    with mock.patch.object(launching, "LONG", 0):
        for from_last, to_last in LAYOUTS:
            check(run, KINDS[name], torch.float32, from_last, to_last)


SMALL = Conv((1, 5, 2, 3), 4, (3,), (2,), (1,))


@every_run
def test_every_coefficient_can_be_missing_a_number_or_a_tensor(run: Run) -> None:
    x, weight = SMALL.tensors(torch.float32, run.device)
    tensors, numbers, none = coefficients(4, run.device), (-1.7, 0.3, -0.9, 0.8), (None,) * 4
    for first, second in itertools.product((none, numbers, tensors), repeat=2):
        values = (first[0], second[1], first[2], second[3])
        assert_close(run(SMALL, x, weight, values), x, weight, SMALL, values, tf32=x.is_cuda)


@every_run
@pytest.mark.parametrize("name", ["k3s2", "k2s2"])
def test_nan_goes_through_to_the_outputs_it_belongs_to_and_infinities_clamp(run: Run, name: str) -> None:
    conv = KINDS[name]
    for last, number in itertools.product((False, True), (math.nan, math.inf, -math.inf)):
        x, weight = conv.tensors(torch.float32, run.device, last)
        x[0, 1, 2, 3] = number
        y = run(conv, x, weight, (None, None, -1.0, 1.0), last, segments=2)
        expected = reference(x.double(), weight.double(), conv.axes, 1, None, None, -1.0, 1.0)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.double()[expected.abs() == 1.0].sign(), expected[expected.abs() == 1.0])


@every_run
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["k3s2", "k4s2", "k2s2"])
def test_rounds_exactly_once_also_on_the_bounds(run: Run, name: str, dtype: torch.dtype) -> None:
    """Small integers and 64ths add up exactly in fp32, in any order, and many of the sums are bounds.

    Any order: where a product is a single step, the compiler begins it with the shift instead of zeros.
    """
    conv = KINDS[name]
    x, weight = (tensor.mul(4).round() for tensor in conv.tensors(dtype, run.device))
    shift = torch.linspace(-9, 9, conv.C_out, device=run.device).mul(64).round() / 64
    values = (None, shift, -40.0, 40.0)
    exact = pointwise(eager(x.double(), weight.double(), conv).float(), *values)
    for last in (False, True):
        assert torch.equal(run(conv, x, weight, values, last), exact.to(dtype))


@every_run
def test_addresses_that_16_does_not_divide(run: Run) -> None:
    memory = torch.randn(2 * 16 * 8 * 8 + 1).to(run.device, torch.bfloat16)
    conv = Conv((2, 16, 8, 8), 16, (3,), (2,), (1,), (1,))
    for last in (False, True):
        x = unflattened(memory[1:], conv.x, last)
        _, weight = conv.tensors(torch.bfloat16, run.device)
        assert_close(run(conv, x, weight, last=last), x, weight, conv)


def problem_of(conv: Conv, dtype: torch.dtype, last: bool, limit: int, allow_tf32: bool = True) -> Problem:
    with FakeTensorMode(), mock.patch.object(problem, "shared_memory_limit", return_value=limit):
        x, weight, _ = conv.fakes(dtype, last, last)
        return problem_for(x, weight, conv.axes, conv.groups, last, allow_tf32)


SEED = PUBLIC["seed"]
REASONS = [
    (replace(SEED, groups=2), {}, "it has 2 groups"),
    (replace(SEED, dilation=(2,)), {}, "it is dilated"),
    (PUBLIC["hifigan_up1"], {}, "no dimension but W has a kernel"),
    (Conv((2, 3, 8, 8), 5, (3,), (2,)), {}, "3 times 5 channels are too few"),
    (SEED, {"allow_tf32": False}, "float32 without TF32"),
    (PUBLIC["dcgan_64"], {}, "16 taps times 256 channels are too much for 232448 bytes"),
    (Conv((2, 64, 8, 8), 64, (16,), (8,), (4,)), {}, "256 taps times 64 channels are too much"),
]


@pytest.mark.parametrize(("conv", "options", "reason"), REASONS, ids=[reason for *_, reason in REASONS])
def test_says_what_it_does_not_take(conv: Conv, options: dict[str, bool], reason: str) -> None:
    assert str(why_not(problem_of(conv, torch.float32, False, HOPPER, **options))).startswith(reason)


def test_does_not_take_float32_through_tensor_memory() -> None:
    for dtype, taken in ((torch.float32, False), (torch.bfloat16, True)):
        assert (why_not(replace(problem_of(SEED, dtype, True, HOPPER), tensor_memory=True)) is None) == taken


FEW, FEWEST = replace(SEED, x=(8, 64, 128, 128)), replace(SEED, x=(1, 64, 128, 128))


@pytest.mark.parametrize(
    ("conv", "dtype", "last", "limit", "config", "segments"),
    [
        (SEED, torch.bfloat16, True, HOPPER, Config(64, 64, 4, 3), 1),
        (SEED, torch.bfloat16, False, HOPPER, Config(64, 64, 4, 3), 1),
        (SEED, torch.float32, True, HOPPER, Config(64, 32, 4, 2), 1),
        (SEED, torch.float32, False, HOPPER, Config(64, 32, 4, 2), 1),
        (SEED, torch.bfloat16, True, ADA, Config(64, 32, 4, 3), 1),
        (SEED, torch.float32, True, ADA, Config(64, 16, 4, 2), 1),
        (PUBLIC["unet_up2"], torch.bfloat16, True, HOPPER, Config(64, 32, 4, 3), 16),
        (FEW, torch.bfloat16, True, HOPPER, Config(64, 64, 4, 3), 15),
        (FEWEST, torch.bfloat16, True, HOPPER, Config(64, 16, 4, 3), 15),
    ],
)
def test_what_is_chosen(conv: Conv, dtype: torch.dtype, last: bool, limit: int, config: Config, segments: int) -> None:
    march = choose_march(problem_of(conv, dtype, last, limit), conv.x)
    assert march.config == config
    assert march.programs == march.strips * segments * -(-conv.C_out // config.channels)


@pytest.mark.parametrize("limit", [64 * 1024, ADA, HOPPER])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_problem_it_takes_has_a_configuration(dtype: torch.dtype, limit: int) -> None:
    for conv, last in itertools.product((*KINDS.values(), *SIZES, *PUBLIC.values()), (False, True)):
        problem = problem_of(conv, dtype, last, limit)
        if why_not(problem) is None:
            assert configs_for(problem)
            assert choose_march(problem, conv.x).config in configs_for(problem)


def test_batch_and_spatial_sizes_can_be_symbolic() -> None:
    conv = KINDS["k3s2"]
    problem = problem_of(conv, torch.bfloat16, True, HOPPER)
    larger = torch.empty([size + 3 for size in conv.x])
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        sizes = mode.from_tensor(larger).shape
        like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        x = empty((sizes[0], conv.x[1], *sizes[2:]), like, True)
        out_sizes = [axis.output_size(size) for axis, size in zip(conv.axes, sizes[2:], strict=True)]
        out = empty((sizes[0], conv.C_out, *out_sizes), like, True)
        given = coefficients_for(out, *split(()))
        march = choose_march(problem, x.shape)
        packed = row_march.pack(empty((20, 24, 3, 3), like, False), problem, march.config)
        (launch,) = record_launches(row_march, lambda: row_march.launch(out, x, packed, problem, march, given))
    concrete = march_for(problem, larger.shape, march.config)
    (programs,) = launch.grid
    assert isinstance(programs, torch.SymInt)
    assert programs.node.hint == concrete.programs
    assert launch.arguments["length"].node.hint == concrete.length


MARCHABLE = {name: conv for name, conv in PUBLIC.items() if conv.rank > 1}


def taken(conv: Conv, x: torch.Tensor, weight: torch.Tensor, last: bool) -> Problem:
    problem = ON_GPU.problem(conv, x, weight, last)
    reason = why_not(problem)
    if reason:
        pytest.skip(reason)
    return problem


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", MARCHABLE.values(), ids=MARCHABLE)
def test_no_element_is_ever_wrong_in_60_launches(
    conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool
) -> None:
    x, weight = conv.tensors(dtype, "cuda", from_last)
    problem = taken(conv, x, weight, to_last)
    values = (None, coefficients(conv.C_out, "cuda")[1], -8.0, 8.0)
    expected = pointwise(eager(x, weight, conv), *values)
    terms = eager(x.abs(), weight.abs(), conv)
    first = torch.full_like(laid_out(expected, to_last), math.nan)
    ON_GPU.launch(first, x, weight, problem, values)
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
        ON_GPU.launch(out, x, weight, problem, values)
        changed += (out != first).sum()
    assert changed.item() == 0


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", MARCHABLE.values(), ids=MARCHABLE)
def test_every_configuration_never_changes_its_mind_at_full_size(
    conv: Conv, dtype: torch.dtype, from_last: bool, to_last: bool
) -> None:
    x, weight = conv.tensors(dtype, "cuda", from_last)
    problem = taken(conv, x, weight, to_last)
    first: torch.Tensor | None = None
    configs = configs_for(problem)
    for config, segments in itertools.product(configs, (None, 3)):
        changed = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(10):
            out = torch.full_like(laid_out(torch.empty(conv.y, dtype=dtype, device="cuda"), to_last), math.nan)
            ON_GPU.launch(out, x, weight, problem, (), config, segments)
            first = out if first is None else first
            # Products of other tiles may add up in another order.
            changed += (~((out - first).abs() <= 1e-2 * (first.abs() + 1))).sum()
        assert changed.item() == 0, (config, segments)


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("conv", MARCHABLE.values(), ids=MARCHABLE)
def test_as_accurate_as_cudnn(conv: Conv, last: bool, dtype: torch.dtype) -> None:
    """Without the tail, which only adds roundings to eager's result.

    For some convolutions cuDNN takes no TF32 although it may. Ours does, with the error of that rounding alone.
    """
    conv = replace(conv, x=(2, *conv.x[1:]))
    x, weight = conv.tensors(dtype, "cuda", last)
    problem = taken(conv, x, weight, last)
    y = empty(conv.y, x, last)
    ON_GPU.launch(y, x, weight, problem)
    exact = eager(x.double(), weight.double(), conv)

    def rmse(y: torch.Tensor) -> float:
        return ((y.double() - exact).square().mean() / exact.square().mean()).sqrt().item()

    assert rmse(y) <= 1.1 * max(rmse(eager(x, weight, conv)), rmse(tf32(x, weight, conv)))


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize(("from_last", "to_last"), LAYOUTS)
def test_more_than_2_to_the_31_elements(from_last: bool, to_last: bool) -> None:
    conv = Conv((3, 16, 6016, 3008), 16, (2,), (2,))
    assert math.prod(conv.y) > 2**31
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("16 GiB of GPU memory are not free")
    x = empty(conv.x, torch.empty(0, dtype=torch.bfloat16, device="cuda"), from_last).normal_()
    weight = torch.randn(16, 16, 2, 2).to(x)
    y = empty(conv.y, x, to_last)
    ON_GPU.launch(y, x, weight, taken(conv, x, weight, to_last))
    # Without overlap rows do not depend on each other.
    for image, row in itertools.product((0, 1, 2), (0, 3000, 6000)):
        part = x[image : image + 1, :, row : row + 16]
        assert_close(y[image : image + 1, :, 2 * row : 2 * row + 32], part, weight, replace(conv, x=tuple(part.shape)))

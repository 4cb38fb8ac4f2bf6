"""The product on Hopper on a GPU, against float64; and which problems it takes, and how it cuts them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose as kernels
from fusion_backend.kernels import hopper, hopper_product
from fusion_backend.kernels import problem as problems
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.conv_transpose import conv_transpose, conv_transpose_keeping, reference
from fusion_backend.kernels.hopper_blocks import (
    CONFIGS,
    Config,
    Product,
    configs_for,
    packed_shape,
    product_for,
    why_not,
    why_not_shape,
)
from fusion_backend.kernels.hopper_product import launch, pack
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.plans import plan_named, plans_for
from fusion_backend.kernels.problem import Problem, is_hopper, problem_for
from fusion_backend.kernels.program import NO_PROGRAM, Program, reference_values
from tests.kernels.convolutions import PUBLIC, Conv, assert_close, coefficients, eager
from tests.kernels.implementations import DTYPES, GPU_MARKS, Value, split
from tests.kernels.layouts import laid_out, unflattened

PROCESSORS = 132
SMALLEST = Config(64, 64)
ON_HOPPER = pytest.param("cuda", marks=GPU_MARKS)


@pytest.fixture(params=[ON_HOPPER])
def gpu(request: pytest.FixtureRequest) -> str:
    """Its name, where that is a Hopper with a triton that knows it."""
    if not is_hopper(torch.device("cuda", 0)):
        pytest.skip("no Hopper")
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    torch.cuda.empty_cache()
    return request.param


def launched(
    y: torch.Tensor,
    conv: Conv,
    x: torch.Tensor,
    weight: torch.Tensor,
    values: Sequence[Value],
    config: Config,
    processors: int = PROCESSORS,
    program: Program = NO_PROGRAM,
) -> None:
    problem = problem_for(x, weight, conv.axes, conv.groups, not y.is_contiguous(), True)
    assert why_not(problem) is None
    cut = product_for(problem, x.shape, config, processors)
    assert why_not_shape(problem, x.shape, cut) is None
    launch(y, x, pack(weight, problem, config), problem, cut, coefficients_for(y, *split(values)), program)


def check(conv: Conv, dtype: torch.dtype, last: bool, config: Config, processors: int = PROCESSORS) -> None:
    """Memory is NaN before, and must still be to both sides of y."""
    x, weight = conv.tensors(dtype, "cuda", True)
    values = coefficients(conv.C_out, "cuda")
    memory = torch.full((math.prod(conv.y) + 128,), math.nan, dtype=x.dtype, device=x.device)
    y = unflattened(memory[64:-64], conv.y, last)
    launched(y, conv, x, weight, values, config, processors)
    assert memory[:64].isnan().all() and memory[-64:].isnan().all()
    assert_close(y, x, weight, conv, values, tf32=True)


KINDS = {
    "dcgan": Conv((5, 256, 16, 16), 128, (4,), (2,), (1,)),
    "odd": Conv((3, 72, 5, 7), 40, (3,), (2,), (1,)),  # blocks of channels that are not full, and few taps
    "k2s2": Conv((2, 128, 9, 11), 96, (2,), (2,)),
    "k3s1": Conv((2, 64, 9, 11), 64, (3,), (1,), (1,)),
    "k1s3": Conv((2, 64, 5, 7), 64, (1,), (3,), (0,), (2,)),  # outputs without a tap
    "dilated": Conv((2, 64, 9, 11), 64, (3,), (2,), (2,), (1,), (3,)),
    "both": Conv((2, 64, 9, 11), 64, (4,), (2,), (1,), (0,), (2,)),  # phases without a tap
    "mixed": Conv((2, 80, 9, 11), 72, (3, 4), (1, 2), (1, 1)),
    "hifigan": Conv((3, 128, 37), 192, (16,), (8,), (4,)),
    "k5s3_1d": Conv((70, 64, 3), 64, (5,), (3,), (1,), (1,)),  # many short rows in a tile
    "k3s2_3d": Conv((2, 64, 3, 4, 5), 64, (3,), (2,), (1,), (1,)),
    "flat_3d": Conv((1, 64, 2, 3, 9), 264, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    "k8s4_1d": Conv((3, 64, 70), 72, (8,), (4,), (2,)),
    "k4s4": Conv(
        (2, 64, 5, 7), 40, (4,), (4,), (0,), (1,)
    ),  # phases that share all inputs, and rows that end in a pixel
    "k8s8_1d": Conv((3, 96, 37), 40, (8,), (8,)),
    "k5s4_1d": Conv((2, 64, 37), 40, (5,), (4,), (1,)),  # ... and that share none
    "k4s8": Conv((2, 64, 3, 37), 40, (2, 4), (2, 8), (0, 4)),  # without a tap for half of them
}
IN_ROWS = [name for name in KINDS if name not in ("k3s1", "k1s3", "k5s3_1d")]  # a contiguous result, in one pass
TO = [(name, True) for name in KINDS] + [(name, False) for name in IN_ROWS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "last"), TO)
def test_every_kind_in_every_configuration(gpu: str, name: str, last: bool, dtype: torch.dtype) -> None:
    """By as many programs as there are multiprocessors, and by few that walk over many tiles."""
    conv = KINDS[name]
    fitting = configs_for(problem_of(conv, dtype, True, last))
    assert fitting
    for config in fitting:
        check(conv, dtype, last, config)
    check(conv, dtype, last, fitting[-1], 3)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_element_is_ever_wrong_in_60_launches(gpu: str, dtype: torch.dtype, last: bool) -> None:
    """At full size, for every configuration: sums of whole numbers are exact, whatever their order."""
    conv = PUBLIC["dcgan_64"]
    x, weight, shift = conv.whole_numbers(dtype, "cuda", 1)
    x = laid_out(x, True)
    y = laid_out(torch.empty(conv.y, device="cuda", dtype=dtype), last)
    expected = reference(x.float(), weight.float(), conv.axes, shift=shift).to(dtype)
    for config in configs_for(problem_of(conv, dtype, True, last)):
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(60):
            y.fill_(math.nan)
            launched(y, conv, x, weight, (None, shift), config)
            wrong += (y != expected).sum()
        assert wrong.item() == 0, config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_cudnn(gpu: str, dtype: torch.dtype) -> None:
    """Without the tail, which only adds roundings to eager's result."""
    conv = PUBLIC["dcgan_64"]
    x, weight = conv.tensors(dtype, "cuda", True)
    exact = eager(x.double(), weight.double(), conv)
    theirs = ((eager(x, weight, conv).double() - exact).square().mean()).sqrt()
    for config in configs_for(problem_of(conv, dtype)):
        y = laid_out(torch.empty(conv.y, device="cuda", dtype=dtype), True)
        launched(y, conv, x, weight, (), config)
        assert (y.double() - exact).square().mean().sqrt() <= 1.1 * theirs


def test_nan_goes_to_the_outputs_it_belongs_to_and_infinities_clamp(gpu: str) -> None:
    conv = KINDS["k2s2"]
    x, weight = conv.tensors(torch.float32, "cuda", True)
    weight = weight.abs() + 0.1
    x[0, 3, 4, 5], x[1, 3, 4, 5] = math.nan, math.inf
    values = (None, None, -1.0, 1.0)
    y = laid_out(torch.empty(conv.y, device="cuda"), True)
    launched(y, conv, x, weight, values, SMALLEST)
    assert y[0, :, 8:10, 10:12].isnan().all() and y.isnan().sum() == 4 * conv.C_out
    assert (y[1, :, 8:10, 10:12] == 1.0).all()


@pytest.mark.parametrize("text", ["silu v0", "affine v0 2.0 c0 - -; gelu v1", "tanh v0; mul v1 v0"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_programs(gpu: str, dtype: torch.dtype, last: bool, text: str) -> None:
    conv = KINDS["odd"]
    x, weight = conv.tensors(dtype, "cuda", True)
    shift = torch.randn(conv.C_out, device="cuda")
    program = Program(text, torch.randn(conv.C_out, 1, device="cuda") if "c0" in text else None)
    y = laid_out(torch.full(conv.y, math.nan, device="cuda", dtype=dtype), last)
    config = configs_for(problem_of(conv, dtype, True, last))[-1]
    launched(y, conv, x, weight, (None, shift), config, program=program)
    exact = reference(x.double(), weight.double(), conv.axes, shift=shift.double(), program=program)
    relative = ((y.double() - exact).norm() / exact.norm()).item()
    assert relative < (2e-3 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("name", ["odd", "hifigan", "k2s2", "k3s2_3d"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_value_is_kept_beside_the_result(gpu: str, dtype: torch.dtype, last: bool, name: str, kept: int) -> None:
    """By the operator that ``conv_transpose_keeping`` calls for a plan of this kernel; memory around both is left."""
    conv = KINDS[name]
    x, weight = conv.tensors(dtype, "cuda", True)
    shift = torch.randn(conv.C_out, device="cuda")
    program = Program("leaky_relu v0 0.1; tanh v1", kept=kept)
    problem = problem_for(x, weight, conv.axes, 1, last, True)
    plans = [plan for plan in plans_for(replace(problem, kept=True)) if plan.is_product]
    assert plans and not any(plan.back for plan in plans)
    sizes = [[getattr(axis, each) for axis in conv.axes] for each in kernels.AXIS]
    exact = reference(x.double(), weight.double(), conv.axes, shift=shift.double())
    values = reference_values(exact, program)
    for plan in plans:
        with mock.patch.object(hopper_product, "launched", side_effect=hopper_product.launched) as launches:
            found = conv_transpose_keeping(
                x, weight, *sizes, shift=shift, channels_last=last, plan=plan.name, program=program.text, kept=kept
            )
        assert launches.call_count == 1 and not hopper._broken
        for y, expected in zip(found, (values[-1], values[kept]), strict=True):
            assert (y.movedim(1, -1) if last else y).is_contiguous() and y.dtype == dtype
            relative = ((y.double() - expected).norm() / expected.norm()).item()
            assert relative < (2e-3 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("from_last", "to_last"), [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("name", ["dcgan", "hifigan", "k3s2_3d"])
def test_the_general_operator_runs_it_by_its_name(
    gpu: str, name: str, from_last: bool, to_last: bool, dtype: torch.dtype
) -> None:
    """With the passes that turn x, and the result back."""
    torch.compiler.reset()  # one function, compiled for each of these
    conv = KINDS[name]
    x, weight = conv.tensors(dtype, "cuda", from_last)
    values = coefficients(conv.C_out, "cuda")
    problem = problem_for(x, weight, conv.axes, 1, to_last, True)
    plans = [plan for plan in plans_for(problem) if plan.is_product]
    assert {plan.turned for plan in plans} == {not from_last}
    firsts = [next((plan for plan in plans if plan.back == back), None) for back in (False, True)]
    assert [plan is not None for plan in firsts] == [to_last or name in IN_ROWS, not to_last]
    sizes = [[getattr(axis, each) for axis in conv.axes] for each in kernels.AXIS]
    tensors, numbers = split(values)
    compiled = torch.compile(conv_transpose, fullgraph=True)
    for plan in filter(None, firsts):
        with mock.patch.object(hopper_product, "launched", side_effect=hopper_product.launched) as launches:
            for run in (conv_transpose, compiled):
                y = run(x, weight, *sizes, 1, *tensors, *numbers, to_last, True, plan.name)
                assert y.movedim(1, -1).is_contiguous() if to_last else y.is_contiguous()
                assert_close(y, x, weight, conv, values, tf32=True)
            assert launches.call_count == 2 and not hopper._broken


def problem_of(conv: Conv, dtype: torch.dtype, x_last: bool = True, out_last: bool = True) -> Problem:
    """As on an H200."""
    x, weight = conv.tensors(torch.float32, "cpu")
    found = problem_for(x, weight, conv.axes, conv.groups, out_last, True)
    tf32 = dtype == torch.float32
    return replace(found, dtype=dtype, x_last=x_last, hopper=True, tf32=tf32, exact=False, shared_limit=227 * 1024)


DCGAN = PUBLIC["dcgan_64"]
REASONS = [
    (replace(DCGAN, groups=2), {}, "it has 2 groups"),
    (DCGAN, {"x_last": False}, "x is contiguous"),
    (
        replace(DCGAN, stride=(3,)),
        {"out_last": False},
        "3 phases of a row, 1 of the same inputs, are none that a tile has",
    ),
    (DCGAN, {"tensors": 1}, "a program reads a tensor of the result's shape"),
    (DCGAN, {"prologue": True}, "something is done to x first, and the copy engine brings it as it is"),
    (DCGAN, {"tf32": False}, "float32 without TF32 has no tensor cores"),
    (
        replace(DCGAN, x=(8, 24, 16, 16)),
        {},
        "pixels of 24 channels are not 128 bytes or more, in multiples of 16",
    ),
    (replace(DCGAN, C_out=32), {}, "32 output channels are too few, or 232448 bytes of shared memory"),
]


@pytest.mark.parametrize(("conv", "options", "reason"), REASONS, ids=[reason for *_, reason in REASONS])
def test_says_what_it_does_not_take(conv: Conv, options: dict[str, bool], reason: str) -> None:
    assert why_not(replace(problem_of(conv, torch.float32), **options)) == reason


def test_says_that_images_are_too_large_for_31_bits() -> None:
    problem = problem_of(DCGAN, torch.bfloat16)
    shape = (1, 256, 4096, 4096)
    reason = why_not_shape(problem, shape, product_for(problem, shape, CONFIGS[0], PROCESSORS))
    assert str(reason).startswith("the images of a tile have 8589934592 elements")


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.joined == 1], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_boxes_cover_every_position_and_no_box_is_empty(name: str, config: Config) -> None:
    conv = KINDS[name]
    problem = problem_of(conv, torch.bfloat16)
    cut = product_for(problem, conv.x, config, PROCESSORS)
    assert math.prod(cut.box) == config.rows and all(edge <= 256 for edge in cut.box)
    axes = (Axis(),) * (3 - conv.rank) + conv.axes
    sizes = (*(1,) * (5 - len(conv.y)), *conv.y[2:])
    spans = (conv.y[0], *(-(-size // axis.stride) for size, axis in zip(sizes, axes, strict=True)))
    for span, edge, boxes in zip(spans, cut.box, cut.boxes, strict=True):
        assert (boxes - 1) * edge < span <= boxes * edge


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_rows_of_a_contiguous_result_stay_long(last: bool) -> None:
    """65 positions make two boxes of 64; single positions of 64 images would be fewer boxes."""
    conv = Conv((128, 64, 64, 64), 128, (4,), (2,), (0,))
    cut = product_for(problem_of(conv, torch.bfloat16, True, last), conv.x, SMALLEST, PROCESSORS)
    assert cut.box == ((64, 1, 1, 1) if last else (4, 1, 1, 16))


def test_plans_turn_what_is_not_channels_last() -> None:
    for x_last in (False, True):
        for out_last in (False, True):
            problem = problem_of(DCGAN, torch.float32, x_last, out_last)
            names = [plan.name for plan in plans_for(problem) if plan.is_product]
            through, turned = ["256x128", "128x128", "256x64", "128x64"], "" if x_last else "turned "
            expected = [f"{turned}product {size}{'' if out_last else ', turned back'}" for size in through]
            if not out_last:
                expected = [f"{turned}product 128x128x2", f"{turned}product 128x64x2", *expected]
            assert names == expected
            for name in names:
                plan = plan_named(problem, name)
                assert plan is not None and plan.name == name and plan.is_hopper
                assert plan.packed_bytes(problem) == 16 * 128 * 256 * 4
    assert not any(plan.is_product for plan in plans_for(replace(problem_of(DCGAN, torch.float32), hopper=False)))


@pytest.mark.parametrize(
    "conv",
    [
        Conv((0, 64, 5, 6), 96, (4,), (2,), (1,)),
        Conv((2, 128, 1, 1), 96, (4,), (1,)),
        Conv((2, 64, 1, 7), 96, (3,), (2,), (1,), (1,)),
        Conv((2, 64, 9), 96, (16,), (8,), (4,)),
        Conv((2, 64, 2, 3, 4), 96, (3,), (2,), (2,), (1,), (3,)),
    ],
    ids=["empty", "one pixel", "a row", "1d", "3d"],
)
def test_what_is_planned_for_the_product_it_takes(conv: Conv) -> None:
    """Also of an x that is contiguous and channels_last at once, as one pixel is."""
    axes = tuple(tuple(int(getattr(axis, name)) for axis in conv.axes) for name in kernels.AXIS)
    with (
        FakeTensorMode(),
        mock.patch.object(problems, "is_hopper", return_value=True),
        mock.patch.object(hopper, "is_hopper", return_value=True),
        mock.patch.object(problems, "shared_memory_limit", return_value=227 * 1024),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=mock.Mock(multi_processor_count=132)),
    ):
        for from_last in (False, True):
            for to_last in (False, True):
                x, weight, _ = conv.fakes(torch.bfloat16, from_last, to_last)
                products = [p for p in plans_for(problem_for(x, weight, conv.axes, 1, to_last, True)) if p.is_product]
                assert products
                for plan in products:
                    given = empty(conv.x, x, True) if plan.turned else x
                    out_last = to_last or plan.back
                    call = hopper.Call(axes, (1.0, 0.0, None, None), out_last, True, plan.config.name)
                    ready = hopper._get_ready(given, weight, call, 0)
                    assert ready is not None and isinstance(ready.cut, Product) and ready.cut.config == plan.config


@pytest.mark.parametrize("name", ["product 256x128", "hopper 64, 2 slots"])
def test_a_plan_by_its_name_is_taken_for_a_batch_of_any_size(name: str) -> None:
    """One compilation serves them all: nothing is guarded on."""
    shapes, real = ShapeEnv(), torch.empty(8, 64, 16, 16)
    varying = StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
    with (
        FakeTensorMode(shape_env=shapes) as fakes,
        mock.patch.object(problems, "is_hopper", return_value=True),
        mock.patch.object(problems, "shared_memory_limit", return_value=227 * 1024),
        mock.patch.object(hopper, "conv_transpose_hopper", side_effect=hopper.conv_transpose_hopper) as called,
    ):
        sizes = fakes.from_tensor(real, symbolic_context=varying, source=ConstantSource("x")).shape
        like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
        x, weight = empty(sizes, like, True), empty((64, 96, 3, 3), like, False)
        y = conv_transpose(x, weight, [2], [1], [1], [1], channels_last=True, plan=name)
    assert called.call_count == 1 and tuple(y.shape[1:]) == (96, 32, 32)
    assert not shapes.guards


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_every_value_once_and_zeros_beyond(dtype: torch.dtype) -> None:
    conv = KINDS["odd"]
    problem = problem_of(conv, dtype)
    weight = torch.arange(72 * 40 * 9, dtype=torch.float64).reshape(72, 40, 3, 3).to(dtype)
    packed = pack(weight, replace(problem, tf32=False), SMALLEST)
    assert packed.shape == (9 * packed_shape(problem, SMALLEST)[0], packed_shape(problem, SMALLEST)[1])
    assert packed.flatten().sort().values[-weight.numel() :].equal(weight.flatten().sort().values)
    assert packed.count_nonzero() == weight.count_nonzero()

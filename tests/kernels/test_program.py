"""Programs: what is one, and that each kernel runs it as its reference does. One body for interpreter and GPU."""

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose, epilogue, hopper_strips, problem, row_march
from fusion_backend.kernels import hopper as on_hopper
from fusion_backend.kernels.activations import ACTIVATIONS
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.conv_transpose import reference
from fusion_backend.kernels.plans import Plan, plans_for
from fusion_backend.kernels.problem import problem_for
from fusion_backend.kernels.program import Instruction, Program, parse
from fusion_backend.kernels.program import reference as run_program
from fusion_backend.kernels.strips import Config, march_for
from tests.kernels.activations import line, parameters_of
from tests.kernels.convolutions import Conv, coefficients, tf32
from tests.kernels.implementations import GPU_MARKS, every, split
from tests.kernels.interpreting import interpreted
from tests.kernels.layouts import is_laid_out, laid_out

# NumPy, which interprets, speaks of every overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# What models have behind a transposed convolution; the numbers are KernelBench's problems of level 2.
PROGRAMS = {
    "5: tanh": "tanh v0",
    "16: mish, hardtanh, scale": "mish v0; affine v1 2.0 1.0 -2.0 2.0",
    "20: (2x + b)x + x": "affine v0 2.0 c0 - -; mul v1 v0; add v2 v0",
    "26: x * hardswish(x)": "hardswish v0; mul v0 v1",
    "93: gelu, scale": "gelu v0; affine v1 2.0 - - -",
    "prelu": "leaky_relu v0 c0",
    "snake": "affine v0 c0 - - -; sin v1; square v2; affine v3 c1 - - -; add v0 v4",
    "bounds by channel": "silu v0; affine v1 - c1 c0 c2; tanh v2",
    "26: + t, x * hardswish(x)": "add v0 t0; hardswish v1; mul v1 v2",
    "residual, mask": "sub v0 t1; mul t0 v1; affine v2 c0 - 1.0 -; div t1 v3; minimum v2 t0; maximum v4 v5",
    "back through 26": "hardswish v0; mul t0 v1; mul t0 v0; hardswish_backward v3 v0; add v2 v4",
    "back through bounds": "clamp v0 -0.5 c0; gelu v1; hardtanh_backward t0 v2 - 0.4; gelu_backward v3 v1; "
    "minmax_backward v4 v1 c0 -; minimum_backward v5 v0 t1; clamp_backward v6 v0 -0.5 c0",
    "all that two values do": "sigmoid v0; sub v0 v1; minimum v2 v0; maximum v3 v1; exp v1; div v4 v5",
}


def vectors_for(text: str, C: int, device: str) -> torch.Tensor | None:
    count = 1 + max((int(p[1:]) for each in parse(text) for p in each.parameters if isinstance(p, str)), default=-1)
    generator = torch.Generator().manual_seed(C)
    return (0.25 + torch.rand(C, count, generator=generator)).to(device) if count else None


def program_for(text: str, shape: tuple[int, ...], x: torch.Tensor, last: bool = False) -> Program:
    """With vectors and tensors for a result of ``shape`` in x's dtype and layout."""
    generator = torch.Generator().manual_seed(len(text))
    tensors = [
        laid_out(torch.randn(shape, generator=generator).to(x.device, x.dtype), last) if name in text else None
        for name in ("t0", "t1")
    ]
    return Program(text, vectors_for(text, shape[1], str(x.device)), (tensors[0], tensors[1]))


def test_reading_a_program() -> None:
    assert parse("") == ()
    assert parse("sigmoid v0; mul v0 v1; affine v2 2.0 0.5 - c0") == (
        Instruction("sigmoid", ("v0",)),
        Instruction("mul", ("v0", "v1")),
        Instruction("affine", ("v2",), (2.0, 0.5, None, "c0")),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swoosh v0", "program has the instruction 'swoosh v0'; allowed are abs, add, affine, clamp, detach, div,"),
        ("tanh", "program has 'tanh'; allowed behind tanh are 1 value(s), 0 parameter(s)"),
        ("tanh v0 1.0", "program has 'tanh v0 1.0'; allowed behind tanh are 1 value(s), 0 parameter(s)"),
        ("leaky_relu v0", "allowed behind leaky_relu are 1 value(s), 1 parameter(s)"),
        ("tanh v1", "program has 'v1' in 'tanh v1'; allowed are values from v0 to v0"),
        ("tanh v0; mul v1 v2", "program has 'v2' in 'mul v1 v2'; allowed are values from v0 to v1"),
        (
            "mul v0 2.0",
            "program has '2.0' in 'mul v0 2.0'; allowed are values from v0 to v0, and t0 and t1 for tensors",
        ),
        ("tanh t0", "program has 't0' in 'tanh t0'; allowed are values from v0 to v0"),
        ("add v0 t2", "program has 't2' in 'add v0 t2'; allowed are values from v0 to v0, and t0 and t1"),
        ("add v0 t0", "names ['t0'], given are []; allowed is t0 before t1"),
        ("leaky_relu v0 -", "program has '-' in 'leaky_relu v0 -'; allowed are finite numbers"),
        ("affine v0 inf - - -", "program has 'inf' in 'affine v0 inf - - -'; allowed are finite numbers"),
        ("affine v0 1.0 nan - -", "allowed are finite numbers"),
        ("leaky_relu v0 x", "allowed are finite numbers, and c0, c1, ... for vectors"),
        ("tanh v0;", "program has the instruction 'tanh v0;'|allowed are values from v0 to v0"),
        ("tanh  v0", "allowed behind tanh are 1 value(s)"),
    ],
)
def test_what_is_no_program(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the messages are compared below
        torch.ops.fused_post.epilogue(torch.randn(1, 2, 3), program=text)
    assert any(part in str(error.value) for part in message.split("|")), error.value


def test_what_are_no_vectors() -> None:
    x, text = torch.randn(1, 2, 3), "leaky_relu v0 c1"
    for vectors, kind, message in (
        (None, ValueError, r"names \['c1'\]; allowed are numbers where vectors is None"),
        (torch.randn(2, 1), ValueError, r"vectors has shape \(2, 1\); allowed for program '.*' is \(2, 2\)"),
        (torch.randn(2, 2).double(), TypeError, "vectors has dtype torch.float64; allowed is torch.float32"),
        (torch.randn(2, 2).t(), ValueError, r"vectors has strides \(1, 2\); allowed is contiguous"),
        (torch.randn(2, 2, device="meta"), ValueError, "vectors is on meta; allowed is x's device, cpu"),
    ):
        with pytest.raises(kind, match=message):
            torch.ops.fused_post.epilogue(x, program=text, vectors=vectors)
    with pytest.raises(ValueError, match=r"vectors has shape \(2, 0\); allowed"):
        torch.ops.fused_post.epilogue(x, program="tanh v0", vectors=torch.randn(2, 0))


def test_what_are_no_tensors() -> None:
    x, text = torch.randn(2, 3, 4, 5), "add v0 t0"
    for tensor, shown in (
        (torch.randn(2, 3, 4, 1), r"torch.float32 \(2, 3, 4, 1\) on cpu"),
        (torch.randn(2, 3, 4, 5).double(), r"torch.float64 \(2, 3, 4, 5\) on cpu"),
        (torch.randn(2, 3, 4, 5, device="meta"), r"torch.float32 \(2, 3, 4, 5\) on meta"),
    ):
        message = rf"a tensor of program 'add v0 t0' is {shown}; allowed is what the result is, torch.float32"
        with pytest.raises(ValueError, match=message):
            torch.ops.fused_post.epilogue(x, program=text, tensor_0=tensor)
    with pytest.raises(ValueError, match=r"names \['t1'\], given are \['t1'\]; allowed is t0 before t1"):
        torch.ops.fused_post.epilogue(x, program="add v0 t1", tensor_1=x)


@pytest.mark.parametrize("to_last", [None, False, True])
def test_a_tensor_in_another_layout_is_copied(to_last: bool | None) -> None:
    x, tensor = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for other in (tensor, laid_out(tensor, True), tensor.mT.contiguous().mT, tensor[:1].expand(2, 3, 4, 5)):
        expected = torch.tanh(x + other)
        program = Program("add v0 t0; tanh v1", None, (other, None))
        y = epilogue_in_interpreter(x.clone(), (), program, to_last)
        torch.testing.assert_close(y, expected, check_stride=False)


def test_the_reference_is_the_plain_thing() -> None:
    x, vectors = torch.randn(2, 3, 4, 5), torch.rand(3, 1)
    slope = vectors.view(3, 1, 1)
    for text, expected in {
        "": x,
        "tanh v0": torch.tanh(x),
        "sigmoid v0; mul v0 v1": x * torch.sigmoid(x),
        "leaky_relu v0 c0": torch.where(x > 0, x, x * slope),
        "square v0; affine v1 2.0 0.5 - c0; sub v2 v0": (x * x * 2 + 0.5).clamp(max=slope) - x,
    }.items():
        program = Program(text, vectors)
        torch.testing.assert_close(run_program(x, program), expected)


def fits(plan: Plan, march: bool, hopper: bool = False) -> bool:
    return (plan.is_march, plan.is_hopper, plan.turned) == (march, hopper, False) and not plan.is_product


# The kernels, each behind the same function: x, weight, convolution, the values of the normal form, program, layout.
Kernel = Callable[..., torch.Tensor]
TWIN, MARCH_TWIN, EPILOGUE_TWIN = (interpreted(module) for module in (conv_transpose, row_march, epilogue))


def general_in_interpreter(
    x: torch.Tensor, weight: torch.Tensor, conv: Conv, values: Any, program: Program, last: bool
) -> torch.Tensor:
    sizes = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
    return TWIN.run(x, weight, *sizes, conv.groups, *split(values), last, True, None, None, program)[0]


def march_in_interpreter(
    x: torch.Tensor, weight: torch.Tensor, conv: Conv, values: Any, program: Program, last: bool
) -> torch.Tensor:
    out = laid_out(torch.empty(conv.y, dtype=x.dtype), last)
    problem = problem_for(x, weight, conv.axes, conv.groups, last, True, compiled=False)
    march = march_for(problem, x.shape, Config(64, 16, 4, 2))
    packed = MARCH_TWIN.pack(weight, problem, march.config)
    with mock.patch.object(row_march, "wrap_triton", lambda kernel: kernel):
        MARCH_TWIN.launch(out, x, packed, problem, march, coefficients_for(out, *split(values)), program=program)
    return out


def on_gpu(march: bool, hopper: bool = False) -> Kernel:
    """By the first plan of each kernel, through the operator."""

    def run(
        x: torch.Tensor, weight: torch.Tensor, conv: Conv, values: Any, program: Program, last: bool
    ) -> torch.Tensor:
        problem = problem_for(x, weight, conv.axes, conv.groups, last, True)
        plans = (plan.name for plan in plans_for(problem) if fits(plan, march, hopper))
        plan = next(plans, None)
        if plan is None:
            pytest.skip(f"the march does not take {conv}")
        tensors, numbers = split(values)
        sizes = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
        assert not (hopper and on_hopper._broken)
        return torch.ops.fused_post.conv_transpose(
            x,
            weight,
            *sizes,
            conv.groups,
            *tensors,
            *numbers,
            last,
            True,
            plan,
            program.text,
            program.vectors,
            *program.tensors,
        )

    return run


def operator(
    x: torch.Tensor, weight: torch.Tensor, conv: Conv, values: Any, program: Program, last: bool
) -> torch.Tensor:
    """On a CPU, the reference: it rounds once, and keeps the layout that is asked for."""
    sizes = (conv.stride, conv.padding, conv.output_padding, conv.dilation)
    tensors, numbers = split(values)
    return torch.ops.fused_post.conv_transpose(
        x,
        weight,
        *sizes,
        conv.groups,
        *tensors,
        *numbers,
        last,
        True,
        None,
        program.text,
        program.vectors,
        *program.tensors,
    )


def check(run: Kernel, conv: Conv, text: str, dtype: torch.dtype, last: bool, device: str = "cpu") -> None:
    """Against float64, from inputs that are rounded to TF32 where the kernel does that."""
    x, weight = conv.tensors(dtype, device, last)
    weight = weight / math.sqrt(conv.x[1] * math.prod(weight.shape[2:]))
    scale, shift, *_ = coefficients(conv.C_out, device)
    values = (scale, shift, -2.0, 2.5)
    program = program_for(text, conv.y, x, last)
    y = run(x, weight, conv, values, program, last)
    assert (y.shape, y.dtype) == (conv.y, dtype) and is_laid_out(y, last)
    if device == "cuda":
        z = tf32(x, weight, conv)
        exact = reference(x.double(), weight.double(), conv.axes, conv.groups)
        z = z if dtype == torch.float32 else exact
    else:
        z = reference(x.double(), weight.double(), conv.axes, conv.groups)
    z = (z * scale.view(-1, *(1,) * conv.rank) + shift.view(-1, *(1,) * conv.rank)).clamp(-2.0, 2.5)
    expected = run_program(z.double(), program).to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected, **tolerance, check_stride=False)


SMALL = {
    1: Conv((2, 5, 7), 6, (4,), (2,), (1,)),
    2: Conv((1, 17, 4, 5), 6, (3,), (2,), (1,), (1,)),
    3: Conv((1, 3, 2, 3, 4), 6, (2,), (2,)),
}
VARIANTS = list(itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)))


@every(operator=operator, interpreter=general_in_interpreter)
@pytest.mark.parametrize("rank", SMALL)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_general_kernel(run: Kernel, name: str, rank: int) -> None:
    dtype, last = VARIANTS[(list(PROGRAMS).index(name) + 2 * rank) % len(VARIANTS)]
    check(run, SMALL[rank], PROGRAMS[name], dtype, last)


@pytest.mark.parametrize("name", PROGRAMS)
def test_groups_and_channels_one_by_one(name: str) -> None:
    for groups, C_out in ((2, 34), (4, 4)):
        conv = Conv((1, 4 * groups if groups == 2 else 4, 5), C_out, (3,), (2,), (1,), groups=groups)
        check(general_in_interpreter, conv, PROGRAMS[name], torch.float32, groups == 2)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_march(name: str, rank: int) -> None:
    dtype, last = VARIANTS[(list(PROGRAMS).index(name) + rank) % len(VARIANTS)]
    conv = Conv((1, 17, 3, 4, 5)[: rank + 2], 20, (3,), (2,), (1,), (1,))
    check(march_in_interpreter, conv, PROGRAMS[name], dtype, last)


def epilogue_in_interpreter(x: torch.Tensor, values: Any, program: Program, to_last: bool | None) -> torch.Tensor:
    if to_last is None:
        EPILOGUE_TWIN._in_place(x, *split(values), program)
        return x
    return EPILOGUE_TWIN._out_of_place(x, *split(values), to_last, program)


def epilogue_on_gpu(x: torch.Tensor, values: Any, program: Program, to_last: bool | None) -> torch.Tensor:
    arguments = [each for pair in split(values) for each in pair]
    if to_last is None:
        torch.ops.fused_post.epilogue_(x, *arguments, program.text, program.vectors, *program.tensors)
        return x
    return torch.ops.fused_post.epilogue(x, *arguments, to_last, program.text, program.vectors, *program.tensors)


@every(interpreter=epilogue_in_interpreter, gpu=epilogue_on_gpu)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_epilogue(run: Any, name: str, dtype: torch.dtype) -> None:
    """Each lookup of channels: rows, pixels, units and elements; turned; in place."""
    device = "cpu" if run is epilogue_in_interpreter else "cuda"
    for shape, from_last, to_last in (
        ((1, 2, 4099), False, False),
        ((2, 16, 5, 7), True, True),
        ((2, 3, 8, 8), False, None),
        ((2, 3, 5, 7), False, False),
        ((2, 24, 9), True, None),
        ((2, 3, 5, 7), True, True),
        ((2, 6, 5, 7), False, True),
        ((2, 6, 5, 7), True, False),
    ):
        text, C = PROGRAMS[name], shape[1]
        x = laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(C)).to(device, dtype), from_last)
        shift = coefficients(C, device)[1]
        program = program_for(text, shape, x, from_last if to_last is None else to_last)
        z = x.double() + shift.double().view(-1, *(1,) * (x.dim() - 2))
        expected = run_program(z, program).to(dtype)
        y = run(x, (None, shift), program, to_last)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(y, expected, **tolerance, check_stride=False)


def test_nan_and_infinities_are_those_of_the_steps() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0, -1.0]).view(1, 2, 3)
    for name, text in PROGRAMS.items():
        program = program_for(text, (1, 2, 3), x)
        y = epilogue_in_interpreter(x, (), program, False)
        torch.testing.assert_close(y, run_program(x.double(), program).float(), equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """+ 256 and - 256 again would leave nothing of a value that is rounded in between."""
    text = "affine v0 - 256.0 - 400.0; abs v1; affine v2 - -256.0 - -"
    x = torch.randn(2, 6, 5, 7).to(dtype)
    program = Program(text)
    for run in (lambda: epilogue_in_interpreter(x, (), program, False), lambda: epilogue.epilogue(x, program=text)):
        assert torch.equal(run(), run_program(x.float(), program).to(dtype))
        assert not torch.equal(run(), run_program(x, program))


@pytest.mark.parametrize("name", ["20: (2x + b)x + x", "26: x * hardswish(x)"])
def test_operators_pass_torchs_own_checks(name: str) -> None:
    conv, text = SMALL[2], PROGRAMS[name]
    x, weight = conv.tensors(torch.float32, "cpu")
    vectors = vectors_for(text, 6, "cpu")
    sizes = ([2], [1], [1], [1])
    options = {"program": text, "vectors": vectors}
    torch.library.opcheck(torch.ops.fused_post.conv_transpose.default, (x, weight, *sizes), options)
    torch.library.opcheck(torch.ops.fused_post.epilogue.default, (x[:, :6],), options)
    torch.library.opcheck(torch.ops.fused_post.epilogue_.default, (x[:, :6].clone(),), options)


def test_on_a_cpu_inductor_compiles_the_reference() -> None:
    conv, text = SMALL[2], PROGRAMS["snake"]
    x, weight = conv.tensors(torch.float32, "cpu")
    vectors = vectors_for(text, 6, "cpu")

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fused_post.conv_transpose(x * 2, weight, [2], [1], [1], [1], program=text, vectors=vectors)

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))


def test_the_march_on_hopper_takes_a_program_without_tensors_where_there_is_room() -> None:
    sizes = ([2], [1], [1], [1])
    with (
        FakeTensorMode(),
        mock.patch.object(problem, "is_hopper", return_value=True),
        mock.patch.object(problem, "shared_memory_limit", return_value=227 * 1024),
        mock.patch.object(on_hopper, "conv_transpose_hopper", side_effect=on_hopper.conv_transpose_hopper) as ran,
    ):
        x, weight = torch.empty(2, 64, 32, 32, device="cuda"), torch.empty(64, 64, 3, 3, device="cuda")
        vectors, y = torch.empty(64, 1, device="cuda"), torch.empty(2, 64, 64, 64, device="cuda")
        given = problem_for(x, weight, WIDE.axes, 1, False, True)
        hopper = next(plan for plan in plans_for(given) if plan.is_hopper)
        name = hopper.name
        operator = torch.ops.fused_post.conv_transpose
        assert operator(x, weight, *sizes, plan=name, program="leaky_relu v0 c0", vectors=vectors).shape == y.shape
        assert ran.call_count == 1 and ran.call_args.args[-2] is vectors
        assert on_hopper.call_of(ran.call_args.args[-1]).program == "leaky_relu v0 c0"
        with pytest.raises(ValueError, match=f"plan is '{name}'; allowed for this convolution are"):
            operator(x, weight, *sizes, plan=name, program="add v0 t0", tensor_0=y)
        assert operator(x, weight, *sizes, program="tanh v0").shape == y.shape
        assert ran.call_count == 1
    most = (given.shared_limit - hopper_strips.shared_memory(given, hopper.config)) // (4 * hopper.config.channels)
    assert conv_transpose._plan(given, x, name, columns=most).is_hopper
    assert not conv_transpose._plan(given, x, name, columns=most + 1).is_hopper


# On a GPU: every activation and every program, in both kernels.
ON_GPU = {"general": on_gpu(march=False), "march": on_gpu(march=True), "hopper": on_gpu(False, hopper=True)}
WIDE = Conv((2, 32, 17, 24), 40, (3,), (2,), (1,), (1,))
DEEP = Conv((1, 32, 5, 9, 16), 24, (3,), (2,), (1,))


def defined_everywhere(name: str) -> str:
    """The activation, of a square where it knows no negative values."""
    parameters = parameters_of(name)[0]
    if name in ("log1p", "sqrt"):
        return f"square v0; {line(name, parameters).replace('v0', 'v1')}"
    return line(name, parameters)


TEXTS = {**PROGRAMS, **{name: defined_everywhere(name) for name in ACTIVATIONS}}


# Every pair of a kernel, a dtype and a layout: eight of them would take a GPU minutes.
PAIRED = (
    ("general", torch.float32, False),
    ("general", torch.bfloat16, True),
    ("march", torch.float32, True),
    ("march", torch.bfloat16, False),
    ("hopper", torch.float32, False),
    ("hopper", torch.bfloat16, True),
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(
    ("name", "kernel", "dtype", "last"),
    [(name, *pair) for name in TEXTS for pair in PAIRED if not (pair[0] == "hopper" and " t0" in TEXTS[name])],
    ids=str,
)
def test_every_program_in_every_kernel_on_a_gpu(name: str, kernel: str, dtype: torch.dtype, last: bool) -> None:
    """In two dimensions and, every other program, in three."""
    conv = (WIDE, DEEP)[list(TEXTS).index(name) % 2]
    check(ON_GPU[kernel], conv, TEXTS[name], dtype, last, "cuda")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU_MARKS)])
@pytest.mark.parametrize("march", [False, True], ids=["general", "march"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_inductor_launches_a_kernel_with_a_program_without_python(name: str, march: bool, device: str) -> None:
    from torch._inductor.utils import run_and_get_code

    x, weight = WIDE.tensors(torch.bfloat16, device)
    program = program_for(PROGRAMS[name], WIDE.y, x)
    steps = {"program": program.text, "vectors": program.vectors}
    steps |= {f"tensor_{i}": tensor for i, tensor in enumerate(program.tensors)}
    problem = problem_for(x, weight, WIDE.axes, 1, False, True)
    plan = next(plan.name for plan in plans_for(problem) if fits(plan, march))  # bfloat16

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fused_post.conv_transpose(
            x * 0.25, weight, [2], [1], [1], [1], channels_last=False, plan=plan, **steps
        )

    y, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), x)
    torch.testing.assert_close(y, function(x), rtol=2e-2, atol=2e-2)
    assert ("_row_march_kernel" if march else "_conv_transpose_kernel") in code
    assert "torch.ops.fused_post" not in code

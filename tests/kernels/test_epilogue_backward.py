"""One body for every implementation: the operator on the CPU, the kernel in the interpreter, the kernel on a GPU."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from fusion_backend.kernels import epilogue_backward as kernels
from fusion_backend.kernels import epilogue_backward_turned as turned
from fusion_backend.kernels import matrix
from fusion_backend.kernels.blocks import ENOUGH_PROGRAMS
from fusion_backend.kernels.epilogue_backward import NOTHING, Back
from fusion_backend.kernels.gate import pack, unpack
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.matrix import CONFIGS, Config, tiling_for
from fusion_backend.kernels.program import Program
from fusion_backend.kernels.program import reference as run_program
from fusion_backend.kernels.rounding import cdiv
from tests.kernels.compiling import CHIPS, compile_launch, on_chip, record_launches
from tests.kernels.implementations import DTYPES, Value, every, every_device
from tests.kernels.interpreting import interpreted
from tests.kernels.layouts import is_laid_out, laid_out
from tests.kernels.test_epilogue import SIZES, random

Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """The operator on ``device``, or where there is a ``twin``, the function of that instead."""

    device: str
    twin: Any = None

    def __call__(
        self,
        grad: torch.Tensor,
        bits: torch.Tensor | None,
        scale: Value = None,
        channels_last: bool = False,
        sum_passed: bool = True,
        sum_blocked: bool = True,
        to_last: bool | None = None,
        back: Back = NOTHING,
    ) -> Results:
        number = scale if isinstance(scale, float) else 1.0
        tensor = scale if isinstance(scale, torch.Tensor) else None
        rest = (tensor, number, channels_last, sum_passed, sum_blocked, to_last)
        if self.twin is None:
            given = (back.text, back.value, back.vectors, back.tensor)
            return torch.ops.fused_post.epilogue_backward(grad, bits, *rest, *given)
        with mock.patch.object(turned, "_turned_backward_kernel", TURNED._turned_backward_kernel):
            return self.twin._backward(grad, bits, *rest, back)

    def launch(self, grad: torch.Tensor, bits: torch.Tensor, channels_last: bool, config: Config) -> Results:
        module = self.twin or kernels
        tiling = tiling_for(grad, channels_last, config)
        with mock.patch.object(kernels, "wrap_triton", lambda kernel: kernel):
            return module.launch(grad, bits, None, 1.0, channels_last, True, True, tiling)


TURNED = interpreted(turned)
ON_CPU = Implementation("cpu")
INTERPRETED = Implementation("cpu", interpreted(kernels))
ON_GPU = Implementation("cuda")

every_kernel = every(interpreter=INTERPRETED, gpu=ON_GPU)
every_implementation = every(operator=ON_CPU, interpreter=INTERPRETED, gpu=ON_GPU)


def mask(shape: tuple[int, ...], device: str, seed: int = 1) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6).to(device)


def scales(C: int, device: str) -> torch.Tensor:
    return torch.randn(C, generator=torch.Generator().manual_seed(C)).to(device)


def exact(grad: torch.Tensor, passing: torch.Tensor, scale: Value) -> Results:
    """In float64, by masks and not by bits."""
    g = grad.double()
    if isinstance(scale, torch.Tensor):
        scale = scale.double().view(-1, *(1,) * (grad.dim() - 2))
    dims = (0, *range(2, grad.dim()))
    grad_x = torch.where(passing, g if scale is None else g * scale, 0.0)
    return grad_x, torch.where(passing, g, 0.0).sum(dims), torch.where(passing, 0.0, g).sum(dims)


def assert_exact(
    results: Results, grad: torch.Tensor, passing: torch.Tensor, scale: Value = None, channels_last: bool = False
) -> None:
    """grad_x up to its one rounding; the sums up to those of a sum in fp32."""
    grad_x, *sums = results
    expected, *expected_sums = exact(grad, passing, scale)
    assert (grad_x.dtype, grad_x.shape) == (grad.dtype, grad.shape)
    assert is_laid_out(grad_x, channels_last)
    torch.testing.assert_close(
        grad_x.double(), expected, rtol=torch.finfo(grad.dtype).eps, atol=1e-7, equal_nan=True, check_stride=False
    )
    for ours, theirs in zip(sums, expected_sums, strict=True):
        assert ours.dtype == torch.promote_types(grad.dtype, torch.float32)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * grad.numel() ** 0.5, equal_nan=True)


@every_implementation
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SIZES, (2, 96, 33), (1, 3, 8, 9, 17), (34, 6, 20)], ids=str)
def test_any_size_in_both_layouts(
    run: Implementation, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    grad = laid_out(random(shape, dtype, run.device), channels_last)
    passing, scale = mask(shape, run.device), scales(shape[1], run.device)
    results = run(grad, pack(passing, channels_last), scale, channels_last)
    assert_exact(results, grad, passing, scale, channels_last)


@every_implementation
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SIZES, (2, 96, 33), (1, 3, 8, 9, 17), (34, 6, 20), (3, 70, 16, 8)], ids=str)
def test_into_the_other_layout(
    run: Implementation, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    """Also without bits, without a scale, and without sums."""
    grad = laid_out(random(shape, dtype, run.device), channels_last)
    passing, scale = mask(shape, run.device), scales(shape[1], run.device)
    bits = pack(passing, channels_last)
    results = run(grad, bits, scale, channels_last, True, True, not channels_last)
    assert_exact(results, grad, passing, scale, not channels_last)
    everything = torch.ones_like(passing)
    assert_exact(
        run(grad, None, None, channels_last, True, True, not channels_last), grad, everything, None, not channels_last
    )
    alone, *sums = run(grad, bits, None, channels_last, False, False, not channels_last)
    assert torch.equal(alone, torch.where(passing, grad, 0.0))
    assert is_laid_out(alone, not channels_last) and [each.numel() for each in sums] == [0, 0]


@every_implementation
@pytest.mark.parametrize("to_last", [None, False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SIZES, (2, 96, 33), (1, 3, 8, 9, 17), (3, 16, 3, 7, 5), (3, 70, 16, 8)], ids=str)
def test_bits_in_channels_last_order_beside_any_layout(
    run: Implementation, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, to_last: bool | None
) -> None:
    """The same results as by bits in the gradient's own order, to the bit but for the order of sums."""
    grad = laid_out(random(shape, dtype, run.device), channels_last)
    passing, scale = mask(shape, run.device), scales(shape[1], run.device)
    bits = pack(passing, True)[None]
    results = run(grad, bits, scale, channels_last, True, True, to_last)
    assert_exact(results, grad, passing, scale, channels_last if to_last is None else to_last)
    assert torch.equal(results[0], run(grad, pack(passing, channels_last), scale, channels_last)[0])
    alone, *_ = run(grad, bits, None, channels_last, False, False, to_last)
    assert torch.equal(alone, torch.where(passing, grad, 0.0))


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_argument_can_be_missing(run: Implementation, channels_last: bool, dtype: torch.dtype) -> None:
    shape = (2, 3, 5, 7)
    grad, passing = laid_out(random(shape, dtype, run.device), channels_last), mask(shape, run.device)
    for has_bits, scale in itertools.product((True, False), (None, -1.7, scales(3, run.device))):
        bits = pack(passing, channels_last) if has_bits else None
        seen = passing if has_bits else torch.ones_like(passing)
        all_sums = run(grad, bits, scale, channels_last)
        assert_exact(all_sums, grad, seen, scale, channels_last)
        for wanted in ((False, False), (True, False), (False, True)):
            some = run(grad, bits, scale, channels_last, *wanted)
            assert torch.equal(some[0], all_sums[0])
            for ours, theirs, is_wanted in zip(some[1:], all_sums[1:], wanted, strict=True):
                assert torch.equal(ours, theirs) if is_wanted else ours.shape == (0,)
                assert ours.dtype == torch.float32


BACKS = {
    "by the result": "tanh_backward_of_result t0 v0",
    "where nothing is, it is no number": "sqrt_backward_of_result t0 v0",
    "by channel": "affine v0 c0 c1 - -; mul v1 v0; silu_backward t0 v2; affine v3 c0 - - -",
    "with a tensor": "add v0 t1; clamp_backward t0 v1 -0.5 c0; mul v2 t1; minimum_backward v3 v0 t1",
    "without a value": "mul t0 t1",
}


@every_implementation
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("to_last", [False, True], ids=["to contiguous", "to channels_last"])
@pytest.mark.parametrize("name", BACKS)
def test_a_program_leads_back(run: Implementation, name: str, to_last: bool, channels_last: bool) -> None:
    """In any size, and added up as what it gives is."""
    text = BACKS[name]
    for shape in ((2, 3, 5, 7), (2, 24, 13), (3, 4, 300), (1, 70, 4, 4, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            grad, value, tensor = (
                laid_out(random(shape, dtype, run.device, seed), channels_last) for seed in (1, 2, 3)
            )
            vectors = random((shape[1], 2), torch.float32, run.device, 4)
            vectors = vectors[:, :1].contiguous() if " c1" not in text else vectors
            back = Back(
                text,
                value if " v0" in text else None,
                vectors if " c" in text else None,
                tensor if " t1" in text else None,
            )
            given = Program(text, None if back.vectors is None else vectors.double(), (grad.double(), back.tensor))
            expected = run_program(value.double(), given)
            everything = torch.ones(shape, dtype=torch.bool, device=run.device)
            grad_x, passed, blocked = run(grad, None, None, channels_last, True, True, to_last, back)
            assert_close = functools.partial(torch.testing.assert_close, equal_nan=True, check_stride=False)
            assert_close(grad_x.double(), expected, rtol=1e-5 + torch.finfo(dtype).eps, atol=2e-6)
            assert is_laid_out(grad_x, to_last)
            sums = exact(expected, everything, None)[1]
            assert_close(passed.double(), sums, rtol=1e-5, atol=2e-6 * grad.numel() ** 0.5)
            assert not blocked.any()


@every_implementation
def test_a_program_in_strides_of_its_own(run: Implementation) -> None:
    dense = random((3, 8, 6, 10), torch.float32, run.device)
    grad, value, tensor = dense[:, ::2], laid_out(dense, True)[:, 4:], dense[:1, :4].expand(3, 4, 6, 10)
    text = "mul v0 t1; silu_backward t0 v1"
    for channels_last in (False, True):
        grad_x, *_ = run(grad, None, 2.0, channels_last, False, False, None, Back(text, value, None, tensor))
        expected = 2 * run_program(value.double(), Program(text, None, (grad.double(), tensor.double())))
        torch.testing.assert_close(grad_x.double(), expected, rtol=1e-5, atol=1e-6, check_stride=False)


@every_kernel
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.tile_bytes}x{config.num_warps}x{config.tiles}")
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((2, 3, 5120), False), ((3, 5, 1100), False), ((2, 3, 1031), False), ((300, 3, 24), False), ((2, 24, 2111), True)],
    ids=["rows", "parts_of_rows", "odd_rows", "short_rows", "channels_last"],
)
def test_every_configuration_writes_every_element_and_nothing_else(
    run: Implementation, shape: tuple[int, ...], channels_last: bool, config: Config
) -> None:
    """All memory that is taken is NaN before, also to both sides."""
    margin = 64
    taken: list[torch.Tensor] = []

    def take(numel: int, dtype: torch.dtype) -> torch.Tensor:
        taken.append(torch.full((numel + 2 * margin,), math.nan, dtype=dtype, device=run.device))
        return taken[-1][margin:-margin]

    def grad_x(shape: tuple[int, ...], like: torch.Tensor, channels_last: bool) -> torch.Tensor:
        N, C, *sizes = shape
        inner = take(math.prod(shape), like.dtype)
        return inner.view(N, *sizes, C).movedim(-1, 1) if channels_last else inner.view(shape)

    def parts(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        return take(math.prod(shape), torch.float32).view(shape)

    grad = laid_out(random(shape, torch.bfloat16, run.device), channels_last)
    passing = mask(shape, run.device)
    names = (run.twin or kernels).launch.__globals__
    with mock.patch.dict(names, empty=grad_x, _empty_parts=parts):
        results = run.launch(grad, pack(passing, channels_last), channels_last, config)
    assert_exact(results, grad, passing, channels_last=channels_last)
    assert len(taken) == 3
    for memory in taken:
        assert memory[:margin].isnan().all() and memory[-margin:].isnan().all()
        assert not memory[margin:-margin].isnan().any()


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_and_infinity_end_in_blocked_elements(run: Implementation, channels_last: bool, dtype: torch.dtype) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0, 2.0], device=run.device, dtype=dtype)
    grad = laid_out(values.view(1, 2, 3).repeat(2, 1, 3), channels_last)
    blocks = torch.zeros(grad.shape, dtype=torch.bool, device=run.device)
    for scale in (None, 0.0, math.inf, torch.tensor([math.nan, 3.0], device=run.device)):
        grad_x, passed, _ = run(grad, pack(blocks, channels_last), scale, channels_last)
        assert torch.equal(grad_x, torch.zeros_like(grad))
        assert not grad_x.signbit().any()
        assert torch.equal(passed, torch.zeros(2, device=run.device))
    results = run(grad, pack(~blocks, channels_last), None, channels_last)
    assert_exact(results, grad, ~blocks, channels_last=channels_last)
    assert torch.equal(results[0].signbit() & (grad == 0), grad.signbit() & (grad == 0))


@every_implementation
@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, 1e300])
def test_scales_that_are_not_finite(run: Implementation, scale: float) -> None:
    """Source cannot spell them, so they come as tensors; 1e300 is infinite in fp32."""
    grad, passing = random((2, 3, 5), torch.float32, run.device), mask((2, 3, 5), run.device)
    grad_x, *_ = run(grad, pack(passing, False), scale)
    expected = torch.where(passing, grad * (math.inf if scale == 1e300 else scale), 0.0)
    torch.testing.assert_close(grad_x, expected, rtol=0, atol=0, equal_nan=True)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_exactly_once(run: Implementation, dtype: torch.dtype) -> None:
    grad, scale = random((4, 6, 40), dtype, run.device), scales(6, run.device)
    everything = torch.ones(grad.shape, dtype=torch.bool, device=run.device)
    grad_x, *_ = run(grad, pack(everything, False), scale)
    assert torch.equal(grad_x, (grad.float() * scale.view(-1, 1)).to(dtype))


@every_implementation
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_in_any_strides(run: Implementation, channels_last: bool) -> None:
    dense = random((3, 8, 6, 10), torch.float32, run.device)
    gradients = [
        dense[:, :4],
        laid_out(dense[:, :4], True),
        dense[:, ::2],
        dense[:, :4, 1:, 3:9],
        laid_out(dense, True)[:, :4, ::2],
        dense[:, :4].permute(0, 1, 3, 2),
        dense[:1, :4].expand(3, 4, 6, 10),
        torch.ones((), device=run.device).expand(3, 4, 6, 10),
    ]
    scale = scales(4, run.device)
    for grad in gradients:
        passing = mask(grad.shape, run.device)
        assert_exact(run(grad, pack(passing, channels_last), scale, channels_last), grad, passing, scale, channels_last)


@every_implementation
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 4, 9), (40, 6, 5, 5), (2, 3, 41, 43)], ids=str)
def test_the_same_bits_on_every_run(run: Implementation, shape: tuple[int, ...], channels_last: bool) -> None:
    grad = laid_out(random(shape, torch.float32, run.device), channels_last)
    bits = pack(mask(shape, run.device), channels_last)
    first, *others = (run(grad, bits, None, channels_last) for _ in range(5))
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, first, strict=True))


@every_implementation
def test_addresses_that_16_does_not_divide(run: Implementation) -> None:
    grad = random((2 * 4 * 24 + 1,), torch.bfloat16, run.device)[1:].view(2, 4, 24)
    passing = mask(grad.shape, run.device)
    bits = torch.cat([torch.zeros(1, dtype=torch.uint8, device=run.device), pack(passing, False)])[1:]
    assert_exact(run(grad, bits), grad, passing)


@pytest.mark.parametrize("channels_last", [False, True])
def test_float64_is_computed_in_float64(channels_last: bool) -> None:
    grad = laid_out(random((2, 3, 5, 7), torch.float64, "cpu"), channels_last)
    passing, scale = mask(grad.shape, "cpu"), scales(3, "cpu").double() / 3
    results = ON_CPU(grad, pack(passing, channels_last), scale, channels_last)
    for ours, theirs in zip(results, exact(grad, passing, scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14, check_stride=False)


def test_the_sums_are_the_gradients_of_what_was_added_and_bounded() -> None:
    """Against eager's own backward of a shift behind which a learned bound stands."""
    x, grad = random((4, 3, 6, 5), torch.float64, "cpu"), random((4, 3, 6, 5), torch.float64, "cpu", seed=1)
    shift, lo = (torch.randn(3, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x.requires_grad_()
    y = torch.maximum(x * 1.5 + shift, lo)
    expected = torch.autograd.grad(y, (x, shift, lo), grad)
    ours = ON_CPU(grad, pack(x * 1.5 + shift > lo, False), 1.5)
    for result, gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, gradient.view(result.shape))


# What a user can get wrong, each with the message's first words.
GRAD = torch.zeros(2, 3, 4, 4)
BITS = torch.zeros(12, dtype=torch.uint8)
MISTAKES: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, type[Exception], str]] = [
    (torch.zeros(2, 3), None, None, ValueError, r"grad has rank 2 \(shape \(2, 3\)\); allowed are ranks 3 to 5"),
    (torch.zeros(1, 2, 1, 1, 1, 1), None, None, ValueError, "grad has rank 6"),
    (GRAD.int(), None, None, TypeError, "grad has dtype torch.int32; allowed are torch.float32, torch.float16, "),
    (GRAD.to(torch.complex64), None, None, TypeError, "grad has dtype torch.complex64"),
    (GRAD, BITS.bool(), None, TypeError, "bits has dtype torch.bool; allowed is torch.uint8"),
    (GRAD, BITS[1:], None, ValueError, r"bits has shape \(11,\); allowed is one bit an element, \[ceil\(96 / 8\)\] = "),
    (GRAD, BITS.view(2, 6), None, ValueError, r"bits has shape \(2, 6\)"),
    (GRAD, BITS.repeat(2).view(2, 12), None, ValueError, r"bits has shape \(2, 12\); .* or with a 1 before that"),
    (GRAD, BITS[None, 1:], None, ValueError, r"bits has shape \(1, 11\)"),
    (GRAD, BITS.repeat(2)[None, ::2], None, ValueError, "bits has stride 2; allowed is 1: call .contiguous"),
    (GRAD, BITS.repeat(2)[::2], None, ValueError, "bits has stride 2; allowed is 1: call .contiguous"),
    (GRAD, BITS.to("meta"), None, ValueError, "bits is on meta; allowed is grad's device, cpu"),
    (GRAD, BITS, torch.ones(4), ValueError, r"scale has shape \(4,\); allowed is \[C\] = \(3,\)"),
    (GRAD, BITS, torch.ones(3).half(), TypeError, "scale has dtype torch.float16; allowed is torch.float32"),
    (GRAD.double(), BITS, torch.ones(3), TypeError, "scale has dtype torch.float32; allowed is torch.float64"),
    (GRAD, BITS, torch.ones(3, device="meta"), ValueError, "scale is on meta; allowed is grad's device, cpu"),
    (GRAD, BITS, torch.ones(6)[::2], ValueError, "scale has stride 2; allowed is 1: call .contiguous"),
]


@pytest.mark.parametrize(("grad", "bits", "scale", "error", "message"), MISTAKES, ids=[m[-1] for m in MISTAKES])
def test_mistakes_are_named(
    grad: torch.Tensor, bits: torch.Tensor | None, scale: torch.Tensor | None, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        torch.ops.fused_post.epilogue_backward(grad, bits, scale, 1.0, False, True, True)


@pytest.mark.parametrize(
    ("back", "message"),
    [
        (Back("tanh_backward t0 v0"), "reads v0, and value is None"),
        (Back("tanh_backward t0 v0", GRAD[:1]), r"value is torch.float32 \(1, 3, 4, 4\); allowed is what grad is"),
        (Back("mul t0 t1"), r"names \['t0', 't1'\], given are \['t0'\]"),
        (Back("", None, None, GRAD), "given are"),
        (Back("swoosh_backward t0 v0", GRAD), "allowed are abs"),
        (Back("gelu_backward_of_result t0 v0", GRAD), "allowed are abs"),
    ],
)
def test_mistakes_in_a_program_are_named(back: Back, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ON_CPU(GRAD, None, back=back)


def test_the_operator_has_the_agreed_schema() -> None:
    assert str(torch.ops.fused_post.epilogue_backward.default._schema) == (
        "fused_post::epilogue_backward(Tensor grad, Tensor? bits, Tensor? scale, float scale_number, "
        'bool channels_last, bool sum_passed, bool sum_blocked, bool? to_channels_last=None, str program="", '
        "Tensor? value=None, Tensor? vectors=None, Tensor? tensor=None) -> (Tensor, Tensor, Tensor)"
    )


@every_device
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 8, 4, 4), (1, 3, 2, 3, 4)], ids=["1d", "2d", "3d"])
def test_opcheck(shape: tuple[int, ...], channels_last: bool, device: str) -> None:
    operator = torch.ops.fused_post.epilogue_backward.default
    grad = laid_out(random(shape, torch.float32, device), channels_last)
    bits, scale = pack(mask(shape, device), channels_last), scales(shape[1], device)
    torch.library.opcheck(operator, (grad, bits, scale, 1.0, channels_last, True, True))
    torch.library.opcheck(operator, (grad, None, None, 2.0, not channels_last, True, False))
    torch.library.opcheck(operator, (grad, bits, scale, 1.0, channels_last, True, True, not channels_last))
    torch.library.opcheck(operator, (grad, bits[None], scale, 1.0, channels_last, True, True, True))


def test_there_is_no_second_derivative() -> None:
    grad = random((2, 3, 4), torch.float32, "cpu").requires_grad_()
    results = torch.ops.fused_post.epilogue_backward(grad, pack(grad > 0, False), None, 1.0, False, True, False)
    for result in results[:2]:
        with pytest.raises(RuntimeError, match=r'no second derivative.*torch\.compile\(model, backend="inductor"\)'):
            result.sum().backward(retain_graph=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 8, 4, 4), (1, 3, 2, 3, 4), (2, 0, 3)], ids=str)
def test_fake_tensors_need_no_gpu(shape: tuple[int, ...], channels_last: bool, device: str) -> None:
    operator = torch.ops.fused_post.epilogue_backward
    with FakeTensorMode():
        # A fake copy on a GPU needs a torch that is built for one.
        grad = empty(shape, torch.empty(0, device=device, dtype=torch.bfloat16), channels_last and device == "cuda")
        bits = torch.empty(math.ceil(grad.numel() / 8), device=device, dtype=torch.uint8)
        fakes = operator(grad, bits, None, 2.0, channels_last, True, False)
    reals = operator(torch.ones(shape, dtype=torch.bfloat16), torch.zeros(bits.shape, dtype=torch.uint8), None, 2.0,
                     channels_last, True, False)  # fmt: skip
    for fake, real in zip(fakes, reals, strict=True):
        assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, device)
        assert fake.stride() == real.stride()


@pytest.mark.parametrize("channels_last", [False, True])
def test_sizes_that_vary_are_traced_into_one_launch(channels_last: bool) -> None:
    """What is fixed: bits for every element, whether the tensor is large, rows are short, and vectors divide them."""
    x = laid_out(random((2, 16, 40, 32), torch.float32, "cpu"), channels_last)

    def backward(grad: torch.Tensor) -> Results:
        bits = grad.new_empty((grad.numel() + 7) // 8, dtype=torch.uint8)
        return kernels._backward(grad, bits, None, 2.0, channels_last, True, True, None)

    with mock.patch.object(kernels, "runs", return_value=True):
        graph = make_fx(backward, tracing_mode="symbolic")(x)
    launches = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(launches) == 1
    assert len(graph.shape_env.guards) <= (6 if channels_last else 9)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partial_sums_are_small_against_the_tensor(dtype: torch.dtype, channels_last: bool) -> None:
    shape = (128, 64, 256, 256)
    with FakeTensorMode():
        grad = empty(shape, torch.empty(0, dtype=dtype, device="cuda"), channels_last)
        bits = torch.empty(grad.numel() // 8, dtype=torch.uint8, device="cuda")
        tiling = tiling_for(grad, channels_last)
        (launch,) = record_launches(
            kernels, lambda: kernels.launch(grad, bits, None, 1.0, channels_last, True, True, tiling)
        )
    parts = [launch.arguments[name] for name in ("passed_ptr", "blocked_ptr")]
    assert sum(part.numel() * part.itemsize for part in parts) < 0.01 * grad.numel() * grad.itemsize
    assert launch.grid[0] >= 8 * ENOUGH_PROGRAMS


def test_a_tile_of_many_short_rows() -> None:
    """512 channels of 4 x 4 pixels: no program is spent on a row of 16 elements."""
    with FakeTensorMode():
        tiling = tiling_for(torch.empty(128, 512, 4, 4, device="cuda"), False)
    assert (tiling.width, tiling.tile_rows * tiling.tile_units * tiling.width) == (4, 1024)
    assert tiling.strips * tiling.blocks == 128 * 512 * 16 // 1024


def test_tiles_leave_little_of_themselves_empty() -> None:
    for C in (1, 3, 4, 20, 64, 65, 96, 100, 129, 192, 320, 2050):
        columns = matrix._column_tile(C, 32)
        assert columns <= matrix.WIDEST and columns & (columns - 1) == 0
        assert 2 * cdiv(C, columns) * columns <= 3 * C or columns == 32
    for S in (1, 128, 196, 784, 1025, 3136, 10000, 65536):
        columns = matrix._row_tile(S, 4096)
        assert 8 * cdiv(S, columns) * columns <= 9 * S or columns == matrix.SHORT_ROW


@pytest.mark.parametrize("channels_last", [False, True])
def test_on_a_cpu_inductor_fuses_the_reference(channels_last: bool) -> None:
    shape = (2, 3, 5, 7)
    grad, passing = laid_out(random(shape, torch.float32, "cpu"), channels_last), mask(shape, "cpu")

    @torch.compile(fullgraph=True)
    def backward(grad: torch.Tensor, bits: torch.Tensor) -> Results:
        return torch.ops.fused_post.epilogue_backward(grad * 1, bits, None, 2.0, channels_last, True, True)

    assert_exact(backward(grad, pack(passing, channels_last)), grad, passing, 2.0, channels_last)


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("C", [7, 16])
def test_more_than_2_to_the_31_elements(C: int, channels_last: bool) -> None:
    """Sums of ones are counts, and exact in fp32 where partial sums are and their sum is rounded once or twice."""
    shape = (3, C, 2**31 // (3 * C * 4096) + 1, 4096)
    numel = math.prod(shape)
    assert numel > 2**31
    if torch.cuda.mem_get_info()[0] < 8 * numel:
        pytest.skip(f"{8 * numel / 2**30:.0f} GiB of GPU memory are not free")
    bits = torch.randint(0, 256, (math.ceil(numel / 8),), dtype=torch.uint8, device="cuda")
    if numel % 8:
        bits[-1] &= 2 ** (numel % 8) - 1
    grad = empty(shape, torch.empty(0, dtype=torch.bfloat16, device="cuda"), channels_last).fill_(1.0)
    grad_x, passed, blocked = ON_GPU(grad, bits, None, channels_last)
    places = torch.arange(8, device="cuda", dtype=torch.uint8)
    flat = (grad_x.movedim(1, -1) if channels_last else grad_x).reshape(-1)
    for begin in range(0, len(bits), 2**25):
        part = bits[begin : begin + 2**25]
        expected = (part[:, None] >> places & 1).reshape(-1)
        ours = flat[8 * begin : 8 * (begin + len(part))]
        assert torch.equal(ours, expected[: len(ours)].to(ours.dtype))
    counts = sum((grad_x[image] == 1).sum((1, 2)) for image in range(3))
    torch.testing.assert_close(passed, counts.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(blocked, (numel // C - counts).float(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [128, 127], ids=str)
def test_no_element_is_ever_wrong_in_repeated_launches(size: int, dtype: torch.dtype, channels_last: bool) -> None:
    grad = laid_out(torch.randn(32, 64, size, size, device="cuda").to(dtype), channels_last)
    passing = torch.rand(grad.shape, device="cuda") < 0.5
    bits = pack(passing, channels_last)
    assert torch.equal(unpack(bits, grad.shape, channels_last), passing)
    for config in CONFIGS:
        first = ON_GPU.launch(grad, bits, channels_last, config)
        assert torch.equal(first[0], torch.where(passing, grad, 0.0))
        torch.testing.assert_close(
            first[1], torch.where(passing, grad, 0.0).double().sum((0, 2, 3)).float(), rtol=1e-4, atol=1e-2
        )
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(30):
            for ours, theirs in zip(ON_GPU.launch(grad, bits, channels_last, config), first, strict=True):
                wrong += (ours != theirs).sum()
        assert wrong.item() == 0, f"{wrong.item()} wrong elements with {config}"


@pytest.mark.usefixtures("empty_gpu")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_inductor_launches_the_kernel_without_python(channels_last: bool, dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    def backward(grad: torch.Tensor, bits: torch.Tensor) -> Results:
        return torch.ops.fused_post.epilogue_backward(grad * 2, bits, None, 1.5, channels_last, True, False)

    compiled = torch.compile(backward, backend="inductor", fullgraph=True, dynamic=dynamic)
    for height in (40, 56):
        grad = laid_out(random((2, 16, height, 32), torch.float32, "cuda"), channels_last)
        passing = mask(grad.shape, "cuda")
        (grad_x, passed, _), codes = run_and_get_code(compiled, grad, pack(passing, channels_last))
        blocked = torch.where(passing, 0.0, 2 * grad).sum((0, 2, 3))
        assert_exact((grad_x, passed, blocked), 2 * grad, passing, 1.5, channels_last)
        for code in codes:
            assert "_backward_kernel_0.run(" in code
            assert "torch.ops.fused_post" not in code


@pytest.mark.parametrize("bits_last", [False, True], ids=["bits in order", "bits in the other order"])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turning_spills_nothing_and_reads_and_writes_whole_vectors(
    dtype: torch.dtype, chip: str, bits_last: bool
) -> None:
    with on_chip(chip):
        grad = empty((128, 64, 256, 256), torch.empty(0, dtype=dtype, device="cuda"), False)
        bits = torch.empty(grad.numel() // 8, dtype=torch.uint8, device="cuda")
        bits = bits.unsqueeze(0) if bits_last else bits
        scale = torch.empty(64, device="cuda")
        (launch,) = record_launches(turned, lambda: turned.launch_turned(grad, bits, scale, 1.0, True, True))
    compiled = compile_launch(launch, CHIPS[chip])
    assert compiled.spills == 0
    assert max(compiled.loads) == max(compiled.stores) == 128

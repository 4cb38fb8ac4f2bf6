"""The rule by which gradients pass a bound, against eager's own; and the order in which its bits are packed."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from fusion_backend.kernels.gate import Gate, pack, passes, unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GATES = [Gate(*flags) for flags in itertools.product((False, True), repeat=3)]


def on_and_around(*bounds: float, dtype: torch.dtype) -> torch.Tensor:
    """The bounds, the numbers next to them, and what is not finite."""
    on = torch.tensor([*bounds, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    beside = [(on.view(whole) + step).view(dtype) for step in (-1, 1)]
    return torch.cat([on, *beside, torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)])


CLOSED, OPEN = Gate(passes_nan=False), Gate(lo_open=True, hi_open=True)
OPERATIONS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], float | None, float | None, Gate]] = [
    ("clamp", lambda x: x.clamp(-0.5, 0.75), -0.5, 0.75, CLOSED),
    ("clamp_min", lambda x: x.clamp_min(0.25), 0.25, None, CLOSED),
    ("clamp_max", lambda x: x.clamp_max(-0.25), None, -0.25, CLOSED),
    ("clamp_tensors", lambda x: x.clamp(torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)), 0, 1, CLOSED),
    ("relu", torch.relu, 0.0, None, OPEN),
    ("relu6", F.relu6, 0.0, 6.0, OPEN),
    ("hardtanh", F.hardtanh, -1.0, 1.0, OPEN),
    ("nothing", lambda x: x * 1.0, None, None, Gate()),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("operation", "lo", "hi", "gate"), [row[1:] for row in OPERATIONS], ids=[r[0] for r in OPERATIONS]
)
def test_passes_what_eager_passes(
    operation: Callable[[torch.Tensor], torch.Tensor],
    lo: float | None,
    hi: float | None,
    gate: Gate,
    dtype: torch.dtype,
) -> None:
    """One by one: on a CPU hardtanh passes a NaN on its own, as CUDA and Inductor do, but not one of many in fp32."""
    values = on_and_around(*(bound for bound in (lo, hi) if bound is not None), dtype=dtype)
    for x in values.split(1):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(operation(x), x)
        assert gradient.item() == passes(x.detach(), lo, hi, gate).item(), x


def test_each_end_and_nan_have_their_own_say() -> None:
    z = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, math.nan])
    for gate in GATES:
        inner = [not gate.lo_open, True, not gate.hi_open]
        for lo, hi in itertools.product((0.0, None), (1.0, None)):
            expected = [lo is None, *inner, hi is None, gate.passes_nan]
            expected[1] = expected[1] or lo is None
            expected[3] = expected[3] or hi is None
            assert passes(z, lo, hi, gate).tolist() == expected
            tensors = (bound if bound is None else torch.full((6,), bound) for bound in (lo, hi))
            assert passes(z, *tensors, gate).tolist() == expected


def test_the_first_element_is_the_lowest_bit_and_the_last_byte_is_filled_with_zeros() -> None:
    passing = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool).view(1, 2, 6)
    assert pack(passing, False).tolist() == [0b10000001, 0b1011]
    channels_last = [1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1]
    assert passing.mT.flatten().tolist() == channels_last
    assert pack(passing, True).tolist() == [0b10101001, 0b1000]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 1, 8), (2, 3, 5), (1, 5, 3, 7), (2, 3, 2, 2, 3), (2, 8, 4, 4), (0, 3, 4), (2, 3, 0)],
    ids=str,
)
def test_what_is_packed_is_unpacked(shape: tuple[int, ...], channels_last: bool) -> None:
    passing = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for given in (passing, passing.movedim(1, -1).contiguous().movedim(-1, 1)):
        bits = pack(given, channels_last)
        assert (bits.dtype, bits.shape) == (torch.uint8, (math.ceil(passing.numel() / 8),))
        assert torch.equal(unpack(bits, shape, channels_last), passing)
        assert not channels_last or torch.equal(unpack(bits[None], shape, False), passing)
    one_by_one = (passing.movedim(1, -1) if channels_last else passing).flatten().tolist()
    assert [bits[i // 8].item() >> i % 8 & 1 for i in range(passing.numel())] == one_by_one


@pytest.mark.parametrize("channels_last", [False, True])
def test_all_sizes_may_vary(channels_last: bool) -> None:
    """The guards that are left hold for all sizes: whole bytes are whole, and no more is cut off than there is."""

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return unpack(pack(x > 0, channels_last), x.shape, channels_last)

    graph = make_fx(there_and_back, tracing_mode="symbolic")(torch.randn(2, 3, 5, 7))
    for shape in ((2, 3, 5, 7), (3, 5, 7, 9), (2, 8, 4, 6)):
        x = torch.randn(shape)
        assert torch.equal(graph(x), x > 0)
    assert len(graph.shape_env.guards) <= 2


def test_inductor_packs_the_same_on_a_cpu() -> None:
    @torch.compile(fullgraph=True)
    def there_and_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bits = pack(x > 0, True)
        return bits, torch.where(unpack(bits, x.shape, True), x, 0.0)

    x = torch.randn(2, 3, 5, 7)
    bits, masked = there_and_back(x)
    assert torch.equal(bits, pack(x > 0, True))
    assert torch.equal(masked, x.relu())

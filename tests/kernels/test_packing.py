"""The kernel that packs a weight, in the interpreter and on a GPU, against the transposition spelt out."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fusion_backend.kernels import packing
from fusion_backend.kernels.packing import Packing, _spelt_out
from tests.kernels.implementations import every
from tests.kernels.interpreting import interpreted

Run = Callable[[torch.Tensor, int, Packing], torch.Tensor]


BY_KERNEL = {"LEAST": 0, "_spelt_out": None}

TWIN = interpreted(packing)
TWIN.pack.__globals__.update(BY_KERNEL)


def on_gpu(weight: torch.Tensor, groups: int, how: Packing) -> torch.Tensor:
    with mock.patch.multiple(packing, **BY_KERNEL):
        return packing.pack(weight.cuda(), groups, how).cpu()


every_run = every(interpreter=TWIN.pack, gpu=on_gpu)

# C_in, C_out / groups, kernel; groups; how.
USES = {
    "general": ((70, 5, 3, 3), 1, Packing(5, 96, False)),
    "general, groups": ((36, 2, 4), 3, Packing(2, 16, False)),
    "general, nothing to fill up": ((128, 64, 2, 2), 1, Packing(64, 128, False)),
    "march": ((20, 24, 3, 3), 1, Packing(32, 32, True)),
    "march, volume": ((3, 16, 2, 3, 4), 1, Packing(16, 16, True)),
    "hopper, float32": ((20, 24, 3, 3), 1, Packing(32, 32, True, 2)),
    "hopper, 16 bits": ((64, 64, 2, 2), 1, Packing(64, 64, True, 4)),
    "shared": ((20, 24, 3, 4), 1, Packing(32, 32, True, 1, False, 2)),
    "shared, by neighbours": ((20, 24, 16), 1, Packing(32, 32, True, 4, False, 8)),
}


@every_run
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", USES)
def test_every_row_is_where_it_belongs(run: Run, name: str, last: bool) -> None:
    shape, groups, how = USES[name]
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    if last:
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    packed = run(weight, groups, how)
    assert torch.equal(packed, _spelt_out(weight, groups, how))
    C_out = shape[1]
    rows = packed.view(groups, *((-1, how.C_out) if how.by_tap else (how.C_out, -1)), how.depth)
    rows = rows if how.by_tap else rows.transpose(1, 2)
    if how.neighbours == how.shared == 1:
        assert rows[-1, 1, C_out - 1, 0] == weight[-shape[0] // groups, C_out - 1].flatten()[1]
        assert rows[:, :, C_out:].count_nonzero() == rows[..., shape[0] // groups :].count_nonzero() == 0


def test_what_one_thread_of_a_product_holds_are_neighbours() -> None:
    """Of column 8*i + 2*t + j, lane t holds the values."""
    packed = _spelt_out(torch.arange(32.0).view(1, 32, 1), 1, Packing(32, 1, True, 4)).flatten()
    held = packed.view(4, 4, 2).transpose(0, 1).reshape(4, 8)  # by lane
    assert torch.equal(held, torch.arange(32.0).view(4, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_rounds_to_tf32_to_nearest() -> None:
    weight = torch.randn(64, 64, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    how = Packing(64, 64, True, rounded=True)
    assert torch.equal(on_gpu(weight, 1, how).nan_to_num(7.0), _spelt_out(weight, 1, how).nan_to_num(7.0))


def test_a_weight_in_no_known_layout() -> None:
    weight = torch.randn(8, 6, 3, 3)[:, ::2]
    assert torch.equal(packing.pack(weight, 1, Packing(3, 16, False))[:, :8], weight.reshape(8, -1).T)


def test_freezing_gets_what_inductor_can_fold() -> None:
    weight = torch.randn(8, 6, 3)
    kernel = mock.patch.multiple(packing, LEAST=0, runs=mock.Mock(return_value=True))
    with mock.patch.object(packing.inductor_config, "freezing", True), kernel:
        assert torch.equal(packing.pack(weight, 1, Packing(6, 8, False)), weight.reshape(8, -1).T)

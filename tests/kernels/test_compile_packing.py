"""The kernel that packs a weight, compiled for every GPU we support: a large one moves 16 bytes a thread."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from fusion_backend.kernels import packing
from fusion_backend.kernels.packing import Packing
from tests.kernels.compiling import CHIPS, compile_launch, on_chip, record_launches

USES = {
    "general": ((512, 256, 16), Packing(256, 512, False)),
    "march": ((256, 256, 3, 3), Packing(256, 256, True)),
    "hopper": ((256, 512, 2, 2), Packing(512, 256, True, 4)),
}


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip != "sm_120"])  # which is to Triton what sm_89 is
@pytest.mark.parametrize("name", USES)
def test_wide_accesses_and_no_spills(name: str, chip: str) -> None:
    shape, how = USES[name]
    for dtype in (torch.float32, torch.bfloat16):
        with on_chip(chip), FakeTensorMode():
            weight = torch.empty(shape, dtype=dtype, device="cuda")
            (launch,) = record_launches(packing, lambda weight=weight: packing.pack(weight, 1, how))
        compiled = compile_launch(launch, CHIPS[chip])
        assert compiled.spills == 0
        assert compiled.stores and min(compiled.stores) == 128
        assert chip == "gfx942" or set(compiled.loads) == {128}

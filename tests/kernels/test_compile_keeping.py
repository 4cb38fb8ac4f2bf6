"""The kernels that store a value beside the result, compiled for GPUs that we support, and without one as before."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose, row_march
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.problem import problem_for
from fusion_backend.kernels.program import Program
from fusion_backend.kernels.strips import choose_march
from fusion_backend.kernels.tiling import choose_tiling
from tests.kernels.compiling import CHIPS, Launch, compile_launch, on_chip, record_launches
from tests.kernels.convolutions import PUBLIC
from tests.kernels.inductor import written_out_again, written_to

CASES = {"general": PUBLIC["hifigan_up1"], "march": PUBLIC["seed"]}
LEAKY = "leaky_relu v0 0.1"


def launch_of(kernel: str, chip: str, dtype: torch.dtype, last: bool, kept: int | None) -> Launch:
    """Behind a shift for each channel, by the rule's configuration for a value that is kept."""
    conv = CASES[kernel]
    with on_chip(chip):
        x, weight, out = conv.fakes(dtype, last, last)
        problem = replace(problem_for(x, weight, conv.axes, 1, last, True), kept=True)
        bias = torch.empty(conv.C_out, device="cuda")
        given = coefficients_for(out, (None, bias, None, None), (1.0, 0.0, None, None))
        beside = {"program": Program(LEAKY, kept=kept), "kept": None if kept is None else torch.empty_like(out)}
        if kernel == "general":
            tiling = choose_tiling(problem)
            arguments = (out, x, conv_transpose.pack(weight, problem, tiling), problem, tiling, given)
            run, module = lambda: conv_transpose.launch(*arguments, **beside), conv_transpose
        else:
            march = choose_march(problem, conv.x)
            arguments = (out, x, row_march.pack(weight, problem, march.config), problem, march, given)
            run, module = lambda: row_march.launch(*arguments, **beside), row_march
        (launch,) = record_launches(module, run)
    return launch


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", CASES)
def test_twice_the_stores_in_the_same_shared_memory_and_no_spills(
    kernel: str, dtype: torch.dtype, last: bool, chip: str
) -> None:
    if (kernel, dtype, chip) == ("march", torch.float32, "gfx942"):
        pytest.skip("its weight does not fit")
    alone, both = (compile_launch(launch_of(kernel, chip, dtype, last, kept), CHIPS[chip]) for kept in (None, 0))
    assert both.stores == Counter({width: 2 * count for width, count in alone.stores.items()})
    assert both.loads == alone.loads and both.shared == alone.shared <= CHIPS[chip].shared_limit
    spills = both.spills
    if chip == "gfx942":  # scalar registers are spilled into lanes of vector registers, not into memory
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", both.assembly).group(1))
    assert not spills, f"{both.registers} registers"


@pytest.mark.parametrize("kernel", CASES)
def test_what_inductor_writes_out_again_compiles_to_the_same(kernel: str, tmp_path: Path) -> None:
    launch = launch_of(kernel, "sm_90", torch.bfloat16, True, 0)
    ours, theirs = written_out_again(launch, tmp_path)
    assert theirs == ours
    assert sorted(written_to(launch)) == ["kept_ptr", "out_ptr"]

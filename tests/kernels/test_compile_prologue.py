"""Kernels with a prologue, compiled for every kind of GPU: spills, shared memory, what Inductor makes of them."""

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
from fusion_backend.kernels.strips import choose_march, why_not
from fusion_backend.kernels.tiling import choose_tiling
from tests.kernels.compiling import CHIPS, TENSOR_CORES, Launch, compile_launch, on_chip, record_launches
from tests.kernels.convolutions import PUBLIC, Conv
from tests.kernels.inductor import written_out_again, written_to
from tests.kernels.test_compile_program import operations

SEED, LONG = PUBLIC["seed"], PUBLIC["hifigan_up1"]
LEAKY, SIGMOID, SNAKE = "leaky_relu v0 0.1", "sigmoid v0", "affine v0 c0 - - -; sin v1; mul v2 v2; add v0 v3"


def launch_of(
    kernel: str, chip: str, text: str, dtype: torch.dtype = torch.bfloat16, last: bool = True, conv: Conv = SEED
) -> Launch:
    """By the rule's configuration, behind a shift for each channel."""
    with on_chip(chip):
        x, weight, out = conv.fakes(dtype, last, last)
        problem = replace(problem_for(x, weight, conv.axes, 1, last, True), prologue=bool(text))
        shift = torch.empty(conv.C_out, device="cuda")
        given = coefficients_for(out, (None, shift, None, None), (1.0, 0.0, None, None))
        prologue = Program(text, torch.empty(conv.x[1], 1, device="cuda") if " c" in text else None)
        if kernel == "general":
            tiling = choose_tiling(problem)
            arguments = (out, x, conv_transpose.pack(weight, problem, tiling), problem, tiling, given)
            run = lambda: conv_transpose.launch(*arguments, prologue=prologue)  # noqa: E731
            (launch,) = record_launches(conv_transpose, run)
        else:
            assert why_not(problem) is None
            march = choose_march(problem, conv.x)
            arguments = (out, x, row_march.pack(weight, problem, march.config), problem, march, given)
            (launch,) = record_launches(row_march, lambda: row_march.launch(*arguments, prologue=prologue))
    return launch


KINDS = {
    "march, bf16": ("march", torch.bfloat16, True, SEED),
    "march, fp32 contiguous": ("march", torch.float32, False, PUBLIC["kb_small"]),
    "general, bf16": ("general", torch.bfloat16, True, LONG),
    "general, fp32 contiguous": ("general", torch.float32, False, LONG),
}


# With tensor memory the march takes no float32.
EVERY = [(kind, chip) for kind in KINDS for chip in CHIPS if (kind, chip) != ("march, fp32 contiguous", "sm_100")]


@pytest.mark.parametrize(("kind", "chip"), EVERY)
def test_no_spills_and_room_in_shared_memory(kind: str, chip: str) -> None:
    kernel, dtype, last, conv = KINDS[kind]
    text = LEAKY if dtype == torch.float32 else SIGMOID
    compiled = compile_launch(launch_of(kernel, chip, text, dtype, last, conv), CHIPS[chip])
    spills = compiled.spills
    if chip == "gfx942":  # scalar registers are spilled into lanes of vector registers, not into memory
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.assembly).group(1))
    assert spills == 0, f"{compiled.registers} registers"
    assert compiled.shared <= CHIPS[chip].shared_limit
    assert re.search(TENSOR_CORES[chip], compiled.ptx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_on_hopper_do_not_wait_for_each_other_behind_a_prologue(dtype: torch.dtype) -> None:
    """ptxas makes them where accumulators do not stay in their registers, and says nothing."""
    assembly = compile_launch(launch_of("march", "sm_90", LEAKY, dtype), CHIPS["sm_90"]).assembly
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR", assembly)) <= 9


@pytest.mark.parametrize("kernel", ["general", "march"])
def test_what_inductor_writes_out_again_compiles_to_the_same(kernel: str, tmp_path: Path) -> None:
    launch = launch_of(kernel, "sm_90", SNAKE)
    ours, theirs = written_out_again(launch, tmp_path)
    assert theirs == ours
    assert Counter(operations(theirs)) == Counter(operations(ours))
    assert written_to(launch) == ["out_ptr"]

"""Typical programs in the three kernels, compiled for every GPU we support, and written out again by Inductor."""

import re
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose, epilogue, row_march, strips
from fusion_backend.kernels import epilogue_backward as backward
from fusion_backend.kernels import epilogue_backward_turned as turned
from fusion_backend.kernels.activations import ACTIVATIONS
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.epilogue_backward import Back
from fusion_backend.kernels.matrix import tiling_for
from fusion_backend.kernels.plans import choose_plan
from fusion_backend.kernels.problem import problem_for
from fusion_backend.kernels.program import NO_PROGRAM, Program
from fusion_backend.kernels.strips import has_room, march_for
from fusion_backend.kernels.tiling import choose_tiling
from tests.kernels.activations import line, parameters_of
from tests.kernels.compiling import CHIPS, Compiled, Launch, compile_launch, on_chip, record_launches
from tests.kernels.convolutions import PUBLIC
from tests.kernels.inductor import written_out_again, written_to

PROGRAMS = {"tanh": "tanh v0", "mish, clamp": "mish v0; affine v1 2.0 1.0 -2.0 2.0", "gelu": "gelu v0"}
MIXED = "silu v0; affine v1 2.0 c1 - c0; mul v2 v0; tanh v3"
SEED = PUBLIC["seed"]


def launch_of(kernel: str, chip: str, text: str, dtype: torch.dtype = torch.bfloat16, last: bool = True) -> Launch:
    """At the seed's shape, behind a shift for each channel."""
    with on_chip(chip):
        x, weight, out = SEED.fakes(dtype, last, last)
        problem = problem_for(x, weight, SEED.axes, 1, last, True)
        given = coefficients_for(out, (None, torch.empty(64, device="cuda"), None, None), (1.0, 0.0, None, None))
        tensors = tuple(torch.empty_like(out) if name in text else None for name in ("t0", "t1"))
        program = Program(text, torch.empty(64, 2, device="cuda") if " c" in text else None, tensors)
        if kernel == "epilogue":
            (launch,) = record_launches(epilogue, lambda: epilogue.launch(out, None, given, program=program))
        elif kernel == "general":
            tiling = choose_tiling(problem)
            arguments = (out, x, conv_transpose.pack(weight, problem, tiling), problem, tiling, given)
            run = lambda: conv_transpose.launch(*arguments, program=program)  # noqa: E731
            (launch,) = record_launches(conv_transpose, run)
        else:
            count = sum(tensor is not None for tensor in tensors)
            plan = conv_transpose._plan(problem, x, None, count)
            assert plan.is_march
            march = march_for(problem, SEED.x, plan.config)
            arguments = (out, x, row_march.pack(weight, problem, march.config), problem, march, given)
            (launch,) = record_launches(row_march, lambda: row_march.launch(*arguments, program=program))
    return launch


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", ["general", "march"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_spills(name: str, kernel: str, chip: str) -> None:
    compiled = compile_launch(launch_of(kernel, chip, PROGRAMS[name]), CHIPS[chip])
    # With tensor memory the march has a thread hold 32 outputs at once, and erf takes the most registers.
    allowed = 80 if (name, kernel, chip) == ("gelu", "march", "sm_100") else 0
    spills = compiled.spills
    if chip == "gfx942":  # scalar registers are spilled into lanes of vector registers, not into memory
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.assembly).group(1))
    assert spills <= allowed + (10 if chip == "sm_100" else 0), f"{compiled.registers} registers"
    assert min(compiled.stores) >= (64 if chip == "gfx942" else 128)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", ["general", "march"])
def test_a_tensor_is_read_in_whole_vectors_and_fits(kernel: str, chip: str) -> None:
    """The march reads it ahead into shared memory, as it does with x."""
    for last in (False, True):
        launch = launch_of(kernel, chip, "add v0 t0; hardswish v1; mul v1 v2", torch.bfloat16, last)
        compiled = compile_launch(launch, CHIPS[chip])
        assert compiled.shared <= CHIPS[chip].shared_limit
        # With tensor memory the march has a thread hold 32 outputs at once.
        assert not compiled.spills or chip in ("sm_100", "gfx942")
        if kernel == "general" and chip != "gfx942":
            (without,) = (compile_launch(launch_of(kernel, chip, "", torch.bfloat16, last), CHIPS[chip]),)
            assert compiled.loads[128] - without.loads[128] == compiled.stores[128]


def test_a_march_without_room_for_tensors_gives_way() -> None:
    with on_chip("sm_89"):
        x, weight, _ = SEED.fakes(torch.bfloat16, True, True)
        problem = problem_for(x, weight, SEED.axes, 1, True, True)
        plans = [conv_transpose._plan(problem, x, None, count) for count in range(3)]
    assert plans[0] == choose_plan(problem, SEED.x) and not has_room(problem, plans[0].config, 1)
    assert all(plan.is_march and has_room(problem, plan.config, i) for i, plan in enumerate(plans))
    with on_chip("sm_89"), mock.patch.object(strips, "has_room", return_value=False):
        assert not conv_transpose._plan(problem, x, None, 1).is_march


BACKS = {
    "silu, scale": "affine v0 - c0 - -; affine t0 2.0 - - -; silu_backward v2 v1",
    "residual": "add v0 t1; hardswish v1; mul t0 v2; mul t0 v1; hardswish_backward v4 v1; add v3 v5",
}
PLACES = ["contiguous", "channels_last", "turned"]


def back_launch(place: str, chip: str, text: str, dtype: torch.dtype = torch.bfloat16) -> Launch:
    with on_chip(chip):
        grad = SEED.fakes(dtype, False, place == "channels_last")[2]
        vectors = torch.empty(64, 1, device="cuda") if " c0" in text else None
        value, tensor = torch.empty_like(grad), torch.empty_like(grad) if " t1" in text else None
        if place == "turned":
            run = lambda: turned.launch_turned(grad, None, None, 1.0, True, False, text, value, vectors, tensor)  # noqa: E731
            (launch,) = record_launches(turned, run)
        else:
            last = place == "channels_last"
            rest = (last, True, False, tiling_for(grad, last), Back(text, value, vectors, tensor))
            (launch,) = record_launches(backward, lambda: backward.launch(grad, None, None, 1.0, *rest))
    return launch


@pytest.mark.parametrize("chip", ["sm_89", "sm_90"])
@pytest.mark.parametrize("place", PLACES)
def test_a_way_back_has_no_spills_and_whole_vectors(place: str, chip: str) -> None:
    compiled = compile_launch(back_launch(place, chip, BACKS["residual"]), CHIPS[chip])
    assert not compiled.spills, f"{compiled.registers} registers"
    assert compiled.loads[128] >= 3 and max(compiled.stores) == 128


@pytest.mark.parametrize("kernel", ["general", "march"])
def test_the_way_back_rides_in_the_convolution(kernel: str) -> None:
    compiled = compile_launch(launch_of(kernel, "sm_90", BACKS["silu, scale"]), CHIPS["sm_90"])
    assert compiled.shared <= CHIPS["sm_90"].shared_limit
    # The march holds a tile of the gradient beside its accumulators.
    assert compiled.spills <= (160 if kernel == "march" else 0)


@pytest.mark.parametrize("chip", ["sm_89", "gfx942"])
def test_every_derivative_compiles(chip: str) -> None:
    """All of them in one program, which has more in registers than there are."""
    told = {name for name, row in ACTIVATIONS.items() if row.of_result}
    names = [f"{name}_backward" for name in ACTIVATIONS] + [f"{name}_backward_of_result" for name in told]
    lines = []
    for number, name in enumerate(names):
        g = f"v{number}" if number else "t0"
        lines.append(line(name, parameters_of(name.partition("_backward")[0])[0]).replace("v0", f"{g} v0"))
    assert compile_launch(back_launch("channels_last", chip, "; ".join(lines)), CHIPS[chip]).registers


@pytest.mark.parametrize("place", ["turned"])
def test_inductors_copy_of_a_way_back_compiles_to_the_same(place: str, tmp_path: Path) -> None:
    launch = back_launch(place, "sm_90", BACKS["residual"])
    ours, theirs = written_out_again(launch, tmp_path)
    assert theirs == ours
    assert Counter(operations(theirs)) == Counter(operations(ours))
    assert written_to(launch) == ["grad_x_ptr", "passed_ptr"]


@pytest.mark.parametrize("chip", ["sm_89", "gfx942"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_compiles(name: str, chip: str) -> None:
    compiled = compile_launch(launch_of("epilogue", chip, line(name, parameters_of(name)[0])), CHIPS[chip])
    # The stack is that of the sine of numbers beyond 100,000.
    assert not compiled.spills or name == "sin"


def test_products_on_hopper_do_not_wait_for_each_other_behind_a_program() -> None:
    """ptxas makes them where accumulators do not stay in their registers, and says nothing."""
    for text in ("", *PROGRAMS.values()):
        assembly = compile_launch(launch_of("march", "sm_90", text), CHIPS["sm_90"]).assembly
        assert len(re.findall(r"\bWARPGROUP\.DEPBAR", assembly)) <= 9


def test_without_instructions_nothing_is_added() -> None:
    """A program that is not there, and one that does nothing, are the same to the bit."""
    for kernel in ("general", "march", "epilogue"):
        none, nothing = (launch_of(kernel, "sm_89", text) for text in (NO_PROGRAM.text, "affine v0 - - - -"))
        assert none.arguments["PROGRAM"] == "" and none.arguments["vectors_ptr"] is None
        assert instructions(none) == instructions(nothing)


def operations(compiled: Compiled) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?(\S+)", compiled.assembly, re.MULTILINE)


def instructions(launch: Launch) -> list[str]:
    assembly = compile_launch(launch, CHIPS["sm_89"]).assembly
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", assembly, re.MULTILINE)


@pytest.mark.parametrize("kernel", ["general", "march", "epilogue"])
def test_what_inductor_writes_out_again_compiles_to_the_same(kernel: str, tmp_path: Path) -> None:
    """Its source with all that it calls, and its constants by their ``repr``; but ptxas may choose other registers."""
    launch = launch_of(kernel, "sm_90", MIXED)
    ours, theirs = written_out_again(launch, tmp_path)
    assert theirs == ours
    assert Counter(operations(theirs)) == Counter(operations(ours))
    assert written_to(launch) == ["out_ptr"]
    assert eval(repr(launch.arguments["PROGRAM"])) == MIXED


def test_what_inductor_hands_over_in_float64_compiles_to_the_same() -> None:
    for text in PROGRAMS.values():
        assembly = compile_launch(launch_of("march", "sm_90", text), CHIPS["sm_90"], number="fp64").assembly
        assert not re.search(r"\bD(ADD|MUL|FMA|SETP)\b", assembly)

"""The march on Hopper compiled for it, every configuration that ships, and what came out."""

import itertools
import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from fusion_backend.kernels import hopper_march
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.gate import EVERYTHING, Gate
from fusion_backend.kernels.hopper_form import Form
from fusion_backend.kernels.hopper_strips import Config, configs_for, march_for, shared_memory, why_no_bits, why_not
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.program import Program, columns_of
from tests.kernels.compiling import Compiled, _read_nvidia
from tests.kernels.compiling_hopper import CHIP, PROCESSORS, compiling, count, loops, problem_of
from tests.kernels.convolutions import PUBLIC, Conv


def compiled(
    conv: Conv, problem: Problem, config: Config, gate: Gate | None = None, program: str = ""
) -> tuple[Compiled, Form]:
    """With a shift for each channel and two bounds."""
    march = march_for(problem, conv.x, config, PROCESSORS, bits=gate is not None)
    # One element stands for all of them: nothing is read or written.
    x, out = (torch.zeros(1, dtype=problem.dtype).expand(shape) for shape in (conv.x, conv.y))
    weight = torch.zeros(conv.x[1], conv.C_out, *(axis.kernel for axis in conv.axes), dtype=problem.dtype)
    given = coefficients_for(out, (None, torch.zeros(conv.C_out), None, None), (1.0, 0.0, 0.0, 0.5))
    packed = hopper_march.pack(weight, problem, config)
    columns = columns_of(program)
    steps = Program(program, torch.zeros(conv.C_out, columns) if columns else None)
    bits = None if gate is None else torch.zeros(1, dtype=torch.uint8)
    flags = None if gate is None else (gate.lo_open, gate.hi_open, gate.passes_nan)
    with compiling(hopper_march):
        launched = hopper_march.launch(out, x, packed, problem, march, given, bits, gate or EVERYTHING, steps)
        form = hopper_march.prepare(problem, march, conv.x, given.kinds, flags, program).form
    return _read_nvidia(launched), form


def wrong(binary: Compiled, form: Form, problem: Problem, config: Config) -> Iterator[str]:
    """What is wrong with a kernel for sizes that 16 divides."""
    expected = shared_memory(problem, config, columns_of(form.program))
    if binary.shared > min(expected, CHIP.shared_limit):
        yield f"{binary.shared} bytes of shared memory: {expected} are expected"
    # What lies side by side in a thread, of 16 bytes at the most.
    if form.out_last:
        neighbours = 2 * min(8 // problem.dtype.itemsize, form.channels // 8)
    else:
        neighbours = form.joined * (1 if form.x_last else 2)
    if set(binary.stores) - ({8} if form.writes_bits else set()) != {8 * problem.dtype.itemsize * neighbours}:
        yield f"stores {dict(binary.stores)}, not of {neighbours} elements"

    inner = list(loops(binary.assembly))
    spills = [count(r"\b(?:LDL|STL)\b", code) for code in inner]
    # Behind a program the producer may spill: its consumers take far longer.
    behind = [number for number, code in zip(spills, inner, strict=True) if count(r"\bHGMMA\.", code)]
    if any(behind if form.program else spills):
        yield f"{spills} spills in loops, {binary.spills} in all"
    marches = [code for code in inner if count(r"\bHGMMA\.", code)]
    products = sum(len(taps) for row in form.taps for taps in row) * form.depth * problem.dtype.itemsize // 32
    if [count(r"\bHGMMA\.", code) for code in marches] != [products] * 2:
        yield f"{[count('HGMMA', code) for code in marches]} products in loops, not {products} for each consumer"
    # ptxas makes each product wait for the one before where registers do not suffice, and says nothing.
    waits = [count(r"\bWARPGROUP\.DEPBAR", code) for code in marches]
    most = form.stored + max(form.carried, 1)
    if any(number > most for number in waits):
        yield f"{waits} waits for products, not {most} at the most"
    # Between the last load of a row from shared memory and the word that it may be overwritten stand the fence and the
    # barrier of all warps.
    for code in marches:
        order = [re.search(r"\b(LDSM|MEMBAR|FENCE|BAR\.SYNC|SYNCS\.ARRIVE|HGMMA)", text) for text in code]
        together = " ".join(match.group(1) for match in order if match)
        if (
            not re.search(r"LDSM (?:MEMBAR |FENCE )+(?:BAR\.SYNC )+SYNCS\.ARRIVE", together)
            or "ARRIVE LDSM" in together
        ):
            yield f"no fence between loads and release: {together[:300]}"


LAYOUTS = tuple(itertools.product((False, True), repeat=2))
SEEDS = [(PUBLIC["seed"], dtype, *layouts) for dtype in (torch.float32, torch.bfloat16) for layouts in LAYOUTS]


@pytest.mark.parametrize("use", SEEDS, ids=str)
def test_every_order_of_the_first_size_that_fits(use: tuple) -> None:
    conv, *_ = use
    problem = problem_of(*use)
    first, *others = configs_for(problem)
    assert first.channels == 64
    for config in (first, *(each for each in others if (each.channels, each.slots) == (first.channels, first.slots))):
        assert not list(wrong(*compiled(conv, problem, config), problem, config)), config


K4 = Conv((8, 64, 64, 64), 64, (4,), (2,), (1,))
OTHERS = [
    (PUBLIC["kb_small"], torch.float32, False, False),
    (PUBLIC["kb_small"], torch.bfloat16, True, True),
    (PUBLIC["kb100_3d"], torch.float32, True, True),
    (PUBLIC["kb100_3d"], torch.bfloat16, False, True),
    (PUBLIC["unet_up2"], torch.float32, False, False),
    (PUBLIC["unet_up2"], torch.bfloat16, True, True),
    (K4, torch.bfloat16, False, False),
    (K4, torch.bfloat16, True, True),
    (K4, torch.float32, True, True),
]


@pytest.mark.parametrize("use", OTHERS, ids=str)
def test_the_configuration_that_others_get(use: tuple) -> None:
    conv, *_ = use
    problem = problem_of(*use)
    assert why_not(problem) is None
    config = configs_for(problem)[0]
    assert not list(wrong(*compiled(conv, problem, config), problem, config)), config


BITS = [*SEEDS, (PUBLIC["kb100_3d"], torch.bfloat16, False, True), (K4, torch.bfloat16, False, False)]


@pytest.mark.parametrize("use", BITS, ids=str)
def test_bits_take_no_barrier_and_no_shared_memory(use: tuple) -> None:
    """They are shifted together in registers, by warps on their own."""
    conv, *_ = use
    problem = problem_of(*use)
    config = configs_for(problem)[0]
    assert why_no_bits(problem, conv.y[-1]) is None
    binary, form = compiled(conv, problem, config, Gate(lo_open=True, passes_nan=False))
    assert not list(wrong(binary, form, problem, config))
    marches = [code for code in loops(binary.assembly) if count(r"\bHGMMA\.", code)]
    assert [count(r"\b(?:STS|STSM)\b", code) for code in marches] == [0, 0]
    assert [count(r"\bBAR\.", code) for code in marches] == [2, 2], "those of the rows of x"


PROGRAMS = [
    (SEEDS[0], "gelu v0"),
    (SEEDS[3], "affine v0 2.0 c0 - -; mul v1 v0; add v2 v0"),
    (SEEDS[4], "silu v0; affine v1 - - - c0"),
    (SEEDS[7], "gelu v0"),
]


@pytest.mark.parametrize(("use", "text"), PROGRAMS, ids=str)
def test_programs_leave_the_march_as_it_is(use: tuple, text: str) -> None:
    conv, *_ = use
    problem = problem_of(*use)
    config = configs_for(problem)[0]
    assert not list(wrong(*compiled(conv, problem, config, None, text), problem, config))

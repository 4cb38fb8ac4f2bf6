"""The product on Hopper compiled for it, every configuration that ships, and what came out."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from fusion_backend.kernels import hopper_product
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.hopper_blocks import (
    BARRIERS,
    CONFIGS,
    CONSUMERS,
    DEPTH_BYTES,
    Config,
    Form,
    configs_for,
    packed_shape,
    product_for,
    why_not,
)
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.program import Program, columns_of
from tests.kernels.compiling import Compiled, _read_nvidia
from tests.kernels.compiling_hopper import CHIP, PROCESSORS, compiling, count, loops, problem_of
from tests.kernels.convolutions import PUBLIC, Conv


def compiled(
    conv: Conv, problem: Problem, config: Config, program: str = "", kept: int | None = None
) -> tuple[Compiled, Form]:
    """With a shift for each channel and two bounds."""
    cut = product_for(problem, conv.x, config, PROCESSORS)
    taps = math.prod(axis.kernel for axis in conv.axes)
    C_out, C_in = packed_shape(problem, config)
    # One element stands for all of them: nothing is read or written.
    x, out, packed = (
        torch.zeros(1, dtype=problem.dtype).expand(shape) for shape in (conv.x, conv.y, (taps * C_out, C_in))
    )
    given = coefficients_for(out, (None, torch.zeros(conv.C_out), None, None), (1.0, 0.0, 0.0, 0.5))
    columns = columns_of(program)
    steps = Program(program, torch.zeros(conv.C_out, columns) if columns else None, kept=kept)
    with compiling(hopper_product):
        beside = None if kept is None else out
        launched = hopper_product.launch(out, x, packed, problem, cut, given, steps, beside)
        form = hopper_product.prepare(problem, cut, conv.x, given.kinds, None, program).form
    return _read_nvidia(launched), form


def wrong(binary: Compiled, form: Form) -> Iterator[str]:
    """What is wrong with a kernel."""
    itemsize = DEPTH_BYTES // form.depth
    expected = form.slots * (CONSUMERS * form.rows + form.columns) * DEPTH_BYTES + BARRIERS
    if binary.shared > min(expected, CHIP.shared_limit):
        yield f"{binary.shared} bytes of shared memory: {expected} are expected"
    # Neighbours in a thread: 16 bytes of channels_last, and else the phases of a pixel.
    wide = 128 if form.out_last else min(form.wide * 8 * itemsize, 128)
    if set(binary.stores) != {wide}:
        yield f"stores {dict(binary.stores)}, not of {wide} bits"
    if binary.spills:
        inner = [count(r"\b(?:LDL|STL)\b", code) for code in loops(binary.assembly)]
        yield f"{binary.spills} spills, {inner} of them in inner loops"

    products = form.rows // 64 * (DEPTH_BYTES // 32)
    steps = [code for code in loops(binary.assembly) if count(r"\bHGMMA\.", code)]
    if [count(r"\bHGMMA\.", code) for code in steps] != [products] * CONSUMERS * form.joined:
        yield f"{[count('HGMMA', code) for code in steps]} products in loops, not {products} for each consumer"
    if len(re.findall(r"\bHGMMA\.", binary.assembly)) != products * CONSUMERS * form.joined:
        yield "products outside of the loops"
    # ptxas makes each product wait for the one before where registers do not suffice, and says nothing.
    for what in (r"\bWARPGROUP\.ARRIVE", r"\bWARPGROUP\.DEPBAR"):
        if [count(what, code) for code in steps] != [1] * CONSUMERS * form.joined:
            yield f"{[count(what, code) for code in steps]} of {what} in a step, not one"

    # A consumer's tile goes from registers to memory. What else there is of STS tells warps what they are.
    accesses = re.findall(r"\b(HGMMA|STG|STSM|STS)\b", binary.assembly)
    order = " ".join(name for name, _ in itertools.groupby(accesses))
    if not re.fullmatch(r"(STS )?HGMMA STG HGMMA STG( STS)?", order):
        yield f"{order}, not two consumers that multiply and store"


DTYPES = (torch.float32, torch.bfloat16)
DCGAN, HIFIGAN = PUBLIC["dcgan_64"], PUBLIC["hifigan_up1"]
K6S4 = Conv((4, 128, 16, 64), 128, (6,), (4,), (1,))  # no two phases share their inputs
USES = [(DCGAN, dtype, config) for dtype in DTYPES for config in CONFIGS if config.columns < 256 and config.joined < 4]
USES += [(HIFIGAN, dtype, config) for dtype in DTYPES for config in CONFIGS if config.columns == 256]
USES += [(K6S4, dtype, config) for dtype in DTYPES for config in CONFIGS if config.joined == 4]
USES += [(Conv((4, 64, 16, 16, 16), 128, (3,), (2,), (1,), (1,)), torch.bfloat16, CONFIGS[0])]


@pytest.mark.parametrize(("conv", "dtype", "config"), USES, ids=str)
def test_every_configuration(conv: Conv, dtype: torch.dtype, config: Config) -> None:
    problem = problem_of(conv, dtype, True, config.joined == 1)
    assert why_not(problem) is None and config in configs_for(problem)
    assert not list(wrong(*compiled(conv, problem, config)))


# Kernel, stride and padding of a contiguous result; phases that share a product, and products that are joined.
SHARED = {(2, 2, 0): (2, 1), (4, 4, 0): (4, 1), (8, 8, 0): (8, 1), (8, 4, 2): (2, 2), (16, 8, 4): (4, 2)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SHARED, ids=str)
def test_phases_that_share_a_product(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    kernel, stride, padding = sizes
    conv = Conv((4, 128, 256), 128, (kernel,), (stride,), (padding,))
    problem = problem_of(conv, dtype, True, False)
    assert configs_for(problem)
    for config in configs_for(problem):
        binary, form = compiled(conv, problem, config)
        assert (form.shared, form.joined) == SHARED[sizes]
        assert not list(wrong(binary, form))


def test_no_configuration_is_left_out() -> None:
    assert {(dtype, config) for _, dtype, config in USES} == {(dtype, config) for dtype in DTYPES for config in CONFIGS}


def test_blocks_that_are_not_full_are_stored_as_wide() -> None:
    """Neither C_in nor C_out fills its last block, and tiles reach beyond the output."""
    conv = Conv((3, 100, 15, 17), 200, (4,), (2,), (1,))
    problem = problem_of(conv, torch.float32, True, True)
    binary, form = compiled(conv, problem, CONFIGS[0])
    assert not form.whole and form.C_out % form.columns and form.C_in % form.depth
    assert not list(wrong(binary, form))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_value_that_is_kept_is_stored_as_the_result_is(last: bool, dtype: torch.dtype) -> None:
    """Twice the stores, as wide, and no spills; the product is as it was."""
    conv = DCGAN if last else HIFIGAN
    problem = problem_of(conv, dtype, True, last)
    config = configs_for(problem)[0]
    (alone, form), (both, _) = (compiled(conv, problem, config, "leaky_relu v0 0.1", kept) for kept in (None, 0))
    assert both.stores == {width: 2 * number for width, number in alone.stores.items()}
    both = replace(both, shared=alone.shared)  # a pointer more to tell the consumers
    assert not list(wrong(both, form))


def test_a_program_leaves_the_product_as_it_is() -> None:
    problem = problem_of(DCGAN, torch.bfloat16, True, True)
    assert not list(wrong(*compiled(DCGAN, problem, CONFIGS[0], "affine v0 2.0 c0 - -; silu v1")))

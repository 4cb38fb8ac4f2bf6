"""Every configuration of the march, compiled for every GPU we support, and what came out."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fusion_backend.kernels import row_march, strips
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.problem import Problem, problem_for
from fusion_backend.kernels.strips import CONFIGS, Config, choose_march, configs_for, march_for, why_not
from tests.kernels.compiling import CHIPS, TENSOR_CORES, Compiled, Launch, compile_launch, on_chip, record_launches
from tests.kernels.convolutions import PUBLIC, Conv
from tests.kernels.inductor import assert_written_out_again, written_to

FEW = Conv((16, 32, 64, 64), 32, (4,), (2,), (1,))

# Convolution, dtype, x channels_last, output channels_last: a configuration is compiled for the first that it fits.
USES = (
    (PUBLIC["seed"], torch.bfloat16, False, False),
    (PUBLIC["unet_up2"], torch.bfloat16, True, False),
    (PUBLIC["seed"], torch.float32, True, True),
    (FEW, torch.float16, True, True),
    (FEW, torch.bfloat16, False, True),
    (PUBLIC["kb_small"], torch.float32, False, False),
)


def launch_of(
    conv: Conv,
    dtype: torch.dtype,
    x_last: bool,
    out_last: bool,
    chip: str,
    config: Config | None = None,
    with_bits: bool = False,
) -> tuple[Launch, Problem] | None:
    """The launch with a shift for each channel and two bounds, as on ``chip``; None where ``config`` does not fit."""
    with on_chip(chip):
        x, weight, out = conv.fakes(dtype, x_last, out_last)
        problem = problem_for(x, weight, conv.axes, conv.groups, out_last, True)
        if why_not(problem) or (config and config not in configs_for(problem)):
            return None
        march = march_for(problem, conv.x, config) if config else choose_march(problem, conv.x)
        shift = torch.empty(conv.C_out, device="cuda")
        given = coefficients_for(out, (None, shift, None, None), (1.0, 0.0, 0.0, 0.5))
        packed = row_march.pack(weight, problem, march.config)
        bits = (torch.empty(out.numel() // 8, dtype=torch.uint8, device="cuda"),) if with_bits else ()
        (launch,) = record_launches(row_march, lambda: row_march.launch(out, x, packed, problem, march, given, *bits))
    return launch, problem


def config_of(launch: Launch) -> Config:
    return next(
        config
        for config in CONFIGS
        if (config.pixels, config.channels) == (launch.arguments["BLOCK_P"], launch.arguments["BLOCK_C"])
        and config.num_warps == launch.options["num_warps"]
        and config.num_stages == launch.arguments["STAGES"]
    )


def problems(compiled: Compiled, launch: Launch, problem: Problem, chip: str) -> Iterator[str]:
    """What is wrong with a kernel for sizes that 16 divides."""
    spills = compiled.spills
    if chip == "gfx942":
        # Scalar registers are spilled into lanes of vector registers, not into memory.
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.assembly).group(1))
    # The assembler of triton 3.6 puts 8 bytes on the stack of some kernels for sm_100, also with registers to spare.
    if spills > (10 if chip == "sm_100" else 0):
        yield f"{spills} spills, {compiled.registers} registers"
    config = config_of(launch)
    limit = strips.shared_memory(problem, config)
    if chip == "sm_100":
        # One more row of x may be in flight.
        row = strips._shifts(problem) * launch.arguments["BLOCK_K"] * config.pixels
        limit += row * problem.dtype.itemsize
    if compiled.shared > min(limit, CHIPS[chip].shared_limit):
        yield f"{compiled.shared} bytes of shared memory: {limit} are expected, {chip} has {CHIPS[chip].shared_limit}"
    # AMD's compiler stores a tile of matrix cores as they hold it, four elements a thread.
    narrowest = 64 if chip == "gfx942" else 128
    if min(compiled.stores, default=0) < narrowest:
        yield f"stores {dict(compiled.stores)}, not of at least {narrowest} bits"
    if not re.search(TENSOR_CORES[chip], compiled.ptx):
        yield "no tensor cores"
    if problem.x_last and chip != "gfx942" and set(compiled.copies) != {128}:
        yield f"copies to shared memory {dict(compiled.copies)}, not of 128 bits alone"


def name_of(config: Config) -> str:
    return f"{config.pixels}x{config.channels}-{config.num_warps}-{config.num_stages}"


# sm_120 is to Triton what sm_89 is.
@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip != "sm_120"])
@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_configuration(config: Config, chip: str) -> None:
    found = next(filter(None, (launch_of(*use, chip, config) for use in USES)), None)
    if found is None:
        pytest.skip(f"{config} does not fit into {chip}")
    assert not list(problems(compile_launch(found[0], CHIPS[chip]), *found, chip))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["seed", "unet_up2"])
def test_what_the_public_cases_get(name: str, dtype: torch.dtype, last: bool, chip: str) -> None:
    found = launch_of(PUBLIC[name], dtype, last, last, chip)
    if found is None:
        pytest.skip(f"the march does not take {name} in {dtype} on {chip}")
    assert not list(problems(compile_launch(found[0], CHIPS[chip]), *found, chip))


@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_a_gate_spill_nothing(dtype: torch.dtype, last: bool, chip: str) -> None:
    launch, _ = launch_of(PUBLIC["seed"], dtype, last, last, chip, with_bits=True)
    compiled = compile_launch(launch, CHIPS[chip])
    assert compiled.spills == 0
    assert sorted(compiled.stores) == [8, 128]


@pytest.mark.parametrize(
    ("chip", "float32", "bfloat16"),
    [
        *((chip, "seed kb_small unet_up2", "seed kb_small unet_up2 kb100_3d") for chip in CHIPS if chip[:4] == "sm_8"),
        ("sm_90", "seed kb_small unet_up2", "seed kb_small unet_up2 kb100_3d"),
        ("sm_100", "", "seed kb_small unet_up2 kb100_3d"),
        ("sm_120", "seed kb_small unet_up2", "seed kb_small unet_up2 kb100_3d"),
        ("gfx942", "kb_small", "seed kb_small unet_up2 kb100_3d"),
    ],
)
def test_which_public_cases_it_takes(chip: str, float32: str, bfloat16: str) -> None:
    for dtype, names in ((torch.float32, float32), (torch.bfloat16, bfloat16)):
        for last in (False, True):
            taken = [name for name, conv in PUBLIC.items() if launch_of(conv, dtype, last, last, chip)]
            assert taken == names.split()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensor_core_products_on_hopper_are_not_made_to_wait_for_each_other(dtype: torch.dtype, last: bool) -> None:
    """ptxas makes them where accumulators do not stay in their registers, and says nothing."""
    launch, _ = launch_of(PUBLIC["seed"], dtype, last, last, "sm_90")
    assembly = compile_launch(launch, CHIPS["sm_90"]).assembly
    products, waits = len(re.findall(r"\bHGMMA\.", assembly)), len(re.findall(r"\bWARPGROUP\.DEPBAR", assembly))
    # Of the nine taps each has a product or more, and each of six accumulators may be waited for.
    assert products >= 36 and waits <= 9


def test_what_inductor_writes_out_again_compiles_to_the_same(tmp_path: Path) -> None:
    launch, _ = launch_of(PUBLIC["seed"], torch.float32, False, False, "sm_90")
    assert_written_out_again(launch, tmp_path)


@pytest.mark.parametrize("use", USES[:3], ids=str)
def test_inductor_sees_that_only_the_output_is_written(use: tuple) -> None:
    """Otherwise it would copy x, the weight and all coefficients first."""
    launch, _ = launch_of(*use, "sm_90")
    assert written_to(launch) == ["out_ptr"]


def test_what_inductor_hands_over_in_float64_compiles_to_the_same() -> None:
    """Inductor passes Python floats as fp64; one multiply-add in fp64 would cost more than the product."""
    launch, _ = launch_of(PUBLIC["seed"], torch.bfloat16, True, True, "sm_90")
    assembly = compile_launch(launch, CHIPS["sm_90"], number="fp64").assembly
    assert not re.search(r"\bD(ADD|MUL|FMA|SETP)\b", assembly)

"""Every configuration of the transposed convolution, compiled for every GPU we support, and what came out."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fusion_backend.kernels import conv_transpose as kernels
from fusion_backend.kernels.problem import problem_for
from fusion_backend.kernels.tiling import (
    CHANNEL_CONFIGS,
    DOT_CONFIGS,
    EXACT_CONFIGS,
    Config,
    Tiling,
    choose_tiling,
    configs_of,
    tiling_for,
)
from tests.kernels.compiling import CHIPS, TENSOR_CORES, Compiled, Launch, compile_launch, on_chip, record_launches
from tests.kernels.compiling_hopper import count, loops
from tests.kernels.convolutions import PUBLIC, Conv
from tests.kernels.inductor import assert_written_out_again, written_to

every_chip = pytest.mark.parametrize("chip", CHIPS)

NARROW = Conv((16, 64, 64, 64), 16, (3,), (2,), (1,), (1,))
DEPTHWISE = Conv((16, 64, 64, 64), 64, (4,), (2,), (1,), groups=64)
SMOOTHING = Conv((16, 64, 64, 64), 64, (3,), (1,), (1,), groups=64)
SHALLOW = Conv((16, 32, 64, 64), 64, (3,), (2,), (1,), (1,))

# Convolution, dtype, x channels_last, output channels_last: a configuration is compiled for the first that it fits.
USES = (
    (PUBLIC["seed"], torch.bfloat16, True, True),
    (PUBLIC["seed"], torch.float32, False, False),
    (PUBLIC["unet_up2"], torch.bfloat16, False, False),
    (PUBLIC["dcgan_64"], torch.float32, True, True),
    (PUBLIC["dcgan_64"], torch.bfloat16, False, False),
    (PUBLIC["hifigan_up1"], torch.float16, False, False),
    (PUBLIC["kb100_3d"], torch.float32, True, False),
    (NARROW, torch.bfloat16, True, True),
    (SHALLOW, torch.bfloat16, False, True),
    (DEPTHWISE, torch.bfloat16, True, True),
    (DEPTHWISE, torch.float32, False, False),
    (SMOOTHING, torch.float32, False, False),
)
EXACT_USES = tuple((conv, torch.float32, *layouts) for conv, _, *layouts in USES)


def launch_of(
    conv: Conv,
    dtype: torch.dtype,
    x_last: bool,
    out_last: bool,
    chip: str,
    config: Config | None = None,
    allow_tf32: bool = True,
) -> tuple[Launch, Tiling] | None:
    """The launch with a shift for each channel and two bounds, as on ``chip``; None where ``config`` does not fit."""
    with on_chip(chip):
        x, weight, out = conv.fakes(dtype, x_last, out_last)
        problem = problem_for(x, weight, conv.axes, conv.groups, out_last, allow_tf32)
        if config is not None and config not in configs_of(problem):
            return None
        tiling = choose_tiling(problem) if config is None else tiling_for(problem, config)
        if tiling is None:
            return None
        shift = torch.empty(conv.C_out, device="cuda")
        given = kernels.coefficients_for(out, (None, shift, None, None), (1.0, 0.0, 0.0, 0.5))
        packed = kernels.pack(weight, problem, tiling)
        (launch,) = record_launches(kernels, lambda: kernels.launch(out, x, packed, problem, tiling, given))
    return launch, tiling


def problems(compiled: Compiled, launch: Launch, chip: str) -> Iterator[str]:
    """What is wrong with a kernel whose sizes 16 divides, apart from an x that is shifted by one element."""
    if compiled.spills:
        yield f"{compiled.spills} spills, {compiled.registers} registers"
    if compiled.shared > CHIPS[chip].shared_limit:
        yield f"{compiled.shared} bytes of shared memory, {chip} has {CHIPS[chip].shared_limit} a block"
    product = launch.arguments["DOT"]
    # AMD's compiler stores a tile of matrix cores as they hold it, four elements a thread. Without a product a thread
    # stores the two neighbours for which it loaded one element.
    narrowest = (64 if product else 16) if chip == "gfx942" else 128 if product else 32
    if min(compiled.stores) < narrowest:
        yield f"stores {dict(compiled.stores)}, not of at least {narrowest} bits"
    exact = launch.arguments["TF32"] is False and launch.arguments["x_ptr"].dtype == torch.float32
    if product and not (exact and chip != "gfx942") and not re.search(TENSOR_CORES[chip], compiled.ptx):
        yield "no tensor cores"
    if product and launch.arguments["X_LAST"] and chip != "gfx942":
        # 16 columns of the weight are less than 16 bytes a thread.
        narrow = launch.arguments["BLOCK_C"] * launch.arguments["BLOCK_K"] <= 16 * 32
        if not compiled.copies or set(compiled.copies) - {128, *((64,) if narrow else ())}:
            yield f"copies to shared memory {dict(compiled.copies)}, not of 128 bits alone"


def first_use(uses: tuple, config: Config, chip: str, allow_tf32: bool = True) -> Launch:
    for use in uses:
        found = launch_of(*use, chip, config, allow_tf32)
        if found is not None:
            return found[0]
    pytest.skip(f"{config} does not fit into {chip}")


def name_of(config: Config) -> str:
    return f"{config.rows}x{config.columns}x{config.depth_bytes}-{config.num_warps}-{config.num_stages}"


@every_chip
@pytest.mark.parametrize("config", [*DOT_CONFIGS, *CHANNEL_CONFIGS], ids=name_of)
def test_every_configuration(config: Config, chip: str) -> None:
    launch = first_use(USES, config, chip)
    assert not list(problems(compile_launch(launch, CHIPS[chip]), launch, chip))


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip != "gfx942"])
@pytest.mark.parametrize("config", EXACT_CONFIGS, ids=name_of)
def test_every_configuration_for_exact_fp32(config: Config, chip: str) -> None:
    launch = first_use(EXACT_USES, config, chip, allow_tf32=False)
    assert not list(problems(compile_launch(launch, CHIPS[chip]), launch, chip))


@pytest.mark.parametrize("chip", ["sm_89", "sm_90"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("conv", PUBLIC.values(), ids=PUBLIC)
def test_what_the_public_cases_get(conv: Conv, dtype: torch.dtype, last: bool, chip: str) -> None:
    launch, _ = launch_of(conv, dtype, last, last, chip)
    compiled = compile_launch(launch, CHIPS[chip])
    # Rows of an odd length cannot be stored in 16 bytes.
    odd = conv.y[-1] % 8 != 0 and not last
    expected = [f"stores {dict(compiled.stores)}, not of at least 128 bits"] if odd else []
    assert list(problems(compiled, launch, chip)) == expected


@pytest.mark.parametrize(("dtype", "in_step"), [(torch.float32, 1), (torch.bfloat16, 0)], ids=str)
def test_products_on_hopper_wait_in_a_step_only_where_they_read_registers(dtype: torch.dtype, in_step: int) -> None:
    """Else behind the loop. ptxas adds waits where accumulators do not stay in their registers, and says nothing."""
    launch, _ = launch_of(PUBLIC["dcgan_64"], dtype, True, True, "sm_90")
    assembly = compile_launch(launch, CHIPS["sm_90"]).assembly
    wait = r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0"
    (step,) = [code for code in loops(assembly) if count(r"\bHGMMA\.", code)]
    assert count(wait, step) == in_step and len(re.findall(wait, assembly)) == 1


RELOADED = [
    (PUBLIC["seed"], torch.float32, False, False),
    (PUBLIC["unet_up2"], torch.bfloat16, True, True),
    (DEPTHWISE, torch.bfloat16, True, False),
]


@pytest.mark.parametrize("use", RELOADED, ids=["seed", "unet_up2", "depthwise"])
def test_what_inductor_writes_out_again_compiles_to_the_same(use: tuple, tmp_path: Path) -> None:
    launch, _ = launch_of(*use, "sm_90")
    assert_written_out_again(launch, tmp_path)


@pytest.mark.parametrize("use", USES, ids=str)
def test_inductor_sees_that_only_the_output_is_written(use: tuple) -> None:
    """Otherwise it would copy x, the weight and all coefficients first."""
    launch, _ = launch_of(*use, "sm_90")
    assert written_to(launch) == ["out_ptr"]


def test_what_inductor_hands_over_in_float64_compiles_to_the_same() -> None:
    """Inductor passes Python floats as fp64; one multiply-add in fp64 would cost more than the product."""
    launch, _ = launch_of(PUBLIC["seed"], torch.bfloat16, True, True, "sm_90")
    assembly = compile_launch(launch, CHIPS["sm_90"], number="fp64").assembly
    assert not re.search(r"\bD(ADD|MUL|FMA|SETP)\b", assembly)

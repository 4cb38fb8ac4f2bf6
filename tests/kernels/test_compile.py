"""Every configuration that ships, compiled for every GPU we support: no spills, 16-byte accesses, shared memory."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from fusion_backend.kernels import epilogue as kernels
from fusion_backend.kernels import epilogue_backward as backward
from fusion_backend.kernels.blocks import FLAT_CONFIGS, TRANSPOSE_CONFIGS, VECTOR_BYTES, Config
from fusion_backend.kernels.gate import Gate
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.matrix import CONFIGS as BACKWARD_CONFIGS
from fusion_backend.kernels.matrix import Config as BackwardConfig
from tests.kernels.compiling import CHIPS, Compiled, Launch, compile_launch, record_launches
from tests.kernels.inductor import assert_written_out_again, written_to

every_chip = pytest.mark.parametrize("chip", CHIPS)

# bfloat16 holds the most elements in a block, hence in registers; float32 is compiled where it is used the most.
every_chip_and_dtype = pytest.mark.parametrize(
    ("chip", "dtype"),
    [*((chip, torch.bfloat16) for chip in CHIPS), ("sm_89", torch.float32), ("sm_90", torch.float32)],
    ids=str,
)

# Each way in which the flat kernel finds an element's channel. The first two are the seed's.
ROWS = ((128, 64, 256, 256), False)
PIXELS = ((128, 64, 256, 256), True)
UNITS = ((128, 64, 28, 28), False)
UNITS_CHANNELS_LAST = ((128, 96, 28, 28), True)
ELEMENTS = ((128, 64, 27, 27), False)
ELEMENTS_CHANNELS_LAST = ((128, 3, 256, 256), True)


def launch_of(
    shape: tuple[int, ...],
    from_last: bool,
    to_last: bool,
    dtype: torch.dtype,
    config: Config | None = None,
    in_place: bool = False,
    numbers: tuple[float, float, float, float] | None = None,
    gate: Gate | None = None,
) -> Launch:
    """The launch for a tensor of ``shape``; without numbers, for four coefficients per channel, the most there are.

    With a gate, the kernel writes bits too.
    """
    with FakeTensorMode():
        x = empty(shape, torch.empty(0, dtype=dtype, device="cuda"), from_last)
        out = x if in_place else empty(shape, x, to_last)
        values = tuple(None if numbers else torch.empty(shape[1], device="cuda") for _ in range(4))
        given = kernels.coefficients_for(x, values, numbers or (1.0, 0.0, None, None))
        bits = (bits_of(x), gate) if gate else ()
        (launch,) = record_launches(kernels, lambda: kernels.launch(out, None if in_place else x, given, config, *bits))
    return launch


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)


def vectors_per_thread(config: Config, chip: str) -> int:
    return config.block_bytes // (VECTOR_BYTES * config.num_warps * CHIPS[chip].target.warp_size)


def problems(compiled: Compiled, chip: str, stores: int, narrow: int = 0) -> Iterator[str]:
    """What is wrong with a kernel whose every store, and a load for each, ought to be 16 bytes wide.

    But for ``narrow`` stores at most, of what is small against the rest: bits, and partial sums.
    """
    if compiled.spills:
        yield f"{compiled.spills} spills"
    if compiled.shared > CHIPS[chip].shared_limit:
        yield f"{compiled.shared} bytes of shared memory, {chip} has {CHIPS[chip].shared_limit} a block"
    if compiled.stores[128] != stores or compiled.stores.total() > stores + narrow:
        yield f"stores {dict(compiled.stores)}, not {stores} of 128 bits, and {narrow} others at most"
    if compiled.loads[128] < stores:
        yield f"loads {dict(compiled.loads)}, not at least {stores} of 128 bits"


@every_chip_and_dtype
@pytest.mark.parametrize("case", [ROWS, PIXELS], ids=["contiguous", "channels_last"])
def test_every_flat_configuration(case: tuple[tuple[int, ...], bool], chip: str, dtype: torch.dtype) -> None:
    shape, last = case
    for config in FLAT_CONFIGS:
        compiled = compile_launch(launch_of(shape, last, last, dtype, config), CHIPS[chip])
        # A block that is whole and the last one take two branches.
        assert not list(problems(compiled, chip, 2 * vectors_per_thread(config, chip))), config
        assert compiled.shared == 0, config


@every_chip_and_dtype
@pytest.mark.parametrize("from_last", [False, True], ids=["to_channels_last", "to_contiguous"])
def test_every_transposing_configuration(from_last: bool, chip: str, dtype: torch.dtype) -> None:
    for config in TRANSPOSE_CONFIGS:
        launch = launch_of((128, 64, 256, 256), from_last, not from_last, dtype, config)
        compiled = compile_launch(launch, CHIPS[chip])
        assert not list(problems(compiled, chip, vectors_per_thread(config, chip))), config
        assert compiled.shared <= config.block_bytes, f"{config}: the tile is turned in a wider dtype than x's"


LOOKUPS = pytest.mark.parametrize(
    "case",
    [UNITS, UNITS_CHANNELS_LAST, ELEMENTS, ELEMENTS_CHANNELS_LAST],
    ids=["units", "units_channels_last", "elements", "elements_channels_last"],
)


def lookup_problems(case: tuple[tuple[int, ...], bool], dtype: torch.dtype, config: Config, chip: str) -> list[str]:
    shape, last = case
    launch = launch_of(shape, last, last, dtype, config)
    # The launcher falls back to the first configuration where every element has its own lookup.
    used = FLAT_CONFIGS[0] if launch.arguments["WIDTH"] == 1 else config
    return list(problems(compile_launch(launch, CHIPS[chip]), chip, 2 * vectors_per_thread(used, chip)))


@every_chip
@LOOKUPS
def test_every_other_lookup_of_channels(case: tuple[tuple[int, ...], bool], chip: str) -> None:
    assert not lookup_problems(case, torch.bfloat16, FLAT_CONFIGS[1], chip)


@LOOKUPS
def test_the_other_lookups_in_every_configuration_on_the_seeds_gpu(case: tuple[tuple[int, ...], bool]) -> None:
    for config in FLAT_CONFIGS:
        assert not lookup_problems(case, torch.float16, config, "sm_89"), config


@every_chip
def test_in_place(chip: str) -> None:
    for shape, last in (ROWS, PIXELS):
        launch = launch_of(shape, last, last, torch.float16, FLAT_CONFIGS[1], in_place=True)
        assert not list(
            problems(compile_launch(launch, CHIPS[chip]), chip, 2 * vectors_per_thread(FLAT_CONFIGS[1], chip))
        )


def bits_problems(case: tuple[tuple[int, ...], bool], dtype: torch.dtype, config: Config, chip: str) -> Iterator[str]:
    """A thread writes 2 or 4 bytes of bits at once, but in the last block, whose bytes may end anywhere."""
    shape, last = case
    launch = launch_of(shape, last, last, dtype, config, in_place=True, gate=Gate(lo_open=True))
    compiled = compile_launch(launch, CHIPS[chip])
    bytes_per_thread = max(1, config.elements(dtype) // (8 * 32 * config.num_warps))
    yield from problems(compiled, chip, 2 * vectors_per_thread(config, chip), narrow=1 + bytes_per_thread)
    if compiled.shared > config.elements(dtype) // 8:
        yield f"{compiled.shared} bytes of shared memory, and only bits need to change hands"


@every_chip_and_dtype
@pytest.mark.parametrize("case", [ROWS, PIXELS], ids=["contiguous", "channels_last"])
def test_bits_beside_the_output(case: tuple[tuple[int, ...], bool], chip: str, dtype: torch.dtype) -> None:
    assert not list(bits_problems(case, dtype, FLAT_CONFIGS[1], chip))


def test_bits_in_small_blocks_on_the_seeds_gpu() -> None:
    for case in (ROWS, UNITS):
        assert not list(bits_problems(case, torch.float16, FLAT_CONFIGS[0], "sm_89"))


def test_without_bits_no_gate_costs_anything() -> None:
    launch = launch_of(*ROWS, False, torch.float32)
    assert launch.arguments["bits_ptr"] is None
    known = {"LO_OPEN": True, "HI_OPEN": True, "PASSES_NAN": False}
    other = Launch(launch.kernel, launch.grid, launch.arguments | known, launch.options)
    ours, theirs = (compile_launch(each, CHIPS["sm_90"]) for each in (launch, other))
    assert ours == theirs


# Tiles whose rows are added up and tiles whose columns are; the last are rows that are short, parts, or odd.
BACKWARD_ROWS = ((128, 64, 256, 256), False)
BACKWARD_COLUMNS = ((128, 64, 256, 256), True)
BACKWARD_SHORT_ROWS = ((1024, 512, 8, 8), False)
BACKWARD_PARTS = ((128, 64, 100, 100), False)
BACKWARD_ODD = ((128, 64, 255, 255), False)


def backward_launch_of(
    shape: tuple[int, ...],
    last: bool,
    dtype: torch.dtype,
    config: BackwardConfig | None = None,
    sums: tuple[bool, bool] = (True, False),
    scale: float | None = None,
) -> Launch:
    """The launch for a gradient of ``shape``; without a number, with a scale per channel."""
    with FakeTensorMode():
        grad = empty(shape, torch.empty(0, dtype=dtype, device="cuda"), last)
        scales = torch.empty(shape[1], device="cuda") if scale is None else None
        tiling = backward.tiling_for(grad, last, config)
        arguments = (grad, bits_of(grad), scales, scale or 1.0, last, *sums, tiling)
        (launch,) = record_launches(backward, lambda: backward.launch(*arguments))
    return launch


def backward_problems(launch: Launch, chip: str, dtype: torch.dtype) -> list[str]:
    known = launch.arguments
    elements = known["ROWS"] * known["UNITS"] * known["WIDTH"]
    threads = launch.options["num_warps"] * CHIPS[chip].target.warp_size
    stores = elements * dtype.itemsize // (VECTOR_BYTES * threads)
    sums = sum(known[name] is not None for name in ("passed_ptr", "blocked_ptr"))
    return list(problems(compile_launch(launch, CHIPS[chip]), chip, stores, narrow=sums))


@every_chip_and_dtype
@pytest.mark.parametrize("case", [BACKWARD_ROWS, BACKWARD_COLUMNS], ids=["rows", "columns"])
def test_the_backward_with_all_it_can_do(case: tuple[tuple[int, ...], bool], chip: str, dtype: torch.dtype) -> None:
    assert not backward_problems(backward_launch_of(*case, dtype, sums=(True, True)), chip, dtype)


@every_chip
@pytest.mark.parametrize("case", [BACKWARD_ROWS, BACKWARD_COLUMNS], ids=["rows", "columns"])
def test_the_backward_without_a_scale(case: tuple[tuple[int, ...], bool], chip: str) -> None:
    assert not backward_problems(backward_launch_of(*case, torch.float32, scale=1.0), chip, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [BACKWARD_SHORT_ROWS, BACKWARD_PARTS], ids=["short_rows", "parts"])
def test_other_tiles_of_the_backward(case: tuple[tuple[int, ...], bool], dtype: torch.dtype) -> None:
    assert not backward_problems(backward_launch_of(*case, dtype), "sm_90", dtype)


@pytest.mark.parametrize("case", [BACKWARD_ROWS, BACKWARD_COLUMNS], ids=["rows", "columns"])
def test_every_configuration_of_the_backward(case: tuple[tuple[int, ...], bool]) -> None:
    for config in BACKWARD_CONFIGS:
        launch = backward_launch_of(*case, torch.float16, config)
        assert not backward_problems(launch, "sm_89", torch.float16), config


@every_chip
def test_odd_rows_of_the_backward_are_narrow_and_do_not_spill(chip: str) -> None:
    compiled = compile_launch(backward_launch_of(*BACKWARD_ODD, torch.bfloat16), CHIPS[chip])
    assert compiled.spills == 0
    assert set(compiled.stores) == {16, 32}


def test_a_scale_that_arrives_in_float64_is_not_computed_with() -> None:
    for case in (BACKWARD_ROWS, BACKWARD_COLUMNS):
        launch = backward_launch_of(*case, torch.float32, scale=0.3)
        compiled = compile_launch(launch, CHIPS["sm_89"], number="fp64")
        assert not re.findall(r"\bD(?:ADD|MUL|FMA|SETP|MNMX)\b", compiled.assembly)


@every_chip
def test_an_odd_number_of_elements_narrows_the_last_block_only(chip: str) -> None:
    launch = launch_of((1, 21, 513, 513), False, False, torch.float32, FLAT_CONFIGS[1])
    compiled = compile_launch(launch, CHIPS[chip])
    vectors = vectors_per_thread(FLAT_CONFIGS[1], chip)
    assert compiled.spills == 0
    assert compiled.stores == {128: vectors, 32: 4 * vectors}
    assert compiled.loads[128] == vectors


def test_addresses_beyond_31_bits_are_16_bytes_wide_too() -> None:
    launch = launch_of((16, 64, 2048, 2048), False, False, torch.bfloat16, FLAT_CONFIGS[1])
    assert launch.arguments["numel"] > 2**31
    compiled = compile_launch(launch, CHIPS["sm_90"])
    assert not list(problems(compiled, "sm_90", 2 * vectors_per_thread(FLAT_CONFIGS[1], "sm_90")))


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip.startswith("sm_")])
def test_minima_and_maxima_let_nan_through(chip: str) -> None:
    """The interpreter does so in any case."""
    for to_last in (False, True):
        compiled = compile_launch(launch_of((8, 64, 32, 32), False, to_last, torch.float32), CHIPS[chip])
        bounds = re.findall(r"\bFMNMX\S*", compiled.assembly)
        assert bounds
        assert all(".NAN" in bound for bound in bounds)


@pytest.mark.parametrize("to_last", [False, True])
def test_numbers_that_arrive_in_float64_are_not_computed_with(to_last: bool) -> None:
    """Inductor types a Python float as fp64, and a GPU has 2 to 64 times fewer units for that."""
    launch = launch_of((128, 64, 256, 256), False, to_last, torch.float32, numbers=(0.3, 0.1, 0.0, 0.7))
    compiled = compile_launch(launch, CHIPS["sm_89"], number="fp64")
    assert not re.findall(r"\bD(?:ADD|MUL|FMA|SETP|MNMX)\b", compiled.assembly)
    assert set(compiled.stores) == {128}


def test_the_harness_sees_narrow_accesses() -> None:
    compiled = compile_launch(launch_of(*ROWS, False, torch.float32, FLAT_CONFIGS[1]), CHIPS["sm_90"], alignment=4)
    assert compiled.stores[128] == 0
    assert compiled.stores[32] > 0


@pytest.mark.parametrize(("case", "to_last"), [(ROWS, False), (PIXELS, True), (UNITS, False), (ROWS, True)], ids=str)
def test_what_inductor_writes_out_again_compiles_to_the_same(
    case: tuple[tuple[int, ...], bool], to_last: bool, tmp_path: Path
) -> None:
    """Inductor copies a kernel's source, and what that refers to, into a module of its own."""
    shape, from_last = case
    assert_written_out_again(launch_of(shape, from_last, to_last, torch.bfloat16), tmp_path)


def test_what_inductor_writes_out_again_of_bits_and_the_backward_compiles_to_the_same(tmp_path: Path) -> None:
    assert_written_out_again(launch_of(*ROWS, False, torch.bfloat16, in_place=True, gate=Gate()), tmp_path)
    for case in (BACKWARD_ROWS, BACKWARD_COLUMNS):
        assert_written_out_again(backward_launch_of(*case, torch.bfloat16), tmp_path)


@pytest.mark.parametrize(
    ("case", "to_last"),
    [(ROWS, False), (PIXELS, True), (UNITS, False), (ELEMENTS, False), (ROWS, True), (PIXELS, False)],
    ids=str,
)
def test_inductor_sees_that_only_the_output_is_written(case: tuple[tuple[int, ...], bool], to_last: bool) -> None:
    """Otherwise it would copy x and all coefficients first."""
    shape, from_last = case
    for in_place in (False, True) if from_last == to_last else (False,):
        launch = launch_of(shape, from_last, to_last, torch.float32, in_place=in_place)
        assert written_to(launch) == ["out_ptr"]
        if from_last == to_last:
            gated = launch_of(shape, from_last, to_last, torch.float32, in_place=in_place, gate=Gate(passes_nan=False))
            assert written_to(gated) == ["out_ptr", "bits_ptr"]


@pytest.mark.parametrize("case", [BACKWARD_ROWS, BACKWARD_COLUMNS, BACKWARD_SHORT_ROWS, BACKWARD_ODD], ids=str)
def test_inductor_sees_that_only_the_outputs_of_the_backward_are_written(case: tuple[tuple[int, ...], bool]) -> None:
    launch = backward_launch_of(*case, torch.float32, sums=(True, True))
    assert written_to(launch) == ["grad_x_ptr", "passed_ptr", "blocked_ptr"]

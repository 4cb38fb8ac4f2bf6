"""Which rows and which of our plans a run of the convolution's benchmark has, without a GPU."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import conv_transpose as benchmark
from benchmarks.cases import CASES
from benchmarks.conv_transpose import Row, is_measured, problem_of
from fusion_backend import evidence
from fusion_backend.kernels import problem


@pytest.fixture
def hopper() -> Iterator[None]:
    with (
        mock.patch.object(problem, "is_hopper", return_value=True),
        mock.patch.object(problem, "shared_memory_limit", return_value=227 * 1024),
        mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU that is not measured"),
    ):
        yield


def row_of(name: str, dtype: torch.dtype, last: bool) -> Row:
    """As much of it as the choice of plans reads."""
    row = object.__new__(Row)
    row.case, row.dtype = CASES[name], dtype
    row.x = torch.empty(1).expand(row.case.x)
    row.problem = problem_of(row.case, dtype, last)
    return row


@pytest.mark.parametrize("taken", [None, "64x128x128, 4 warps, 3 stages"])
def test_the_products_the_rules_and_the_compiled_models(
    hopper: None, monkeypatch: pytest.MonkeyPatch, taken: str | None
) -> None:
    """What the compiled model takes is timed as well: what its call takes besides is the difference."""
    row = row_of("dcgan_64", torch.bfloat16, True)
    if taken is not None:
        found = evidence.Prediction(taken, 1.2, "dcgan_64", 0)
        monkeypatch.setattr(evidence, "predict", lambda *args: found)
    monkeypatch.setattr(Row, "ours", lambda *args, **options: None)
    contenders = row.contenders("product", ())
    products = [f"product {size}" for size in ("256x128", "128x128", "256x64", "128x64")]
    expected = [row.chosen.name, *products] + ([taken] if taken else [])
    assert sorted(contenders) == sorted([*expected, "eager"])


def test_rows_are_those_that_the_product_takes(hopper: None) -> None:
    rows = [
        (name, str(dtype).removeprefix("torch."), last)
        for name in benchmark.NAMES
        for dtype in (torch.float32, torch.bfloat16)
        for last in (False, True)
        if is_measured(CASES[name], dtype, last, "product")
    ]
    both = ("float32", "bfloat16")
    expected = [
        (name, dtype, last)
        for name in ("seed", "unet_up2", "dcgan_64", "hifigan_up1")
        for dtype in both
        for last in (False, True)
    ]
    assert rows == expected


def test_no_row_where_there_is_no_hopper() -> None:
    assert not is_measured(CASES["dcgan_64"], torch.bfloat16, True, "product")
    assert is_measured(CASES["dcgan_64"], torch.bfloat16, True, "few")


def test_a_row_without_its_memory_is_of_the_same_problem() -> None:
    """But for what the device is."""
    for name, last in (("kb_small", True), ("kb_small", False), ("hifigan_up1", True), ("kb100_3d", True)):
        case = CASES[name].small()
        found = problem_of(case, torch.float32, last)
        described = {"case": "", "x": case.x, "C_out": case.C_out, "dtype": "float32", "plans": {}, "peer": 0.0}
        described["kernel_stride_padding"] = (case.kernel, case.stride, case.padding, case.output_padding)
        described["memory_format"] = "channels_last" if last else "contiguous"
        recorded = evidence.case_of(described).problem
        for each in ("axes", "C_in", "C_out", "positions", "dtype", "x_last", "out_last", "tf32"):
            assert getattr(found, each) == getattr(recorded, each), each

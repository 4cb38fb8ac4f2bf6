"""The march on Hopper compiled for it, every configuration that ships, and what came out."""

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import triton
from triton.runtime.driver import driver

from fusion_backend.kernels import hopper_march, hopper_strips
from fusion_backend.kernels.coefficients import coefficients_for
from fusion_backend.kernels.hopper_strips import Config, configs_for, march_for, why_not
from fusion_backend.kernels.problem import Problem, problem_for
from tests.kernels.compiling import CHIPS, Compiled, _read_nvidia, on_chip
from tests.kernels.convolutions import PUBLIC, Conv

HOPPER = CHIPS["sm_90"]
PROCESSORS = 132

FEW = Conv((8, 64, 64, 64), 64, (4,), (2,), (1,))


class Driver:
    """As much of a driver as compiling takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> triton.backends.compiler.GPUTarget:
        return HOPPER.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Warmed:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


def compiled(conv: Conv, dtype: torch.dtype, x_last: bool, out_last: bool, config: Config | None = None) -> Compiled:
    """With a shift for each channel and two bounds, and the configuration that is chosen unless one is given."""
    problem = problem_of(conv, dtype, x_last, out_last)
    config = config or configs_for(problem)[0]
    march = march_for(problem, conv.x, config, PROCESSORS)
    kernel, *rest = hopper_march._gluon()
    # One element stands for all of them: nothing is read or written.
    x, out = (torch.zeros(1, dtype=dtype).expand(shape) for shape in (conv.x, conv.y))
    weight = torch.zeros(conv.x[1], conv.C_out, *(axis.kernel for axis in conv.axes), dtype=dtype)
    given = coefficients_for(out, (None, torch.zeros(conv.C_out), None, None), (1.0, 0.0, 0.0, 0.5))
    packed = hopper_march.pack(weight, problem, config)
    with (
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(hopper_march, "_gluon", lambda: (Warmed(kernel), *rest)),
    ):
        return _read_nvidia(hopper_march.launch(out, x, packed, problem, march, given))


def problem_of(conv: Conv, dtype: torch.dtype, x_last: bool, out_last: bool) -> Problem:
    with on_chip("sm_90"):
        x, weight, _ = conv.fakes(dtype, x_last, out_last)
        return problem_for(x, weight, conv.axes, conv.groups, out_last, True)


def loops(assembly: str) -> Iterator[list[str]]:
    """The instructions of each loop that has no other inside."""
    lines = [match.groups() for match in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", assembly)]
    code = [(int(address, 16), text) for address, text in lines]
    edges = []
    for address, text in code:
        target = re.search(r"\bBRA 0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            edges.append((int(target.group(1), 16), address))
    for begin, end in edges:
        if not any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in edges):
            yield [text for address, text in code if begin <= address <= end]


def count(pattern: str, code: list[str]) -> int:
    return sum(bool(re.search(pattern, text)) for text in code)

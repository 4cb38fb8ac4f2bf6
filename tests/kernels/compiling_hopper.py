"""The kernels for Hopper compiled for it, through their own launchers; and how to read loops of machine code.

with compiling(hopper_march):
    binary = _read_nvidia(hopper_march.launch(...))
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fusion_backend.kernels.problem import Problem, problem_for
from tests.kernels.compiling import CHIPS, on_chip
from tests.kernels.convolutions import Conv

CHIP = CHIPS["sm_90"]
PROCESSORS = 132


class Driver:
    """As much of a driver as compiling takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return CHIP.target


class Warmed:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options)


@contextmanager
def compiling(module: ModuleType) -> Iterator[None]:
    """Inside, ``module.launch`` compiles, and launches nothing. What it prepares is kept neither before nor after."""
    kernel = module._kernel()
    module.prepare.cache_clear()
    with (
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(module, "_kernel", return_value=Warmed(kernel)),
    ):
        yield
    module.prepare.cache_clear()


def problem_of(conv: Conv, dtype: torch.dtype, x_last: bool, out_last: bool) -> Problem:
    with on_chip("sm_90"):
        x, weight, _ = conv.fakes(dtype, x_last, out_last)
        return problem_for(x, weight, conv.axes, conv.groups, out_last, True)


def loops(assembly: str) -> Iterator[list[str]]:
    """The instructions of each loop that has no other inside."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", assembly)
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

"""Compile the kernels that a launcher would launch, for GPUs that need not be there, and read off what came out.

    launches = record_launches(module, lambda: module.launch(...))        # on fake tensors
    compiled = compile_launch(launches[0], CHIPS["sm_90"])

The kernels come from the launcher itself, so what is compiled is what ships. Each is looked through for a race that
no result need show, see under_way.py.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusion_backend.kernels import problem
from tests.kernels.under_way import overwritten

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """A compilation target and the shared memory that one block may have on it."""

    target: GPUTarget
    shared_limit: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 99 * KIB),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


# In PTX, and in AMD's assembly.
TENSOR_CORES = {
    "sm_80": r"\bmma\.sync",
    "sm_89": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async",
    "sm_100": r"\btcgen05\.mma",
    "sm_120": r"\bmma\.sync",
    "gfx942": r"\bv_mfma_",
}


@contextmanager
def on_chip(name: str) -> Iterator[None]:
    """Fake tensors are on a GPU of this kind, as far as the choice of a configuration looks at it."""
    chip = CHIPS[name]
    hip = "6.4" if chip.target.backend == "hip" else None
    with (
        FakeTensorMode(),
        mock.patch.object(problem, "shared_memory_limit", return_value=chip.shared_limit),
        mock.patch.object(problem, "has_tensor_memory", return_value=name == "sm_100"),
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments of one launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What a launch compiled to. ``loads``, ``stores`` and ``copies`` count global accesses by their width in bits.

    ``copies`` are those to shared memory; ``spills`` bytes of the stack and accesses to it, on AMD registers. On AMD
    ``ptx`` is its assembly. ``assembly`` is read when it is asked for: NVIDIA's disassembler takes as long as the rest.
    """

    registers: int
    spills: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]
    copies: Counter[int]
    ptx: str = field(compare=False, repr=False)
    disassemble: Callable[[], str] = field(compare=False, repr=False)

    @functools.cached_property
    def assembly(self) -> str:
        return self.disassemble()


def record_launches(module: ModuleType, run: Callable[[], object]) -> list[Launch]:
    """The launches that ``run`` makes through ``module.wrap_triton``. Nothing is launched."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, args, strict=False))
                arguments |= {name: value for name, value in kwargs.items() if name in self.kernel.arg_names}
                options = {name: value for name, value in kwargs.items() if name not in self.kernel.arg_names}
                launches.append(Launch(self.kernel, grid, arguments, options))

            return launch

    with mock.patch.object(module, "wrap_triton", Recorder):
        run()
    return launches


def compile_launch(launch: Launch, chip: Chip, alignment: int = 16, number: str = "fp32") -> Compiled:
    """Compile for ``chip`` what Triton's launcher would compile for tensors whose addresses ``alignment`` divides.

    ``number`` is the type of Python floats: "fp32" for Triton's launcher, "fp64" for Inductor's.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = "constexpr" if parameter.is_constexpr else _type_of(value, number)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif alignment % 16 == 0 if isinstance(value, torch.Tensor) else isinstance(value, int) and value % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=chip.target, options=launch.options)
    return _read_amd(compiled) if chip.target.backend == "hip" else _read_nvidia(compiled)


_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


def _type_of(value: Any, number: str) -> str:
    """Triton's own rule: None and the integer 1 are constants, other integers are as narrow as they fit."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return number
    if value is None or value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@functools.cache
def _cuobjdump() -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def _read_nvidia(compiled: Any) -> Compiled:
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    assert not (early := overwritten(ptx)), f"products still read what these write: {early}"
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", _dumped(cubin, "-res-usage")).groups())

    def widths(direction: str) -> Counter[int]:
        accesses = re.findall(rf"\b{direction}\.global((?:\.[\w:]+)+)", ptx)
        return Counter(int(re.search(r"\.[busf](\d+)$", each).group(1)) * _vector(each) for each in accesses)

    return Compiled(
        registers=registers,
        spills=stack and stack + len(re.findall(r"\b(?:LDL|STL)\b", _dumped(cubin, "-sass"))),
        shared=compiled.metadata.shared,
        loads=widths("ld"),
        stores=widths("st"),
        copies=Counter(8 * int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.[^\]]*\][^\]]*\], (\w+)", ptx)),
        ptx=ptx,
        disassemble=lambda: _dumped(cubin, "-sass"),
    )


def _dumped(cubin: bytes, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_cuobjdump(), flag, file.name], capture_output=True, text=True, check=True).stdout


def _vector(modifiers: str) -> int:
    """st.global.v4.b32 is of four."""
    found = re.search(r"\.v(\d)\b", modifiers)
    return int(found.group(1)) if found else 1


def _read_amd(compiled: Any) -> Compiled:
    assembly = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))

    def widths(direction: str) -> Counter[int]:
        names = re.findall(rf"\b(?:global|buffer|flat)_{direction}_([a-z0-9_]+)", assembly)
        return Counter(_amd_width(name) for name in names)

    return Compiled(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        shared=compiled.metadata.shared,
        loads=widths("load"),
        stores=widths("store"),
        copies=Counter(),
        ptx=assembly,
        disassemble=lambda: assembly,
    )


def _amd_width(name: str) -> int:
    """dwordx4 is 128 bits wide; short, ushort and short_d16_hi 16."""
    if name.startswith("dword"):
        return 32 * int(name.removeprefix("dword").removeprefix("x") or 1)
    return 16 if "short" in name else 8

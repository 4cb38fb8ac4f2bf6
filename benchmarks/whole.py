"""Whole models, fused_post beside eager, Inductor and max-autotune: what models.py and kernelbench.py run.

Rows are prepared (compiled and checked) by many processes at once, which share Inductor's and triton's caches, and then
measured one after the other while all others wait. A row's contenders run in turn, on a cold cache:

``ms``          on a GPU the device's time, of a call that was queued whole before its first kernel began, if it can be
``wall_ms``     on a GPU also the time on the wall, with what the host takes for it
``peak_bytes``  device memory above parameters and inputs, so with the output
``tf32_error``  what rounding to TF32 alone makes of the result, where that is allowed
``in_rule``     whether the error is at most twice eager's and a tenth of the tolerance; TF32's is not if eager has none

Max-autotune is without CUDA graphs, as all are; it is compiled last, and what is not ready in time is not measured.
What Inductor tunes, it tunes while other rows are prepared. A contender that is wrong, or that raises, is not timed:
its first output is compared with float64, the first and last images of a large batch, and all of it with eager's.
Each row also says what became of each transposed convolution. The data go to benchmarks/results as JSON, row by row.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import inspect
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import async_compile
from torch._inductor.compile_worker.subproc_pool import SubprocPool
from torch.overrides import TorchFunctionMode

import fusion_backend
from benchmarks import rows
from benchmarks.measure import TOLERANCE, environment, in_turn, peak_bytes, summary
from benchmarks.sites import PEERS, RESULTS, backend, names, show, twin
from benchmarks.training import at_most
from fusion_backend.kernels.tf32 import round_to_tf32

Inputs = tuple[Tensor, ...]
Build = Callable[[bool], tuple[nn.Module, Inputs]]

IMAGES = 8  # that are compared at a time, and of a larger batch with float64: half of them at either end
ROUNDS = 30  # of each measurement, at most, for each of the seconds asked for

# Behind a graph break the contenders share code, and with it Dynamo's cache, unless each has its own.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}

# Strict: else what interrupts it, or a mistake, would make Inductor's code of it, and that would be timed.
COMPILED: dict[str, dict[str, object]] = {
    "inductor": {},
    "fused_post": {"backend": backend, "options": {"fused_post.strict": True}},
    "fused_post fused": {"backend": backend, "options": {"fused_post.strict": True, "fused_post.kernel": "fused"}},
    "inductor max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}
CONTENDERS = ("eager", "inductor", "fused_post", "inductor max-autotune")


@dataclass(frozen=True)
class Entry:
    """A model that another process finds by its name in ``BUILDS`` of the module ``table``."""

    table: str
    name: str

    def build(self, small: bool) -> tuple[nn.Module, Inputs]:
        build: Build = importlib.import_module(self.table).BUILDS[self.name]
        return build(small)


class Row:
    """One model in one dtype: its inputs, its sites, and the contenders that are right."""

    def __init__(self, entry: Entry, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        with torch.device(device):
            model, inputs = entry.build(device == "cpu")
        self.model, self.inputs = model.to(dtype), tuple(tensor.to(dtype) for tensor in inputs)
        self.columns: dict[str, dict[str, object]] = {}
        self.correct: dict[str, Callable[[], Tensor]] = {}
        self.y: tuple[int, ...] | None = None
        self.tf32_error: float | None = None
        self.references_s = 0.0

    def prepare(self, contenders: Iterable[str], until: float) -> None:
        """Compile and check every contender. ``until``: when, by ``time.monotonic``, what is not ready is left out."""
        begun = time.monotonic()
        self.sites = fusion_backend.explain(self.model, *self.inputs).sites
        exact = self.in_float64()
        eagers = self.model(*self.inputs)
        self.y = tuple(eagers.shape)
        error = relative(zip(ends(eagers), exact, strict=True))
        rule = 2 * error + TOLERANCE[self.dtype] / 10
        if self.dtype == torch.float32 and self.device == "cuda" and torch.backends.cudnn.allow_tf32:
            # Where a contender takes TF32 and cuDNN, which may too, takes none, its rounding is the measure.
            with RoundedToTF32():
                self.tf32_error = relative(zip(self.in_float64(), exact, strict=True))
            error = max(error, self.tf32_error)
        allowed = 2 * error + TOLERANCE[self.dtype] / 10
        self.references_s = round(time.monotonic() - begun, 1)
        for name in contenders:
            run = self.contender(name)
            begun = time.monotonic()
            try:
                with at_most(until - begun):
                    result = run(*self.inputs)
                    error = relative(zip(ends(result), exact, strict=True))
                    apart = relative(zip(result.split(IMAGES), eagers.split(IMAGES), strict=True))
            except Exception as raised:  # one contender that cannot run must not hide the others
                self.columns[name] = {"raised": words(raised)}
                continue
            self.columns[name] = {"error": error, "in_rule": error <= rule}
            self.columns[name]["prepared_s"] = round(time.monotonic() - begun, 1)
            if error <= allowed and apart <= 2 * allowed:
                self.correct[name] = functools.partial(run, *self.inputs)

    def contender(self, name: str) -> nn.Module:
        if name == "eager":
            return self.model
        arguments = {key: value() if callable(value) else value for key, value in COMPILED[name].items()}
        return torch.compile(twin(self.model, name), **ISOLATED, **arguments)

    def in_float64(self) -> list[Tensor]:
        """What the model returns at either end of the batch."""
        model = deepcopy(self.model).double()
        return [model(*(part.double() for part in parts)) for parts in zip(*map(ends, self.inputs), strict=True)]

    def measure(self, seconds: float) -> dict[str, object]:
        columns = self.columns
        most = round(ROUNDS * seconds)
        for name, times in in_turn(self.correct, self.device, seconds, most, "ahead").items():
            columns[name] |= summary(times)
        if self.device == "cuda":
            for name, times in in_turn(self.correct, self.device, seconds / 2, most, "waited for").items():
                columns[name]["wall_ms"] = statistics.median(times)
            for name, run in self.correct.items():
                columns[name]["peak_bytes"] = peak_bytes(run)
        best = min((columns[name]["ms"] for name in PEERS if name in self.correct), default=math.nan)
        for name in self.correct:
            columns[name]["speed"] = best / columns[name]["ms"]
        sites = [asdict(site) for site in self.sites]
        shapes = {"x": tuple(self.inputs[0].shape), "y": self.y}
        about = {"references_s": self.references_s, "tf32_error": self.tf32_error}
        return shapes | about | {"sites": sites, "contenders": columns}


class RoundedToTF32(TorchFunctionMode):
    """Transposed convolutions of float64 take input and weight rounded to TF32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
            args = (*(round_to_tf32(tensor.float()).double() for tensor in args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))


def ends(tensor: Tensor) -> tuple[Tensor, ...]:
    half = IMAGES // 2
    return (tensor,) if tensor.shape[0] <= IMAGES else (tensor[:half], tensor[-half:])


def relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """RMS of the difference over that of the second."""
    error = size = 0.0
    for result, expected in pairs:
        expected = expected.double()
        error += (result.double() - expected).square().sum().item()
        size += expected.square().sum().item()
    return (error / size) ** 0.5


def words(raised: Exception) -> str:
    return " ".join(f"{type(raised).__name__}: {raised}".split())[:300]


def release(device: str) -> None:
    """Give the GPU's memory back to the other processes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


_PREPARED: dict[rows.Key, Row] = {}


@torch.no_grad()
def prepare(entry: Entry, dtype: torch.dtype, device: str, contenders: Iterable[str], seconds: float) -> None:
    until = time.monotonic() + seconds
    _PREPARED.clear()  # a process has one row at a time
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # beyond it Dynamo would run a contender as eager does
    row = Row(entry, dtype, device)
    row.prepare(contenders, until)
    _PREPARED[entry, dtype] = row
    end_compilers()  # else one that was too late goes on
    release(device)


def end_compilers() -> None:
    """At once: left to itself Inductor waits until all is compiled that is still queued, minutes of max-autotune's."""
    for pool in async_compile._pool_set:
        if isinstance(pool, SubprocPool):
            pool.process.kill()  # its own processes end with it
    async_compile.shutdown_compile_workers()


@torch.no_grad()
def measure(entry: Entry, dtype: torch.dtype, device: str, seconds: float) -> dict[str, object]:
    outcome = _PREPARED[entry, dtype].measure(seconds)
    release(device)
    return outcome


def main(
    table: str,
    about: str,
    builds: Mapping[str, Build],
    sizes: Mapping[str, int] | None = None,
    packages: tuple[str, ...] = (),
) -> None:
    """Read the command line, measure the rows asked for, and write results/<table>_<device>.json.

    ``sizes``: bytes of a row's largest tensor in float32, by its name, where that matters.
    ``packages``: those whose versions belong to the data.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=names, default=list(builds), help=f"of {','.join(builds)}")
    parser.add_argument("--dtypes", type=names, default=["float32"])
    parser.add_argument("--contenders", type=names, default=CONTENDERS, help=f"of eager,{','.join(COMPILED)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring a row")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for preparing as many rows as fit")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no row is measured")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<this>_<device>.json")
    args = parser.parse_args()
    for what, given, known in (
        ("rows", args.rows, list(builds)),
        ("contenders", args.contenders, ["eager", *COMPILED]),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {what} {sorted(unknown)}; known are {known}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no GPU here; --cpu measures small shapes on the CPU")

    device = "cpu" if args.cpu else "cuda"
    where = "cpu" if args.cpu else "-".join(torch.cuda.get_device_name().lower().replace("/", " ").split())
    out = args.out or RESULTS / f"{table.rpartition('.')[2]}_{where}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    data = environment() | {"device": device, "packages": {package: version(package) for package in packages}}
    data |= {"left_out": {}, "rows": []}
    todo = [(Entry(table, name), getattr(torch, dtype)) for name in args.rows for dtype in args.dtypes]
    processors = os.cpu_count() or 1
    workers = min(len(todo), processors)
    # By default every process would have a pool of as many compilers as there are processors.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1" if workers == processors else "4")
    outcomes = rows.measured(
        parts(todo, workers, sizes or {}, math.inf if args.cpu else 0.65 * torch.cuda.mem_get_info()[1]),
        # Processes take a while to start. A contender that is late is left out; only where it cannot be, the row is.
        functools.partial(prepare, device=device, contenders=in_order(args.contenders), seconds=most_of(args.limit)),
        functools.partial(measure, device=device, seconds=args.seconds),
        workers,
        args.budget,
        args.limit,
    )
    for (entry, dtype), outcome in outcomes:
        if isinstance(outcome, ModuleNotFoundError):
            print(f"\n{entry.name}: left out, {outcome}")
            data["left_out"][entry.name] = str(outcome)
            outcome = None
        elif isinstance(outcome, Exception):
            outcome = {"sites": [], "contenders": {"row": {"raised": words(outcome)}}}
        if outcome is not None:
            row = {"case": entry.name, "dtype": str(dtype).removeprefix("torch."), "memory_format": "contiguous_format"}
            data["rows"].append(row | outcome)
            show(row | outcome)
            kernels = Counter(site["kernel"] or "missed" for site in outcome["sites"])
            outside = [name for name, column in outcome["contenders"].items() if column.get("in_rule") is False]
            if outside:
                print(
                    f"  {', '.join(outside)}: more than twice eager's error; TF32 alone makes {outcome['tf32_error']}"
                )
            print(f"  sites: {', '.join(f'{count} {kernel}' for kernel, count in kernels.items())}")
        data["seconds"] = round(time.monotonic() - start, 1)
        out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"\n{len(data['rows'])} rows of {len(todo)}, {time.monotonic() - start:.0f} s: {out}")


def parts(todo: list[rows.Key], workers: int, sizes: Mapping[str, int], most: float) -> list[list[rows.Key]]:
    """As few as there are processes and memory for, and about the same of both in each.

    A row holds x, what eager and a contender return, and what that makes on the way: about four of its largest tensor.
    """
    size = {key: 4 * sizes.get(key[0].name, 0) for key in todo}
    count = max(math.ceil(len(todo) / workers), math.ceil(sum(size.values()) / most))
    largest_first = sorted(todo, key=size.__getitem__, reverse=True)
    return [part for part in (largest_first[i::count] for i in range(count)) if part]


def most_of(limit: float) -> float:
    """What a process may take for what it can leave out, of the seconds after which it is stopped."""
    return max(0.7 * limit, limit - 40.0)


def in_order(contenders: Iterable[str]) -> tuple[str, ...]:
    """What takes longest to compile last."""
    return tuple(name for name in ("eager", *COMPILED) if name in contenders)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

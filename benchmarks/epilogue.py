"""The epilogue kernel against a device copy of the same bytes, the kernel it replaces, and Inductor.

    python -m benchmarks.epilogue [--out DIR]           about three minutes on an H200; exit code 2 without a GPU

Every contender is checked before it is timed. All of a case run in turn, and medians are compared. What counts is
"of copy": the time of ``dst.copy_(src)``, measured in the same rounds, over the contender's. Exit code 1 where a
contender of ours is wrong or fails; a promise that is not kept is printed, and no error.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from benchmarks.measure import environment
from fusion_backend.kernels import epilogue as kernels
from fusion_backend.kernels.blocks import FLAT_CONFIGS, TRANSPOSE_CONFIGS, Config, choose_config, is_aligned

ROUNDS = 21

# Rows that do not ship but might, if this script says so.
FLAT_CANDIDATES = (Config(8192, 4), Config(8192, 8), Config(16384, 4), Config(32768, 8), Config(32768, 16))
TRANSPOSE_CANDIDATES = (Config(8192, 8), Config(16384, 8), Config(32768, 8))

# The least speed that is promised at the seed's shape, a copy's being 1; most is promised for fp32 and NCHW.
PROMISED_FP32_NCHW = 0.97
PROMISED = 0.90


@dataclass(frozen=True)
class Case:
    """A shape in memory: its dtype, its layout before and after, and whether it is overwritten."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    from_last: bool = False
    to_last: bool = False
    in_place: bool = False
    candidates: bool = False

    @property
    def total_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def layout(self) -> str:
        before, after = ("channels_last" if last else "contiguous" for last in (self.from_last, self.to_last))
        return before if before == after else f"{before} -> {after}"

    @property
    def title(self) -> str:
        how = "in place" if self.in_place else "out of place"
        return f"{self.name} {self.shape} {str(self.dtype).removeprefix('torch.')} {self.layout} {how}"


SEED = (128, 64, 256, 256)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = (
    *(
        Case("seed", SEED, dtype, last, last, in_place, candidates=not in_place)
        for dtype in (FP32, BF16)
        for last in (False, True)
        for in_place in (False, True)
    ),
    *(Case("seed", SEED, dtype, last, not last, candidates=True) for dtype in (FP32, BF16) for last in (False, True)),
    *(Case("seed", SEED, FP16, last, last) for last in (False, True)),
    *(Case("small", (128, 16, 32, 32), dtype, last, last) for dtype in (FP32, BF16) for last in (False, True)),
    *(Case("small", (128, 16, 32, 32), FP32, last, not last) for last in (False, True)),
    *(Case("3d", (2, 32, 64, 128, 128), dtype, last, last) for dtype in (FP32, BF16) for last in (False, True)),
    *(Case("1d", (16, 64, 131072), dtype) for dtype in (FP32, BF16)),
    *(Case("odd", (1, 21, 1025, 2049), FP32, last, last) for last in (False, True)),
    *(Case("rgb", (64, 3, 512, 512), BF16, last, last) for last in (False, True)),
    *(Case("wide", (64, 96, 56, 56), BF16, last, last) for last in (False, True)),
)


@triton.autotune(
    configs=[
        triton.Config({"BLOCK": 256}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK": 512}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK": 1024}, num_warps=8, num_stages=2),
        triton.Config({"BLOCK": 2048}, num_warps=8, num_stages=1),
    ],
    key=["channels", "spatial"],
)
@triton.jit
def _seed_kernel(out_ptr, x_ptr, shift_ptr, channels, spatial, scale, BLOCK: tl.constexpr):
    """The kernel that the seed document asks to improve on: one (image, channel, block) a program, five operations."""
    row = tl.program_id(0).to(tl.int64) * channels + tl.program_id(1)
    index = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = index < spatial
    x = tl.load(x_ptr + row * spatial + index, mask=inside) + tl.load(shift_ptr + tl.program_id(1))
    x = tl.minimum(tl.maximum(x, 0.0), 1.0) * scale
    x = tl.minimum(tl.maximum(x, 0.0), 1.0) * (1.0 / scale)
    tl.store(out_ptr + row * spatial + index, x, mask=inside)


def seed_tail(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The user's own five operations; the epilogue of (shift, lo = 0, hi = 0.5)."""
    y = torch.clamp(x + shift.view(-1, *(1,) * (x.dim() - 2)), 0.0, 1.0) * 2.0
    return torch.clamp(y, 0.0, 1.0) / 2.0


def laid_out(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


class Bench:
    """One case: its memory, its contenders, and what they must come to."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        self.x = laid_out(torch.randn(case.shape, device="cuda", dtype=case.dtype), case.from_last)
        self.out = (
            torch.empty_like(self.x) if case.from_last == case.to_last else laid_out(self.x, case.to_last).clone()
        )
        # Sixteenths, so that contenders which round after each operation agree on what lies on a bound.
        self.shift = torch.arange(case.shape[1], device="cuda", dtype=torch.float32) % 16 / 16 - 0.5
        self.coefficients = kernels.coefficients_for(self.x, (None, self.shift, None, None), (1.0, 0.0, 0.0, 0.5))
        self.typed_shift = self.shift.to(case.dtype)

    @property
    def chosen(self) -> Config:
        case = self.case
        aligned = is_aligned(case.shape, case.dtype, case.to_last)
        return choose_config(case.from_last != case.to_last, case.total_bytes, aligned)

    def contenders(self) -> dict[str, Callable[[], object]]:
        """By name; "copy" is first, ours are called by their configuration, and the rest are the peers."""
        case = self.case
        transposing = case.from_last != case.to_last
        configs = TRANSPOSE_CONFIGS if transposing else FLAT_CONFIGS
        if case.candidates:
            configs = configs + (TRANSPOSE_CANDIDATES if transposing else FLAT_CANDIDATES)
        contenders: dict[str, Callable[[], object]] = {"copy": self.copy}
        contenders |= {name_of(config): self.ours(config) for config in configs}
        if case.in_place or case.dtype == FP16:
            return contenders
        if not transposing and not case.from_last:
            contenders["seed's kernel"] = self.seeds_kernel
        if case.name in ("seed", "small", "3d"):
            contenders["inductor"] = self.inductor()
        return contenders

    def copy(self) -> torch.Tensor:
        """The same bytes moved by the device's own copy; never a change of layout."""
        flat_x, flat_out = (t.as_strided((t.numel(),), (1,)) for t in (self.x, self.out))
        return flat_out.copy_(flat_x)

    def ours(self, config: Config) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            out = self.x if self.case.in_place else self.out
            kernels.launch(out, None if self.case.in_place else self.x, self.coefficients, config)
            return out

        return run

    def seeds_kernel(self) -> torch.Tensor:
        N, C, *sizes = self.case.shape
        S = math.prod(sizes)
        _seed_kernel[lambda meta: (N, C, triton.cdiv(S, meta["BLOCK"]))](self.out, self.x, self.typed_shift, C, S, 2.0)
        return self.out

    def inductor(self) -> Callable[[], torch.Tensor]:
        to_last, changes = self.case.to_last, self.case.from_last != self.case.to_last

        def tail(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            y = seed_tail(x, shift)
            return laid_out(y, to_last) if changes else y

        torch._dynamo.reset()
        compiled = torch.compile(tail, backend="inductor", fullgraph=True, dynamic=False)
        return lambda: compiled(self.x, self.typed_shift)

    def wrong(self, name: str, run: Callable[[], object]) -> str | None:
        """What is wrong with a contender's result, by the values and by every element having been written."""
        if self.case.in_place:
            source = self.x.clone()
        else:
            source = self.x
            self.out.fill_(math.nan)
        result = run()
        assert isinstance(result, torch.Tensor)
        tolerance = 4 * torch.finfo(self.case.dtype).eps
        wrong = 0
        for x, y in zip(source.split(8), result.view(self.case.shape).split(8), strict=True) if name != "copy" else ():
            expected = kernels.reference(x, None, self.shift, 0.0, 0.5).float()
            wrong += int((~((y.float() - expected).abs() <= tolerance)).sum())
        if self.case.in_place:
            self.x.copy_(source)
        return f"{wrong} of {result.numel()} elements are wrong" if wrong else None


def name_of(config: Config) -> str:
    return f"{config.block_bytes // 1024} KiB, {config.num_warps} warps"


def milliseconds(contenders: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    """The time of one of the ``calls`` that a contender makes at once, ROUNDS times each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(ROUNDS + 2):
        events = []
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            contenders[name]()
            end.record()
            events.append((name, begin, end))
        torch.cuda.synchronize()
        if turn >= 2:
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) / calls)
    return times


def in_a_graph(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """Replayed, short kernels follow each other without the host's time between them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def measure(case: Case) -> list[dict[str, Any]]:
    """One row a contender: its median, its speed, or what is wrong with it."""
    bench = Bench(case)
    calls = max(1, min(50, 2**28 // case.total_bytes))
    rows: dict[str, dict[str, Any]] = {}
    sound: dict[str, Callable[[], object]] = {}
    for name, run in bench.contenders().items():
        rows[name] = {"contender": name, "chosen": name == name_of(bench.chosen)}
        try:
            run()
            problem = bench.wrong(name, run)
            if problem is None:
                sound[name] = in_a_graph(run, calls) if calls > 1 else run
        except Exception as error:
            problem = " ".join(f"{type(error).__name__}: {error}".split())
        if problem is not None:
            rows[name]["problem"] = problem[:500]

    for name, times in milliseconds(sound, calls).items():
        rows[name] |= {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
        rows[name]["gb_per_s"] = 2 * case.total_bytes / rows[name]["ms"] / 1e6
    for row in rows.values():
        if "ms" in row and "ms" in rows["copy"]:
            row["of_copy"] = rows["copy"]["ms"] / row["ms"]
    described = {
        "case": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "in_place": case.in_place,
    }
    return [described | row for row in rows.values()]


def is_ours(row: dict[str, Any]) -> bool:
    return "warps" in row["contender"]


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    print(f"\n{case.title}")
    for row in rows:
        mark = "*" if row["chosen"] else " "
        if "problem" in row:
            print(f"  {mark} {row['contender']:28} {row['problem']}")
        else:
            speed = f"{row['ms']:9.4f} ms {row['gb_per_s']:7.0f} GB/s {row.get('of_copy', math.nan):6.3f} of copy"
            print(f"  {mark} {row['contender']:28} {speed}")
    ours = [row for row in rows if is_ours(row) and "of_copy" in row]
    chosen = next((row for row in ours if row["chosen"]), None)
    if case.name != "seed" or case.layout.count(">") or chosen is None:
        return
    promised = PROMISED_FP32_NCHW if (case.dtype, case.layout) == (FP32, "contiguous") else PROMISED
    best = max(ours, key=lambda row: row["of_copy"])
    verdict = "kept" if chosen["of_copy"] >= promised else "NOT KEPT"
    print(f"  promised {promised}: {verdict}; best is {best['contender']} with {best['of_copy']:.3f}")


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    parser.add_argument("--cases", nargs="*", help="only these: " + ", ".join(dict.fromkeys(c.name for c in CASES)))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2

    start = time.time()
    gpu = "-".join(torch.cuda.get_device_name().lower().replace("/", " ").split())
    path = arguments.out / f"epilogue_{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    described = environment() | {"driver": driver_version(), "rounds": ROUNDS}
    results: list[dict[str, Any]] = []
    # The tracing wrapper costs a millisecond of Python a launch; Inductor's code does not go through it.
    with mock.patch.object(kernels, "wrap_triton", lambda kernel: kernel):
        for case in CASES:
            if arguments.cases and case.name not in arguments.cases:
                continue
            rows = measure(case)
            show(case, rows)
            results += rows
            data = described | {"seconds": round(time.time() - start, 1), "results": results}
            path.write_text(json.dumps(data, indent=1) + "\n")
            torch.cuda.empty_cache()

    problems = [row for row in results if is_ours(row) and "problem" in row]
    print(f"\n{len(results)} rows, {len(problems)} problems of ours, {time.time() - start:.0f} s: {path}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The transposed convolution with its tail inside: every configuration, against cuDNN, eager and Inductor.

    python -m benchmarks.conv_transpose [--cases seed,unet_up2] [--dtypes float32] [--configs chosen] [--no-inductor]
                                        [--budget 330] [--out FILE]

Needs a GPU; without one the exit code is 2. Each contender is checked before it is timed: every element written, and
the error against float64. All of a row run in turn, each as a CUDA graph of one call, on a cold cache: what is compared
is the device's time. Ours get a packed weight, as where it is frozen; "ours, packing" also packs it. The data go to
benchmarks/results as JSON after every row. Exit code 1 where a contender of ours is wrong or fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.cases import CASES, Case
from benchmarks.measure import TOLERANCE, environment, in_turn, summary
from fusion_backend.kernels import conv_transpose as kernels
from fusion_backend.kernels import row_march, strips
from fusion_backend.kernels.coefficients import reference as pointwise
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.tiling import Config, Tiling, choose_tiling, tilings

RESULTS = Path(__file__).parent / "results"
NAMES = ("seed", "unet_up2", "dcgan_64", "hifigan_up1", "kb100_3d", "kb_small")
PEERS = ("eager", "inductor", "inductor max-autotune")
CHECKED = 2  # images at either end that are compared with float64

Value = Tensor | float | None


class Row:
    """One case in one dtype and memory format: its tensors and its contenders."""

    def __init__(self, case: Case, dtype: torch.dtype, last: bool) -> None:
        torch.manual_seed(0)
        self.case, self.dtype, self.last = case, dtype, last
        self.model = case.model().to("cuda", dtype)
        self.x = self.laid_out(torch.randn(case.x, device="cuda", dtype=dtype))
        conv: nn.Module = self.model.conv
        if last and case.rank > 1:
            conv.to(memory_format=torch.channels_last if case.rank == 2 else torch.channels_last_3d)
        self.weight = conv.weight.detach()
        axis = Axis(case.kernel, case.stride, case.padding, case.output_padding)
        self.problem = kernels.problem_for(self.x, self.weight, [axis] * case.rank, 1, last, True)
        self.tensor_memory = strips.has_tensor_memory(self.x.device)
        self.out = empty(case.y, self.x, last)
        self.values = folded(case.tail, conv.bias.detach().float(), self.model.bias.detach().float().flatten())

    def laid_out(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else x.contiguous()

    def ours(self, tiling: Tiling, packing: bool = False) -> Callable[[], Tensor]:
        coefficients = kernels.coefficients_for(self.out, *split(self.values))
        frozen = kernels.pack(self.weight, self.problem, tiling)

        def run() -> Tensor:
            packed = kernels.pack(self.weight, self.problem, tiling) if packing else frozen
            kernels.launch(self.out, self.x, packed, self.problem, tiling, coefficients)
            return self.out

        return run

    def march(self, config: strips.Config) -> Callable[[], Tensor]:
        coefficients = kernels.coefficients_for(self.out, *split(self.values))
        frozen = row_march.pack(self.weight, self.problem, config)
        march = strips.march_for(self.problem, self.x.shape, config)

        def run() -> Tensor:
            row_march.launch(self.out, self.x, frozen, self.problem, march, coefficients)
            return self.out

        return run

    def convolution(self) -> Tensor:
        return self.plain_convolution(self.x, self.weight)

    def plain_convolution(self, x: Tensor, weight: Tensor) -> Tensor:
        case = self.case
        function = kernels.CONV_TRANSPOSE[x.dim()]
        return function(x, weight, None, case.stride, case.padding, case.output_padding)

    def contenders(self, configs: str, inductor: bool) -> dict[str, Callable[[], Tensor]]:
        chosen = choose_tiling(self.problem)
        contenders: dict[str, Callable[[], Tensor]] = {}
        for tiling in tilings(self.problem) if configs == "all" else [chosen]:
            contenders[name_of(tiling.config)] = self.ours(tiling)
        for config in strips.configs_for(self.problem, self.tensor_memory) if configs == "all" else ():
            contenders[march_name(config)] = self.march(config)
        contenders["ours, packing"] = self.ours(chosen, packing=True)
        contenders["cudnn convolution alone"] = self.convolution
        contenders["eager"] = lambda: self.model(self.x)
        if inductor:
            # Without CUDA graphs of their own, since every contender is run as one.
            torch._dynamo.reset()
            for name, mode in (("inductor", None), ("inductor max-autotune", "max-autotune-no-cudagraphs")):
                compiled = torch.compile(self.model, mode=mode, fullgraph=True, dynamic=False)
                contenders[name] = lambda compiled=compiled: compiled(self.x)
        return contenders

    def error(self, run: Callable[[], Tensor], alone: bool) -> float:
        """Relative RMSE against float64 on the images at both ends; infinite where any element was not written."""
        self.out.fill_(math.nan)
        result = run()
        if result.isnan().any():
            return math.inf
        error = size = 0.0
        for images in (slice(None, CHECKED), slice(-CHECKED, None)):
            exact = self.plain_convolution(self.x[images].double(), self.weight.double())
            if not alone:
                values = (v.double() if isinstance(v, Tensor) else v for v in self.values)
                exact = pointwise(exact, *values)
            error += (result[images].double() - exact).square().sum().item()
            size += exact.square().sum().item()
        return (error / size) ** 0.5

    def measure(self, configs: str, inductor: bool) -> dict[str, dict[str, object]]:
        columns: dict[str, dict[str, object]] = {}
        correct: dict[str, Callable[[], object]] = {}
        contenders = self.contenders(configs, inductor)
        allowed = 2 * self.error(contenders["eager"], alone=False) + TOLERANCE[self.dtype] / 10
        for name, run in contenders.items():
            try:
                alone = name == "cudnn convolution alone"  # another result, and no rival's: it is timed as it is
                error = self.error(run, alone)
                columns[name] = {"error": error}
                if alone or error <= allowed:
                    correct[name] = as_graph(run)
            except Exception as raised:  # one contender that cannot run must not hide the others
                columns[name] = {"raised": " ".join(f"{type(raised).__name__}: {raised}".split())[:300]}
        for name, times in in_turn(correct, "cuda", seconds=0.5).items():
            columns[name] |= summary(times)
        best = min((columns[name]["ms"] for name in PEERS if name in correct), default=math.nan)
        moved = self.x.nbytes + self.out.nbytes + self.weight.nbytes
        for name in correct:
            columns[name]["speed"] = best / columns[name]["ms"]
            columns[name]["gb_per_s"] = moved / columns[name]["ms"] / 1e6
        columns[name_of(choose_tiling(self.problem).config)]["chosen"] = True
        return columns


def folded(tail: str, conv_bias: Tensor, bias: Tensor) -> tuple[Value, ...]:
    """scale, shift, lo and hi of a case's tail and of its convolution's bias."""
    return {
        "none": (None, conv_bias, None, None),
        "seed": (None, conv_bias + bias, 0.0, 0.5),
        "bias_relu": (None, conv_bias + bias, 0.0, None),
        "clamp_halve": (0.5, conv_bias / 2, -0.5, None),
    }[tail]


def split(values: tuple[Value, ...]) -> tuple[tuple, tuple]:
    tensors = tuple(value if isinstance(value, Tensor) else None for value in values)
    missing = (1.0, 0.0, None, None)
    return tensors, tuple(v if isinstance(v, float) else none for v, none in zip(values, missing, strict=True))


def as_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Replayed, a short kernel does not wait for the host."""
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def name_of(config: Config) -> str:
    size = f"{config.rows}x{config.columns}x{config.depth_bytes}"
    return f"{size}, {config.num_warps} warps, {config.num_stages} stages"


def march_name(config: strips.Config) -> str:
    return f"march {config.pixels}x{config.channels}, {config.num_warps} warps, {config.num_stages} stages"


def is_ours(name: str) -> bool:
    return "warps" in name or name.startswith("ours")


def show(title: str, columns: dict[str, dict[str, object]]) -> None:
    print(f"\n{title}", flush=True)
    for name, column in sorted(columns.items(), key=lambda item: item[1].get("ms", math.inf)):
        mark = "*" if column.get("chosen") else " "
        if "ms" not in column:
            print(f" {mark} {name:32}{column.get('raised') or 'WRONG, not timed: error {error:.1e}'.format(**column)}")
            continue
        numbers = "{ms:9.4f} ms {gb_per_s:6.0f} GB/s  error {error:.1e}  {speed:.2f}x the best peer".format(**column)
        print(f" {mark} {name:32}{numbers}")


def names(text: str) -> list[str]:
    return text.split(",")


def precompile(todo: list[tuple[Case, torch.dtype, bool]], configs: str) -> None:
    """Every kernel of ours into Triton's cache, on all processors at once: compiling is what takes longest."""
    workers = min(len(todo), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for task in [pool.submit(_run_ours_once, *each, configs) for each in todo]:
            task.result()


def _run_ours_once(case: Case, dtype: torch.dtype, last: bool, configs: str) -> None:
    with launched_directly(), torch.no_grad():
        for name, run in Row(case, dtype, last).contenders(configs, inductor=False).items():
            if is_ours(name):
                try:
                    run()
                except Exception:  # it is said where it is measured
                    continue


def launched_directly() -> contextlib.ExitStack:
    """The tracing wrapper costs a millisecond of Python a launch; Inductor's code does not go through it."""
    stack = contextlib.ExitStack()
    for module in (kernels, row_march):
        stack.enter_context(mock.patch.object(module, "wrap_triton", lambda kernel: kernel))
    return stack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=names, default=list(NAMES), help=f"of {','.join(NAMES)}")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    parser.add_argument("--configs", choices=["all", "chosen"], default="all", help="of ours")
    parser.add_argument("--no-inductor", dest="inductor", action="store_false", help="compile no peers")
    parser.add_argument("--budget", type=float, default=330, help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/conv_transpose-<gpu>.json")
    args = parser.parse_args()
    unknown = set(args.cases) - set(NAMES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; known are {list(NAMES)}")
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2

    out = args.out or RESULTS / f"conv_transpose-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    data = environment() | {"rows": []}
    todo = [
        (CASES[name], getattr(torch, dtype), last)
        for name in args.cases
        for dtype in args.dtypes
        for last in (False, True)
    ]
    precompile(todo, args.configs)
    with launched_directly(), torch.no_grad():
        for case, dtype, last in todo:
            if time.monotonic() - start > args.budget:
                print(
                    f"\nthe budget of {args.budget:.0f} s is spent: {out} lacks what follows from {case.name} {dtype}"
                )
                break
            columns = Row(case, dtype, last).measure(args.configs, args.inductor)
            layout = "channels_last" if last else "contiguous"
            show(f"{case.name} {str(dtype).removeprefix('torch.')} {layout}", columns)
            described = {"case": case.name, "x": case.x, "y": case.y, "dtype": str(dtype).removeprefix("torch.")}
            data["rows"].append(described | {"memory_format": layout, "contenders": columns})
            data["seconds"] = round(time.monotonic() - start, 1)
            out.write_text(json.dumps(data, indent=1) + "\n")
            torch.cuda.empty_cache()
    bad = [
        (row["case"], row["dtype"], row["memory_format"], name)
        for row in data["rows"]
        for name, column in row["contenders"].items()
        if is_ours(name) and "ms" not in column
    ]
    print(f"\n{len(data['rows'])} rows of {len(todo)}, {time.monotonic() - start:.0f} s: {out}")
    for each in bad:
        print("WRONG or raised:", *each)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

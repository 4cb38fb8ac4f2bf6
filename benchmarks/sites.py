"""Every public case, dtype and memory format: fused_post beside eager, Inductor and Inductor max-autotune.

    python -m benchmarks.sites [--cases seed,unet_up2] [--dtypes float32] [--budget 500] [--cpu] [--out FILE]

Each contender is checked against float64 before it is timed; one that is wrong, or that raises, is not timed. The data
(GPU, versions, date, command, medians, errors, peak memory) goes to benchmarks/results as JSON, after every row.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.cases import CASES, Case
from benchmarks.measure import TOLERANCE, environment, in_turn, peak_bytes, relative_rmse, summary

PEERS = ("eager", "inductor", "inductor max-autotune")
RESULTS = Path(__file__).parent / "results"


def backend() -> str | Callable[..., object]:
    """The name where the package is installed, else what the name stands for in this checkout."""
    if "fused_post" in torch._dynamo.list_backends():
        return "fused_post"
    from fusion_backend.backend import fused_post

    return fused_post


def contenders(model: nn.Module, autotune: str = "max-autotune") -> dict[str, Callable[..., Tensor]]:
    """``autotune``: the mode that stands for Inductor max-autotune."""
    kernels = ("auto", "fused", "epilogue", "inductor")
    compiled = functools.partial(torch.compile, dynamic=False)
    return {
        "eager": model,
        "inductor": compiled(twin(model, "inductor")),
        "inductor max-autotune": compiled(twin(model, "autotune"), mode=autotune),
        **{
            f"fused_post {kernel}": compiled(
                twin(model, kernel),
                backend=backend(),
                options={"fused_post.kernel": kernel, "fused_post.strict": True},
            )
            for kernel in kernels
        },
    }


def twin(model: nn.Module, name: str) -> nn.Module:
    """A copy with a code object of its own: at each call Dynamo looks through all it has compiled of a code object."""
    copied = copy.deepcopy(model)
    forward = type(model).forward
    name = name.replace(" ", "_").replace("-", "_")
    twins = types.FunctionType(
        forward.__code__.replace(co_name=name), forward.__globals__, name, forward.__defaults__, forward.__closure__
    )
    twins.__kwdefaults__ = forward.__kwdefaults__
    copied.forward = twins.__get__(copied)
    return copied


def measure(case: Case, device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, object]:
    """One row: every contender's error, median time, speed relative to the fastest peer, and peak memory."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.model().to(device, dtype)
    if memory_format is not torch.contiguous_format:
        model.conv.to(memory_format=memory_format)
    inputs = case.inputs(device, dtype, memory_format)

    columns: dict[str, dict[str, object]] = {}
    correct: dict[str, Callable[[], object]] = {}
    for name, run in contenders(model).items():
        try:
            error = relative_rmse(run(*inputs), model, inputs)
        except Exception as raised:  # one contender that cannot run must not hide the others
            columns[name] = {"raised": f"{type(raised).__name__}: {raised}"[:300]}
            continue
        columns[name] = {"error": error}
        if error <= 2 * columns["eager"].get("error", 0.0) + TOLERANCE[dtype] / 10:
            correct[name] = lambda run=run: run(*inputs)

    for name, times in in_turn(correct, device).items():
        columns[name] |= summary(times)
        if device == "cuda":
            columns[name]["peak_bytes"] = peak_bytes(correct[name])
    best = min((columns[name]["ms"] for name in PEERS if name in correct), default=float("nan"))
    for name in correct:
        columns[name]["speed"] = best / columns[name]["ms"]
    return {
        "case": case.name,
        "x": case.x,
        "y": case.y,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_format": str(memory_format).removeprefix("torch."),
        "contenders": columns,
    }


def show(row: dict[str, object]) -> None:
    print(f"\n{row['case']} {row['dtype']} {row['memory_format']}", flush=True)
    for name, column in row["contenders"].items():
        if "ms" not in column:
            print(f"  {name:24}{column.get('raised', 'WRONG, not timed: error {:.1e}'.format(column.get('error', 0)))}")
            continue
        saved = f"  kept {column['saved_bytes'] / 2**20:.2f} MiB" if "saved_bytes" in column else ""
        line = f"{column['ms']:10.4f} ms  error {column['error']:.1e}  {column['speed']:.2f}x the best peer{saved}"
        print(f"  {name:24}{line}")


def names(text: str) -> list[str]:
    return text.split(",")


def sweep(
    stem: str,
    measure: Callable[..., dict[str, object]],
    cases: Sequence[str],
    description: str,
    small: Callable[[Case], Case] = Case.small,
) -> None:
    """Read the command line, measure every case, dtype and memory format asked for, and write results/<stem>_*.json."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--cases", type=names, default=list(cases), help=f"of {','.join(CASES)}")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/{stem}_<device>.json")
    args = parser.parse_args()
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; known are {list(CASES)}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no GPU here; --cpu measures small shapes on the CPU")

    device = "cpu" if args.cpu else "cuda"
    where = "cpu" if args.cpu else "-".join(torch.cuda.get_device_name().lower().replace("/", " ").split())
    out = args.out or RESULTS / f"{stem}_{where}.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    start = time.monotonic()
    data = environment() | {"device": device, "rows": []}
    for name in args.cases:
        case = small(CASES[name]) if args.cpu else CASES[name]
        for dtype in args.dtypes:
            for memory_format in case.memory_formats:
                if time.monotonic() - start > args.budget:
                    print(f"\nthe budget of {args.budget:.0f} s is spent: {out} lacks what follows from {name} {dtype}")
                    return
                row = measure(case, device, getattr(torch, dtype), memory_format)
                show(row)
                data["rows"].append(row)
                out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"\n{out}")


def main() -> None:
    sweep("sites", torch.no_grad()(measure), list(CASES), __doc__)


if __name__ == "__main__":
    main()

"""A training step through one site: forward and backward, fused_post beside eager, Inductor and Inductor max-autotune.

    python -m benchmarks.training [--cases seed,unet_up2 | sweep] [--dtypes float32] [--limit 100] [--budget 150]
                                  [--cpu] [--out FILE]
    python -m benchmarks.training --cases programs

The step is ``model(x).backward(g)`` with gradients for x, the weight and both biases. Each gradient, of the whole
batch, is checked against float64 before anything is timed. Rows are prepared (compiled and checked) by many processes
at once, and then measured one after the other while all others wait. A row's contenders run in turn, on a cold cache:

``ms``            on a GPU the device's time, of a step that was queued whole before its first kernel began
``wall_ms``       on a GPU also the time on the wall, with what the host takes for it, and no CUDA graph
``peak_bytes``    device memory above parameters, inputs and g, so with the output and the gradients
``saved_bytes``   what forward leaves for backward on top of inputs, parameters and the result

Max-autotune is without CUDA graphs, as all are. "fused_post epilogue" has PyTorch's convolution and keeps bits,
"fused_post fused" has the fused kernel write them, where it can; on a GPU "fused_post inductor" keeps none. What
Inductor tunes, it tunes while other rows are prepared. The data go to benchmarks/results as JSON after every row.

"programs" are two of these shapes behind activations: a tail of which the result tells the gradient (tanh), and such
of which it does not (gelu, silu, and leaky_relu, whose result leaves the graph); there "fused_post fused" computes the
convolution once more in the backward.
"sweep" is the same sites with a quarter of the batch, and with half the sizes: ``auto`` judges a site that is not among
the measured ones by the two most like it (``python -m benchmarks.evidence``).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.cases import CASES, Case
from benchmarks.measure import TOLERANCE, environment, in_turn, peak_bytes, summary
from benchmarks.sites import PEERS, RESULTS, contenders, names, show
from fusion_backend.kernels.tf32 import round_to_tf32

TRAINED = ("seed", "unet_up2", "kb100_3d", "dcgan_64")


def sweep() -> dict[str, Case]:
    """By name."""
    cases = []
    for case in map(CASES.__getitem__, TRAINED):
        N, C_in, *sizes = case.x
        cases.append(replace(case, name=f"{case.name} N={N // 4}", x=(N // 4, C_in, *sizes)))
        halved = tuple(size // 2 for size in sizes)
        cases.append(replace(case, name=f"{case.name} {'x'.join(map(str, halved))}", x=(N, C_in, *halved)))
    return {case.name: case for case in cases}


def programs() -> dict[str, Case]:
    """By name, such as "seed tanh"."""
    cases = [
        replace(CASES[name], name=f"{name} {tail.removeprefix('bias_')}", tail=tail)
        for name in ("seed", "unet_up2")
        for tail in ("bias_tanh", "bias_leaky_relu", "bias_gelu", "bias_silu")
    ]
    return {case.name: case for case in cases}


SETS = {"sweep": sweep(), "programs": programs()}
KNOWN = CASES | SETS["sweep"] | SETS["programs"]
IMAGES = 8  # whose float64 gradients are computed at a time
CPU_IMAGES, CPU_PIXELS = 4, 64 * 64  # of a case on the CPU


class Row:
    """One case in one dtype and memory format: its tensors, and the contenders that have the right gradients."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        self.model = case.model().to(device, dtype)
        if memory_format is not torch.contiguous_format:
            self.model.conv.to(memory_format=memory_format)
        self.x, *self.others = case.inputs(device, dtype, memory_format)
        self.x.requires_grad_()
        self.grad = torch.randn(case.y, device=device, dtype=dtype).contiguous(memory_format=memory_format)
        self.columns: dict[str, dict[str, object]] = {}
        self.correct: dict[str, nn.Module] = {}

    def prepare(self, seconds: float) -> None:
        """Compile and check every contender. ``seconds``: what is not ready by then is left out."""
        until = time.monotonic() + seconds
        exact = self.exact(lambda tensor: tensor)
        allowed = [0.0] * len(exact)
        if self.dtype == torch.float32 and self.device == "cuda" and torch.backends.cudnn.allow_tf32:
            # Where ours takes TF32 and cuDNN, which may too, takes none, its rounding is the measure.
            allowed = [relative(*pair) for pair in zip(self.exact(round_to_tf32), exact, strict=True)]
        for name, run in contenders(self.model, "max-autotune-no-cudagraphs").items():
            begun = time.monotonic()
            try:
                with at_most(until - begun):
                    errors = self.errors(run, exact)
                    saved = saved_bytes(run, self.x, self.others)
            except Exception as raised:  # one contender that cannot run must not hide the others
                self.columns[name] = {"raised": " ".join(f"{type(raised).__name__}: {raised}".split())[:300]}
                continue
            finally:
                self.release()
            if name == "eager":
                allowed = [max(pair) for pair in zip(allowed, errors, strict=True)]
            limits = [2 * error + TOLERANCE[self.dtype] / 10 for error in allowed]
            self.columns[name] = {"error": max(errors), "errors": errors}
            self.columns[name]["prepared_s"] = round(time.monotonic() - begun, 1)
            if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
                self.columns[name]["saved_bytes"] = saved
                self.correct[name] = run

    def exact(self, rounded: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The gradients in float64, a few images at a time: those of parameters add up over the batch."""
        model = copy.deepcopy(self.model).double()
        with torch.no_grad():
            model.conv.weight.copy_(rounded(self.model.conv.weight))
        batch = [rounded(self.x.detach()), self.grad, *self.others]
        of_x: list[Tensor] = []
        of_parameters: list[Tensor] = []
        for x, grad, *others in zip(*(tensor.split(IMAGES) for tensor in batch), strict=True):
            first, *rest = gradients(model, x.double(), [other.double() for other in others], grad.double())
            of_x.append(first)
            of_parameters = [a + b for a, b in zip(of_parameters, rest, strict=True)] if of_parameters else rest
        return [torch.cat(of_x), *of_parameters]

    def errors(self, run: nn.Module, exact: list[Tensor]) -> list[float]:
        return [relative(*pair) for pair in zip(gradients(run, self.x, self.others, self.grad), exact, strict=True)]

    def step(self, run: nn.Module) -> None:
        self.forget(run)
        run(self.x, *self.others).backward(self.grad)

    def forget(self, run: nn.Module) -> None:
        self.x.grad = None
        for parameter in run.parameters():
            parameter.grad = None

    def release(self) -> None:
        """Give the GPU's memory back to the other processes."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def measure(self, seconds: float) -> dict[str, dict[str, object]]:
        columns = self.columns
        steps = {name: functools.partial(self.step, run) for name, run in self.correct.items()}
        for name, times in in_turn(steps, self.device, seconds, 30, "ahead").items():
            columns[name] |= summary(times)
        if self.device == "cuda":
            for name, times in in_turn(steps, self.device, seconds / 2, 30, "waited for").items():
                columns[name]["wall_ms"] = statistics.median(times)
            for name, run in self.correct.items():
                for each in self.correct.values():
                    self.forget(each)
                columns[name]["peak_bytes"] = peak_bytes(steps[name])
                self.forget(run)
        self.release()
        best = min((columns[name]["ms"] for name in PEERS if name in steps), default=math.nan)
        for name in steps:
            columns[name]["speed"] = best / columns[name]["ms"]
        return columns


def gradients(run: nn.Module, x: Tensor, others: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Those of x and of the parameters, as new tensors."""
    x = x.detach().requires_grad_()
    inputs = [x, *run.parameters()]
    return [
        each.detach().clone()
        for each in torch.autograd.grad(run(x, *others), inputs, grad, allow_unused=True)
        if each is not None
    ]


def relative(result: Tensor, exact: Tensor) -> float:
    """RMS of the difference over that of ``exact``; in slices to save memory."""
    error = size = torch.zeros((), dtype=torch.float64, device=exact.device)
    for part, true in zip(result.split(IMAGES), exact.split(IMAGES), strict=True):
        error = error + (part.double() - true).square().sum()
        size = size + true.square().sum()
    return (error / size).sqrt().item()


def saved_bytes(run: nn.Module, x: Tensor, others: list[Tensor]) -> int:
    """What autograd keeps for the backward, each storage once, without inputs, parameters and the result."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run(x, *others)
    for own in (x, *others, *run.parameters(), result):
        kept.pop(own.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError where the block takes longer; again each second, since a compiler may take it for its own failure.

    In the main thread of a process alone.
    """

    def stop(*_: object) -> None:
        raise TimeoutError("the row's time for preparing is spent")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, 1e6), 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_PREPARED: dict[rows.Key, Row] = {}


def prepare(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, device: str, seconds: float) -> None:
    _PREPARED.clear()  # a process has one row at a time
    torch._dynamo.reset()
    row = Row(case, device, dtype, memory_format)
    row.prepare(seconds)
    _PREPARED[case, dtype, memory_format] = row


def measure(
    case: Case, dtype: torch.dtype, memory_format: torch.memory_format, seconds: float
) -> dict[str, dict[str, object]]:
    return _PREPARED[case, dtype, memory_format].measure(seconds)


def bytes_of(case: Case, dtype: torch.dtype, *_: object) -> int:
    """What a row takes of the GPU's memory: eager keeps about eight tensors of the output's size at once."""
    return 10 * math.prod(case.y) * dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=names, default=list(TRAINED), help=f"of {','.join([*SETS, *KNOWN])}")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring a row")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for preparing as many rows as fit")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no row is measured")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training_<device>.json")
    args = parser.parse_args()
    chosen = [name for given in args.cases for name in SETS.get(given, [given])]
    unknown = set(chosen) - set(KNOWN)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; known are {[*SETS, *KNOWN]}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no GPU here; --cpu measures small shapes on the CPU")

    device = "cpu" if args.cpu else "cuda"
    where = "cpu" if args.cpu else "-".join(torch.cuda.get_device_name().lower().replace("/", " ").split())
    out = args.out or RESULTS / f"training_{where}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    data = environment() | {"benchmark": "training", "device": device, "rows": []}
    cases = [KNOWN[name].small(CPU_IMAGES, CPU_PIXELS) if args.cpu else KNOWN[name] for name in chosen]
    todo = [
        (case, getattr(torch, dtype), memory_format)
        for case in cases
        for dtype in args.dtypes
        for memory_format in case.memory_formats
    ]
    processors = os.cpu_count() or 1
    workers = min(len(todo), processors)
    # By default every process would have a pool of as many compilers as there are processors.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, processors // workers)))
    most = math.inf if args.cpu else torch.cuda.mem_get_info()[1] // 2
    outcomes = rows.measured(
        list(rows.parts(todo, lambda key: bytes_of(*key), most, workers)),
        # Processes take a while to start. A contender that is late is left out; only where it cannot be, the row is.
        functools.partial(prepare, device=device, seconds=0.7 * args.limit),
        functools.partial(measure, seconds=args.seconds),
        workers,
        args.budget,
        args.limit,
    )
    for (case, dtype, memory_format), outcome in outcomes:
        row = {
            "case": case.name,
            "x": case.x,
            "y": case.y,
            "kernel_stride_padding": (case.kernel, case.stride, case.padding, case.output_padding),
            "tail": case.tail,
            "dtype": str(dtype).removeprefix("torch."),
            "memory_format": str(memory_format).removeprefix("torch."),
        }
        if isinstance(outcome, Exception):
            outcome = {"row": {"raised": " ".join(f"{type(outcome).__name__}: {outcome}".split())[:300]}}
        row["contenders"] = outcome
        show(row)
        data["rows"].append(row)
        data["seconds"] = round(time.monotonic() - start, 1)
        out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"\n{len(data['rows'])} rows of {len(todo)}, {time.monotonic() - start:.0f} s: {out}")


if __name__ == "__main__":
    main()

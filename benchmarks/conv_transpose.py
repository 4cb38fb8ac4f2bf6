"""The transposed convolution with its tail inside: every plan of ours, against cuDNN, eager and Inductor.

    python -m benchmarks.conv_transpose [--cases seed,unet_up2 | public | around | decoders | kernelbench | models]
                                        [--dtypes float32] [--layouts contiguous] [--plans likely] [--no-inductor]
                                        [--budget 330] [--out FILE]

Needs a GPU; without one the exit code is 2. Each contender is checked before it is timed: every element written, and
the error against float64. All of a row run in turn, each as a CUDA graph of one call, on a cold cache: what is compared
is the device's time. The kernels alone get a packed weight and ready coefficients; "ours, packing" also packs; and
"operator" and "fused_post" are the operator and the model, compiled, the fused kernel asked for, with all that belongs
to a call; "in CUDA graphs" it has the plan that it gets there. Beside what is compiled stands how long the host takes
over a call, and how much memory it takes at most, the result included. Rows are prepared (compiled and checked) by
many processes at once, and then measured one after the other while all others wait. The data go to benchmarks/results
as JSON after every row. Exit code 1 where one of ours is wrong or fails.

``--plans product`` is for adding to older results (``benchmarks.evidence`` merges them): at the cases that the product
on Hopper takes, its plans, the rule's and the compiled model's, beside the peers of the same run.

"around" is the seed's shape grown and shrunk by powers of two, "decoders" shapes of U-Nets, GANs, vocoders and volumes,
"kernelbench" and "models" those of these benchmarks: what ``auto`` chooses by (``python -m benchmarks.evidence``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import kernelbench, models, rows
from benchmarks.cases import CASES, Case
from benchmarks.measure import TOLERANCE, environment, in_turn, peak_bytes, summary
from benchmarks.sites import backend, twin
from fusion_backend import evidence
from fusion_backend.kernels import conv_transpose as kernels
from fusion_backend.kernels import epilogue, hopper_blocks, hopper_march, hopper_product, hopper_strips, row_march
from fusion_backend.kernels.coefficients import reference as pointwise
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.plans import Plan, choose_plan, plans_for
from fusion_backend.kernels.problem import Problem

RESULTS = Path(__file__).parent / "results"
PROCESS_BYTES = 2 << 30  # of a GPU's memory, before its row's: the context, and libraries' workspaces
NAMES = ("seed", "unet_up2", "dcgan_64", "hifigan_up1", "kb100_3d", "kb_small")


def sweep() -> dict[str, Case]:
    """By name, each with a bias and a relu behind it but for those around the seed."""
    seed = CASES["seed"]
    N, _, H, _ = seed.x
    base = replace(seed, x=(32, 64, 64, 64))
    cases = [replace(seed, name=f"seed N={n}", x=(n, 64, H, H)) for n in (1, 4, 16, 32)]
    cases += [replace(seed, name=f"seed {size}x{size}", x=(N, 64, size, size)) for size in (8, 16, 32, 64)]
    cases += [replace(base, name=f"seed C_in={c}", x=(32, c, 64, 64)) for c in (16, 32, 128, 256)]
    cases += [replace(base, name=f"seed C_out={c}", C_out=c) for c in (3, 16, 32, 128, 256)]
    cases += [
        Case(name, x, C_out, *sizes, tail="bias_relu")
        for name, x, C_out, sizes in (
            ("unet_up1", (4, 64, 256, 256), 32, (2, 2, 0, 0)),
            ("unet_up3", (4, 256, 64, 64), 128, (2, 2, 0, 0)),
            ("unet_up4", (4, 512, 32, 32), 256, (2, 2, 0, 0)),
            ("sam_up1", (1, 256, 64, 64), 64, (2, 2, 0, 0)),
            ("sam_up2", (1, 64, 128, 128), 32, (2, 2, 0, 0)),
            ("mask_rcnn", (100, 256, 14, 14), 256, (2, 2, 0, 0)),
            ("dcgan_4", (64, 512, 8, 8), 256, (4, 2, 1, 0)),
            ("dcgan_32", (64, 128, 32, 32), 64, (4, 2, 1, 0)),
            ("dcgan_rgb", (64, 64, 32, 32), 3, (4, 2, 1, 0)),
            ("pose", (16, 256, 32, 24), 256, (4, 2, 1, 0)),
            ("hifigan_up2", (16, 256, 2048), 128, (16, 8, 4, 0)),
            ("hifigan_up3", (16, 128, 16384), 64, (4, 2, 1, 0)),
            ("hifigan_up4", (16, 64, 32768), 32, (4, 2, 1, 0)),
            ("encodec_up1", (8, 512, 375), 256, (16, 8, 4, 0)),
            ("encodec_up4", (8, 64, 60000), 32, (4, 2, 1, 0)),
            ("dac_up1", (4, 1536, 250), 768, (16, 8, 4, 0)),
            ("nnunet_up1", (2, 64, 64, 64, 64), 32, (2, 2, 0, 0)),
            ("nnunet_up2", (2, 128, 32, 32, 32), 64, (2, 2, 0, 0)),
            ("nnunet_up4", (2, 320, 8, 8, 8), 256, (2, 2, 0, 0)),
            ("monai_up", (4, 32, 48, 48, 48), 16, (3, 2, 1, 1)),
            ("kb20", (16, 32, 16, 32, 32), 64, (3, 2, 1, 1)),
            ("kb100", (16, 64, 24, 48, 48), 128, (3, 2, 1, 0)),
        )
    ]
    return {case.name: case for case in cases}


def known() -> dict[str, Case]:
    """By name, each convolution once."""
    found: dict[Case, Case] = {}
    public = [CASES[name] for name in NAMES]
    for case in (*public, *sweep().values(), *kernelbench.convolutions(), *models.convolutions()):
        found.setdefault(replace(case, name="", tail=""), case)
    return {case.name: case for case in found.values()}


KNOWN = known()
LAYOUTS = {"contiguous": False, "channels_last": True}
PEERS = ("eager", "inductor", "inductor max-autotune")
SWEEPS = ("few", "product")  # of many cases: nothing but plans, the compiled model and peers, and not the host's time
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
        self.out_last = last and case.rank > 1  # as eager's: in one dimension cuDNN's result is contiguous
        self.problem = kernels.problem_for(self.x, self.weight, [axis] * case.rank, 1, self.out_last, True)
        self.out = empty(case.y, self.x, self.out_last)
        self.values = folded(case.tail, conv.bias.detach().float(), self.model.bias.detach().float().flatten())

    def laid_out(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else x.contiguous()

    def ours(self, plan: Plan, packing: bool = False) -> Callable[[], Tensor]:
        if plan.is_hopper:
            return self.hopper(plan)
        coefficients = kernels.coefficients_for(self.out, *split(self.values))
        frozen = kernels.pack_for(plan, self.weight, self.problem)

        def run() -> Tensor:
            packed = kernels.pack_for(plan, self.weight, self.problem) if packing else frozen
            with launched_directly():
                kernels.launch_plan(self.out, self.x, packed, self.problem, plan, coefficients)
            return self.out

        return run

    def hopper(self, plan: Plan) -> Callable[[], Tensor]:
        processors = torch.cuda.get_device_properties(self.x.device).multi_processor_count
        coefficients = kernels.coefficients_for(self.out, *split(self.values))
        packed, problem = kernels.pack_for(plan, self.weight, self.problem), plan.problem(self.problem)
        launch, cut_for = hopper_march.launch, hopper_strips.march_for
        if plan.is_product:
            launch, cut_for = hopper_product.launch, hopper_blocks.product_for
        cut = cut_for(problem, self.x.shape, plan.config, processors)

        def run() -> Tensor:
            with launched_directly():
                x = kernels.turned_by(self.x, True) if plan.turned else self.x
                out = empty(self.out.shape, self.out, True) if plan.back else self.out
                launch(out, x, packed, problem, cut, coefficients)
                if plan.back:
                    epilogue.launch(self.out, out, kernels.NO_COEFFICIENTS)
            return self.out

        return run

    def operator(self, plan: Plan) -> Callable[[], Tensor]:
        """What the backend makes of a site that takes this plan, compiled by Inductor."""
        case = self.case
        sizes = ([case.stride], [case.padding], [case.output_padding], [1], 1)
        tensors, numbers = split(self.values)

        def run(x: Tensor, weight: Tensor, *tensors: Tensor | None) -> Tensor:
            return kernels.conv_transpose(x, weight, *sizes, *tensors, *numbers, self.out_last, True, plan.name)

        compiled = torch.compile(run, fullgraph=True, dynamic=False)
        return lambda: compiled(self.x, self.weight, *tensors)

    def replayed(self, compiled: Callable[[Tensor], Tensor]) -> Tensor:
        """Compiled as where the call becomes part of a CUDA graph, and no operator costs the host anything."""
        with mock.patch.object(evidence, "OPAQUE", 0.0):
            return compiled(self.x)

    def convolution(self) -> Tensor:
        return self.plain_convolution(self.x, self.weight)

    def plain_convolution(self, x: Tensor, weight: Tensor) -> Tensor:
        case = self.case
        function = kernels.CONV_TRANSPOSE[x.dim()]
        return function(x, weight, None, case.stride, case.padding, case.output_padding)

    def compiled_plan(self, replayed: bool = False) -> str:
        """What the backend gives the model where it is asked for the fused kernel."""
        found = evidence.predict(self.problem, self.x.shape, torch.cuda.get_device_name(), replayed)
        return found.plan if isinstance(found, evidence.Prediction) else self.chosen.name

    @property
    def chosen(self) -> Plan:
        return choose_plan(self.problem, self.x.shape)

    def others(self, plans: str) -> list[Plan]:
        """Beside what the rule chooses: all that fit, none, or "likely" or "few" ones.

        "likely": the marches, where there are any, and the general kernel's with x as it is and turned, where not; of
        the march on Hopper, the first size that fits, in every order. "few": of these, one or two of each kind.
        "product": those of the product on Hopper, and the one that the compiled model takes.
        """
        everything = [] if plans == "chosen" else list(plans_for(self.problem))
        if plans in ("all", "chosen"):
            return everything
        if plans == "product":
            taken = self.compiled_plan()
            return [plan for plan in everything if plan.is_product or plan.name == taken]
        hopper = [plan for plan in everything if isinstance(plan.config, hopper_strips.Config)]
        size = [(plan.config.channels, plan.config.slots) for plan in hopper]
        hopper = [plan for plan, its in zip(hopper, size, strict=True) if its == size[0]]
        marches = [plan for plan in everything if plan.is_march]
        general = [plan for plan in everything if not plan.is_hopper and not plan.is_march]
        hopper += [plan for plan in everything if plan.is_product]
        if plans == "likely":
            return hopper + (marches or general)
        turned = any(plan.turned for plan in general)
        few = [plan for plan in marches if not plan.turned][:2]
        few += [plan for plan in marches if plan.turned and self.dtype.itemsize == 2][:1]
        general = [plan for plan in general if plan.turned == turned]
        back = [plan for plan in general if plan.back]
        return hopper + (few or [plan for plan in general if not plan.back][:4] + back[:2])

    def contenders(self, plans: str, inductor: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
        chosen = self.chosen
        taken = list(dict.fromkeys((chosen, *self.others(plans))))
        contenders = {plan.name: self.ours(plan) for plan in taken}
        if plans not in SWEEPS:
            contenders["ours, packing"] = self.ours(chosen, packing=True)
            contenders["cudnn convolution alone"] = self.convolution
        opaque = next((plan for plan in taken if plan.is_hopper), None)
        if opaque is not None and inductor and plans not in SWEEPS:
            contenders["operator, " + opaque.name] = self.operator(opaque)
        contenders["eager"] = lambda: self.model(self.x)
        if inductor:
            options = {"fused_post.kernel": "fused", "fused_post.strict": True}
            fused, graphed = (
                torch.compile(twin(self.model, name), backend=backend(), fullgraph=True, dynamic=False, options=options)
                for name in ("fused_post", "graphed")
            )
            contenders["fused_post"] = lambda: fused(self.x)
            if plans not in SWEEPS:
                contenders["fused_post in CUDA graphs"] = lambda: self.replayed(graphed)
        for name in inductor:
            # Without CUDA graphs of their own, since every contender is run as one.
            mode = "max-autotune-no-cudagraphs" if name.endswith("autotune") else None
            model = twin(self.model, name)
            compiled = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
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

    def prepare(self, plans: str, inductor: tuple[str, ...]) -> None:
        """Compile, check and capture every contender."""
        self.measured, self.times_host = False, plans not in SWEEPS
        self.columns: dict[str, dict[str, object]] = {}
        self.correct: dict[str, Callable[[], object]] = {}
        torch._dynamo.reset()
        contenders = self.contenders(plans, inductor)
        self.compiled = {name: run for name, run in contenders.items() if is_compiled(name)}
        allowed = 2 * self.error(contenders["eager"], alone=False) + TOLERANCE[self.dtype] / 10
        for name, run in contenders.items():
            try:
                alone = name == "cudnn convolution alone"  # another result, and no rival's: it is timed as it is
                error = self.error(run, alone)
                self.columns[name] = {"error": error}
                if alone or error <= allowed:
                    self.correct[name] = as_graph(run)
            except Exception as raised:  # one contender that cannot run must not hide the others
                self.columns[name] = {"raised": " ".join(f"{type(raised).__name__}: {raised}".split())[:300]}

    def measure(self, seconds: float) -> dict[str, dict[str, object]]:
        columns, self.measured = self.columns, True
        for name, times in in_turn(self.correct, "cuda", seconds).items():
            columns[name] |= summary(times)
        if self.times_host:
            torch._dynamo.reset()  # what was compiled for other rows since, which guards would have to tell apart
            runs = {name: run for name, run in self.compiled.items() if name in self.correct}
            for name, times in in_turn(runs, "cuda", most=100, host="alone").items():
                columns[name]["host_us"] = round(statistics.median(times) * 1e3, 1)
                columns[name]["peak_bytes"] = peak_bytes(runs[name])
        best = min((columns[name]["ms"] for name in PEERS if name in self.correct), default=math.nan)
        moved = self.x.nbytes + self.out.nbytes + self.weight.nbytes
        for name in self.correct:
            columns[name]["speed"] = best / columns[name]["ms"]
            columns[name]["gb_per_s"] = moved / columns[name]["ms"] / 1e6
        columns[self.chosen.name]["chosen"] = True
        for name, replayed in (("fused_post", False), ("fused_post in CUDA graphs", True)):
            if name in columns:
                columns[name]["plan"] = self.compiled_plan(replayed)
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
    return lambda kept=run: graph.replay()  # what ``run`` holds must live as long as the graph, which reads it


def is_ours(name: str) -> bool:
    return evidence.is_plan(name) or name.startswith(("ours", "operator", "fused_post"))


def is_compiled(name: str) -> bool:
    return "graphs" not in name and name.startswith(("operator", "fused_post", "inductor"))


def show(title: str, columns: dict[str, dict[str, object]]) -> None:
    print(f"\n{title}", flush=True)
    for name, column in sorted(columns.items(), key=lambda item: item[1].get("ms", math.inf)):
        mark = "*" if column.get("chosen") else " "
        if "ms" not in column:
            print(f" {mark} {name:32}{column.get('raised') or 'WRONG, not timed: error {error:.1e}'.format(**column)}")
            continue
        host = "  host {host_us:.0f} us".format(**column) if "host_us" in column else ""
        numbers = "{ms:9.4f} ms {gb_per_s:6.0f} GB/s  error {error:.1e}  {speed:.2f}x the best peer".format(**column)
        print(f" {mark} {name:32}{numbers}{host}")


def copy_gb_per_s(size: int = 2**30) -> int:
    """Of a large copy: bytes read and written."""
    source = torch.zeros(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = in_turn({"copy": lambda: target.copy_(source)}, "cuda", 0.1)["copy"]
    return round(2 * size / statistics.median(times) / 1e6)


def names(text: str) -> list[str]:
    return text.split(",")


_PREPARED: dict[tuple[Case, torch.dtype, bool], Row] = {}


def prepare(case: Case, dtype: torch.dtype, last: bool, plans: str, inductor: tuple[str, ...]) -> None:
    for measured in [key for key, row in _PREPARED.items() if row.measured]:
        del _PREPARED[measured]  # not before: to free a graph's memory takes a second
    with torch.no_grad():
        row = Row(case, dtype, last)
        row.prepare(plans, inductor)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    _PREPARED[case, dtype, last] = row


def measure(case: Case, dtype: torch.dtype, last: bool, seconds: float) -> dict[str, dict[str, object]]:
    with torch.no_grad():
        return _PREPARED[case, dtype, last].measure(seconds)


def bytes_of(case: Case, dtype: torch.dtype, *_: object) -> int:
    """What a row takes of the GPU's memory: about ten tensors of the output's size."""
    return 10 * math.prod(case.y) * dtype.itemsize


def is_measured(case: Case, dtype: torch.dtype, last: bool, plans: str) -> bool:
    """Whether a run of these ``plans`` has this row."""
    if plans == "few" and last and case.rank == 1:
        return False
    return plans != "product" or any(plan.is_product for plan in plans_for(problem_of(case, dtype, last)))


def problem_of(case: Case, dtype: torch.dtype, last: bool) -> Problem:
    """A row's, without its memory."""
    axis = Axis(case.kernel, case.stride, case.padding, case.output_padding)
    with FakeTensorMode():
        x = empty(case.x, torch.empty(0, dtype=dtype, device="cuda"), last)
        weight = x.new_empty(case.x[1], case.C_out, *[case.kernel] * case.rank)
        return kernels.problem_for(x, weight, [axis] * case.rank, 1, last and case.rank > 1, True)


def launched_directly() -> contextlib.ExitStack:
    """The tracing wrapper costs a millisecond of Python a launch; Inductor's code does not go through it."""
    stack = contextlib.ExitStack()
    for module in (kernels, row_march, epilogue):
        stack.enter_context(mock.patch.object(module, "wrap_triton", lambda kernel: kernel))
    return stack


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    around = [name for name in sweep() if name.startswith("seed ")]
    decoders = [name for name in sweep() if name not in around]
    groups = {"public": list(NAMES), "around": around, "decoders": decoders, "all": list(KNOWN)}
    of_models = {"kernelbench": kernelbench.convolutions(), "models": models.convolutions()}
    groups |= {group: [case.name for case in cases if case.name in KNOWN] for group, cases in of_models.items()}
    parser.add_argument("--cases", type=names, default=["public"], help=f"of {', '.join([*groups, *KNOWN])}")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    parser.add_argument("--layouts", type=names, default=list(LAYOUTS))
    parser.add_argument("--plans", choices=["all", "likely", *SWEEPS, "chosen"], default="all", help="of ours")
    parser.add_argument("--no-inductor", dest="inductor", action="store_const", const=(), default=PEERS[1:])
    parser.add_argument("--no-autotune", dest="inductor", action="store_const", const=PEERS[1:2])
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring a row")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no row is measured")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/conv_transpose-<gpu>.json")
    args = parser.parse_args()
    cases = [name for given in args.cases for name in groups.get(given, [given])]
    for what, given, allowed in (("cases", cases, [*groups, *KNOWN]), ("layouts", args.layouts, list(LAYOUTS))):
        if unknown := set(given) - set(allowed):
            parser.error(f"unknown {what} {sorted(unknown)}; known are {allowed}")
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2

    out = args.out or RESULTS / f"conv_transpose-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    data = environment() | {"copy_gb_per_s": copy_gb_per_s(), "rows": []}
    todo = [
        (KNOWN[name], getattr(torch, dtype), last)
        for name in cases
        for dtype in args.dtypes
        for last in map(LAYOUTS.__getitem__, args.layouts)
        if is_measured(KNOWN[name], getattr(torch, dtype), last, args.plans)
    ]
    _, total = torch.cuda.mem_get_info()
    outcomes = rows.measured(
        list(rows.parts(todo, lambda key: bytes_of(*key), total // 4)),
        functools.partial(prepare, plans=args.plans, inductor=args.inductor),
        functools.partial(measure, seconds=args.seconds),
        min(len(todo), os.cpu_count() or 1, total // 2 // PROCESS_BYTES),
        args.budget,
    )
    for (case, dtype, last), columns in outcomes:
        if isinstance(columns, Exception):  # one row that cannot run must not lose the others
            columns = {"row": {"raised": " ".join(f"{type(columns).__name__}: {columns}".split())[:300]}}
        layout = list(LAYOUTS)[last]
        show(f"{case.name} {str(dtype).removeprefix('torch.')} {layout}", columns)
        sizes = (case.kernel, case.stride, case.padding, case.output_padding)
        described = {"case": case.name, "x": case.x, "y": case.y, "kernel_stride_padding": sizes}
        described |= {"dtype": str(dtype).removeprefix("torch."), "memory_format": layout}
        data["rows"].append(described | {"contenders": columns})
        data["seconds"] = round(time.monotonic() - start, 1)
        out.write_text(json.dumps(data, indent=1) + "\n")
    bad = [
        (row["case"], row["dtype"], row["memory_format"], name)
        for row in data["rows"]
        for name, column in row["contenders"].items()
        if (is_ours(name) or name == "row") and "ms" not in column
    ]
    print(f"\n{len(data['rows'])} rows of {len(todo)}, {time.monotonic() - start:.0f} s: {out}")
    for each in bad:
        print("WRONG or raised:", *each)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

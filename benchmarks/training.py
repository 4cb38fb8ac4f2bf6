"""A training step through one site: forward and backward, fused_post beside eager, Inductor and Inductor max-autotune.

    python -m benchmarks.training [--cases seed,unet_up2] [--dtypes float32] [--budget 500] [--cpu] [--out FILE]

The step is ``model(x).backward(g)`` with gradients for x, the weight and both biases. Each gradient is checked against
float64 before anything is timed. Beside the time: ``peak_bytes``, device memory above parameters, inputs, and g; and
``saved_bytes``, what forward leaves for backward on top of inputs and parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.measure import TOLERANCE, in_turn, peak_bytes, summary
from benchmarks.sites import PEERS, contenders, sweep

TRAINED = ("seed", "unet_up2", "kb100_3d", "dcgan_64")


def measure(case: Case, device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, object]:
    """One row: every contender's largest error of a gradient, median time, memory, and speed against the best peer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.model().to(device, dtype)
    if memory_format is not torch.contiguous_format:
        model.conv.to(memory_format=memory_format)
    x, *others = case.inputs(device, dtype, memory_format)
    x.requires_grad_()
    grad = torch.randn(case.y, device=device, dtype=dtype).contiguous(memory_format=memory_format)
    exact = gradients(copy.deepcopy(model).double(), x.double(), [other.double() for other in others], grad.double())

    columns: dict[str, dict[str, object]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, run in contenders(model).items():
        try:
            errors = [relative(*pair) for pair in zip(gradients(run, x, others, grad), exact, strict=True)]
        except Exception as raised:  # one contender that cannot run must not hide the others
            columns[name] = {"raised": f"{type(raised).__name__}: {raised}"[:300]}
            continue
        columns[name] = {"error": max(errors), "errors": errors}
        allowed = [2 * error + TOLERANCE[dtype] / 10 for error in columns["eager"].get("errors", [0.0] * len(errors))]
        if all(error <= limit for error, limit in zip(errors, allowed, strict=True)):
            columns[name]["saved_bytes"] = saved_bytes(run, x, others)
            steps[name] = lambda run=run: step(run, x, others, grad)

    for name, times in in_turn(steps, device).items():
        columns[name] |= summary(times)
        if device == "cuda":
            columns[name]["peak_bytes"] = peak_bytes(steps[name])
    best = min((columns[name]["ms"] for name in PEERS if name in steps), default=float("nan"))
    for name in steps:
        columns[name]["speed"] = best / columns[name]["ms"]
    return {
        "case": case.name,
        "x": case.x,
        "y": case.y,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_format": str(memory_format).removeprefix("torch."),
        "contenders": columns,
    }


def gradients(run: nn.Module, x: Tensor, others: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Those of x and of the parameters, as new tensors."""
    x = x.detach().requires_grad_()
    inputs = [x, *run.parameters()]
    return [
        each.detach().clone()
        for each in torch.autograd.grad(run(x, *others), inputs, grad, allow_unused=True)
        if each is not None
    ]


def step(run: nn.Module, x: Tensor, others: list[Tensor], grad: Tensor) -> None:
    x.grad = None
    for parameter in run.parameters():
        parameter.grad = None
    run(x, *others).backward(grad)


def relative(result: Tensor, exact: Tensor) -> float:
    """RMS of the difference over that of ``exact``."""
    return ((result.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


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


if __name__ == "__main__":
    sweep("training", measure, TRAINED, __doc__, lambda case: case.small(images=4, pixels=64 * 64))

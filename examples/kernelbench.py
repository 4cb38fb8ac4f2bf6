"""Problem 2 of KernelBench's level 2, as a user has it, compiled by name.

Prints what was fused, the error of eager, Inductor and fused_post against float64, and their times; ends with exit
status 1 if fused_post is less accurate than the rule allows. On a GPU the shape is the problem's own, on a CPU a small
one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch._dynamo
from torch import nn

import fusion_backend

TOLERANCE = 1e-4  # float32, relative
ROUNDS = 20


class Model(nn.Module):
    """Transposed convolution, bias, clamp, scaling, clamp, division."""

    def __init__(
        self, in_channels, out_channels, kernel_size, stride, padding, output_padding, bias_shape, scaling_factor
    ):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
        )
        self.bias = nn.Parameter(torch.randn(bias_shape))
        self.scaling_factor = scaling_factor

    def forward(self, x):
        x = self.conv_transpose(x)
        x = x + self.bias
        x = torch.clamp(x, min=0.0, max=1.0)
        x = x * self.scaling_factor
        x = torch.clamp(x, min=0.0, max=1.0)
        return x / self.scaling_factor


def backend() -> str | Callable[..., object]:
    """The name, as everywhere once the package is installed; in a bare checkout, what the name stands for."""
    if "fused_post" in torch._dynamo.list_backends():
        return "fused_post"
    from fusion_backend.backend import fused_post

    return fused_post


def contenders(model: nn.Module, device: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Everything that is compared, by the name it is printed under."""
    rows: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"eager": model, "inductor": torch.compile(model)}
    if device == "cuda":
        rows["inductor max-autotune"] = torch.compile(model, mode="max-autotune")
    rows["fused_post"] = torch.compile(model, backend=backend())
    return rows


def relative_rmse(run: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> float:
    """RMS of run(x) - model(x) in float64, over that of model(x); a few images at a time to save memory."""
    exact = copy.deepcopy(model).double()
    result = run(x)
    error = size = 0.0
    for part, inputs in zip(result.split(8), x.split(8), strict=True):
        expected = exact(inputs.double())
        error += (part.double() - expected).square().sum().item()
        size += expected.square().sum().item()
    return (error / size) ** 0.5


def is_close(run: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, x: torch.Tensor) -> bool:
    """KernelBench's own check of a float32 answer, against eager."""
    return torch.allclose(run(x), model(x), rtol=1e-4, atol=1e-4)


def milliseconds(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """One call, start to finish."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device

    torch.manual_seed(0)
    shape = (128, 64, 128, 128) if device == "cuda" else (4, 64, 32, 32)
    model = Model(64, 64, 3, 2, 1, 1, (64, 1, 1), 2.0).to(device)
    x = torch.rand(shape, device=device)

    print(f"x {tuple(x.shape)} {x.dtype} on {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}\n")
    print(fusion_backend.explain(model, x), "\n")

    rows = contenders(model, device)
    errors = {name: relative_rmse(run, model, x) for name, run in rows.items()}
    times = {name: [] for name in rows}
    for _ in range(ROUNDS):  # in turn, so that a change of clocks or of load meets all alike
        for name, run in rows.items():
            times[name].append(milliseconds(run, x))

    print(f"{'':24}{'error':>10}{'ms':>10}{'speed':>10}   error: relative RMSE against float64")
    eager = statistics.median(times["eager"])
    for name in rows:
        ms = statistics.median(times[name])
        print(f"{name:24}{errors[name]:10.1e}{ms:10.3f}{eager / ms:9.2f}x")

    close = ", ".join(f"{name} {'passes' if is_close(run, model, x) else 'fails'}" for name, run in rows.items())
    print(f"\nKernelBench's check, allclose to eager at 1e-4: {close}")

    allowed = 2 * errors["eager"] + TOLERANCE / 10
    passed = errors["fused_post"] <= allowed
    print(f"error {'ok' if passed else 'TOO LARGE'}: {errors['fused_post']:.1e}, allowed {allowed:.1e}")
    return 0 if passed else 1


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())

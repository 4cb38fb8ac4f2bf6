"""Train a small convolutional autoencoder, eagerly and compiled by name, from one seed; compare losses and memory.

    python examples/train_autoencoder.py [--steps 200] [--inductor]

The decoder's transposed convolutions end in bounded tails. For its backward, fused_post keeps one bit an element of
each, where PyTorch keeps the values; the gradients are eager's. Runs in under a minute on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_backend


class Autoencoder(nn.Module):
    """Images [N, 1, 32, 32] with values from 0 to 1, through 8 x 8 x 8 features."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(8, 16, 3, stride=2, padding=1, output_padding=1)
        self.up2 = nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down1(x))
        x = self.down2(x)
        x = F.relu6(self.up1(x) + 3.0) / 6.0  # a hard sigmoid
        return (self.up2(x).clamp(-1, 1) + 1) / 2


def batches(steps: int) -> list[Tensor]:
    """Soft discs of random radius and place."""
    grid = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        radius, x_0, y_0 = torch.rand(3, 16, 1, 1, 1, generator=generator) - 0.5
        made.append(torch.sigmoid(20 * (radius.abs() + 0.2 - ((x - x_0) ** 2 + (y - y_0) ** 2).sqrt())))
    return made


def train(forward: Callable[[Tensor], Tensor], model: nn.Module, data: list[Tensor]) -> tuple[list[float], float]:
    """The loss of each step, and the median time of one in milliseconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses, times = [], []
    for x in data:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.mse_loss(forward(x), x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append((time.perf_counter() - start) * 1e3)
    return losses, statistics.median(times)


def backend() -> str | Callable[..., object]:
    """The name, as everywhere once the package is installed; in a bare checkout, what the name stands for."""
    if "fused_post" in torch._dynamo.list_backends():
        return "fused_post"
    from fusion_backend.backend import fused_post

    return fused_post


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--inductor", action="store_true", help="train it with Inductor alone, too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    start = Autoencoder().to(device)
    data = [x.to(device) for x in batches(args.steps)]

    backends = {"eager": None, **({"inductor": "inductor"} if args.inductor else {}), "fused_post": backend()}
    print(f"{'':12}{'first loss':>12}{'last loss':>12}{'ms a step':>12}")
    for name, how in backends.items():
        model = copy.deepcopy(start)
        forward = model if how is None else torch.compile(model, backend=how)
        losses, ms = train(forward, model, data)
        print(f"{name:12}{losses[0]:12.6f}{losses[-1]:12.6f}{ms:12.2f}", flush=True)
    print()
    print(fusion_backend.explain(start, data[0]))


if __name__ == "__main__":
    main()

"""A small U-Net style decoder, compiled by name, and what fused_post says about each of its transposed convolutions.

Three of them have a longer tail, one with a BatchNorm in eval; the others show how far a tail reaches, or why there is
none: a concatenation, a second user, a tanh.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_backend


class Decoder(nn.Module):
    """From 8x8 features with three skip connections to an image of 256x256."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.merge1 = nn.Conv2d(64, 32, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.up3 = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1)
        self.gain3 = nn.Parameter(torch.rand(16, 1, 1) + 0.5)
        self.up4 = nn.ConvTranspose2d(16, 8, 2, stride=2, bias=False)
        self.shift4 = nn.Parameter(torch.randn(8, 1, 1))
        self.up5 = nn.ConvTranspose2d(8, 3, 2, stride=2, bias=False)
        self.up5_detail = nn.ConvTranspose2d(8, 3, 2, stride=2, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up1(x)
        x = F.relu(self.merge1(torch.cat((x, skip), dim=1)))

        x = self.up2(x)
        x = F.relu(self.norm2(x))

        x = self.up3(x)
        x = x * self.gain3
        x = F.relu6(x)

        x = self.up4(x)
        x = x + self.shift4
        x = x.clamp(-1, 1)
        x = (x + 1) / 2

        image = self.up5(x)
        detail = self.up5_detail(x)
        return torch.tanh(image) + detail * torch.sigmoid(detail)


def backend() -> str | Callable[..., object]:
    """The name, as everywhere once the package is installed; in a bare checkout, what the name stands for."""
    if "fused_post" in torch._dynamo.list_backends():
        return "fused_post"
    from fusion_backend.backend import fused_post

    return fused_post


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Decoder().eval().to(device)
    x = torch.randn(2, 64, 8, 8, device=device)
    skip = torch.randn(2, 32, 16, 16, device=device)

    compiled = torch.compile(model, backend=backend())
    with torch.no_grad():
        result, expected = compiled(x, skip), model(x, skip)
        report = fusion_backend.explain(compiled, x, skip)
    print(report)
    print(f"\noutput {tuple(result.shape)}, largest difference from eager {(result - expected).abs().max():.1e}")

    print("\nThe same model where gradients are wanted:")
    print(fusion_backend.explain(compiled, x, skip))


if __name__ == "__main__":
    main()

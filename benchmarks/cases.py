"""The shapes that benchmarks and tests use: the project's first case, common decoders, and KernelBench's level 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """A transposed convolution with the same sizes along every spatial dimension, and the tail behind it."""

    name: str
    x: tuple[int, ...]  # N, C_in, spatial
    C_out: int
    kernel: int
    stride: int
    padding: int = 0
    output_padding: int = 0
    tail: str = "none"

    @property
    def rank(self) -> int:
        return len(self.x) - 2

    @property
    def y(self) -> tuple[int, ...]:
        """The output's shape."""
        grow = self.kernel - 2 * self.padding + self.output_padding
        return (self.x[0], self.C_out, *((size - 1) * self.stride + grow for size in self.x[2:]))

    @property
    def memory_formats(self) -> tuple[torch.memory_format, ...]:
        last = CHANNELS_LAST.get(self.rank)
        return (torch.contiguous_format,) if last is None else (torch.contiguous_format, last)

    def model(self) -> nn.Module:
        conv = CONV[self.rank](
            self.x[1],
            self.C_out,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
        )
        return Upsample(conv, TAILS[self.tail])

    def inputs(self, device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
        """x, and for a tail that adds a full tensor also that tensor."""
        shapes = (self.x, self.y) if self.tail == "add_hardswish" else (self.x,)
        return tuple(
            torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format) for shape in shapes
        )

    def small(self, images: int = 2, pixels: int = 16 * 16) -> Case:
        """The same case with at most so many images and pixels: as given, two CPU cores run it in milliseconds."""
        longest = {1: pixels // 4, 2: math.isqrt(pixels), 3: math.isqrt(pixels) // 2}[self.rank]
        N, C_in, *spatial = self.x
        return replace(self, x=(min(N, images), C_in, *(min(size, longest) for size in spatial)))


class Upsample(nn.Module):
    """The convolution, then the tail with a bias of its own."""

    def __init__(self, conv: nn.Module, tail: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv = conv
        self.tail = tail
        self.bias = nn.Parameter(torch.randn(conv.out_channels, *[1] * (conv.weight.dim() - 2)))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.tail(self.conv(x), self.bias, *others)


def none(y: Tensor, bias: Tensor) -> Tensor:
    return y


def seed(y: Tensor, bias: Tensor) -> Tensor:
    return torch.clamp(torch.clamp(y + bias, 0.0, 1.0) * 2.0, 0.0, 1.0) / 2.0


def bias_relu(y: Tensor, bias: Tensor) -> Tensor:
    return F.relu(y + bias)


def bias_tanh(y: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(y - bias)


def bias_leaky_relu(y: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(y + bias, 0.2)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(y + bias)


def bias_silu(y: Tensor, bias: Tensor) -> Tensor:
    return F.silu(y + bias)


def clamp_halve(y: Tensor, bias: Tensor) -> Tensor:
    return torch.clamp(y, min=-1.0) / 2.0


def mish_hardtanh(y: Tensor, bias: Tensor) -> Tensor:
    return F.hardtanh(F.mish(y) + 0.5, -1.0, 1.0) * 2.0


def residual(y: Tensor, bias: Tensor) -> Tensor:
    original = y.clone().detach()
    return (y + bias + original) * original + original


def add_hardswish(y: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    y = y + other
    return y * F.hardswish(y)


def min_gelu(y: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(torch.min(y + 0.5, torch.tensor(0.0, device=y.device))) * 2.0


TAILS: dict[str, Callable[..., Tensor]] = {
    tail.__name__: tail
    for tail in (
        none, seed, bias_relu, bias_tanh, bias_leaky_relu, bias_gelu, bias_silu, clamp_halve, mish_hardtanh, residual,
        add_hardswish, min_gelu,
    )
}  # fmt: skip

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("seed", (128, 64, 128, 128), 64, 3, 2, 1, 1, "seed"),
        Case("kb_small", (128, 32, 16, 16), 16, 3, 2, 1, 1, "seed"),
        Case("dcgan_64", (64, 256, 16, 16), 128, 4, 2, 1, 0, "seed"),
        Case("unet_up2", (4, 128, 128, 128), 64, 2, 2, tail="bias_relu"),
        Case("hifigan_up1", (16, 512, 256), 256, 16, 8, 4),
        Case("kb100_3d", (16, 32, 16, 32, 32), 16, 3, 2, 1, tail="clamp_halve"),
        Case("kb2_first", (128, 3, 32, 32), 16, 3, 2, 1, 1, "seed"),
        Case("kb5", (32, 64, 256, 256), 64, 4, 2, 1, 1, "bias_tanh"),
        Case("kb16", (128, 64, 128, 128), 64, 3, 2, 1, 1, "mish_hardtanh"),
        Case("kb20", (16, 32, 16, 32, 32), 64, 3, 2, 1, 1, "residual"),
        Case("kb26", (128, 32, 16, 16, 16), 64, 3, 2, 1, 1, "add_hardswish"),
        Case("kb93", (128, 64, 64, 64), 128, 4, 2, tail="min_gelu"),
        Case("kb100", (16, 64, 24, 48, 48), 128, 3, 2, 1, tail="clamp_halve"),
    )
}

"""Transposed convolutions to test with: shapes and parameters, their tensors, and the public cases."""

from dataclasses import dataclass

import torch

from fusion_backend.kernels.phases import Axis


@dataclass(frozen=True)
class Conv:
    """x's shape, C_out, and the parameters, one a dimension."""

    x: tuple[int, ...]
    C_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] = (0,)
    output_padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    groups: int = 1

    @property
    def rank(self) -> int:
        return len(self.x) - 2

    @property
    def axes(self) -> tuple[Axis, ...]:
        columns = (self.kernel, self.stride, self.padding, self.output_padding, self.dilation)
        return tuple(Axis(*each) for each in zip(*(c * (self.rank // len(c)) for c in columns), strict=True))

    @property
    def y(self) -> tuple[int, ...]:
        sizes = (axis.output_size(size) for axis, size in zip(self.axes, self.x[2:], strict=True))
        return (self.x[0], self.C_out, *sizes)

    def tensors(self, dtype: torch.dtype, device: str, last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """x and weight; standard normal, so that a missing or doubled term shows."""
        generator = torch.Generator().manual_seed(self.C_out)
        kernel = self.kernel * (self.rank // len(self.kernel))
        x = torch.randn(self.x, generator=generator).to(device, dtype)
        weight = torch.randn(self.x[1], self.C_out // self.groups, *kernel, generator=generator)
        return laid_out(x, last), weight.to(device, dtype)


def laid_out(x: torch.Tensor, last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


PUBLIC = {
    "seed": Conv((128, 64, 128, 128), 64, (3,), (2,), (1,), (1,)),
    "kb_small": Conv((128, 32, 16, 16), 16, (3,), (2,), (1,), (1,)),
    "dcgan_64": Conv((64, 256, 16, 16), 128, (4,), (2,), (1,)),
    "unet_up2": Conv((4, 128, 128, 128), 64, (2,), (2,)),
    "hifigan_up1": Conv((16, 512, 256), 256, (16,), (8,), (4,)),
    "kb100_3d": Conv((16, 32, 16, 32, 32), 16, (3,), (2,), (1,)),
}

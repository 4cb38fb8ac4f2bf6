"""Transposed convolutions to test with: shapes and parameters, their tensors, what is right, and the public cases."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fusion_backend.kernels.conv_transpose import CONV_TRANSPOSE, reference
from fusion_backend.kernels.layout import empty
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.tf32 import round_to_tf32
from tests.kernels.implementations import Value
from tests.kernels.layouts import laid_out


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

    def whole_numbers(
        self, dtype: torch.dtype, device: str, largest: int = 2
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, weight and a shift [C_out] of whole numbers, with which every sum is exact."""
        generator = torch.Generator().manual_seed(0)
        x, weight = (
            torch.randint(-largest, largest + 1, t.shape, generator=generator) for t in self.tensors(dtype, "cpu")
        )
        shift = torch.randint(-2, 3, (self.C_out,), generator=generator)
        return x.to(device, dtype), weight.to(device, dtype), shift.to(device, torch.float32)

    def fakes(self, dtype: torch.dtype, x_last: bool, out_last: bool) -> tuple[torch.Tensor, ...]:
        """x, weight and the output on a GPU, without values; for fake tensors."""
        like = torch.empty(0, dtype=dtype, device="cuda")
        kernel = self.kernel * (self.rank // len(self.kernel))
        weight = empty((self.x[1], self.C_out // self.groups, *kernel), like, False)
        return empty(self.x, like, x_last), weight, empty(self.y, like, out_last)


def coefficients(C: int, device: str) -> tuple[torch.Tensor, ...]:
    """A scale, a shift and bounds for each channel; both bounds are hit, and neither always."""
    generator = torch.Generator().manual_seed(C)
    scale, shift = torch.randn(C, generator=generator), torch.randn(C, generator=generator)
    lo, hi = -3 * torch.rand(C, generator=generator), 3 * torch.rand(C, generator=generator)
    return tuple(value.to(device) for value in (scale, shift, lo, hi))


def eager(x: torch.Tensor, weight: torch.Tensor, conv: Conv) -> torch.Tensor:
    """The convolution alone, in x's dtype."""
    axes = zip(*((axis.stride, axis.padding, axis.output_padding, axis.dilation) for axis in conv.axes), strict=True)
    stride, padding, output_padding, dilation = axes
    return CONV_TRANSPOSE[x.dim()](x, weight, None, stride, padding, output_padding, conv.groups, dilation)


def tf32(x: torch.Tensor, weight: torch.Tensor, conv: Conv) -> torch.Tensor:
    """``eager`` of inputs that are rounded to TF32 where they are float32, and with no error besides."""
    inputs = (round_to_tf32(each) if each.dtype == torch.float32 else each for each in (x, weight))
    return eager(*(each.double() for each in inputs), conv)


def assert_close(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    conv: Conv,
    values: Sequence[Value] = (),
    tf32: bool = False,
) -> None:
    """Within one rounding of the dtype, and of fp32 or TF32 for each term of the sum, of float64."""
    exact = [value.double() if isinstance(value, torch.Tensor) else value for value in values]
    scale = [abs(value) for value in exact[:1] if value is not None]
    expected = reference(x.double(), weight.double(), conv.axes, conv.groups, *exact)
    terms = reference(x.double().abs(), weight.double().abs(), conv.axes, conv.groups, *scale)
    rounding = 2.0**-10 if tf32 and x.dtype == torch.float32 else 2.0**-20
    bound = torch.finfo(y.dtype).eps * expected.abs() + rounding * (terms + 1)
    wrong = ~((y.double() - expected).abs() <= bound)
    assert y.shape == expected.shape
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} wrong, the first at {wrong.nonzero()[0].tolist()}"


PUBLIC = {
    "seed": Conv((128, 64, 128, 128), 64, (3,), (2,), (1,), (1,)),
    "kb_small": Conv((128, 32, 16, 16), 16, (3,), (2,), (1,), (1,)),
    "dcgan_64": Conv((64, 256, 16, 16), 128, (4,), (2,), (1,)),
    "unet_up2": Conv((4, 128, 128, 128), 64, (2,), (2,)),
    "hifigan_up1": Conv((16, 512, 256), 256, (16,), (8,), (4,)),
    "kb100_3d": Conv((16, 32, 16, 32, 32), 16, (3,), (2,), (1,)),
}

"""KernelBench level 2: the 30 problems with a transposed convolution, as whole models.

    python -m benchmarks.kernelbench [--rows 2,5] [--dtypes float32] [--limit 50] [--budget 150] [--cpu]
                                     [--contenders "eager,inductor,fused_post,fused_post fused"] [--out FILE]

Each module is written here from the chain of operations that names its problem. The convolution, its input and the
numbers of 2, 5, 16, 20, 26, 93 and 100 are KernelBench's. What the other chains leave open is chosen here: sizes of the
same order; pools 2 wide (the second of 78: 3); norms in 8 groups (60: 4); LayerNorm over the last dimension; softmax,
logsumexp, min and max over the channels (38: softmax over the pixels). KernelBench runs its modules in training mode;
here they are in eval mode, with running statistics other than 0 and 1. Values are chosen so that no chain saturates or
averages away what the convolution contributes: an error of it shows in the result.

benchmarks/whole.py says how they are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import CONV, Case
from benchmarks.whole import Inputs, main

Layer = nn.Module | nn.Parameter
SMALL = {2: 6, 3: 5}  # pixels along each dimension


@dataclass(frozen=True, kw_only=True)
class Problem(Case):
    """A convolution, the chain behind it, and what the chain holds: by name, made from the shape of the output."""

    chain: Callable[..., Tensor]
    layers: dict[str, Callable[[tuple[int, ...]], Layer]]
    bias: bool
    inputs_like_y: int
    size: Callable[[tuple[int, ...]], float]  # of the convolution's output

    def small(self) -> Problem:
        """The same structure for a CPU: at least two channels to each group of a norm."""
        return replace(self, x=(2, 4, *[SMALL[self.rank]] * self.rank), C_out=16)

    def build(self, small: bool) -> tuple[nn.Module, Inputs]:
        """The module, and its inputs: x, and for 26 a tensor of the convolution's shape."""
        problem = self.small() if small else self
        shapes = (problem.x, *[problem.y] * self.inputs_like_y)
        return Chain(problem).eval(), tuple(map(images, shapes))


def images(shape: tuple[int, ...]) -> Tensor:
    """Each channel has a mean of its own: where a chain averages over the pixels, something is left."""
    return torch.randn(shape) + torch.randn(*shape[:2], *[1] * (len(shape) - 2))


class Chain(nn.Module):
    """A problem's module; what the chain holds are attributes, as in a module written by hand."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        C_in, C_out, p = problem.x[1], problem.C_out, problem
        self.conv = CONV[p.rank](C_in, C_out, p.kernel, p.stride, p.padding, p.output_padding, bias=p.bias)
        size, taps = p.size(p.y), (p.kernel / p.stride) ** p.rank
        nn.init.normal_(self.conv.weight, std=size / math.sqrt(C_in * taps))
        if p.bias:
            nn.init.normal_(self.conv.bias, std=size)
        self.chain = problem.chain
        for name, layer in problem.layers.items():
            setattr(self, name, layer(problem.y))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.chain(self, self.conv(x), *others)


PROBLEMS: dict[int, Problem] = {}


def about_one(y: tuple[int, ...]) -> float:
    return 1.0


def problem(
    number: int,
    *sizes: object,
    bias: bool = True,
    inputs_like_y: int = 0,
    size: Callable[[tuple[int, ...]], float] = about_one,
    **layers: Callable,
) -> Callable:
    """Make the decorated chain a problem. ``sizes``: x, C_out, kernel, stride, padding, output padding, as in Case."""

    def register(chain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        PROBLEMS[number] = Problem(
            f"kb{number}", *sizes, bias=bias, chain=chain, layers=layers, inputs_like_y=inputs_like_y, size=size
        )
        return chain

    return register


def per_channel(y: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(y[1], *[1] * (len(y) - 2)))


def scalar(y: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(()))


def small_scalar(y: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(0.1 * torch.randn(()))


def pool(kind: type[nn.Module], size: int = 2) -> Callable[[tuple[int, ...]], nn.Module]:
    return lambda y: kind(size)


def group_norm(groups: int) -> Callable[[tuple[int, ...]], nn.Module]:
    return lambda y: nn.GroupNorm(groups, y[1])


def layer_norm(y: tuple[int, ...]) -> nn.Module:
    return nn.LayerNorm(y[-1])


def batch_norm(y: tuple[int, ...]) -> nn.Module:
    norm = (nn.BatchNorm2d if len(y) == 4 else nn.BatchNorm3d)(y[1])
    for tensor in (norm.running_mean, norm.bias.data):
        nn.init.normal_(tensor)
    for tensor in (norm.running_var, norm.weight.data):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return norm


@problem(2, (128, 64, 128, 128), 64, 3, 2, 1, 1, bias_after=per_channel)
def bias_clamp_scale_clamp_divide(self, y):
    y = torch.clamp(y + self.bias_after, 0.0, 1.0)
    return torch.clamp(y * 2.0, 0.0, 1.0) / 2.0


@problem(3, (32, 32, 16, 32, 32), 64, 3, 2, 1, 1, shift=scalar, norm=layer_norm, pool=pool(nn.AvgPool3d))
def sum_layer_norm_pool_gelu(self, y):
    return F.gelu(self.pool(self.norm(y + self.shift)))


@problem(5, (32, 64, 256, 256), 64, 4, 2, 1, 1, bias_after=per_channel)
def subtract_tanh(self, y):
    return torch.tanh(y - self.bias_after)


@problem(10, (128, 64, 256, 256), 64, 3, 1, 1, pool=pool(nn.MaxPool2d))
def pool_hardtanh_mean_tanh(self, y):
    y = F.hardtanh(self.pool(y), -1.0, 1.0)
    return torch.tanh(y.mean(dim=(2, 3), keepdim=True))


@problem(11, (512, 64, 32, 32), 128, 5, 1, 1, batch=batch_norm, pool=pool(nn.MaxPool2d), norm=group_norm(8))
def batch_norm_tanh_pool_group_norm(self, y):
    return self.norm(self.pool(torch.tanh(self.batch(y))))


@problem(13, (16, 16, 32, 128, 128), 64, 3, 1, 1, bias_after=per_channel)
def mean_add_softmax_tanh_scale(self, y):
    y = y.mean(dim=2, keepdim=True) + self.bias_after
    return torch.tanh(torch.softmax(y, dim=1)) * 2.0


@problem(15, (16, 16, 16, 32, 32), 32, 3, 2, 1, batch=batch_norm)
def batch_norm_subtract_mean(self, y):
    y = self.batch(y)
    return y - y.mean(dim=(2, 3, 4), keepdim=True)


@problem(16, (128, 64, 128, 128), 64, 3, 2, 1, 1)
def mish_add_hardtanh_scale(self, y):
    return F.hardtanh(F.mish(y) + 0.5, -1.0, 1.0) * 2.0


@problem(19, (128, 64, 256, 256), 64, 3, 1, norm=group_norm(8))
def gelu_group_norm(self, y):
    return self.norm(F.gelu(y))


@problem(20, (16, 32, 16, 32, 32), 64, 3, 2, 1, 1, bias_after=per_channel)
def sum_residual_multiply_residual(self, y):
    original = y.clone().detach()
    return (y + self.bias_after + original) * original + original


@problem(26, (128, 32, 16, 16, 16), 64, 3, 2, 1, 1, inputs_like_y=1)
def add_hardswish(self, y, other):
    y = y + other
    return y * F.hardswish(y)


@problem(34, (32, 32, 16, 32, 32), 64, 4, 2, 1, norm=layer_norm)
def layer_norm_gelu_scale(self, y):
    return F.gelu(self.norm(y)) * 1.0


# A gelu of the sum over the rows of what is mostly below zero.
@problem(36, (16, 64, 128, 128), 128, 3, 2, 1, 1, size=lambda y: 0.1 / y[2], bias_after=scalar)
def min_sum_gelu_add(self, y):
    y = torch.min(y, dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)
    return F.gelu(y) + self.bias_after


@problem(38, (32, 32, 32, 64, 64), 64, 3, 2, 1, 1, pool=pool(nn.AvgPool3d), scale=per_channel)
def pool_clamp_softmax_multiply(self, y):
    y = torch.clamp(self.pool(y), 0.0, 1.0)
    return torch.softmax(y.flatten(2), dim=2).view(y.shape) * self.scale


@problem(42, (16, 64, 512, 512), 128, 3, 1, bias_after=per_channel)
def mean_add_logsumexp_sum_multiply(self, y):
    y = y.mean(dim=(2, 3), keepdim=True) + self.bias_after
    return torch.logsumexp(y, dim=1, keepdim=True).sum(dim=(2, 3)) * 10.0


@problem(44, (16, 64, 128, 128), 128, 3, 2, 1, 1)
def multiply_mean_mean(self, y):
    return (y * 0.5).mean(dim=(2, 3), keepdim=True).mean(dim=(2, 3), keepdim=True)


@problem(49, (16, 32, 16, 32, 32), 64, 3, 2, 1, 1)
def softmax_sigmoid(self, y):
    return torch.sigmoid(torch.softmax(y, dim=1))


@problem(
    50, (128, 3, 16, 32, 32), 16, 3, 2, 1, first=scalar, pool=pool(nn.AvgPool3d), bias_after=per_channel, second=scalar
)
def scale_pool_add_scale(self, y):
    return (self.pool(y * self.first) + self.bias_after) * self.second


@problem(58, (128, 3, 16, 32, 32), 16, 3, 2, 1, bias_after=small_scalar)
def logsumexp_hardswish_subtract_clamp(self, y):
    y = torch.logsumexp(y, dim=1, keepdim=True)
    y = y * torch.sigmoid(y + 3) / 6
    return torch.clamp(y - self.bias_after, -1.0, 1.0)


@problem(60, (128, 3, 16, 32, 32), 16, 3, 2, 1, norm=group_norm(4))
def swish_group_norm_hardswish(self, y):
    return F.hardswish(self.norm(torch.sigmoid(y) * y))


@problem(61, (16, 64, 32, 32, 32), 128, 3, 1, bias=False, norm=group_norm(8))
def relu_group_norm(self, y):
    return self.norm(F.relu(y))


@problem(72, (64, 3, 32, 32, 32), 16, 3, 2, 1, batch=batch_norm, first=pool(nn.AvgPool3d), second=pool(nn.AvgPool3d))
def batch_norm_pool_pool(self, y):
    return self.second(self.first(self.batch(y)))


@problem(74, (16, 16, 16, 32, 32), 32, 3, 2, 1, 1, scale=per_channel, pool=pool(nn.MaxPool3d))
def leaky_relu_multiply_leaky_relu_pool(self, y):
    y = F.leaky_relu(y, 0.2) * self.scale
    return self.pool(F.leaky_relu(y, 0.2))


@problem(77, (16, 64, 16, 32, 32), 128, 5, 1, batch=batch_norm)
def scale_batch_norm_mean(self, y):
    return self.batch(y * 2.0).mean(dim=(2, 3, 4), keepdim=True)


@problem(78, (16, 32, 32, 32, 32), 64, 5, 2, 2, first=pool(nn.MaxPool3d), second=pool(nn.MaxPool3d, 3))
def pool_pool_sum(self, y):
    return self.second(self.first(y)).sum(dim=1, keepdim=True)


@problem(89, (128, 3, 16, 32, 32), 16, 3, 2, 1, 1, pool=pool(nn.MaxPool3d), bias_after=per_channel)
def pool_softmax_subtract_swish_max(self, y):
    y = torch.softmax(self.pool(y), dim=1) - self.bias_after
    return torch.max(torch.sigmoid(y) * y, dim=1)[0]


@problem(91, (128, 64, 64, 64), 128, 4, 2, 1, 1, bias_after=per_channel)
def softmax_add_scale_sigmoid(self, y):
    return torch.sigmoid((torch.softmax(y, dim=1) + self.bias_after) * 2.0)


@problem(93, (128, 64, 64, 64), 128, 4, 2)
def add_min_gelu_multiply(self, y):
    return F.gelu(torch.min(y + 0.5, torch.tensor(0.0, device=y.device))) * 2.0


@problem(96, (128, 3, 16, 32, 32), 16, 3, 2, 1, pool=pool(nn.MaxPool3d))
def multiply_pool_mean_clamp(self, y):
    y = self.pool(y * 0.5).mean(dim=(2, 3, 4), keepdim=True)
    return torch.clamp(y, 0.0, 1.0)


@problem(100, (16, 64, 24, 48, 48), 128, 3, 2, 1)
def clamp_divide(self, y):
    return torch.clamp(y, min=-1.0) / 2.0


def convolutions() -> list[Case]:
    """As cases of benchmarks/conv_transpose.py, by whose data ``auto`` chooses."""
    return [
        Case(p.name, p.x, p.C_out, p.kernel, p.stride, p.padding, p.output_padding, "bias_relu")
        for p in PROBLEMS.values()
    ]


BUILDS = {str(number): problem.build for number, problem in PROBLEMS.items()}


if __name__ == "__main__":
    largest = {str(number): 4 * max(math.prod(p.x), math.prod(p.y)) for number, p in PROBLEMS.items()}
    main("benchmarks.kernelbench", __doc__, BUILDS, largest)

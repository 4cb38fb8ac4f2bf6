"""What a step of the march on Hopper reads, adds and carries, followed in plain PyTorch."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fusion_backend.kernels.hopper_form import Form
from fusion_backend.kernels.hopper_strips import Config, form_for, march_for
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.strips import three_sizes, turned
from tests.kernels.convolutions import Conv, eager


def problem_of(conv: Conv, x_last: bool) -> Problem:
    axes = (Axis(),) * (3 - conv.rank) + conv.axes
    return Problem(axes, conv.x[1], conv.C_out, 1, 0, torch.float32, x_last, False, True, False, 2**20)


def form_of(conv: Conv, x_last: bool) -> Form:
    problem = problem_of(conv, x_last)
    march = march_for(problem, conv.x, Config(16, slots=1), 132)
    return form_for(problem, march, 1, (0, 0, 0, 0))


def marched(conv: Conv, form: Form, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The convolution as a strip that is as wide as the image would compute it."""
    problem = problem_of(conv, form.x_last)
    row, middle, column = turned(problem, problem.axes)
    R, M, W = turned(problem, three_sizes(conv.x[2:]))
    O_R, O_M, O_W = (axis.output_size(size) for axis, size in ((row, R), (middle, M), (column, W)))
    Q_M, Q_W = -(-O_M // middle.stride), -(-O_W // column.stride)

    x = x.view(*x.shape[:2], *three_sizes(x.shape[2:]))
    x = x if form.along_d else x.transpose(2, 3)
    beyond = 2 * max(*form.kernel, *form.padding) + 2
    x = F.pad(x, (beyond, beyond + Q_W + 1, beyond, beyond + Q_M, 0, beyond))

    def shifted(i: int, s_m: int, s_w: int, step: int = 1) -> torch.Tensor:
        m, w = beyond + form.first[0] + s_m, beyond + form.first[1] + s_w
        return x[:, :, i, m : m + Q_M, w : w + Q_W + Q_W % step : step]

    def operands(i: int) -> Iterator[torch.Tensor]:
        for s_m in range(form.shifts[0]):
            if form.x_last:
                yield from (shifted(i, s_m, s_w) for s_w in range(form.tiles))
            else:
                combs = [shifted(i, s_m, j, 2) for j in range(form.tiles)]
                pairs = itertools.pairwise(combs)
                yield from (torch.stack(pair, -1).flatten(-2)[..., :Q_W] for pair in pairs)

    taps = weight.flatten(2)
    y = x.new_zeros(x.shape[0], weight.shape[1], O_R, Q_M * middle.stride, Q_W * column.stride)
    carried = [x.new_zeros(())] * (form.carried * form.phases)
    first = row.padding // row.stride
    for i in range(max(first - form.halo, 0), -(-(O_R + row.padding) // row.stride)):
        xs = list(operands(i))
        assert len(xs) == form.shifts[0] * form.shifts[1]
        accs = []
        for r, phases in enumerate(form.taps):
            for e, products in enumerate(phases):
                acc = carried[r * form.phases + e] if r < form.carried else x.new_zeros(())
                accs.append(sum((torch.einsum("ncmw,ck->nkmw", xs[s], taps[..., tap]) for s, tap in products), acc))
        carried = accs[form.stored * column.stride :]
        assert len(carried) == form.carried * form.phases
        for index, (r, e_m, e_w) in enumerate(itertools.product(*map(range, form.stride))):
            o_r = i * row.stride + r - row.padding
            if i >= first and 0 <= o_r < O_R:
                y[:, :, o_r, e_m :: middle.stride, e_w :: column.stride] = accs[index]
    y = y[..., :O_M, :O_W]
    return (y if form.along_d else y.transpose(2, 3)).reshape(conv.y)


def every_combination() -> Iterator[Conv]:
    along = [
        (kernel, stride, padding, output_padding)
        for kernel, stride, padding in itertools.product(range(1, 6), range(1, 5), range(3))
        for output_padding in {0, stride - 1}
        if stride * 2 + kernel - 2 * padding + output_padding > 0
    ]
    for index, march in enumerate(along):
        yield Conv((2, 2, 3, 5), 3, *zip(march, along[(7 * index + 3) % len(along)], strict=True))
    yield Conv((1, 2, 3, 2, 5), 3, (3,), (2,), (1,), (1,))
    yield Conv((1, 2, 3, 3, 4), 3, (4, 3, 2), (2, 1, 2), (1, 1, 0))


@pytest.mark.parametrize("x_last", [False, True], ids=["contiguous", "channels_last"])
def test_every_combination_along_one_dimension(x_last: bool) -> None:
    for conv in every_combination():
        kernel = [axis.kernel for axis in conv.axes]
        x, weight = torch.randn(conv.x).double(), torch.randn(conv.x[1], conv.C_out, *kernel).double()
        y = marched(conv, form_of(conv, x_last), x, weight)
        torch.testing.assert_close(y, eager(x, weight, conv), msg=str(conv))

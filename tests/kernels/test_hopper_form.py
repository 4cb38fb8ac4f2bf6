"""What a step of the march on Hopper reads, adds and carries, followed in plain PyTorch."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fusion_backend.kernels.conv_transpose import CONV_TRANSPOSE
from fusion_backend.kernels.hopper_form import COMB, Form
from fusion_backend.kernels.hopper_strips import Config, form_for, march_for
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.strips import three_sizes, turned
from tests.kernels.convolutions import Conv


def problem_of(conv: Conv) -> Problem:
    axes = (Axis(),) * (3 - conv.rank) + conv.axes
    return Problem(axes, conv.x[1], conv.C_out, 1, 0, torch.float32, False, False, True, False, 2**20)


def form_of(conv: Conv, pixels: int) -> Form:
    problem = problem_of(conv)
    march = march_for(problem, conv.x, Config(pixels, 16, 2, 1, 240, False), 132)
    return form_for(problem, march, 1, (0, 0, 0, 0))


def marched(conv: Conv, form: Form, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The convolution as a strip that is as wide as the image would compute it."""
    problem = problem_of(conv)
    row, middle, column = turned(problem, problem.axes)
    R, M, W = turned(problem, three_sizes(conv.x[2:]))
    outputs = [axis.output_size(size) for axis, size in ((row, R), (middle, M), (column, W))]
    Q_M, Q_W = -(-outputs[1] // middle.stride), -(-outputs[2] // column.stride)
    pairs = -(-Q_W // form.pair)

    x = x.view(*x.shape[:2], *three_sizes(x.shape[2:]))
    x = x if form.along_d else x.transpose(2, 3)
    beyond = 2 * max(*form.kernel, *form.padding) + form.pair
    x = F.pad(x, (beyond, beyond + Q_W, beyond, beyond + Q_M, 0, beyond))
    taps = weight.reshape(*weight.shape[:2], -1)
    y = x.new_zeros(x.shape[0], weight.shape[1], outputs[0], Q_M * middle.stride, Q_W * column.stride)

    carried = [x.new_zeros(())] * (form.carried * form.phases)
    first = row.padding // row.stride
    for i in range(max(first - form.halo, 0), -(-(outputs[0] + row.padding) // row.stride)):
        shifted = []
        for s_m in range(form.shifts[0]):
            m = beyond + form.first[0] + s_m
            combs = []
            for j in range(form.combs):
                w = beyond + form.first[1] + j
                combs.append(x[:, :, i, m : m + Q_M, w : w + form.pair * pairs : form.pair])
            for s_w in range(form.shifts[1]):
                together = torch.stack(combs[s_w : s_w + form.pair], -1)
                shifted.append(together.flatten(-2)[..., :Q_W])
        assert len(shifted) == form.shifts[0] * form.shifts[1]
        assert form.combs_fetched == form.shifts[0] * len(combs)
        accs = []
        for r, phases in enumerate(form.taps):
            for e, products in enumerate(phases):
                acc = carried[r * form.phases + e] if r < form.carried else x.new_zeros(())
                for shift, tap in products:
                    acc = acc + torch.einsum("ncmw,ck->nkmw", shifted[shift], taps[..., tap])
                accs.append(acc)
        carried = accs[form.stride[0] * form.phases :]
        assert len(carried) == form.carried * form.phases
        for r, e_m, e_w in itertools.product(*map(range, form.stride)):
            o_r = i * row.stride + r - row.padding
            if i >= first and 0 <= o_r < outputs[0]:
                y[:, :, o_r, e_m :: middle.stride, e_w :: column.stride] = accs[
                    (r * middle.stride + e_m) * column.stride + e_w
                ]
    y = y[..., : outputs[1], : outputs[2]]
    y = y if form.along_d else y.transpose(2, 3)
    return y.reshape(conv.y)


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


@pytest.mark.parametrize("pixels", [64, 128])
def test_every_combination_along_one_dimension(pixels: int) -> None:
    for conv in every_combination():
        form = form_of(conv, pixels)
        assert form.pair == pixels // COMB
        x, weight = (
            torch.randn(conv.x, dtype=torch.float64),
            torch.randn(conv.x[1], conv.C_out, *(axis.kernel for axis in conv.axes), dtype=torch.float64),
        )
        y = marched(conv, form, x, weight)
        options = zip(*((axis.stride, axis.padding, axis.output_padding) for axis in conv.axes), strict=True)
        torch.testing.assert_close(y, CONV_TRANSPOSE[x.dim()](x, weight, None, *options), msg=str(conv))

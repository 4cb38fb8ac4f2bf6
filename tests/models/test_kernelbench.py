"""KernelBench level 2, all problems with a transposed convolution, small: numbers, the tail found, where it ends."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernelbench import PROBLEMS
from tests.models.checking import Found, assert_accurate, assert_an_error_would_show, sites

UNKNOWN = "no step of a tail"
ACTIVATION = "not an affine or clamp operation"

NORMALISED = "y = batch.scale[c]*x + conv.bias[c]*batch.scale[c] + batch.shift[c]"  # a BatchNorm in eval

# Where the vocabulary grows, the rows of the problems that gain by it change, and nothing else.
EXPECTED: dict[int, Found] = {
    2: ("y = min(max(x + conv.bias[c] + bias_after[c], 0), 0.5)", "return: the value leaves the graph"),
    3: ("y = x + conv.bias[c] + shift", f"layer_norm: {UNKNOWN}"),
    5: ("y = x + conv.bias[c] - bias_after[c]", f"tanh: {ACTIVATION}"),
    10: ("y = x + conv.bias[c]", f"max_pool2d: {UNKNOWN}"),
    11: (NORMALISED, f"tanh: {ACTIVATION}"),
    13: ("y = x + conv.bias[c]", f"mean: {UNKNOWN}"),
    15: (NORMALISED, "batch_norm: its value has 2 users"),
    16: ("y = x + conv.bias[c]", f"mish: {ACTIVATION}"),
    19: ("y = x + conv.bias[c]", f"gelu: {ACTIVATION}"),
    20: ("y = x + conv.bias[c]", "conv_transpose3d: its value has 2 users"),
    26: (
        "y = x + conv.bias[c]",
        "add: operand args_1 of shape (2, 16, 10, 10, 10) differs by position, not by channel",
    ),
    34: ("y = x + conv.bias[c]", f"layer_norm: {UNKNOWN}"),
    36: ("y = x + conv.bias[c]", f"min: {UNKNOWN}"),
    38: ("y = x + conv.bias[c]", f"avg_pool3d: {UNKNOWN}"),
    42: ("y = x + conv.bias[c]", f"mean: {UNKNOWN}"),
    44: ("y = 0.5*x + 0.5*conv.bias[c]", f"mean: {UNKNOWN}"),
    49: ("y = x + conv.bias[c]", f"softmax: {UNKNOWN}"),
    50: ("y = first*x + conv.bias[c]*first", f"avg_pool3d: {UNKNOWN}"),
    58: ("y = x + conv.bias[c]", f"logsumexp: {UNKNOWN}"),
    60: ("y = x + conv.bias[c]", "conv_transpose3d: its value has 2 users"),
    61: ("y = max(x, 0)", f"group_norm: {UNKNOWN}"),
    72: (NORMALISED, f"avg_pool3d: {UNKNOWN}"),
    74: ("y = x + conv.bias[c]", f"leaky_relu: {ACTIVATION}"),
    77: (NORMALISED.replace("= ", "= 2*").replace("+ conv", "+ 2*conv"), f"mean: {UNKNOWN}"),
    78: ("y = x + conv.bias[c]", f"max_pool3d: {UNKNOWN}"),
    89: ("y = x + conv.bias[c]", f"max_pool3d: {UNKNOWN}"),
    91: ("y = x + conv.bias[c]", f"softmax: {UNKNOWN}"),
    93: ("y = min(x + conv.bias[c] + 0.5, 0)", f"gelu: {ACTIVATION}"),
    96: ("y = 0.5*x + 0.5*conv.bias[c]", f"max_pool3d: {UNKNOWN}"),
    100: ("y = max(0.5*x + 0.5*conv.bias[c], -0.5)", "return: the value leaves the graph"),
}


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_every_problem_has_its_expectation() -> None:
    assert list(PROBLEMS) == list(EXPECTED) and len(PROBLEMS) == 30


@pytest.mark.parametrize("number", PROBLEMS)
@torch.no_grad()
def test_numbers_are_eagers(number: int) -> None:
    assert_accurate(*PROBLEMS[number].build(small=True))


@pytest.mark.parametrize("number", PROBLEMS)
@torch.no_grad()
def test_an_error_of_the_convolution_would_show(number: int) -> None:
    assert_an_error_would_show(*PROBLEMS[number].build(small=True))


@pytest.mark.parametrize("number", PROBLEMS)
@torch.no_grad()
def test_the_one_site_has_the_tail_and_the_end_that_are_expected(number: int) -> None:
    assert sites(*PROBLEMS[number].build(small=True)) == [EXPECTED[number]]


@pytest.mark.parametrize("number", PROBLEMS)
@torch.no_grad()
def test_the_shape_of_the_benchmark_fits(number: int) -> None:
    with torch.device("meta"):
        model, (x, *others) = PROBLEMS[number].build(small=False)
        assert model.conv(x).shape == PROBLEMS[number].y
        model(x, *others)

"""Models of transformers, MONAI and torchvision, unmodified, tiny and with random weights: numbers and sites.

A package that is not installed skips its models; requirements/dev.txt says which of them CI installs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import CONV, Case
from benchmarks.measure import TOLERANCE, relative_rmse
from benchmarks.models import CONVOLUTIONS, MODELS
from fusion_backend import choice, explain, fused_post
from tests.models.checking import Found, assert_accurate, assert_an_error_would_show, sites

UNKNOWN = "no step of a tail"
ACTIVATION = "not an affine or clamp operation"

# Where the vocabulary grows, the rows of the models that gain by it change, and nothing else.
EXPECTED: dict[str, list[Found]] = {
    "sam_mask_decoder": [
        (
            "y = x + model.upscale_conv1.bias[c]",
            f"permute: {UNKNOWN}",
        ),  # the first step of a LayerNorm over the channels
        ("y = x + model.upscale_conv2.bias[c]", f"gelu: {ACTIVATION}"),
    ],
    # Each branch of residual blocks reads it twice.
    "speecht5_hifigan": [
        ("y = x + upsampler.0.bias[c]", "conv_transpose1d: its value has 4 users"),
        ("y = x + upsampler.1.bias[c]", "conv_transpose1d: its value has 4 users"),
    ],
    "vits_hifigan": [
        ("y = x + upsampler.0.bias[c]", "conv_transpose1d: its value has 4 users"),
        ("y = x + upsampler.1.bias[c]", "conv_transpose1d: its value has 4 users"),
    ],
    # Cut at the right, being causal. Dynamo breaks the graph at each padding, and makes the length vary in the second.
    "encodec_decoder": [
        ("y = x + conv.bias[c]", f"getitem: {UNKNOWN}"),
        ("y = x + conv.bias[c]", f"getitem: {UNKNOWN}"),
    ],
    # The residual unit's Snake reads it twice, and so does the residual.
    "dac_decoder": [
        ("y = x + block.0.conv_t1.bias[c]", "conv_transpose1d: its value has 2 users"),
        ("y = x + block.1.conv_t1.bias[c]", "conv_transpose1d: its value has 2 users"),
    ],
    "monai_unet": [
        ("y = x + model.1.submodule.2.0.conv.bias[c]", f"instance_norm: {UNKNOWN}"),
        ("y = x + model.2.0.conv.bias[c]", f"instance_norm: {UNKNOWN}"),
    ],
    "monai_dynunet": [("", f"cat: {UNKNOWN}"), ("", f"cat: {UNKNOWN}")],
    "monai_autoencoder": [
        ("y = x + decode.decode_0.conv.conv.bias[c]", f"instance_norm: {UNKNOWN}"),
        ("y = x + decode.decode_1.conv.conv.bias[c]", "return: the value leaves the graph"),
    ],
    "mask_rcnn_head": [("y = max(x + 1.conv5_mask.bias[c], 0)", f"conv2d: {UNKNOWN}")],
}


# With the fused kernel, in inference: residual blocks read the up-convolution's output beside what is made of it. DAC's
# snakes take more time than the pass that is saved.
KEPT: dict[str, list[str]] = {
    "speecht5_hifigan": [f"y = x + upsampler.{i}.bias[c]; v1 = leaky_relu(y, 0.1); y is kept" for i in range(2)],
    "vits_hifigan": [f"y = x + upsampler.{i}.bias[c]; v1 = leaky_relu(y, 0.1); y is kept" for i in range(2)],
    "dac_decoder": [f"y = x + block.{i}.conv_t1.bias[c]" for i in range(2)],
}


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def build(name: str, small: bool = True) -> tuple[nn.Module, tuple[Tensor, ...]]:
    package = MODELS[name].package
    try:
        pytest.importorskip(package, reason=f"{package} is not installed")
    except RuntimeError as problem:  # torchvision, where it was built for another torch
        pytest.skip(f"{package} cannot be imported: {problem}")
    return MODELS[name](small)


def test_every_model_has_its_expectation() -> None:
    assert list(MODELS) == list(EXPECTED)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_numbers_are_eagers(name: str) -> None:
    assert_accurate(*build(name))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_error_of_the_convolutions_would_show(name: str) -> None:
    assert_an_error_would_show(*build(name))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_sites_are_those_expected(name: str) -> None:
    assert sites(*build(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_what_the_fused_kernel_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU tensor the operator computes its reference."""
    monkeypatch.setattr(choice, "why_unsupported", lambda device, dtype: None)
    model, inputs = build(name)
    options = {"fused_post.strict": True, "fused_post.kernel": "fused"}
    compiled = torch.compile(model, backend=fused_post, options=options)
    assert [site.equation for site in explain(compiled, *inputs).sites] == KEPT[name]
    expected = model(*inputs)
    allowed = 2 * relative_rmse(expected, model, inputs) + TOLERANCE[expected.dtype] / 10
    assert relative_rmse(compiled(*inputs), model, inputs) <= allowed


# Not EnCodec, which reads its paddings off tensors: without data there is nothing to read.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "encodec_decoder"])
@torch.no_grad()
def test_the_configuration_of_the_benchmark_has_the_convolutions_that_are_measured(name: str) -> None:
    found: list[Case] = []

    def record(conv: Any, inputs: tuple[Tensor, ...]) -> None:
        sizes = (conv.kernel_size, conv.stride, conv.padding, conv.output_padding)
        assert all(len(set(each)) == 1 for each in sizes)
        found.append(Case("", tuple(inputs[0].shape), conv.out_channels, *(each[0] for each in sizes)))

    with torch.device("meta"):
        model, inputs = build(name, small=False)
        for module in model.modules():
            if isinstance(module, tuple(CONV.values())):
                module.register_forward_pre_hook(record)
        assert model(*inputs).shape[0] == inputs[0].shape[0]
    assert found == [Case("", *sizes) for sizes in CONVOLUTIONS[name]]

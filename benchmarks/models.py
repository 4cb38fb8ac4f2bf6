"""Models of installed packages, unmodified and with random weights: fused_post beside eager, Inductor and max-autotune.

    python -m benchmarks.models [--rows dac_decoder,monai_unet] [--dtypes float32] [--limit 90] [--budget 150] [--cpu]
                                [--contenders "eager,inductor,fused_post,fused_post fused"] [--out FILE]

A model whose package is not installed is left out, and so is said, in the data too. Configurations are the packages'
own defaults (nnU-Net's for DynUNet, those of the tutorials for the rest of MONAI), and tiny ones of the same structure
with ``--cpu``. benchmarks/whole.py says how they are measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.whole import Inputs, main


class Whole(nn.Module):
    """A model that is called with tensors alone and returns its first output, as what measures it expects."""

    def __init__(self, model: nn.Module, **arguments: object) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments

    def forward(self, *inputs: Tensor) -> Tensor:
        result = self.model(*inputs, **self.arguments)
        return result if isinstance(result, Tensor) else result[0]


def sam_mask_decoder(small: bool) -> tuple[nn.Module, Inputs]:
    """The points of a grid on one image: 64 a call, as in automatic mask generation."""
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
    from transformers.models.sam.modeling_sam import SamMaskDecoder

    C, size, points = (32, 8, 2) if small else (256, 64, 64)
    sizes = {"hidden_size": C, "mlp_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"iou_head_hidden_dim": C, "num_multimask_outputs": 1}
    # As SamModel sets it; with none, the decoder logs a warning, which breaks the graph.
    config = SamMaskDecoderConfig(**(sizes if small else {}), attn_implementation="sdpa")
    image = (1, C, size, size)
    inputs = (torch.randn(image), torch.randn(image), torch.randn(1, points, 2, C), torch.randn(image))
    return Whole(SamMaskDecoder(config), multimask_output=True), inputs


def speecht5_hifigan(small: bool) -> tuple[nn.Module, Inputs]:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    if not small:
        return SpeechT5HifiGan(SpeechT5HifiGanConfig()), (torch.randn(8, 256, 80),)
    return SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=16, **SMALL_HIFIGAN)), (torch.randn(1, 10, 16),)


def vits_hifigan(small: bool) -> tuple[nn.Module, Inputs]:
    from transformers import VitsConfig
    from transformers.models.vits.modeling_vits import VitsHifiGan

    if not small:
        return VitsHifiGan(VitsConfig()), (torch.randn(8, 192, 256),)
    return VitsHifiGan(VitsConfig(flow_size=16, **SMALL_HIFIGAN)), (torch.randn(1, 16, 10),)


SMALL_HIFIGAN = {
    "upsample_initial_channel": 32,
    "upsample_rates": [4, 4],
    "upsample_kernel_sizes": [8, 8],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1], [3]],
}


def encodec_decoder(small: bool) -> tuple[nn.Module, Inputs]:
    from transformers import EncodecConfig, EncodecModel

    if not small:
        return EncodecModel(EncodecConfig()).decoder, (torch.randn(8, 128, 375),)
    config = EncodecConfig(num_filters=8, hidden_size=16, upsampling_ratios=[4, 2], num_lstm_layers=1)
    return EncodecModel(config).decoder, (torch.randn(1, 16, 20),)


def dac_decoder(small: bool) -> tuple[nn.Module, Inputs]:
    from transformers import DacConfig, DacModel

    if not small:
        return DacModel(DacConfig()).decoder, (torch.randn(4, 1024, 250),)
    config = DacConfig(encoder_hidden_size=8, decoder_hidden_size=32, downsampling_ratios=[2, 4])
    return DacModel(config).decoder, (torch.randn(1, config.hidden_size, 20),)


def monai_unet(small: bool) -> tuple[nn.Module, Inputs]:
    from monai.networks.nets import UNet

    if not small:
        return UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), (torch.randn(4, 1, 96, 96, 96),)
    return UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=1), (torch.randn(1, 1, 32, 32),)


def monai_dynunet(small: bool) -> tuple[nn.Module, Inputs]:
    from monai.networks.nets import DynUNet

    if not small:
        strides = [1, 2, 2, 2, 2, 2]
        return DynUNet(3, 1, 3, [3] * 6, strides, strides[1:]), (torch.randn(2, 1, 128, 128, 128),)
    return DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[8, 16, 32]), (torch.randn(1, 1, 16, 16, 16),)


def monai_autoencoder(small: bool) -> tuple[nn.Module, Inputs]:
    from monai.networks.nets import AutoEncoder

    if not small:
        return AutoEncoder(2, 1, 1, (32, 64, 128, 256), (2, 2, 2, 2)), (torch.randn(16, 1, 256, 256),)
    return AutoEncoder(2, 1, 1, (8, 16), (2, 2)), (torch.randn(1, 1, 32, 32),)


def mask_rcnn_head(small: bool) -> tuple[nn.Module, Inputs]:
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

    N, C, classes = (2, 16, 3) if small else (100, 256, 91)
    head = nn.Sequential(MaskRCNNHeads(C, (C,) * (1 if small else 4), 1), MaskRCNNPredictor(C, C, classes))
    return head, (torch.randn(N, C, 14, 14),)


@dataclass(frozen=True)
class Model:
    package: str
    build: Callable[[bool], tuple[nn.Module, Inputs]]

    def __call__(self, small: bool) -> tuple[nn.Module, Inputs]:
        # transformers looks for a package of this name; from the repository's root it would find our folder.
        sys.modules.setdefault("kernels", None)
        model, inputs = self.build(small)
        return model.eval(), inputs


MODELS: dict[str, Model] = {
    "sam_mask_decoder": Model("transformers", sam_mask_decoder),
    "speecht5_hifigan": Model("transformers", speecht5_hifigan),
    "vits_hifigan": Model("transformers", vits_hifigan),
    "encodec_decoder": Model("transformers", encodec_decoder),
    "dac_decoder": Model("transformers", dac_decoder),
    "monai_unet": Model("monai", monai_unet),
    "monai_dynunet": Model("monai", monai_dynunet),
    "monai_autoencoder": Model("monai", monai_autoencoder),
    "mask_rcnn_head": Model("torchvision", mask_rcnn_head),
}


BUILDS = MODELS

# x, C_out, kernel, stride, padding and output padding of each of their transposed convolutions.
Sizes = tuple[tuple[int, ...], int, int, int, int, int]
CONVOLUTIONS: dict[str, tuple[Sizes, ...]] = {
    "sam_mask_decoder": (
        ((64, 256, 64, 64), 64, 2, 2, 0, 0),
        ((64, 64, 128, 128), 32, 2, 2, 0, 0),
    ),
    "speecht5_hifigan": (
        ((8, 512, 256), 256, 8, 4, 2, 0),
        ((8, 256, 1024), 128, 8, 4, 2, 0),
        ((8, 128, 4096), 64, 8, 4, 2, 0),
        ((8, 64, 16384), 32, 8, 4, 2, 0),
    ),
    "vits_hifigan": (
        ((8, 512, 256), 256, 16, 8, 4, 0),
        ((8, 256, 2048), 128, 16, 8, 4, 0),
        ((8, 128, 16384), 64, 4, 2, 1, 0),
        ((8, 64, 32768), 32, 4, 2, 1, 0),
    ),
    "encodec_decoder": (
        ((8, 512, 375), 256, 16, 8, 0, 0),
        ((8, 256, 3000), 128, 10, 5, 0, 0),
        ((8, 128, 15000), 64, 8, 4, 0, 0),
        ((8, 64, 60000), 32, 4, 2, 0, 0),
    ),
    "dac_decoder": (
        ((4, 1536, 250), 768, 16, 8, 4, 0),
        ((4, 768, 2000), 384, 16, 8, 4, 0),
        ((4, 384, 16000), 192, 8, 4, 2, 0),
        ((4, 192, 64000), 96, 4, 2, 1, 0),
    ),
    "monai_unet": (
        ((4, 384, 6, 6, 6), 64, 3, 2, 1, 1),
        ((4, 128, 12, 12, 12), 32, 3, 2, 1, 1),
        ((4, 64, 24, 24, 24), 16, 3, 2, 1, 1),
        ((4, 32, 48, 48, 48), 2, 3, 2, 1, 1),
    ),
    "monai_dynunet": (
        ((2, 320, 4, 4, 4), 320, 2, 2, 0, 0),
        ((2, 320, 8, 8, 8), 256, 2, 2, 0, 0),
        ((2, 256, 16, 16, 16), 128, 2, 2, 0, 0),
        ((2, 128, 32, 32, 32), 64, 2, 2, 0, 0),
        ((2, 64, 64, 64, 64), 32, 2, 2, 0, 0),
    ),
    "monai_autoencoder": (
        ((16, 256, 16, 16), 128, 3, 2, 1, 1),
        ((16, 128, 32, 32), 64, 3, 2, 1, 1),
        ((16, 64, 64, 64), 32, 3, 2, 1, 1),
        ((16, 32, 128, 128), 1, 3, 2, 1, 1),
    ),
    "mask_rcnn_head": (((100, 256, 14, 14), 256, 2, 2, 0, 0),),
}


def convolutions() -> list[Case]:
    """As cases of benchmarks/conv_transpose.py, by whose data ``auto`` chooses."""
    return [
        Case(f"{model} {i}", *sizes, tail="bias_relu")
        for model, of_model in CONVOLUTIONS.items()
        for i, sizes in enumerate(of_model, 1)
    ]


if __name__ == "__main__":
    main("benchmarks.models", __doc__, BUILDS, packages=("transformers", "monai", "torchvision"))

"""Models of installed packages, unmodified and with random weights: fused_post beside eager, Inductor and max-autotune.

    python -m benchmarks.models [--rows dac_decoder,monai_unet] [--dtypes float32] [--budget 300] [--cpu] [--out FILE]

The time is that of the whole model, the error that of its first output against float64; a contender that is wrong, or
that raises, is not timed. Each row also says what became of each transposed convolution. The data goes to
benchmarks/results as JSON after every row. A model whose package is not installed is left out, and so is said.

Configurations are the packages' own defaults (nnU-Net's for DynUNet, those of the tutorials for the rest of MONAI), and
tiny ones of the same structure with ``--cpu``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn

import fusion_backend
from benchmarks.measure import TOLERANCE, environment, in_turn, peak_bytes, relative_rmse, summary
from benchmarks.sites import PEERS, RESULTS, backend, names, show, twin

Inputs = tuple[Tensor, ...]
Build = Callable[[bool], tuple[nn.Module, Inputs]]


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


# Behind a graph break the contenders share code, and with it Dynamo's cache and its limit, unless each has its own.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def contenders(model: nn.Module) -> dict[str, Callable[..., Tensor]]:
    def compiled(name: str, **arguments: object) -> Callable[..., Tensor]:
        return torch.compile(twin(model, name), **ISOLATED, **arguments)

    return {
        "eager": model,
        "inductor": compiled("inductor"),
        "inductor max-autotune": compiled("autotune", mode="max-autotune"),
        "fused_post": compiled("fused_post", backend=backend()),
    }


def measure(name: str, build: Build, device: str, dtype: torch.dtype) -> dict[str, object]:
    """One row: what became of the sites, and every contender's error, median time, speed and peak memory."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device(device):
        model, inputs = build(device == "cpu")
    model, inputs = model.to(dtype), tuple(tensor.to(dtype) for tensor in inputs)
    sites = fusion_backend.explain(model, *inputs).sites
    torch._dynamo.reset()  # what explain has seen of the shapes

    shape: tuple[int, ...] | None = None
    columns: dict[str, dict[str, object]] = {}
    correct: dict[str, Callable[[], object]] = {}
    for contender, run in contenders(model).items():
        try:
            result = run(*inputs)
            shape, error = tuple(result.shape), relative_rmse(result, model, inputs)
        except Exception as raised:  # one contender that cannot run must not hide the others
            columns[contender] = {"raised": f"{type(raised).__name__}: {raised}"[:300]}
            continue
        columns[contender] = {"error": error}
        if error <= 2 * columns["eager"].get("error", 0.0) + TOLERANCE[dtype] / 10:
            correct[contender] = lambda run=run: run(*inputs)

    for contender, times in in_turn(correct, device).items() if correct else ():
        columns[contender] |= summary(times)
        if device == "cuda":
            columns[contender]["peak_bytes"] = peak_bytes(correct[contender])
    best = min((columns[peer]["ms"] for peer in PEERS if peer in correct), default=float("nan"))
    for contender in correct:
        columns[contender]["speed"] = best / columns[contender]["ms"]
    return {
        "case": name,
        "x": tuple(inputs[0].shape),
        "y": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "memory_format": "contiguous_format",
        "sites": [asdict(site) for site in sites],
        "contenders": columns,
    }


def main(name: str, about: str, rows: Mapping[str, Build], packages: tuple[str, ...] = ()) -> None:
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--rows", type=names, default=list(rows), help=f"of {','.join(rows)}")
    parser.add_argument("--dtypes", type=names, default=["float32"])
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/{name}_<device>.json")
    args = parser.parse_args()
    unknown = set(args.rows) - set(rows)
    if unknown:
        parser.error(f"unknown rows {sorted(unknown)}; known are {list(rows)}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("no GPU here; --cpu measures small shapes on the CPU")

    device = "cpu" if args.cpu else "cuda"
    where = "cpu" if args.cpu else "-".join(torch.cuda.get_device_name().lower().replace("/", " ").split())
    out = args.out or RESULTS / f"{name}_{where}.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    start = time.monotonic()
    data = environment() | {"device": device, "packages": {package: _version(package) for package in packages}}
    data["rows"] = []
    for row_name in args.rows:
        for dtype in args.dtypes:
            if time.monotonic() - start > args.budget:
                print(f"\nthe budget of {args.budget:.0f} s is spent: {out} lacks what follows from {row_name} {dtype}")
                return
            try:
                with torch.no_grad():
                    row = measure(row_name, rows[row_name], device, getattr(torch, dtype))
            except ModuleNotFoundError as missing:
                print(f"\n{row_name}: left out, {missing}")
                continue
            show(row)
            kernels = Counter(site["kernel"] or "missed" for site in row["sites"])
            print(f"  sites: {', '.join(f'{count} {kernel}' for kernel, count in kernels.items())}")
            data["rows"].append(row)
            out.write_text(json.dumps(data, indent=1) + "\n")
            torch.cuda.empty_cache()
    print(f"\n{out}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main("models", __doc__, MODELS, ("transformers", "monai", "torchvision"))

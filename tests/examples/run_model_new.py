"""Compare ModelNew with the model that it answers, under TRITON_INTERPRET=1.

Prints one JSON object: for each case, relative RMSE against float64 of both, whether NaNs stand where float64 has them,
and the grids of the marches that ModelNew made. A CPU has no shared memory: where the march is to run, it is given a
limit as a GPU has it.
"""

import importlib.util
import itertools
import json
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels.interpreting import _cast, _dot, _patch_tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
SCALES = (2.0, 0.5, -3.0, 0.0)
SHAPES = {"one pixel": (1, 3, 1, 1), "odd": (2, 3, 5, 7), "aligned": (1, 3, 32, 32)}
CHANNELS = (1, 5, 16)
DTYPES = (torch.float32, torch.bfloat16)

# x, output channels, then kernel, stride, padding and output padding.
MARCHES = {
    "k3s2": ((2, 20, 5, 7), 24, 3, 2, 1, 1),
    "k4s2": ((2, 16, 5, 7), 33, 4, 2, 1, 0),
    "k2s2": ((2, 20, 4, 16), 24, 2, 2, 0, 0),
    "k5s2": ((1, 16, 5, 3), 17, 5, 2, 2, 1),
    "k3s1": ((2, 20, 5, 7), 24, 3, 1, 1, 0),
    "k4s4": ((1, 20, 3, 5), 24, 4, 4, 0, 0),
    "k1s3": ((1, 20, 3, 5), 24, 1, 3, 0, 2),  # outputs without a tap
    "uneven": ((2, 3, 4, 5), 17, (3, 2), (2, 3), (1, 0), (0, 2)),
    "padding cuts off": ((1, 17, 7, 4), 3, (4, 2), (2, 2), (4, 0), 0),
    "one pixel": ((1, 17, 1, 1), 16, 3, 2, 1, 0),
    "one column": ((3, 3, 13, 1), 17, 3, 2, 1, 1),
    "two strips": ((1, 3, 2, 67), 70, 3, 2, 1, 1),
    "segments": ((1, 16, 41, 3), 16, 3, 2, 1, 1),
}

# Under 99 KiB these are too many taps times channels.
UNFIT = {
    "wide": ((1, 260, 2, 3), 16, 3, 2, 1, 1),
    "large": ((1, 32, 3, 3), 16, 7, 2, 3, 1),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def rmse(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.double() - expected).nan_to_num()
    return (difference.square().mean().sqrt() / (expected.nan_to_num().square().mean().sqrt() + 1e-30)).item()


def compare(reference: torch.nn.Module, ours: torch.nn.Module, x: torch.Tensor) -> dict[str, object]:
    ours.load_state_dict(reference.state_dict())
    result, eager = ours.to(x.dtype)(x), reference.to(x.dtype)(x)
    expected = reference.double()(x.double())
    return {
        "error": rmse(result, expected),
        "eager": rmse(eager, expected),
        "dtype": str(result.dtype),
        "same_shape": result.shape == eager.shape,
        "same_format": x.is_contiguous() == result.is_contiguous() or 1 in x.shape[1:],
        "same_nan": torch.equal(result.isnan(), expected.isnan()),
        "nans": int(result.isnan().sum()),
    }


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_new", EXAMPLES / "model_new.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recording:
    """The march's kernel, the grids of its launches, and whether its offsets are to take 64 bits at all sizes."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches, self.long = kernel, [], False

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches.append(grid)
            self.kernel[grid](*args, **constants | {"LONG": self.long})

        return launch


def compare_marches(reference: type, ours: type, kernel: Recording) -> dict[str, dict[str, object]]:
    rows = {}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for (name, (shape, C, *sizes)), layout, dtype in itertools.product((MARCHES | UNFIT).items(), FORMATS, dtypes):
        arguments = (shape[1], C, *sizes, (C, 1, 1), 1.5)
        x = torch.randn(shape).to(dtype).to(memory_format=FORMATS[layout])
        x[0, 0, shape[2] // 2, shape[3] // 2] = float("nan")
        kernel.launches = []
        kernel.long = layout == "channels_last" and dtype == torch.float32
        row = compare(reference(*arguments), ours(*arguments), x)
        rows[f"{name}, {layout}, {dtype}"] = row | {"launches": kernel.launches}
    return rows


def main() -> None:
    torch.manual_seed(0)
    model, module = runpy.run_path(str(EXAMPLES / "kernelbench.py"))["Model"], load()
    kernel = module.row_march_kernel = Recording(module.row_march_kernel)
    rows = {}
    for (name, shape), C, scale, dtype in itertools.product(SHAPES.items(), CHANNELS, SCALES, DTYPES):
        arguments = (shape[1], C, 3, 2, 1, 1, (C, 1, 1), scale)
        x = torch.randn(shape).to(dtype)
        x[0, 0, 0, 0] = float("nan")
        for way, limit in (("convolved", 0), ("marched", 99 * 1024)):
            kernel.launches = []
            with mock.patch.object(module, "shared_memory_limit", return_value=limit):
                row = compare(model(*arguments), module.ModelNew(*arguments), x)
            rows[f"{name}, {C} channels, scale {scale}, {dtype}, {way}"] = row | {"launches": kernel.launches}
    with mock.patch.object(module, "shared_memory_limit", return_value=99 * 1024):
        marches = compare_marches(model, module.ModelNew, kernel)
    print(json.dumps({"scales": rows, "marches": marches}))


if __name__ == "__main__":
    # The interpreter alone multiplies the bits of bfloat16, cuts float32 off to it, and needs an older NumPy.
    with (
        torch.no_grad(),
        mock.patch.multiple(InterpreterBuilder, cast_impl=_cast, create_dot=_dot),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_tensor),
    ):
        main()

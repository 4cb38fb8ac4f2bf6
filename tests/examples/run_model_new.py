"""Compare ModelNew with the model that it answers, under TRITON_INTERPRET=1.

Prints one JSON object: for each case, relative RMSE against float64 of both, and whether NaNs stand in the same places.
"""

import itertools
import json
import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SCALES = (2.0, 0.5, -3.0, 0.0)
SHAPES = {"one pixel": (1, 3, 1, 1), "odd": (2, 3, 5, 7), "aligned": (1, 3, 32, 32)}
CHANNELS = (1, 5, 16)
DTYPES = (torch.float32, torch.bfloat16)


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
        "same_nan": torch.equal(result.isnan(), eager.isnan()),
        "nans": int(result.isnan().sum()),
    }


def main() -> None:
    torch.manual_seed(0)
    model = runpy.run_path(str(EXAMPLES / "kernelbench.py"))["Model"]
    model_new = runpy.run_path(str(EXAMPLES / "model_new.py"))["ModelNew"]
    rows = {}
    for (name, shape), C, scale, dtype in itertools.product(SHAPES.items(), CHANNELS, SCALES, DTYPES):
        arguments = (shape[1], C, 3, 2, 1, 1, (C, 1, 1), scale)
        x = torch.randn(shape).to(dtype)
        x[0, 0, 0, 0] = float("nan")
        rows[f"{name}, {C} channels, scale {scale}, {dtype}"] = compare(model(*arguments), model_new(*arguments), x)
    print(json.dumps(rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()

"""Who runs a kernel in the tests, on which devices and dtypes, and the coefficients that an operator is given."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Value = torch.Tensor | float | None

GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU_MARKS)])


def every(**implementations: Any) -> pytest.MarkDecorator:
    """Runs a test once for each, as its ``run``; the one that is called gpu needs a GPU."""
    marks = {"gpu": GPU_MARKS}
    together = [pytest.param(each, id=name, marks=marks.get(name, ())) for name, each in implementations.items()]
    return pytest.mark.parametrize("run", together)


def split(values: Sequence[Value]) -> tuple[tuple[torch.Tensor | None, ...], tuple[Any, ...]]:
    """The operator's tensors and numbers, from one value per coefficient."""
    values = (*values, None, None, None, None)[:4]
    tensors = tuple(value if isinstance(value, torch.Tensor) else None for value in values)
    missing = (1.0, 0.0, None, None)
    numbers = tuple(v if isinstance(v, float) else none for v, none in zip(values, missing, strict=True))
    return tensors, numbers

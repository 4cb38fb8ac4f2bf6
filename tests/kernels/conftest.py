from collections.abc import Iterator

import pytest
import torch

from tests.kernels.implementations import GPU_MARKS


@pytest.fixture(params=[pytest.param("cuda", marks=GPU_MARKS)])
def empty_gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """A GPU's name, for what takes one; nothing of other tests is kept in its memory."""
    torch.cuda.empty_cache()
    yield request.param
    torch.cuda.empty_cache()

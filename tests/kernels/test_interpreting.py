from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from fusion_backend.kernels import epilogue as kernels
from tests.kernels.interpreting import interpreted


def triton_as_it_is() -> dict[str, dict[str, Any]]:
    places = (
        tl,
        tl.core,
        tl.math,
        tl.standard,
        tl.tensor,
        tl.core.dtype,
        tl.core.range,
        tl.core.tensor_descriptor_base,
    )
    return {str(place): dict(vars(place)) for place in places}


def without_dict(members: dict[str, Any]) -> dict[str, Any]:
    return {name: member for name, member in members.items() if not name.startswith("__")}


@pytest.mark.parametrize("channels_last", [False, True])
def test_leaves_triton_as_it_was(channels_last: bool) -> None:
    """Else kernels compiled later in the same process would fail, and in some orders of the tests only."""
    twin = interpreted(kernels)
    x, shift = torch.randn(2, 3, 4, 5), torch.randn(3)
    before = triton_as_it_is()
    y = twin._out_of_place(x, (None, shift, None, None), (1.0, 0.0, 0.0, None), channels_last)
    torch.testing.assert_close(y, kernels.reference(x, None, shift, 0.0))
    after = triton_as_it_is()
    for place, members in before.items():
        changed = {
            name
            for name in without_dict(members).keys() | without_dict(after[place]).keys()
            if members.get(name) is not after[place].get(name)
        }
        assert not changed, place

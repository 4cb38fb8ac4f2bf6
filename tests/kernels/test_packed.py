"""Packed copies live as long as their weight is alive and unchanged, and no longer."""

import gc
import weakref

import pytest
import torch

from fusion_backend.kernels.packed import MOST_COPIES, PackedWeights


class Counted:
    """Packs by doubling, and counts how often."""

    def __init__(self) -> None:
        self.times = 0
        self.kept = PackedWeights()

    def __call__(self, weight: torch.Tensor, key: object = "key") -> torch.Tensor:
        def pack() -> torch.Tensor:
            self.times += 1
            return weight * 2

        return self.kept.get(weight, key, pack)


def test_packs_once_for_each_weight_and_key() -> None:
    packed = Counted()
    one, two = torch.ones(3), torch.ones(3)
    for _ in range(3):
        assert torch.equal(packed(one), one * 2)
    assert packed.times == 1
    packed(two)
    packed(one, "other")
    assert packed.times == 3 and len(packed.kept) == 3
    packed(one)
    assert packed.times == 3


CHANGES = {
    "in place": lambda weight: weight.mul_(3),
    "through a view": lambda weight: weight.view(-1)[1:].zero_(),
    "by an optimizer": lambda weight: torch.optim.SGD([weight], 0.1).step(),
    "new data": lambda weight: setattr(weight, "data", torch.full((2, 2), 7.0)),
    "new data elsewhere": lambda weight: weight.set_(torch.full((2, 2), 8.0)),
    "turned": lambda weight: weight.t_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_packs_again_once_the_weight_has_changed(change) -> None:
    packed = Counted()
    weight = torch.nn.Parameter(torch.arange(4.0).view(2, 2))
    weight.grad = torch.ones(2, 2)
    packed(weight)
    with torch.no_grad():
        change(weight)
    assert torch.equal(packed(weight), weight * 2)
    assert torch.equal(packed(weight), weight * 2)
    assert packed.times == 2 and len(packed.kept) == 1


def test_nothing_outlives_the_weight() -> None:
    packed = Counted()
    weight = torch.nn.Parameter(torch.ones(3))
    copy, alive = weakref.ref(packed(weight)), weakref.ref(weight)
    assert len(packed.kept) == 1
    del weight
    gc.collect()
    assert alive() is None and copy() is None and len(packed.kept) == 0


def test_keeps_a_few_copies_of_one_weight() -> None:
    packed = Counted()
    weight = torch.ones(3)
    for key in range(3 * MOST_COPIES):
        packed(weight, key)
    assert len(packed.kept) == MOST_COPIES


def test_keeps_nothing_of_what_has_no_version_or_no_values() -> None:
    packed = Counted()
    with torch.inference_mode():
        weight = torch.ones(3)
        packed(weight)
        weight.mul_(3)
        assert torch.equal(packed(weight), torch.full((3,), 6.0))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        packed(torch.ones(3))
    assert len(packed.kept) == 0

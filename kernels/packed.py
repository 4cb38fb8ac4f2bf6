"""Packed copies of weights, each kept for as long as its weight is alive and unchanged.

A weight has changed when its version or its address has. What no version counts is not noticed: a write through
``weight.data`` or from another library. Nothing is kept for an inference tensor, which has no version; nor while a CUDA
graph is captured, where memory belongs to the graph and a replay must read the weight anew; nor beside Inductor's CUDA
graph trees, which account for all memory that is alive between calls.
"""

import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

# Ways in which one weight is packed at a time: a configuration each for a few input sizes.
MOST_COPIES = 4


class PackedWeights:
    def __init__(self) -> None:
        self._kept: Any = WeakIdKeyDictionary()

    def __len__(self) -> int:
        return sum(len(copies) for _, copies in self._kept.values())

    def get(self, weight: torch.Tensor, key: Hashable, pack: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``pack`` returns, or returned for this weight and ``key`` before."""
        if not _keeps(weight):
            return pack()
        state = (weight._version, weight.data_ptr(), weight.shape, weight.stride())
        kept = self._kept.get(weight)
        if kept is None or kept[0] != state:
            kept = self._kept[weight] = (state, {})
        copies: dict[Hashable, torch.Tensor] = kept[1]
        packed = copies.get(key)
        if packed is None:
            if len(copies) == MOST_COPIES:
                del copies[next(iter(copies))]
            # Without a history, which would keep the weight alive.
            packed = copies[key] = pack().detach()
        return packed


def _keeps(weight: torch.Tensor) -> bool:
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.is_inference():
        return False
    return not (weight.is_cuda and (torch.cuda.is_current_stream_capturing() or _has_graph_trees(weight.device)))


def _has_graph_trees(device: torch.device) -> bool:
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return trees.get_manager(index, create_if_none_exists=False) is not None

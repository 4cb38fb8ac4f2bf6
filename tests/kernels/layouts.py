"""The two layouts in memory: contiguous, and ``last``, which is channels_last."""

import torch


def laid_out(x: torch.Tensor, last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def is_laid_out(x: torch.Tensor, last: bool) -> bool:
    return (x.movedim(1, -1) if last else x).is_contiguous()


def unflattened(memory: torch.Tensor, shape: tuple[int, ...], last: bool) -> torch.Tensor:
    return memory.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else memory.view(shape)

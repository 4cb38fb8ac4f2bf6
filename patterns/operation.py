"""A row of the vocabulary: one operation, its parameters in torch's order, and its spellings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Operation:
    """``parameters`` beyond ``positional`` are keyword-only in Python, not in ATen.

    ``module``      the module that is this operation, with its parameters as attributes
    ``activation``  from the parameters, but for the first, to the step that a tail then takes: its name among the
                    kernels' activations and its own parameters; or in words why it takes none
    """

    name: str
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    positional: int = 2
    functions: tuple[Callable[..., Any], ...] = ()
    in_place_functions: tuple[Callable[..., Any], ...] = ()
    module: type[nn.Module] | None = None
    activation: Callable[..., tuple[Any, ...] | str] | None = None

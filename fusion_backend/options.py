"""What a user may pass as ``mode=`` and ``options=``: everything Inductor takes, and our own keys beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

PREFIX = "fused_post."
KERNELS = ("auto", "fused", "epilogue", "inductor")


@dataclass(frozen=True)
class Options:
    """``kernel``: which implementation the sites get, one of ``KERNELS``. ``strict``: raise our own mistakes."""

    kernel: str = "auto"
    strict: bool = False


def parse(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options, and the rest, which is Inductor's. Raises ValueError on a key or a value of ours that is unknown."""
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options={options!r}; allowed is a dict from option name to value")
    for key in options or {}:
        if not isinstance(key, str):
            raise ValueError(f"option {key!r} is not a str; options are named by strings such as {PREFIX}kernel")
    ours = {key: value for key, value in (options or {}).items() if key.startswith(PREFIX)}
    rest = {key: value for key, value in (options or {}).items() if key not in ours}
    known = [PREFIX + name for name in Options.__dataclass_fields__]
    for key in ours:
        if key not in known:
            raise ValueError(f"unknown option {key!r}; fused_post's own options are {known}")
    parsed = Options(**{key.removeprefix(PREFIX): value for key, value in ours.items()})
    if parsed.kernel not in KERNELS:
        raise ValueError(f"{PREFIX}kernel={parsed.kernel!r}; allowed are {list(KERNELS)}")
    if not isinstance(parsed.strict, bool):
        raise ValueError(f"{PREFIX}strict={parsed.strict!r}; allowed are True and False")
    return parsed, rest


def inductor(mode: str | None, options: Mapping[str, Any]) -> Callable[..., Any]:
    """Inductor as ``torch.compile(mode=mode, options=options)`` would call it, with the checks that it makes."""
    try:
        return torch._TorchCompileInductorWrapper(mode, dict(options), dynamic=None)
    except RuntimeError as error:
        known = [PREFIX + name for name in Options.__dataclass_fields__]
        raise ValueError(f"{error}; fused_post's own options are {known}") from error

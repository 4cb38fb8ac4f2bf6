"""What a user may pass as ``mode=`` and ``options=``: everything Inductor takes, and our own keys beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._inductor.config

PREFIX = "fused_post."
KERNELS = ("auto", "fused", "epilogue", "inductor")
OURS = ("kernel", "strict")


@dataclass(frozen=True)
class Options:
    """What the user asked for, of us and of Inductor.

    ``kernel``    which implementation the sites get, one of ``KERNELS``
    ``strict``    raise our own mistakes
    ``measures``  Inductor's ``max_autotune``: what is fastest is measured while the model is compiled
    ``replayed``  Inductor's ``triton.cudagraphs``: calls are replayed as CUDA graphs
    """

    kernel: str = "auto"
    strict: bool = False
    measures: bool = False
    replayed: bool = False


def read(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Options, Callable[..., Any]]:
    """What ``torch.compile(mode=mode, options=options)`` asks for, and Inductor as it would call it.

    Raises ValueError on an unknown key or value.
    """
    ours, rest = _parse(options)
    compiler = inductor(mode, rest)
    config, default = compiler.config, torch._inductor.config  # type: ignore[attr-defined]
    return replace(
        ours,
        measures=bool(config.get("max_autotune", default.max_autotune)),
        replayed=bool(config.get("triton.cudagraphs", default.triton.cudagraphs)),
    ), compiler


def _parse(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options, and the rest, which is Inductor's. Raises ValueError on a key or a value of ours that is unknown."""
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"options={options!r}; allowed is a dict from option name to value")
    for key in options or {}:
        if not isinstance(key, str):
            raise ValueError(f"option {key!r} is not a str; options are named by strings such as {PREFIX}kernel")
    ours = {key: value for key, value in (options or {}).items() if key.startswith(PREFIX)}
    rest = {key: value for key, value in (options or {}).items() if key not in ours}
    known = [PREFIX + name for name in OURS]
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
        known = [PREFIX + name for name in OURS]
        raise ValueError(f"{error}; fused_post's own options are {known}") from error

"""Timing and accuracy for the benchmarks: contenders in turn, on a cold cache, checked against float64 first."""

from __future__ import annotations

import copy
import datetime
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

# Relative; a contender's error may exceed twice eager's by a tenth of this.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
CACHE_BYTES = 256 << 20  # more than any GPU's L2


def relative_rmse(result: Tensor, model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """RMS of result - model(*inputs) in float64, over that of model(*inputs); in slices along N to save memory."""
    exact = copy.deepcopy(model).double()
    error = size = 0.0
    for part, *parts in zip(result.split(8), *(tensor.split(8) for tensor in inputs), strict=True):
        expected = exact(*(tensor.double() for tensor in parts))
        error += (part.double() - expected).square().sum().item()
        size += expected.square().sum().item()
    return (error / size) ** 0.5


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float = 1.0,
    most: int = 100,
    host: Literal["beside", "ahead", "waited for", "alone"] = "beside",
) -> dict[str, list[float]]:
    """Milliseconds of each call: every contender once a round, as many rounds (10 to ``most``) as fit in ``seconds``.

    Each round begins with another contender, so that none always follows the same one. On a GPU the time is its own,
    from the first kernel to the last, where the ``host`` may be late; or the host is "ahead", all kernels being queued
    before the first begins; or it is "waited for", and what is measured is the time on the wall; or the host's own time
    "alone" is measured, the GPU being waited for before each call.
    """
    if not contenders:
        return {}
    if device == "cuda":
        cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
        ways = {
            "beside": _once_on_gpu,
            "ahead": _once_behind_host,
            "waited for": _once_with_host,
            "alone": _once_on_host,
        }
        once = ways[host](cache)
    else:
        once = _once_on_cpu
    for run in contenders.values():
        run()
    round_ms = sum(once(run) for run in contenders.values())
    rounds = max(10, min(most, int(seconds * 1e3 / round_ms)))

    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for first in range(rounds):
        for i in range(len(names)):
            name = names[(first + i) % len(names)]
            times[name].append(once(contenders[name]))
    return times


def _once_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _once_on_gpu(cache: Tensor) -> Callable[[Callable[[], object]], float]:
    def once(run: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return once


def _once_behind_host(cache: Tensor) -> Callable[[Callable[[], object]], float]:
    """The GPU sleeps until all of the call is queued: twice as long each time that it was not."""
    cycles, most = 2_000_000, 32_000_000  # about 1 and 16 ms

    def once(run: Callable[[], object]) -> float:
        nonlocal cycles
        while True:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.zero_()
            torch.cuda._sleep(cycles)
            begin.record()
            run()
            end.record()
            late = begin.query()
            end.synchronize()
            if not late or cycles >= most:
                return begin.elapsed_time(end)
            cycles *= 2

    return once


def _once_with_host(cache: Tensor) -> Callable[[Callable[[], object]], float]:
    def once(run: Callable[[], object]) -> float:
        cache.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    return once


def _once_on_host(cache: Tensor) -> Callable[[Callable[[], object]], float]:
    def once(run: Callable[[], object]) -> float:
        cache.zero_()
        torch.cuda.synchronize()
        return _once_on_cpu(run)

    return once


def peak_bytes(run: Callable[[], object]) -> int:
    """Device memory that one call takes on top of what is allocated before it, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def summary(times: list[float]) -> dict[str, float]:
    """Median and the two outer deciles."""
    deciles = statistics.quantiles(times, n=10)
    return {"ms": statistics.median(times), "ms_p10": deciles[0], "ms_p90": deciles[-1]}


def environment() -> dict[str, object]:
    """Where, when, with what and how the numbers beside it were made."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "gpu": gpu,
        "capability": torch.cuda.get_device_capability() if gpu else None,
        "cpu": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "fused-post")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")

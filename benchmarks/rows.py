"""Rows of a benchmark: prepared by many processes at once, then measured one after the other while all others wait.

A row's key is a tuple of arguments that can be pickled, a case and a dtype first. ``prepare(*key)`` and
``measure(*key)`` run in the same process, which keeps what cannot leave it: models, compiled code, tensors.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Key = tuple[Any, ...]


def parts(
    todo: Sequence[Key], bytes_of: Callable[[Key], int], most: float, most_rows: float = math.inf
) -> Iterator[list[Key]]:
    """As many rows at once as take at most so many bytes together."""
    part: list[Key] = []
    taken = 0
    for key in todo:
        size = bytes_of(key)
        if part and (taken + size > most or len(part) == most_rows):
            yield part
            part, taken = [], 0
        part.append(key)
        taken += size
    yield part


def measured(
    todo: Sequence[list[Key]],
    prepare: Callable[..., object],
    measure: Callable[..., object],
    workers: int,
    budget: float = math.inf,
    limit: float = math.inf,
) -> Iterator[tuple[Key, Any]]:
    """What ``measure`` returned of each row, or the exception by which it failed, one part of ``todo`` after another.

    ``budget``: seconds after which no row is measured. A part is prepared for at most ``limit`` seconds: what is not
    ready by then, or takes as long to measure, is stopped together with its process.
    """
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        context = multiprocessing.get_context("spawn")

        def new() -> ProcessPoolExecutor:
            return stack.enter_context(ProcessPoolExecutor(1, context))

        processes = [new() for _ in range(workers)]
        ended: set[ProcessPoolExecutor] = set()
        for part in todo:
            if time.monotonic() - start > budget:
                print(f"the budget of {budget:.0f} s is spent: {len(part)} rows are not prepared")
                continue
            processes = [new() if each in ended else each for each in processes]
            assigned = [(processes[i % workers], key) for i, key in enumerate(part)]
            until = time.monotonic() + limit
            tasks = [_submit(process, prepare, key) for process, key in assigned]
            outcomes = [
                _outcome(process, task, until - time.monotonic(), ended)
                for (process, _), task in zip(assigned, tasks, strict=True)
            ]
            ready = sum(not isinstance(outcome, Exception) for outcome in outcomes)
            print(f"\n{ready} rows prepared at {time.monotonic() - start:.0f} s", flush=True)
            for (process, key), outcome in zip(assigned, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    yield key, outcome
                elif time.monotonic() - start > budget:
                    print(f"the budget of {budget:.0f} s is spent: {key[0].name} {key[1]} is not measured")
                else:
                    yield key, _outcome(process, _submit(process, measure, key), limit, ended)


def _submit(process: ProcessPoolExecutor, function: Callable[..., object], key: Key) -> Future[object]:
    try:
        return process.submit(function, *key)
    except BrokenProcessPool as ended:
        task: Future[object] = Future()
        task.set_exception(ended)
        return task


def _outcome(
    process: ProcessPoolExecutor, task: Future[object], seconds: float, ended: set[ProcessPoolExecutor]
) -> object:
    """The result or the exception. A process that is not done in time would disturb the others, and ends."""
    try:
        return task.result(None if math.isinf(seconds) else max(seconds, 0.0))
    except concurrent.futures.TimeoutError:
        for each in list(process._processes.values()):
            each.kill()
        ended.add(process)
        return TimeoutError("not done in time")
    except BrokenProcessPool as raised:  # killed, as where memory runs out
        ended.add(process)
        return raised
    except Exception as raised:
        return raised

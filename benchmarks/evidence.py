"""What ``auto`` chooses by, from the results of the convolution and training benchmarks, and how good its choices are.

    python -m benchmarks.evidence RESULTS.json ...

Writes fusion_backend/measured/<gpu>.json; what the results say nothing of, inference or training, stays in it as it is.
To each plan's time is added what the compiled call takes beside it, mostly packing the weight: the time of "fused_post"
less that of its plan where that was measured, else of the packing alone. Of a training step the file gets our ways and
the fastest peer. Then every case is taken out in turn and predicted from the others:
printed is how often ``auto`` would have been slower than the best peer, or than the best plan, and by how much.

A convolution that several files hold becomes one row (``merged``). So a run of new plans alone is added to older
results by naming its file behind theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from fusion_backend import evidence, training

PEERS = ("eager", "inductor", "inductor max-autotune")


def compact(row: dict[str, Any]) -> dict[str, Any] | None:
    """None where Inductor was not measured beside our plans."""
    times = {name: column["ms"] for name, column in row["contenders"].items() if "ms" in column}
    if "inductor" not in times:
        return None
    chosen = next((name for name, column in row["contenders"].items() if column.get("chosen")), None)
    whole = row["contenders"].get("fused_post", {})
    if "ms" in whole and whole.get("plan") in times:
        beside = whole["ms"] - times[whole["plan"]]
    else:
        beside = times.get("ours, packing", 0.0) - times.get(chosen, 0.0)
    plans = {name: ms + max(beside, 0.0) for name, ms in times.items() if evidence.is_plan(name)}
    return {
        "case": row["case"],
        "x": row["x"],
        "C_out": row["y"][1],
        "kernel_stride_padding": row["kernel_stride_padding"],
        "dtype": row["dtype"],
        "memory_format": row["memory_format"],
        "plans": plans,
        "peers": {name: times[name] for name in PEERS if name in times},
    }


def merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``compact`` makes of rows, one for each convolution, with its plans by their time and its best peer."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        convolution = ("x", "C_out", "kernel_stride_padding", "dtype", "memory_format")
        key = json.dumps([row[name] for name in convolution])
        found[key] = added(found[key], row) if key in found else row
    return [
        {name: value for name, value in row.items() if name != "peers"}
        | {
            "plans": {name: round(ms, 5) for name, ms in sorted(row["plans"].items(), key=lambda item: item[1])},
            "peer": round(min(row["peers"].values()), 5),
        }
        for row in found.values()
    ]


def added(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``row`` with what ``other``, a later run, has of the same convolution; of a plan in both, ``other``'s time.

    Runs differ by some per cent, and in which peers they have. So ``other``'s times are taken in units of a peer of
    both, the fastest in ``row``. A peer in both has ``row``'s time.
    """
    both = row["peers"].keys() & other["peers"].keys()
    unit = min(both, key=row["peers"].__getitem__)
    scale = row["peers"][unit] / other["peers"][unit]
    plans, peers = ({name: ms * scale for name, ms in other[kind].items()} for kind in ("plans", "peers"))
    return row | {"plans": row["plans"] | plans, "peers": peers | row["peers"]}


# Our ways to train, and what the benchmark calls them.
WAYS = {"fused": "fused_post fused", "epilogue": "fused_post epilogue", training.FOLDED: "fused_post inductor"}


def compact_training(row: dict[str, Any]) -> dict[str, Any] | None:
    """None where Inductor was not measured beside our ways."""
    columns = {name: column for name, column in row["contenders"].items() if "ms" in column}
    if "inductor" not in columns:
        return None
    peer = min((name for name in PEERS if name in columns), key=lambda name: columns[name]["ms"])
    taken = {way: columns[name] for way, name in WAYS.items() if name in columns}
    every = taken | {"peer": columns[peer]}
    return {
        "case": row["case"],
        "x": row["x"],
        "C_out": row["y"][1],
        "kernel_stride_padding": row["kernel_stride_padding"],
        "tail": row["tail"],
        "dtype": row["dtype"],
        "memory_format": "channels_last" if "last" in row["memory_format"] else "contiguous",
        "plans": {way: round(column["ms"], 5) for way, column in taken.items()},
        "peer": round(columns[peer]["ms"], 5),
        "peer_is": peer,
        "kept": {name: column["saved_bytes"] for name, column in every.items()},
        "peak": {name: column["peak_bytes"] for name, column in every.items()},
    }


def judge(rows: list[dict[str, Any]]) -> None:
    """Leave one out: what ``auto`` would take for it, against what it would have been best to take."""
    cases = [evidence.case_of(row) for row in rows]
    slower, lost, taken, unknown = [], [], 0, 0
    for row, own in zip(rows, cases, strict=True):
        others = tuple(case for case in cases if case is not own)
        with mock.patch.object(evidence, "measured", lambda gpu, others=others: others):
            found = evidence.predict(
                replace(own.problem, shared_limit=227 * 1024, hopper=any(map(evidence.is_opaque, own.plans))),
                own.shape,
                "this GPU",
            )
        takes = isinstance(found, evidence.Prediction) and found.speedup >= evidence.LEAST_SPEEDUP
        taken += takes
        if takes and found.plan not in own.plans:
            unknown += 1
            continue
        time = own.plans[found.plan] if takes else own.peer
        best = min((own.peer, *own.plans.values()))
        title = f"{row['case']} {row['dtype']} {row['memory_format']}"
        slower += [(time / own.peer, title)] if time > 1.05 * own.peer else []
        lost += [(time / best, title)] if time > 1.05 * best else []
    print(f"{len(cases)} cases, each predicted from the others: the fused kernel is taken for {taken}")
    print(f"with a plan that was not measured there for {unknown} of these; of the others:")
    for what, bad in (("the best peer", slower), ("the best of all", lost)):
        print(f"slower than {what} by more than 5 %: {len(bad)}")
        for ratio, title in sorted(bad, reverse=True)[:20]:
            print(f"    {title}: {ratio:.2f} of its time")


def judge_training(rows: list[dict[str, Any]], hopper: bool) -> None:
    """What ``auto`` takes at each measured case: by itself, and by the others."""
    cases = [training.case_of(row) for row in rows]
    print(f"{len(cases)} training steps; taken, and where only the others are known:")
    for row, own in zip(rows, cases, strict=True):
        found = []
        for known in (cases, [case for case in cases if case is not own]):
            with mock.patch.object(training, "measured", lambda gpu, known=known: known):
                problem = replace(own.problem, shared_limit=227 * 1024, hopper=hopper)
                found.append(training.predict(problem, own.shape, own.kind, "this GPU"))
        ways = " / ".join(each.way if not isinstance(each, str) and each.is_taken else "inductor" for each in found)
        times = ", ".join(f"{way} {own.peer / ms:.2f}x" for way, ms in own.plans.items())
        print(f"    {row['case']} {row['dtype']} {row['memory_format']}: {ways} ({times})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of both benchmarks from one kind of GPU")
    data = [json.loads(path.read_text()) for path in parser.parse_args().results]
    gpus = {each["gpu"] for each in data}
    if len(gpus) != 1:
        parser.error(f"the results are from {sorted(gpus)}; allowed are those of one kind of GPU")
    (gpu,) = gpus
    path = evidence.file_of(gpu)
    path.parent.mkdir(exist_ok=True)
    content = json.loads(path.read_text()) if path.is_file() else {}
    steps = [each for each in data if each.get("benchmark") == "training"]
    content |= part("runs", "cases", [each for each in data if each not in steps], compact, merged)
    content |= part("training_runs", "training", steps, compact_training)
    copies = [each["copy_gb_per_s"] for each in data if "copy_gb_per_s" in each]
    content |= {"copy_gb_per_s": max(copies)} if copies else {}
    path.write_text(as_text({"gpu": gpu} | content))
    judge(content.get("cases", []))
    hopper = any(evidence.is_opaque(plan) for row in content.get("cases", []) for plan in row["plans"])
    judge_training(content.get("training", []), hopper)
    print(path)
    return 0


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    entries = []
    for name, value in content.items():
        text = json.dumps(value)
        if name in ("cases", "training"):
            text = "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]"
        entries.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def part(
    runs: str,
    rows: str,
    data: list[dict[str, Any]],
    compact: Callable[[dict[str, Any]], dict[str, Any] | None],
    merged: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
) -> dict[str, Any]:
    """What the results of one benchmark put into the file: nothing where there are none."""
    found = [[row for row in map(compact, each["rows"]) if row is not None] for each in data]
    used = [each for each, some in zip(data, found, strict=True) if some]
    if not used:
        return {}
    of_run = ("versions", "date", "commit", "command")
    return {
        runs: [{name: each[name] for name in of_run} for each in used],
        rows: merged([row for some in found for row in some]),
    }


if __name__ == "__main__":
    sys.exit(main())

"""What ``auto`` chooses by, from the results of the convolution benchmark, and how good its choices are.

    python -m benchmarks.evidence RESULTS.json ...

Writes fusion_backend/measured/<gpu>.json. Then every case is taken out in turn and predicted from the others: printed
is how often ``auto`` would have been slower than the best peer or than the best plan, and by how much.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fusion_backend import evidence
from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.rounding import cdiv

PEERS = ("eager", "inductor", "inductor max-autotune")


def problem_of(row: dict[str, Any]) -> Problem:
    axis = Axis(*row["kernel_stride_padding"])
    N, C_in, *sizes = row["x"]
    dtype = getattr(torch, row["dtype"])
    positions = N
    for size in sizes:
        positions *= cdiv(axis.output_size(size), axis.stride)
    last = row["memory_format"] == "channels_last"
    return Problem(
        (Axis(),) * (3 - len(sizes)) + (axis,) * len(sizes),
        C_in, row["y"][1], 1, positions, dtype, last, last, dtype == torch.float32, False, 227 * 1024,
    )  # fmt: skip


def compact(row: dict[str, Any]) -> dict[str, Any] | None:
    """None where no peer was measured beside our plans."""
    columns = row["contenders"]
    peers = [columns[name]["ms"] for name in PEERS if "ms" in columns.get(name, {})]
    if not any(name.startswith("inductor") and "ms" in columns[name] for name in columns):
        return None
    problem = problem_of(row)
    itemsize, tf32, _, x_last, out_last, overlaps = evidence.kind_of(problem)
    plans = {name: round(c["ms"], 5) for name, c in columns.items() if "warps" in name and "ms" in c}
    return {
        "case": row["case"],
        "itemsize": itemsize,
        "tf32": tf32,
        "x_last": x_last,
        "out_last": out_last,
        "overlaps": overlaps,
        "sizes": [round(size, 4) for size in evidence.sizes_of(problem, row["x"])],
        "plans": dict(sorted(plans.items(), key=lambda item: item[1])),
        "peer": round(min(peers), 5),
    }


def judge(rows: list[dict[str, Any]], cases: list[dict[str, Any]]) -> None:
    """Leave one out: what ``auto`` would take for it, against what it would have been best to take."""
    slower, lost, left = [], [], 0
    for row, own in zip(rows, cases, strict=True):
        others = tuple(evidence._case(case) for case in cases if case is not own)
        with mock.patch.object(evidence, "measured", lambda gpu, others=others: others):
            found = evidence.predict(problem_of(row), row["x"], "this GPU")
        best = min(own["plans"].values(), default=float("inf"))
        taken = isinstance(found, evidence.Prediction) and found.speedup >= evidence.LEAST_SPEEDUP
        time = own["plans"].get(found.plan, float("inf")) if taken else own["peer"]
        left += not taken
        title = f"{row['case']} {row['dtype']} {row['memory_format']}"
        if time > 1.05 * own["peer"]:
            slower.append((title, time / own["peer"]))
        if time > 1.05 * min(best, own["peer"]):
            lost.append((title, time / min(best, own["peer"])))
    print(f"{len(cases)} cases; each left out in turn: {left} left to Inductor")
    print(f"slower than the best peer by more than 5 %: {len(slower)}")
    for title, ratio in sorted(slower, key=lambda pair: -pair[1]):
        print(f"    {title}: {ratio:.2f} of its time")
    print(f"slower than the best of all by more than 5 %: {len(lost)}")
    for title, ratio in sorted(lost, key=lambda pair: -pair[1])[:20]:
        print(f"    {title}: {ratio:.2f} of its time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of benchmarks.conv_transpose from one kind of GPU")
    args = parser.parse_args()
    data = [json.loads(path.read_text()) for path in args.results]
    gpus = {each["gpu"] for each in data}
    if len(gpus) != 1:
        parser.error(f"the results are from {sorted(gpus)}; allowed are those of one kind of GPU")
    (gpu,) = gpus
    pairs = [(row, compact(row)) for each in data for row in each["rows"]]
    rows, cases = zip(*[(row, case) for row, case in pairs if case is not None], strict=True)
    out = evidence.MEASURED / f"{'-'.join(gpu.lower().replace('/', ' ').split())}.json"
    out.parent.mkdir(exist_ok=True)
    described = {name: data[-1][name] for name in ("gpu", "versions", "date", "commit", "command")}
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    out.write_text(json.dumps(described, indent=1)[:-2] + f',\n "cases": [\n{lines}\n ]\n}}\n')
    judge(list(rows), list(cases))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What ``auto`` chooses by, from the results of the convolution benchmark, and how good its choices are.

    python -m benchmarks.evidence RESULTS.json ...

Writes fusion_backend/measured/<gpu>.json. To each plan's time is added what the compiled call takes beside it, mostly
packing the weight: the time of "fused_post" less that of its plan where that was measured, else of the packing alone.
Then every case is taken out in turn and predicted from the others: printed is how often ``auto`` would have been slower
than the best peer, or than the best plan, and by how much.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from fusion_backend import evidence

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
    plans = {name: round(ms + max(beside, 0.0), 5) for name, ms in times.items() if is_plan(name)}
    return {
        "case": row["case"],
        "x": row["x"],
        "C_out": row["y"][1],
        "kernel_stride_padding": row["kernel_stride_padding"],
        "dtype": row["dtype"],
        "memory_format": row["memory_format"],
        "plans": dict(sorted(plans.items(), key=lambda item: item[1])),
        "peer": round(min(times[name] for name in PEERS if name in times), 5),
    }


def is_plan(name: str) -> bool:
    return "warps" in name or "slots" in name


def judge(rows: list[dict[str, Any]]) -> None:
    """Leave one out: what ``auto`` would take for it, against what it would have been best to take."""
    cases = [evidence.case_of(row) for row in rows]
    slower, lost, taken = [], [], 0
    for row, own in zip(rows, cases, strict=True):
        others = tuple(case for case in cases if case is not own)
        with mock.patch.object(evidence, "measured", lambda gpu, others=others: others):
            found = evidence.predict(
                replace(own.problem, shared_limit=227 * 1024, hopper=any("slots" in name for name in own.plans)),
                own.shape,
                "this GPU",
            )
        takes = isinstance(found, evidence.Prediction) and found.speedup >= evidence.LEAST_SPEEDUP
        taken += takes
        time = own.plans.get(found.plan, math.inf) if takes else own.peer
        best = min((own.peer, *own.plans.values()))
        title = f"{row['case']} {row['dtype']} {row['memory_format']}"
        slower += [(time / own.peer, title)] if time > 1.05 * own.peer else []
        lost += [(time / best, title)] if time > 1.05 * best else []
    print(f"{len(cases)} cases, each predicted from the others: the fused kernel is taken for {taken}")
    for what, bad in (("the best peer", slower), ("the best of all", lost)):
        print(f"slower than {what} by more than 5 %: {len(bad)}")
        for ratio, title in sorted(bad, reverse=True)[:20]:
            print(f"    {title}: {ratio:.2f} of its time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of benchmarks.conv_transpose from one kind of GPU")
    data = [json.loads(path.read_text()) for path in parser.parse_args().results]
    gpus = {each["gpu"] for each in data}
    if len(gpus) != 1:
        parser.error(f"the results are from {sorted(gpus)}; allowed are those of one kind of GPU")
    (gpu,) = gpus
    found = [[row for row in map(compact, each["rows"]) if row is not None] for each in data]
    rows = [row for part in found for row in part]
    used = [each for each, part in zip(data, found, strict=True) if part]
    runs = [{name: each[name] for name in ("versions", "date", "commit", "command")} for each in used]
    path = evidence.file_of(gpu)
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{\n "gpu": {json.dumps(gpu)},\n "runs": {json.dumps(runs)},\n "cases": [\n{lines}\n ]\n}}\n')
    judge(rows)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

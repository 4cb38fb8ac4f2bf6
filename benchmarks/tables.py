"""The tables of README.md and docs/performance.md, from the data in benchmarks/results.

python -m benchmarks.tables            # writes them, between their marks
python -m benchmarks.tables --check    # exit code 1 where a file has others
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.evidence import PEERS, compact
from fusion_backend import evidence

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GPU = "NVIDIA H200"
DTYPE = {"float32": "fp32", "bfloat16": "bf16"}
OURS, REPLAYED = "fused_post", "fused_post in CUDA graphs"


def load(name: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / name).read_text())["rows"])


def times(row: dict[str, Any]) -> dict[str, float]:
    return {name: column["ms"] for name, column in row["contenders"].items() if "ms" in column}


def public() -> list[dict[str, Any]]:
    return sorted(load("conv_transpose-nvidia-h200-whole.json"), key=lambda row: list(CASES).index(row["case"]))


def title(row: dict[str, Any]) -> list[str]:
    layout = "channels_last" if "last" in row["memory_format"] else "contiguous"
    return [row["case"], f"{DTYPE[row['dtype']]} {layout}"]


def table(header: str, lines: list[list[str]]) -> str:
    rule = "|---" * (header.count("|") - 1) + "|"
    return "\n".join([header, rule, *(f"| {' | '.join(line)} |" for line in lines)])


def inference() -> str:
    """Milliseconds of the public cases, and the speedup over the best peer of what ``auto`` takes."""
    rows = public()
    ours = [name for name in (OURS, REPLAYED) if all(name in times(row) for row in rows)]
    lines = []
    speedups: dict[str, list[float]] = {name: [] for name in ours}
    for row in rows:
        known = times(row)
        cells = [*title(row), *(f"{known[name]:.3f}" for name in PEERS)]
        for name, found in speedups.items():
            is_ours = is_taken(row, name == REPLAYED)
            found.append(min(known[peer] for peer in PEERS) / known[name] if is_ours else 1.0)
            cells += [f"{known[name]:.3f}" if is_ours else "Inductor's", f"{found[-1]:.2f}x"]
        lines.append(cells)
    means = (f"{statistics.geometric_mean(found):.2f}x" for found in speedups.values())
    lines.append(["geometric mean", "", "", "", "", *(cell for mean in means for cell in ("", mean))])
    names = " | ".join(f"{name.removeprefix('fused_post ')} | speedup" for name in ours)
    return table(f"| case | dtype, layout | eager | Inductor | max-autotune | {names} |", lines)


def is_taken(row: dict[str, Any], replayed: bool = False) -> bool:
    """Whether ``auto`` takes the fused kernel of a case that is among the measured."""
    own = evidence.case_of({**compact(row), "plans": {}, "peer": 0.0})
    case = next(case for case in evidence.measured(GPU) if (case.problem, case.shape) == (own.problem, own.shape))
    opaque = 0.0 if replayed else evidence.OPAQUE
    counted = (max(ms, opaque) if evidence.is_opaque(name) else ms for name, ms in case.plans.items())
    return case.peer / min(counted, default=math.inf) >= evidence.LEAST_SPEEDUP


def growth() -> str:
    """Milliseconds around the seed's shape, and the speedup over the faster of eager and Inductor."""
    cells: dict[str, dict[str, str]] = {}
    for row in load("conv_transpose-nvidia-h200-around.json"):
        if not row["case"].startswith("seed "):
            continue
        known = times(row)
        peer = min(known[name] for name in PEERS if name in known)
        ours = known["fused_post"] if is_taken(row) else None
        cell = f"{ours:.3f}, {peer / ours:.2f}x" if ours else f"Inductor's {peer:.3f}"
        cells.setdefault(row["case"].removeprefix("seed "), {})[title(row)[1]] = cell
    columns = [f"{dtype} {layout}" for dtype in DTYPE.values() for layout in ("contiguous", "channels_last")]
    lines = [[name, *(row.get(column, "-") for column in columns)] for name, row in cells.items()]
    return table(f"| seed with | {' | '.join(columns)} |", lines)


def memory() -> str:
    """MiB that a call takes at most, its result included."""
    lines = []
    for row in public():
        peaks = {name: column["peak_bytes"] for name, column in row["contenders"].items() if "peak_bytes" in column}
        if OURS in peaks:
            result = math.prod(row["y"]) * getattr(torch, row["dtype"]).itemsize
            sizes = [result, peaks["inductor"], peaks[OURS]]
            lines.append([*title(row), *(f"{size / 2**20:.1f}" for size in sizes)])
    return table("| case | dtype, layout | result | Inductor | fused_post |", lines)


# Of the counters, what tells which resource a kernel waits for.
SHOWN = {
    "us": "us",
    "DRAM": "dram_percent",
    "L2": "l2_percent",
    "shared memory": "shared_memory_percent",
    "tensor cores": "tensor_cycles_percent",
    "issue": "issue_percent",
}


def counters() -> str:
    """Of the kernel alone, in percent of what the GPU sustains."""
    lines = [
        [*title(row), row["plan"], *(f"{row['counters'][name]:.0f}" for name in SHOWN.values())]
        for row in load("counters_nvidia-h200-product.json") + load("counters_nvidia-h200.json")
    ]
    return table(f"| case | dtype, layout | plan | {' | '.join(SHOWN)} |", lines)


def mebibytes(size: int) -> str:
    """With a decimal where there are few."""
    return f"{size / 2**20:.{int(0 < size < 10 * 2**20)}f}"


def training(*names: str) -> str:
    """Milliseconds of a forward and a backward, and MiB kept; the peer is the faster of Inductor's two modes."""
    lines = []
    for row in itertools.chain.from_iterable(map(load, names)):
        columns = row["contenders"]
        peer = min((name for name in PEERS if "ms" in columns[name]), key=lambda name: columns[name]["ms"])
        fused, epilogue = columns["fused_post fused"], columns["fused_post epilogue"]
        cells = [*title(row), f"{columns[peer]['ms']:.3f}"]
        for each in (fused, epilogue):
            cells += [f"{each['ms']:.3f}", f"{columns[peer]['ms'] / each['ms']:.2f}x"] if "ms" in each else ["-", "-"]
        cells += (mebibytes(each["saved_bytes"]) if "ms" in each else "-" for each in (columns[peer], fused))
        cells.append(f"{fused['peak_bytes'] / columns[peer]['peak_bytes']:.2f}" if "ms" in fused else "-")
        lines.append(cells)
    header = (
        "| site | dtype, layout | Inductor | fused | speedup | epilogue | speedup | kept: Inductor | fused | peak |"
    )
    return table(header, lines)


def whole(*names: str) -> str:
    """Milliseconds of whole models, how many of their sites are fused, and the speedup over the best peer."""
    lines = []
    rows = itertools.chain.from_iterable(map(load, names))
    speedups: dict[str, list[float]] = {"ms": [], "wall_ms": []}
    for row in sorted(rows, key=lambda row: int(row["case"]) if row["case"].isdigit() else 0):
        columns = {name: column for name, column in row["contenders"].items() if "ms" in column}
        fused = sum(site["kernel"] == "fused" for site in row["sites"])
        cells = [row["case"], DTYPE[row["dtype"]], f"{fused} of {len(row['sites'])}"]
        cells += [f"{columns[name]['ms']:.3f}" if name in columns else "-" for name in (*PEERS, OURS)]
        for unit, found in speedups.items():
            best = min((columns[name][unit] for name in PEERS if name in columns), default=None)
            ours = columns.get(OURS, {}).get(unit)
            if best and ours:
                found.append(best / ours)
            cells.append(f"{best / ours:.2f}x" if best and ours else "-")
        lines.append(cells)
    means = [f"{statistics.geometric_mean(found):.2f}x" if found else "-" for found in speedups.values()]
    lines.append(["geometric mean", *[""] * 6, *means])
    ways = "eager | Inductor | max-autotune | fused_post | speedup | with the host"
    return table(f"| model | dtype | fused | {ways} |", lines)


# Each stands between two marks of its name.
TABLES = {
    "inference": inference,
    "training": functools.partial(training, "training_nvidia-h200.json"),
    "steps": functools.partial(training, "training_nvidia-h200-sweep.json"),
    "programs": functools.partial(
        training, "training_nvidia-h200-programs.json", "training_nvidia-h200-programs-unet.json"
    ),
    "growth": growth,
    "memory": memory,
    "counters": counters,
    "kernelbench": functools.partial(whole, "kernelbench_nvidia-h200.json"),
    "models": functools.partial(whole, "models_nvidia-h200.json"),
}
FILES = ("README.md", "docs/performance.md")


def written(text: str) -> str:
    for name in dict.fromkeys(re.findall(r"<!-- (\w+) -->", text)):
        mark = re.escape(f"<!-- {name} -->")
        text, found = re.subn(
            f"({mark}\n).*?({mark})", lambda m, name=name: f"{m[1]}{TABLES[name]()}\n{m[2]}", text, flags=re.DOTALL
        )
        assert found == 1, f"there are no two marks {name}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    texts = {ROOT / name: (ROOT / name).read_text() for name in FILES}
    stale = {path: written(text) for path, text in texts.items() if written(text) != text}
    for path, text in ({} if check else stale).items():
        path.write_text(text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

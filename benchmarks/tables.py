"""The tables of README.md, from the data in benchmarks/results.

python -m benchmarks.tables            # writes them into README.md, between their marks
python -m benchmarks.tables --check    # exit code 1 where README.md has others
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.evidence import PEERS, compact
from fusion_backend import evidence

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAYOUT = {"float32": "fp32", "bfloat16": "bf16"}


def load(name: str) -> list[dict[str, Any]]:
    return list(json.loads((RESULTS / name).read_text())["rows"])


def times(row: dict[str, Any]) -> dict[str, float]:
    return {name: column["ms"] for name, column in row["contenders"].items() if "ms" in column}


def inference() -> str:
    """Milliseconds of the public cases, and the speedup over the best peer of what ``auto`` takes."""
    lines = [
        "| case | dtype, layout | eager | Inductor | max-autotune | fused_post | speedup |",
        "|---|---|---|---|---|---|---|",
    ]
    speedups = []
    rows = [row for part in ("seed", "public") for row in load(f"conv_transpose-nvidia-h200-{part}.json")]
    for row in sorted(rows, key=lambda row: list(CASES).index(row["case"])):
        known = times(row)
        cells = [row["case"], f"{LAYOUT[row['dtype']]} {row['memory_format']}"]
        cells += [f"{known[name]:.3f}" for name in PEERS]
        speedups.append(min(known[peer] for peer in PEERS) / known["fused_post"] if is_taken(row) else 1.0)
        cells += [f"{known['fused_post']:.3f}" if is_taken(row) else "Inductor's", f"{speedups[-1]:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| geometric mean | | | | | | {statistics.geometric_mean(speedups):.2f}x |")
    return "\n".join(lines)


def is_taken(row: dict[str, Any]) -> bool:
    """Whether ``auto`` takes the fused kernel where this row is what is known of the case."""
    compacted = compact(row)
    if compacted is None or not compacted["plans"]:
        return False
    case = evidence.case_of(compacted)
    counted = [max(ms, evidence.OPAQUE) if name.startswith("hopper") else ms for name, ms in case.plans.items()]
    return case.peer / min(counted) >= evidence.LEAST_SPEEDUP


def training() -> str:
    """Milliseconds of a forward and a backward, and MiB kept; the peer is the faster of Inductor's two modes."""
    lines = [
        "| site | dtype, layout | Inductor | fused | speedup | epilogue | speedup | kept: Inductor | fused | peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in load("training_nvidia-h200.json"):
        columns = row["contenders"]
        peer = min((name for name in PEERS if "ms" in columns[name]), key=lambda name: columns[name]["ms"])
        fused, epilogue = columns["fused_post fused"], columns["fused_post epilogue"]
        layout = "channels_last" if "last" in row["memory_format"] else "contiguous"
        cells = [row["case"], f"{LAYOUT[row['dtype']]} {layout}", f"{columns[peer]['ms']:.3f}"]
        for each in (fused, epilogue):
            cells += [f"{each['ms']:.3f}", f"{columns[peer]['ms'] / each['ms']:.2f}x"] if "ms" in each else ["-", "-"]
        kept = (f"{each['saved_bytes'] / 2**20:.0f}" if "ms" in each else "-" for each in (columns[peer], fused))
        peak = f"{fused['peak_bytes'] / columns[peer]['peak_bytes']:.2f}" if "ms" in fused else "-"
        lines.append(f"| {' | '.join([*cells, *kept, peak])} |")
    return "\n".join(lines)


def whole(name: str) -> str:
    """Milliseconds of whole models, how many of their sites are fused, and the speedup over the best peer."""
    lines = [
        "| model | dtype | fused | eager | Inductor | max-autotune | fused_post | speedup | with the host |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = load(f"{name}_nvidia-h200.json")
    for row in sorted(rows, key=lambda row: int(row["case"]) if row["case"].isdigit() else 0):
        columns = {name: column for name, column in row["contenders"].items() if "ms" in column}
        fused = sum(site["kernel"] == "fused" for site in row["sites"])
        cells = [row["case"], LAYOUT[row["dtype"]], f"{fused} of {len(row['sites'])}"]
        cells += [f"{columns[name]['ms']:.3f}" if name in columns else "-" for name in (*PEERS, "fused_post")]
        for unit in ("ms", "wall_ms"):
            best = min((columns[name][unit] for name in PEERS if name in columns), default=None)
            ours = columns.get("fused_post", {}).get(unit)
            cells.append(f"{best / ours:.2f}x" if best and ours else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "inference": inference,
    "training": training,
    "kernelbench": functools.partial(whole, "kernelbench"),
    "models": functools.partial(whole, "models"),
}


def written(text: str) -> str:
    for name in dict.fromkeys(re.findall(r"<!-- (\w+) -->", text)):
        table = TABLES[name]
        mark = re.escape(f"<!-- {name} -->")
        text, found = re.subn(
            f"({mark}\n).*?({mark})", lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL
        )
        assert found == 1, f"README.md has no two marks {name}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = written(before)
    if parser.parse_args().check:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())

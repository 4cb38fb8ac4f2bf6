"""What bounds our kernel at a public case: Nsight Compute's counters of one launch, for the plan that ``auto`` takes.

    python -m benchmarks.counters [--cases dcgan_64,hifigan_up1] [--dtypes bfloat16] [--ncu /path/to/ncu] [--out FILE]

Needs a GPU and ncu, with leave to read counters; the clocks stay as they are. The passes that turn x and the result,
and the one that packs the weight, are not looked at. The data go to benchmarks/results as JSON.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.conv_transpose import KNOWN, NAMES, RESULTS, Row, names
from benchmarks.measure import environment
from fusion_backend.kernels.plans import plan_named

KERNELS = "regex:march|product|_conv_transpose_kernel"

# Percentages are of the peak that can be sustained.
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
    "l2_percent": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "l1_percent": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "shared_memory_percent": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "tensor_cycles_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "warps_active_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "waves": "launch__waves_per_multiprocessor",
    "registers": "launch__registers_per_thread",
    "stall_long_scoreboard": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "stall_barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "stall_math": "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "stall_wait": "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
    "stall_gmma": "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio",
}


def launch(cases: list[tuple[str, str, str]]) -> None:
    """Each once for the compiler and once to be looked at; says on stdout what was launched."""
    with torch.no_grad():
        for name, dtype, layout in cases:
            row = Row(KNOWN[name], getattr(torch, dtype), layout == "channels_last")
            plan = plan_named(row.problem, row.compiled_plan(replayed=True))
            assert plan is not None
            run = row.ours(plan)
            run()
            torch.cuda.synchronize()
            run()
            torch.cuda.synchronize()
            print(json.dumps({"case": name, "dtype": dtype, "memory_format": layout, "plan": plan.name}), flush=True)


def numbers(report: str) -> list[dict[str, float]]:
    """Of every launch in ncu's CSV, in its order, those of our metrics that this GPU has."""
    lines = report[report.index('"ID"') :]
    header, units, *launches = csv.reader(io.StringIO(lines))
    scale = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    found = []
    for launch in launches:
        cells = {name: (cell, unit) for name, cell, unit in zip(header, launch, units, strict=True)}
        found.append(
            {
                name: float(cells[metric][0].replace(",", "")) * scale.get(cells[metric][1], 1.0)
                for name, metric in METRICS.items()
                if metric in cells and cells[metric][0].replace(",", "").replace(".", "").isdigit()
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=names, default=list(NAMES), help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    parser.add_argument("--ncu", default="ncu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    cases = [
        (name, dtype, layout)
        for name, dtype, layout in itertools.product(args.cases, args.dtypes, ("contiguous", "channels_last"))
    ]
    if args.launch:
        launch(cases)
        return 0
    profiler = [args.ncu, "--clock-control", "none", "--csv", "--page", "raw", "-k", KERNELS]
    profiler += ["--metrics", ",".join(METRICS.values())]
    command = [sys.executable, "-m", "benchmarks.counters", "--launch", "--cases", ",".join(args.cases)]
    command += ["--dtypes", ",".join(args.dtypes)]
    ran = subprocess.run([*profiler, *command], capture_output=True, text=True)
    if ran.returncode != 0 or '"ID"' not in ran.stdout:
        print(ran.stdout[-2000:], ran.stderr[-2000:], file=sys.stderr)
        return 1
    launched = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    counted = numbers("\n".join(line for line in ran.stdout.splitlines() if line.startswith('"')))
    assert len(counted) == 2 * len(launched), (len(counted), len(launched))
    rows = [row | {"counters": second} for row, second in zip(launched, counted[1::2], strict=True)]
    path = args.out or RESULTS / f"counters_{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        title = f"{row['case']} {row['dtype']} {row['memory_format']}, {row['plan']}"
        print(title, " ".join(f"{name} {value:.4g}" for name, value in row["counters"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

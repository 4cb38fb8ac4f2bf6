"""One plan of ours at one case, launched a few times and nothing else: what a profiler looks at.

    ncu --clock-control none --set full -k "regex:march|product|conv_transpose" -c 1 \\
        python -m benchmarks.once --case seed --dtype bfloat16 --layout contiguous --plan "hopper 64, 2 slots, burst"
    compute-sanitizer python -m benchmarks.once --case kb_small

Needs a GPU. Without ``--plan`` it is what the backend takes where it is asked for the fused kernel.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.conv_transpose import KNOWN, Row
from fusion_backend.kernels.plans import plan_named, plans_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(KNOWN), default="seed")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--layout", choices=["contiguous", "channels_last"], default="contiguous")
    parser.add_argument("--plan", help="the name of one")
    parser.add_argument("--launches", type=int, default=3)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    row = Row(KNOWN[args.case], getattr(torch, args.dtype), args.layout == "channels_last")
    name = args.plan or row.compiled_plan()
    plan = plan_named(row.problem, name)
    if plan is None:
        parser.error(f"--plan {name!r}; allowed for this case are {[plan.name for plan in plans_for(row.problem)]}")
    with torch.no_grad():
        run = row.ours(plan)
        for _ in range(args.launches):
            run()
        torch.cuda.synchronize()
    print(name)


if __name__ == "__main__":
    main()

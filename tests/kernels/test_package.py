import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_asking_for_support_needs_no_triton() -> None:
    code = """
import sys
import torch

sys.modules["triton"] = None
from fusion_backend.kernels.support import why_unsupported

print(why_unsupported(torch.device("cuda"), torch.float32))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "triton is not installed\n"

"""float32 rounded to TF32: to nearest, ties away from zero, as cvt.rna.tf32.f32 does.

Tensor cores by themselves cut the last 13 bits off, at three times the error.
"""

import torch
import triton
import triton.language as tl


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """A NaN stays as it is: its bits could overflow."""
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


@triton.jit
def rounded_to_tf32(x):
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)

import math
from typing import Any

import torch
import torch.nn.functional as F

from fusion_backend.kernels.coefficients import Coefficients
from fusion_backend.kernels.hopper_strips import Config, March, form_for
from fusion_backend.kernels.launching import unit_of
from fusion_backend.kernels.problem import Problem
from fusion_backend.kernels.strips import block_k_of, three_sizes, turned
from fusion_backend.kernels.tf32 import round_to_tf32


def pack(weight: torch.Tensor, problem: Problem, config: Config) -> torch.Tensor:
    """[taps * C_out, C_in], both filled up with zeros to whole blocks, and rounded where the product is TF32."""
    packed = weight.reshape(problem.C_in, problem.C_out, -1).permute(2, 1, 0)
    packed = packed.clone(memory_format=torch.contiguous_format)
    if problem.tf32:
        packed = round_to_tf32(packed)
    packed = F.pad(packed, (0, block_k_of(problem) - problem.C_in, 0, -problem.C_out % config.channels))
    taps, C_out, depth = packed.shape
    if problem.out_last:
        joined = min(8 // weight.element_size(), config.channels // 8)
        packed = packed.view(taps, -1, 4, joined, 2, depth).transpose(2, 3)
    return packed.reshape(taps * C_out, depth).contiguous()


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    problem: Problem,
    march: March,
    coefficients: Coefficients,
) -> Any:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fusion_backend.kernels.hopper_kernel import hopper_march_kernel

    if out.numel() == 0:
        return None
    N, _, *sizes = x.shape
    R, M, W = turned(problem, three_sizes(sizes))
    unit = unit_of(W)
    kinds = tuple(
        (2 if tensor is not None else 1) if present else 0
        for tensor, present in zip(coefficients.tensors, coefficients.present, strict=True)
    )
    form = form_for(problem, march, unit, kinds)
    dtype = {torch.float32: gl.float32, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.dtype]
    block = [form.channels, form.depth]
    weight = TensorDescriptor(
        packed, list(packed.shape), [form.depth, 1], block, gl.NVMMASharedLayout.get_default_for(block, dtype)
    )
    combs: list[Any] = [None] * 4
    x_ptr, x_layout = x, gl.NVMMASharedLayout.get_default_for([32, form.depth], dtype)
    if form.x_last:
        x_ptr = None
        C = problem.C_in
        per_row, per_middle = (M * W * C, W * C) if form.along_d else (W * C, R * W * C)
        block = [form.box[0], 1, form.box[1], form.box[2], form.depth]
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        for h in range(form.pair):
            combs[h] = TensorDescriptor(
                x[..., h:],
                [N, R, M, -((h - W) // form.pair), C],
                [R * M * W * C, per_row, per_middle, form.pair * C, 1],
                block,
                layout,
            )
    return hopper_march_kernel[march.grid](
        out,
        x_ptr,
        *combs,
        weight,
        *coefficients.tensors,
        N,
        R,
        M,
        W // unit,
        march.rows,
        *march.tiles,
        march.total,
        march.length,
        *coefficients.numbers,
        x_layout,
        form,
        num_warps=4,
    )

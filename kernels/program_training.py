"""y = program(u) with u = a * v + b and v = conv_transpose(x, w), for training: forward, and back to u.

``conv_transpose_training`` says what is kept. The passes that lead back are programs (see ``program_backward``), each
run by what has their v0: ``epilogue_backward`` where y or v is kept, and the fused kernel, with x and w, where neither
is. There is one for u and, where they learn, one for each column of the vectors and one for the tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fusion_backend.kernels import conv_transpose, epilogue
from fusion_backend.kernels.coefficients import Numbers, Tensors, coefficients_for, reference
from fusion_backend.kernels.epilogue_backward import epilogue_backward
from fusion_backend.kernels.program import Program, laid_out_as, reads
from fusion_backend.kernels.program import reference as run_program
from fusion_backend.kernels.program_backward import backward_of, behind_form, of_result, with_columns_from_zero


def takes(text: str, value: str, wanted: Sequence[str]) -> bool:
    """Whether the gradients of u and of these columns and tensors are made from ``value``, v0 being v."""
    if of_result(text) is not None:
        return False
    return any(reads(backward_of(text, each) or "", value) for each in ("v0", *wanted))


def forward(
    v: torch.Tensor, tensors: Tensors, numbers: Numbers, program: Program, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and v where it is to be kept; it is written over if not."""
    coefficients = coefficients_for(v, tensors, numbers)
    program = laid_out_as(v, program)
    if epilogue.runs_kernel(v):
        y = torch.empty_like(v) if keep else v
        epilogue.launch(y, v if keep else None, coefficients, program=program)
    else:
        exact = v.to(torch.promote_types(v.dtype, torch.float32))
        y = run_program(reference(exact, *coefficients.values), program).to(v.dtype)
    return y, v if keep else v.new_empty(0)


def backward(
    ctx: Any, grad: torch.Tensor, to_last: bool, sums: bool, needs_vectors: bool, needs_tensor: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of u, with its ``sums`` by channel, of the vectors and of the tensor.

    ``to_last``: the first may be channels_last though grad is not.
    """
    x, weight, _, scale, value, shift, vectors, tensor = ctx.saved_tensors
    text, columns, u = _from_convolution(ctx, scale, shift, vectors)
    first = len(columns) - (0 if vectors is None else vectors.shape[1])
    of_u, of_tensor = of_result(ctx.program), None
    if of_u is None:
        of_u, of_tensor = backward_of(text, u), backward_of(text, "t0")

    def run(text: str | None, to_last: bool, sums: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        compute = torch.promote_types(grad.dtype, torch.float32)
        if text is None:
            return torch.zeros_like(grad), grad.new_zeros(grad.shape[1], dtype=compute)
        named, text = with_columns_from_zero(text)
        used = torch.stack([columns[column] for column in named], 1) if named else None
        t1 = tensor if reads(text, "t1") else None
        if text and (value is not None or not reads(text, "v0")):
            at = value if reads(text, "v0") else None
            rest = (ctx.channels_last, sums, False, True if to_last else None, text, at, used, t1)
            g, passed, _ = epilogue_backward(grad, None, None, 1.0, *rest)
            return g, passed
        g = grad
        if text:
            how = {"channels_last": ctx.channels_last, "allow_tf32": ctx.allow_tf32, "program": text, "vectors": used}
            g = conv_transpose.conv_transpose(x, weight, *ctx.convolution, **how, tensor_0=grad, tensor_1=t1)
        return g, g.sum((0, *range(2, g.dim())), dtype=compute) if sums else None

    grad_u, passed = run(of_u, to_last, sums)
    grad_vectors = grad_tensor = None
    if needs_vectors:
        learned: Any = {column: run(backward_of(text, f"c{first + column}"), False, True)[1] for column in ctx.learned}
        nothing = torch.zeros_like(columns[first])
        grad_vectors = torch.stack([learned.get(column, nothing) for column in range(vectors.shape[1])], 1)
    if needs_tensor:
        grad_tensor = grad_u if of_tensor == of_u else run(of_tensor, False, False)[0]
    return grad_u, passed, grad_vectors, grad_tensor


def _from_convolution(
    ctx: Any, scale: torch.Tensor | None, shift: torch.Tensor | None, vectors: torch.Tensor | None
) -> tuple[str, list[torch.Tensor], str]:
    """The program from v on, the columns that it names then, and which of its values is u."""
    columns = [each for each in (scale, shift) if each is not None]
    own = [] if vectors is None else list(vectors.unbind(1))
    words: list[float | str] = [f"c{i}" for i in range(len(columns))]
    a = words.pop(0) if scale is not None else ctx.scale_number
    b = words.pop(0) if shift is not None else ctx.shift_number
    if a == 1.0 and b == 0.0:
        return ctx.program, own, "v0"
    text = behind_form(ctx.program, None if a == 1.0 else a, None if b == 0.0 else b, len(columns))
    return text, [*columns, *own], "v1"

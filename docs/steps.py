"""Writes docs/steps.md, the list of all steps that a tail may take, from the tables that define them.

python docs/steps.py
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fusion_backend.kernels.activations import ACTIVATIONS as KERNELS
from fusion_backend.patterns.activations import ACTIVATIONS as SPELLINGS
from fusion_backend.patterns.operation import Operation
from fusion_backend.patterns.vocabulary import OPERATIONS

PAGE = Path(__file__).parent / "steps.md"

HEAD = """\
# The steps of a tail

Written by `python docs/steps.py` from the tables in the code; a test holds the page to them.

What stands behind a transposed convolution rides in our kernels as long as it is made of the steps below, in inference
and where a gradient flows. Where a site is left to Inductor, it gets all but the first normal form as you wrote it.

## Affine and clamp operations

Any run of these is one normal form, min(max(a*x + b, lo), hi), with numbers and per-channel values
([design.md](design.md#the-normal-form)). Several runs, with other steps between them, are one normal form each.

| operation | spellings |
|---|---|
"""

VALUES = """
## Two values of the tail

A value may be read more than once, as in `x * sigmoid(x)`, if all its readers belong to the tail: `add`, `sub`, `rsub`
(with a constant `alpha`), `mul`, `div`, `minimum` and `maximum` of two such values are steps. In inference one value in
front of the result may have other readers as well, or be returned, as the up-convolution's output of a HiFi-GAN: the
fused kernel then stores both, if the steps behind that value are a few multiply-adds and comparisons (a leaky_relu, a
prelu, sums and products). Otherwise, and in training, the tail ends at that value. A step that is written out
again, on the same value and with the same parameters, counts as the value that is there already, unless a write in
between, or afterwards, could tell them apart. `detach()`, `clone()` and
a reshape to the same shape are taken along. So is a tensor of the convolution's shape, dtype and memory format in the
place of one of the two, a residual or a mask: at most two of them, in training one, and without `alpha`. In training a
tensor that is only added, which eager does not keep, must be made in the same graph if the backward would read it:
others may write to it.

## Activations

In fp32 whatever the dtype is, rounded once at the end of the tail. A parameter is a number; the slope of `leaky_relu`
and `prelu` may also be one value per channel. The derivative is eager's, at corners and at NaN, too. Where it is a
function of the result y, as behind a sigmoid, and the activation is the whole tail but for the affine steps before it,
y is all that is kept for the backward (for `elu` where its parameters are positive, for `leaky_relu` where the slope is
a positive number, and for `softplus` where the threshold is 16 or more). Not where y leaves the graph of an activation
of which eager keeps x, as of these three: you may write to y then.

| step | formula | derivative | spellings |
|---|---|---|---|
"""

TAIL = """
## Before the convolution

The same steps, of the convolution's input alone, ride in the kernel that convolves: `leaky_relu`, `elu`, a snake or a
BatchNorm in eval in front, with numbers and with one value per channel, if nobody else reads what they make. At most 16
of them, rounded once before the product; an operation in place only where nobody else can see what it writes.

## Adding an activation

Two rows, one on either side of the fence between reading graphs and computing:

1. `kernels/activations.py`: a row of `ACTIVATIONS` with its formula, its meaning in plain PyTorch and its derivative
   (at x and, if the result tells it, at y), and the same in Triton, a branch of `activate`, of `differentiate` and, if
   so, of `differentiate_result`. Mind NaN, infinities, what overflows on the way, digits near zero.
2. `patterns/activations.py`: a row of `ACTIVATIONS` with its spellings, whose `activation` leads from the parameters
   that a user writes to those of the first row.

The tests go over both tables: derivative against autograd, Triton form against float64 in the interpreter and on a GPU,
every GPU that we compile for. What is left to you is a line for each spelling in
`tests/patterns/test_activations.py`, values for its parameters, if it has any, in `tests/kernels/activations.py`,
and `python docs/steps.py`.
"""


def page() -> str:
    affine = [_row(row.name, _spellings([row])) for row in OPERATIONS if _is_affine(row)]
    rows: dict[str, list[Operation]] = defaultdict(list)
    for row in SPELLINGS:
        for step in _steps(row):
            rows[step].append(row)
    activations = [
        _row(name, f"`{each.equation}`", f"`{each.slope}`", _spellings(rows[name])) for name, each in KERNELS.items()
    ]
    return "".join([HEAD, *dict.fromkeys(affine), VALUES, *activations, TAIL])


def _is_affine(row: Operation) -> bool:
    return row.activation is None and row.name not in ("detach", "clone") and bool(row.names)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _steps(row: Operation) -> list[str]:
    """gelu has a parameter that chooses between two."""
    assert row.activation is not None
    if row.name == "gelu":
        return ["gelu", "gelu_tanh"]
    parameters = inspect.signature(row.activation).parameters
    return [row.activation(**{name: 2.0 for name, each in parameters.items() if each.default is each.empty})[0]]


def _spellings(rows: list[Operation]) -> str:
    """Each once: functions of torch and methods, those in place too, then functions under other names, then modules."""
    found: list[str] = []
    for row in rows:
        for name in (name for name in row.names if not name.startswith("_")):
            places = (("torch.", torch, name), ("x.", torch.Tensor, name), ("x.", torch.Tensor, name + "_"))
            found += [place + spelling for place, owner, spelling in places if hasattr(owner, spelling)]
        for function in (*row.functions, *row.in_place_functions):
            found.append(_function(function))
        found += [f"nn.{row.module.__name__}"] if row.module else []
    return ", ".join(f"`{each}`" for each in dict.fromkeys(found) if each)


def _function(function: object) -> str:
    name = getattr(function, "__name__", "")
    if getattr(torch.nn.functional, name, None) is function:
        return f"F.{name}"
    module = (getattr(function, "__module__", "") or "").lstrip("_").replace("builtins", "")
    return f"{module}.{name}" if module else name


if __name__ == "__main__":
    PAGE.write_text(page())

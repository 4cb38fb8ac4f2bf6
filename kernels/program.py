"""What a tail does behind its first normal form: a list of instructions, which is a compile-time constant of kernels.

Written as text, one instruction a value, and the last value is the result. v0 is what the first normal form gives:

    sigmoid v0                  v1 = sigmoid(v0): an activation, with its parameters behind the value
    mul v0 v1                   v2 = v0 * v1: add, sub, mul, div, minimum or maximum of two values
    add v2 t0                   v3 = v2 + t0: a tensor of the result's shape in the place of a value
    affine v3 2.0 0.5 - c0      v4 = min(max(2*v3 + 0.5, lo), hi) with hi = c0 and no lo: a normal form, "-" is none

and in one line "sigmoid v0; mul v0 v1; add v2 t0; affine v3 2.0 0.5 - c0". Where gradients are asked for, the bounds
of a normal form are an instruction of their own, since at a bound they differ (see ``gate``; g is the gradient):

    clamp v0 0.0 1.0            v1 = min(max(v0, lo), hi), and g on a bound, 0 beyond, 0 at NaN
    hardtanh v0 0.0 -           the same value, and 0 on a bound, 0 beyond, g at NaN: relu, relu6, hardtanh
    minmax v0 0.0 -             the same value, and g/2 on a bound, 0 beyond, g at NaN: minimum, maximum
    detach v0                   v0, and 0

A backward is a program, too. ``program_backward`` writes it, and it has, with g as any value or tensor,

    tanh_backward g v0          g times the derivative of tanh at v0; so for every activation and bound
    tanh_backward_of_result g v1   the same from tanh's value, where that tells it
    minimum_backward g v0 v1    what the first of the two gets: g where it is the less, g/2 where they are equal, else 0

A parameter is a number or, as c0, c1, ...,
a column of ``vectors``, float32 [C, k]: one value per channel. t0 and t1 are read where the result is written. Text
because Inductor writes constants of a kernel out by ``repr``, and because Triton takes no text inside of tuples; a
compiled kernel reads it by ``triton.constexpr_function``.

One value in front of the result may be kept: stored beside it by the same kernel, rounded once, as the result is.

Everything is computed in fp32, in the order that is written; NaN goes through. Without instructions a kernel is what it
is without a program.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from fusion_backend.kernels.activations import ACTIVATIONS, activate, differentiate, differentiate_result
from fusion_backend.kernels.coefficients import apply_coefficients, load_coefficient
from fusion_backend.kernels.coefficients import reference as normal_form
from fusion_backend.kernels.gate import Bound, Gate, passes, passes_gate
from fusion_backend.kernels.layout import empty, is_channels_last

BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}
Tensors = tuple[torch.Tensor | None, torch.Tensor | None]
AFFINE = ("scale", "shift", "lo", "hi")
BOUNDS = ("clamp", "hardtanh", "minmax")
BACKWARD, OF_RESULT = "_backward", "_backward_of_result"


@dataclass(frozen=True)
class Instruction:
    """``name`` applied to these values, "v0", "t0", ... A parameter is a number, a column of vectors, or None."""

    name: str
    values: tuple[str, ...]
    parameters: tuple[float | str | None, ...] = ()


@dataclass(frozen=True)
class Program:
    """The text, the vectors that it names (or None), and the tensors. ``kept``: v<kept> is stored beside the result."""

    text: str = ""
    vectors: torch.Tensor | None = None
    tensors: Tensors = (None, None)
    kept: int | None = None


NO_PROGRAM = Program()


def check_program(program: Program, C: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Raise ValueError or TypeError where the text is not what is described above, or the rest does not fit to it.

    Of the tensors it is checked that they are there; see ``laid_out_as``.
    """
    text, vectors = program.text, program.vectors
    instructions = parse(text)
    named = {value for each in instructions for value in each.values if value[0] == "t"}
    given = {f"t{i}" for i, tensor in enumerate(program.tensors) if tensor is not None}
    if named != given or named == {"t1"}:
        raise ValueError(f"program {text!r} names {sorted(named)}, given are {sorted(given)}; allowed is t0 before t1")
    if program.kept is not None and not 0 <= program.kept < len(instructions):
        raise ValueError(
            f"kept is {program.kept}; allowed for program {text!r} are values in front of the result, from 0 to "
            f"{len(instructions) - 1}"
        )
    columns = {p for each in instructions for p in each.parameters if isinstance(p, str)}
    count = 1 + max((int(column[1:]) for column in columns), default=-1)
    if vectors is None and count:
        raise ValueError(f"program {text!r} names {sorted(columns)}; allowed are numbers where vectors is None")
    if vectors is None:
        return
    if tuple(vectors.shape) != (C, count) or count == 0:
        raise ValueError(f"vectors has shape {tuple(vectors.shape)}; allowed for program {text!r} is {(C, count)}")
    if vectors.dtype != dtype:
        raise TypeError(f"vectors has dtype {vectors.dtype}; allowed is {dtype}")
    if vectors.device != device:
        raise ValueError(f"vectors is on {vectors.device}; allowed is x's device, {device}")
    if not vectors.is_contiguous():
        raise ValueError(f"vectors has strides {vectors.stride()}; allowed is contiguous: call .contiguous() on it")


def laid_out_as(out: torch.Tensor, program: Program) -> Program:
    """The program with its tensors in the layout of ``out``, which is dense: what is not is copied.

    Raises ValueError where one is not of out's shape, dtype and device.
    """

    def laid_out(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if tensor.dtype != out.dtype or tensor.device != out.device or tuple(tensor.shape) != tuple(out.shape):
            raise ValueError(
                f"a tensor of program {program.text!r} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                f"allowed is what the result is, {out.dtype} {tuple(out.shape)} on {out.device}"
            )
        last = bool(is_channels_last(out))
        is_dense = (tensor.movedim(1, -1) if last else tensor).is_contiguous()
        return tensor if is_dense else empty(out.shape, out, last).copy_(tensor)

    return replace(program, tensors=(laid_out(program.tensors[0]), laid_out(program.tensors[1])))


def parse(text: str) -> tuple[Instruction, ...]:
    return tuple(_parse(line, number) for number, line in enumerate(text.split("; "))) if text else ()


def reads(text: str, value: str) -> bool:
    return any(value in each.values for each in parse(text))


def _parse(line: str, known: int) -> Instruction:
    """An instruction behind which ``known`` others, and so values up to v<known>, stand."""
    name, *words = line.split(" ")
    if (counts := _counts(name)) is None:
        allowed = sorted((*BINARY, "affine", "detach", *BOUNDS, *ACTIVATIONS))
        raise ValueError(f"program has the instruction {line!r}; allowed are {', '.join(allowed)}")
    values, parameters = counts
    or_tensor = values > 1 or name == "affine"
    if len(words) != values + parameters:
        raise ValueError(
            f"program has {line!r}; allowed behind {name} are {values} value(s), {parameters} parameter(s)"
        )
    return Instruction(
        name,
        tuple(_value(line, word, known, or_tensor) for word in words[:values]),
        tuple(_parameter(line, word, split_name(name)[0] in ("affine", *BOUNDS)) for word in words[values:]),
    )


def split_name(name: str) -> tuple[str, str]:
    """("tanh", "_backward") and the like; the second is "" for what is no step back."""
    suffix = next((suffix for suffix in (OF_RESULT, BACKWARD) if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def _counts(name: str) -> tuple[int, int] | None:
    """How many values and parameters stand behind that name; None where there is no such instruction."""
    of, suffix = split_name(name)
    if of in ACTIVATIONS and not (suffix == OF_RESULT and ACTIVATIONS[of].of_result is None):
        return (2 if suffix else 1), len(ACTIVATIONS[of].parameters)
    known = {**dict.fromkeys(BINARY, (2, 0)), "affine": (1, len(AFFINE)), "detach": (1, 0)}
    known |= {"minimum_backward": (3, 0), "maximum_backward": (3, 0)}
    known |= {bounds + suffix: (2 if suffix else 1, 2) for bounds in BOUNDS for suffix in ("", BACKWARD)}
    return known.get(name)


def _value(line: str, word: str, known: int, or_tensor: bool) -> str:
    if or_tensor and word in ("t0", "t1"):
        return word
    if word[:1] != "v" or not word[1:].isdigit() or int(word[1:]) > known:
        or_tensors = ", and t0 and t1 for tensors" if or_tensor else ""
        raise ValueError(f"program has {word!r} in {line!r}; allowed are values from v0 to v{known}{or_tensors}")
    return word


def _parameter(line: str, word: str, or_none: bool) -> float | str | None:
    if word == "-" and or_none:
        return None
    if word[:1] == "c" and word[1:].isdigit():
        return word
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"program has {word!r} in {line!r}; allowed are finite numbers, and c0, c1, ... for vectors")
    return number


def reference(x: torch.Tensor, program: Program) -> torch.Tensor:
    """The same in plain PyTorch, on the value [N, C, *spatial] of the first normal form, which is not rounded yet."""
    return reference_values(x, program)[-1]


def reference_values(x: torch.Tensor, program: Program) -> list[torch.Tensor]:
    """v0, v1, ..., and the result last."""
    tensors = {f"t{i}": tensor.to(x.dtype) for i, tensor in enumerate(program.tensors) if tensor is not None}
    values = [x]
    for each in parse(program.text):
        inputs = [tensors[name] if name in tensors else values[int(name[1:])] for name in each.values]
        parameters = [_column(p, program, x) if isinstance(p, str) else p for p in each.parameters]
        values.append(_step(each.name, inputs, parameters))
    return values


def _step(name: str, inputs: list[torch.Tensor], parameters: list[torch.Tensor | float | None]) -> torch.Tensor:
    x = inputs[0]
    of, suffix = split_name(name)
    if name in BINARY:
        return BINARY[name](*inputs)
    if name == "affine":
        return normal_form(x, *parameters)
    if name in BOUNDS:
        return normal_form(x, None, None, *parameters)
    if name == "detach":
        return x
    if of in ("minimum", "maximum"):
        _, a, b = inputs
        passed = torch.where(a == b, x * 0.5, x)
        return torch.where(a > b if of == "minimum" else a < b, 0.0, passed)
    spread = [_spread(p, x) for p in parameters]
    if of in BOUNDS:
        return _through_bounds(of, *inputs, *spread)
    row = ACTIVATIONS[of]
    if not suffix:
        return row.meaning(x, *spread)
    slope = (row.of_result if suffix == OF_RESULT else row.derivative)(inputs[1], *spread)  # type: ignore[misc]
    return torch.where(slope == 0, 0.0, x * slope) if row.blocks else x * slope


def _through_bounds(kind: str, g: torch.Tensor, x: torch.Tensor, lo: Bound, hi: Bound) -> torch.Tensor:
    opened = kind == "hardtanh"
    passed = torch.where(passes(x, lo, hi, Gate(opened, opened, kind != "clamp")), g, 0.0)
    if kind == "minmax":
        for bound in (lo, hi):
            passed = passed if bound is None else torch.where(x == bound, 0.5 * passed, passed)
    return passed


def _column(name: str, program: Program, x: torch.Tensor) -> torch.Tensor:
    assert program.vectors is not None
    return program.vectors[:, int(name[1:])].to(x.dtype)


def _spread(parameter: torch.Tensor | float | None, x: torch.Tensor) -> torch.Tensor | float | None:
    return parameter.view(-1, *(1,) * (x.dim() - 2)) if isinstance(parameter, torch.Tensor) else parameter


@triton.constexpr_function
def instructions_of(program):
    return len(program.split("; ")) if program else 0


@triton.constexpr_function
def columns_of(program):
    """Of the vectors that a program names."""
    words = program.replace(";", "").split(" ")
    return 1 + max([int(word[1:]) for word in words if word[:1] == "c" and word[1:].isdigit()] + [-1])


@triton.constexpr_function
def tensors_of(program):
    """How many of t0 and t1 a program names."""
    words = program.replace(";", "").split(" ")
    return 2 if "t1" in words else 1 if "t0" in words else 0


@triton.constexpr_function
def _word(program, instruction, position):
    """The word there; "" behind the last one."""
    words = program.split("; ")[instruction].split(" ")
    return words[position] if position < len(words) else ""


@triton.constexpr_function
def _index(word):
    return int(word[1:])


@triton.constexpr_function
def _number(word):
    return float(word)


@triton.constexpr_function
def _of(name):
    return name.removesuffix("_of_result").removesuffix("_backward")


@triton.constexpr_function
def _is_backward(name):
    return name.endswith(("_backward", "_backward_of_result"))


@triton.constexpr_function
def _is_of_result(name):
    return name.endswith("_of_result")


@triton.jit
def append(values, value):
    return values + (value,)  # noqa: RUF005 Triton has no stars


@triton.jit
def load_vectors(vectors_ptr, channel, next_channel, beyond, PROGRAM: tl.constexpr):
    """The columns of the vectors that a program names, at a tile's channels (see ``load_coefficient``)."""
    COLUMNS: tl.constexpr = columns_of(PROGRAM)
    if beyond is not None:
        next_channel = next_channel * COLUMNS
    vectors = ()
    for column in tl.static_range(COLUMNS):
        vector = load_coefficient(vectors_ptr + column, 0.0, channel * COLUMNS, next_channel, beyond)
        vectors = append(vectors, vector)
    return vectors


@triton.jit
def load_tensors(tensor_0_ptr, tensor_1_ptr, offset, exists, PROGRAM: tl.constexpr):
    """A tile of each tensor that a program names, ``offset`` being that of the same tile in the result."""
    tensors = ()
    if tensors_of(PROGRAM) > 0:
        tensors = append(tensors, tl.load(tensor_0_ptr + offset, mask=exists).to(tl.float32))
    if tensors_of(PROGRAM) > 1:
        tensors = append(tensors, tl.load(tensor_1_ptr + offset, mask=exists).to(tl.float32))
    return tensors


@triton.jit
def run_back(g, value_ptr, tensor_ptr, vectors, offset, inside, PROGRAM: tl.constexpr):
    """A program that is a backward, from a tile of the gradient; zero where there is none, which sums count on."""
    value = g
    if value_ptr is not None:
        value = tl.load(value_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tensors = (g,)
    if tensors_of(PROGRAM) > 1:
        tensors = append(tensors, tl.load(tensor_ptr + offset, mask=inside, other=0.0).to(tl.float32))
    return tl.where(inside, apply_program(value, vectors, tensors, PROGRAM), 0.0)


@triton.jit
def _value_of(values, tensors, WORD: tl.constexpr):
    if WORD[0] == "t":
        value = tensors[_index(WORD)]
    else:
        value = values[_index(WORD)]
    return value


@triton.jit
def _parameter_of(vectors, WORD: tl.constexpr):
    if WORD == "" or WORD == "-":
        value = 0.0
    elif WORD[0] == "c":
        value = vectors[_index(WORD)]
    else:
        value = _number(WORD)
    return value


@triton.jit
def _run_backward(g, values, vectors, tensors, PROGRAM: tl.constexpr, INSTRUCTION: tl.constexpr):
    NAME: tl.constexpr = _of(_word(PROGRAM, INSTRUCTION, 0))
    THIRD: tl.constexpr = _word(PROGRAM, INSTRUCTION, 3)
    FOURTH: tl.constexpr = _word(PROGRAM, INSTRUCTION, 4)
    FIFTH: tl.constexpr = _word(PROGRAM, INSTRUCTION, 5)
    x = _value_of(values, tensors, _word(PROGRAM, INSTRUCTION, 2))
    if NAME == "minimum" or NAME == "maximum":
        other = _value_of(values, tensors, THIRD)
        beyond = x > other if NAME == "minimum" else x < other
        y = tl.where(beyond, 0.0, tl.where(x == other, 0.5 * g, g))
    else:
        p = _parameter_of(vectors, THIRD)
        q = _parameter_of(vectors, FOURTH)
        r = _parameter_of(vectors, FIFTH)
        if NAME == "clamp" or NAME == "hardtanh" or NAME == "minmax":
            OPEN: tl.constexpr = NAME == "hardtanh"
            y = tl.where(passes_gate(x, p, q, THIRD != "-", FOURTH != "-", OPEN, OPEN, NAME != "clamp"), g, 0.0)
            if NAME == "minmax" and THIRD != "-":
                y = tl.where(x == p, 0.5 * y, y)
            if NAME == "minmax" and FOURTH != "-":
                y = tl.where(x == q, 0.5 * y, y)
        elif _is_of_result(_word(PROGRAM, INSTRUCTION, 0)):
            y = g * differentiate_result(x, p, q, r, NAME)
        else:
            slope = differentiate(x, p, q, r, NAME)
            y = g * slope
            if NAME == "hardsigmoid" or NAME == "hardswish":  # as the rows that block
                y = tl.where(slope == 0, 0.0, y)
    return y


@triton.jit
def _run(values, vectors, tensors, PROGRAM: tl.constexpr, INSTRUCTION: tl.constexpr):
    NAME: tl.constexpr = _word(PROGRAM, INSTRUCTION, 0)
    SECOND: tl.constexpr = _word(PROGRAM, INSTRUCTION, 2)
    x = _value_of(values, tensors, _word(PROGRAM, INSTRUCTION, 1))
    if NAME == "add":
        y = x + _value_of(values, tensors, SECOND)
    elif NAME == "sub":
        y = x - _value_of(values, tensors, SECOND)
    elif NAME == "mul":
        y = x * _value_of(values, tensors, SECOND)
    elif NAME == "div":
        y = x / _value_of(values, tensors, SECOND)
    elif NAME == "minimum":
        y = tl.minimum(x, _value_of(values, tensors, SECOND), propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "maximum":
        y = tl.maximum(x, _value_of(values, tensors, SECOND), propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "detach":
        y = x
    elif _is_backward(NAME):
        y = _run_backward(x, values, vectors, tensors, PROGRAM, INSTRUCTION)
    else:
        THIRD: tl.constexpr = _word(PROGRAM, INSTRUCTION, 3)
        FOURTH: tl.constexpr = _word(PROGRAM, INSTRUCTION, 4)
        FIFTH: tl.constexpr = _word(PROGRAM, INSTRUCTION, 5)
        p = _parameter_of(vectors, SECOND)
        q = _parameter_of(vectors, THIRD)
        r = _parameter_of(vectors, FOURTH)
        if NAME == "affine":
            hi = _parameter_of(vectors, FIFTH)
            y = apply_coefficients(x, p, q, r, hi, SECOND != "-", THIRD != "-", FOURTH != "-", FIFTH != "-")
        elif NAME == "clamp" or NAME == "hardtanh" or NAME == "minmax":
            y = apply_coefficients(x, 0.0, 0.0, p, q, False, False, SECOND != "-", THIRD != "-")
        else:
            y = activate(x, p, q, r, NAME)
    return y


@triton.jit
def values_of(x, vectors, tensors, PROGRAM: tl.constexpr):
    """v0, v1, ..., from a tile of v0; the rest as ``load_vectors`` and ``load_tensors`` return them."""
    values = (x.to(tl.float32),)
    for instruction in tl.static_range(instructions_of(PROGRAM)):
        values = append(values, _run(values, vectors, tensors, PROGRAM, instruction))
    return values


@triton.jit
def apply_program(x, vectors, tensors, PROGRAM: tl.constexpr):
    """The program's last value."""
    return values_of(x, vectors, tensors, PROGRAM)[instructions_of(PROGRAM)]


@triton.jit
def apply_keeping(x, vectors, tensors, kept_ptr, offset, exists, PROGRAM: tl.constexpr, KEPT: tl.constexpr):
    """The program's last value. If there is a ``kept_ptr``, v<KEPT> is stored there, as the result is at out_ptr."""
    values = values_of(x, vectors, tensors, PROGRAM)
    if kept_ptr is not None:
        tl.store(kept_ptr + offset, values[KEPT].to(kept_ptr.dtype.element_ty), mask=exists)
    return values[instructions_of(PROGRAM)]


@triton.jit
def apply_prologue(x, vectors, exists, PROLOGUE: tl.constexpr):
    """The program's last value, from a tile of v0, in that one's dtype, and zero where no v0 exists."""
    y = apply_program(x, vectors, (), PROLOGUE).to(x.dtype)
    return tl.where(exists, y, 0.0)

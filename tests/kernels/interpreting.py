"""A twin of a kernel module that runs in Triton's interpreter, on the CPU, beside the compiled original.

TRITON_INTERPRET=1 would decide for the whole process when a module is imported. The twin is a copy of the module's
functions in a namespace of their own, in which every ``@triton.jit`` function is an interpreted one. Once a kernel has
run, Triton is as it was before.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.experimental.gluon  # Triton imports it late, and it must not meet interpreted functions then  # noqa: F401
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, InterpreterOptions, TensorHandle
from triton.runtime.jit import JITFunction


def interpreted(module: ModuleType) -> SimpleNamespace:
    """The functions of ``module``, calling each other, and interpreting its kernels. Operators stay the original's."""
    return SimpleNamespace(**_twin(module))


def _twin(module: ModuleType) -> dict[str, Any]:
    namespace: dict[str, Any] = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, JITFunction) and value.__module__ != module.__name__:
            namespace[name] = _twin(sys.modules[value.__module__])[value.__name__]
        elif isinstance(value, JITFunction):
            namespace[name] = _Interpreted(_rebind(value.fn, namespace))
        elif isinstance(value, FunctionType) and value.__module__ == module.__name__:
            namespace[name] = _rebind(value, namespace)
    return namespace


def _rebind(function: Any, namespace: dict[str, Any]) -> FunctionType:
    twin = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    return twin


class _Interpreted(InterpretedFunction):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        with (
            mock.patch.multiple(InterpreterBuilder, cast_impl=_cast, create_dot=_dot),
            mock.patch.object(interpreter, "_patch_lang_tensor", _patch_tensor),
            mock.patch.object(interpreter.interpreter_builder, "options", _OPTIONS),
            _interpreted_language(),
        ):
            return super().run(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """From within a kernel. The base class would patch ``tl`` anew, as it is patched already, at each call."""
        return self.rewrite()(*args, **kwargs)


# Compiled kernels do not look for overflow either; it would take half of the time.
_OPTIONS = InterpreterOptions(sanitize_overflow=False)


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """``tl``, and that part of it (cdiv, zeros, ...) which is itself written in Triton, and reads ``tl.core``.

    In ``tl.standard`` too: by the functions that stand there the interpreter knows a sum from any other reduction,
    which it would work out one element at a time.
    """
    language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope = interpreter._LangPatchScope()
    try:
        for place, name, value in _PATCHES:
            scope.set_attr(place, name, value)
        yield
    finally:
        scope.restore()
        language.restore()


_PATCHES = [
    (place, name, value)
    for name, value in _twin(tl.standard).items()
    for place in (tl, tl.standard)
    if isinstance(value, _Interpreted) and isinstance(getattr(place, name, None), JITFunction)
]
_cast_impl = InterpreterBuilder.cast_impl


def _cast(builder: InterpreterBuilder, source: TensorHandle, to: Any) -> TensorHandle:
    """As GPUs do it: the interpreter itself cuts float32 to bfloat16 off instead of rounding it."""
    if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)
    return _cast_impl(builder, source, to)


_create_dot = InterpreterBuilder.create_dot


def _dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    """The interpreter itself multiplies the bits of bfloat16 as if they were integers."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (_cast_impl(builder, each, tl.float32) for each in (a, b))
    return _create_dot(builder, a, b, *rest)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Up to Triton 3.6 a loop's bounds cannot be worked out at run time where NumPy is 2.4 or later."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

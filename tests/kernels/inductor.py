"""What Inductor does with a kernel of ours before it launches it: it reads what it writes to, and copies its source."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import triton

from tests.kernels.compiling import CHIPS, Compiled, Launch, compile_launch


def written_to(launch: Launch) -> list[str]:
    """The arguments that Inductor sees written to; it would copy those it need not first."""
    wrapping = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")
    kernel = wrapping.kernel_side_table.add_kernel(launch.kernel)
    constants = wrapping.kernel_side_table.add_constant_args({})
    # Enough of a driver for Triton to write a kernel down.
    driver = SimpleNamespace(get_current_target=lambda: CHIPS["sm_90"].target)
    with mock.patch.object(triton.runtime, "driver", SimpleNamespace(active=driver)):
        return wrapping.get_mutated_tensors(kernel, constants, launch.arguments, {})


def assert_written_out_again(launch: Launch, folder: Path) -> None:
    """Inductor copies a kernel's source, and what that refers to, into a module of its own: it compiles to the same."""
    ours, theirs = written_out_again(launch, folder)
    assert theirs == ours and theirs.assembly == ours.assembly


def written_out_again(launch: Launch, folder: Path) -> tuple[Compiled, Compiled]:
    """What the kernel compiles to, and what the copy does."""
    wrapper = pytest.importorskip("torch._inductor.codegen.wrapper")
    source = wrapper.user_defined_triton_kernel_transitive_closure_source_code(launch.kernel)
    path = folder / "again.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n@triton.jit\n{source}")
    spec = spec_from_file_location("again", path)
    again = module_from_spec(spec)
    spec.loader.exec_module(again)
    copy = Launch(getattr(again, launch.kernel.__name__), launch.grid, launch.arguments, launch.options)
    return compile_launch(launch, CHIPS["sm_90"]), compile_launch(copy, CHIPS["sm_90"])

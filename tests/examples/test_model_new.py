"""examples/model_new.py: the form that its document demands, numbers, and what the compiler makes of the kernel."""

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = (EXAMPLES / "model_new.py").read_text()
TREE = ast.parse(SOURCE)
PARAMETERS = "in_channels, out_channels, kernel_size, stride, padding, output_padding, bias_shape, scaling_factor"


def stage(node: ast.stmt) -> str:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return "import"
    if isinstance(node, ast.FunctionDef):
        return "kernel" if [ast.unparse(d) for d in node.decorator_list] == ["triton.jit"] else "wrapper"
    return "class" if isinstance(node, ast.ClassDef) else type(node).__name__


def test_stands_in_the_order_that_is_demanded():
    stages = [stage(node) for node in TREE.body]
    assert stages == sorted(stages, key=["import", "kernel", "wrapper", "class"].index)
    assert set(stages) == {"import", "kernel", "wrapper", "class"}


def test_imports_what_is_demanded_and_nothing_else():
    imports = [ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports == ["import torch", "import torch.nn as nn", "import triton", "import triton.language as tl"]


def test_holds_no_test_code():
    for forbidden in ("__name__", "__main__", "get_inputs", "get_init_inputs", "print(", "assert", "fusion_backend"):
        assert forbidden not in SOURCE


def test_defines_one_module_with_the_reference_constructor():
    (model,) = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
    assert (model.name, [ast.unparse(base) for base in model.bases]) == ("ModelNew", ["nn.Module"])
    (init,) = [node for node in model.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert ast.unparse(init.args) == f"self, {PARAMETERS}"


def test_calls_its_kernels_from_the_module():
    names = {stage_: [node.name for node in TREE.body if stage(node) == stage_] for stage_ in ("kernel", "wrapper")}
    launched = {ast.unparse(node.value) for node in ast.walk(TREE) if isinstance(node, ast.Subscript)}
    called = {ast.unparse(node.func) for node in ast.walk(TREE) if isinstance(node, ast.Call)}
    assert set(names["kernel"]) <= launched
    assert set(names["wrapper"]) <= called


@pytest.fixture(scope="module")
def numbers() -> dict[str, dict]:
    script = Path(__file__).with_name("run_model_new.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_agrees_with_the_reference_for_every_shape_scale_and_dtype(numbers):
    assert len(numbers) == 3 * 3 * 4 * 2
    for case, row in numbers.items():
        tolerance = 1e-2 if "bfloat16" in case else 1e-4
        assert row["error"] <= 2 * row["eager"] + tolerance / 10, (case, row)
        assert row["same_shape"], case
        assert row["dtype"] in case


def test_passes_nan_on_and_makes_none_but_for_a_scale_of_zero(numbers):
    for case, row in numbers.items():
        assert row["same_nan"], case
        assert row["nans"] > 0, case


def test_refuses_an_infinite_scale():
    pytest.importorskip("triton")
    clamp_bounds = runpy.run_path(str(EXAMPLES / "model_new.py"))["clamp_bounds"]
    with pytest.raises(ValueError, match="finite"):
        clamp_bounds(float("inf"))
    with pytest.raises(ValueError, match="finite in float32, got 1e"):
        clamp_bounds(1e39)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("dtype", "block"), [("fp32", 4096), ("bf16", 8192)])
@pytest.mark.parametrize(
    ("channels_last", "channels", "width"), [(True, 64, 64), (True, 48, 16), (False, 64, 4096), (False, 64, 32)]
)
@pytest.mark.parametrize("odd", [True, False])
def test_every_access_to_the_output_is_16_bytes_wide(capability, dtype, block, channels_last, channels, width, odd):
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = runpy.run_path(str(EXAMPLES / "model_new.py"))["shift_clamp_kernel"]
    types = dict.fromkeys(kernel.arg_names, "constexpr")
    types |= {"y_ptr": f"*{dtype}", "conv_bias_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}"}
    types |= {"numel": "i32", "units": "i32", "lo": "fp32", "hi": "fp32"}
    constants = {"CHANNELS": channels, "CHANNELS_LAST": channels_last, "WIDTH": width, "BLOCK": block}
    if channels_last and channels == width:  # triton makes a constant of an argument that is 1
        types["units"], constants["units"] = "constexpr", 1
    aligned = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        kernel, types, constants, {(index,): aligned for index in range(3 if odd else 4)}
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})

    # Each twice: without a mask, and with the mask of the last block, which is wide only where 16 divides numel.
    wide = 4 if odd else 8
    assert binary.asm["ptx"].count("st.global.v4.b32") == wide
    assert binary.asm["ptx"].count("ld.global.v4.b32") >= wide


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [31, 64])
@torch.no_grad()
def test_agrees_with_the_reference_on_a_gpu(dtype, memory_format, size):
    reference = runpy.run_path(str(EXAMPLES / "kernelbench.py"))["Model"](64, 64, 3, 2, 1, 1, (64, 1, 1), 2.0)
    ours = runpy.run_path(str(EXAMPLES / "model_new.py"))["ModelNew"](64, 64, 3, 2, 1, 1, (64, 1, 1), 2.0)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(8, 64, size, size, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)

    eager, result = reference.to("cuda", dtype)(x), ours.to("cuda", dtype)(x)
    expected = reference.double()(x.double())
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-4
    assert (result - expected).square().mean() ** 0.5 <= 2 * (eager - expected).square().mean() ** 0.5 + tolerance / 10

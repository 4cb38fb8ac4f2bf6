"""examples/model_new.py: the form that its document demands, numbers, and what the compiler makes of the kernels."""

import ast
import copy
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

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


def check(case: str, row: dict) -> None:
    tolerance = 1e-2 if "float16" in case else 1e-4
    assert row["error"] <= 2 * row["eager"] + tolerance / 10, (case, row)
    assert row["same_shape"], case
    assert row["dtype"] in case
    assert row["same_nan"], case
    assert row["nans"] > 0, case


def test_agrees_with_the_reference_for_every_shape_scale_and_dtype(numbers):
    rows = numbers["scales"]
    assert len(rows) == 3 * 3 * 4 * 2 * 2
    for case, row in rows.items():
        check(case, row)
        # 3 times 5 input and output channels are too few.
        assert len(row["launches"]) == ("16 channels" in case and "marched" in case), case


def test_marches_for_every_kernel_layout_and_dtype(numbers):
    rows = numbers["marches"]
    assert len(rows) == 15 * 2 * 3
    for case, row in rows.items():
        check(case, row)
        fits = not case.startswith(("wide", "large"))
        assert len(row["launches"]) == fits, case
        assert row["same_format"] or not fits, case
    assert {tuple(row["launches"][0]) for case, row in rows.items() if "segments" in case} == {(5,)}


@pytest.fixture
def module() -> ModuleType:
    pytest.importorskip("triton")
    from tests.examples.run_model_new import load

    return load()


def test_packs_the_weight_again_when_it_is_another_or_was_written_to(module):
    model = module.ModelNew(3, 5, 3, 2, 1, 1, (5, 1, 1), 2.0)
    other = module.ModelNew(3, 5, 3, 2, 1, 1, (5, 1, 1), 2.0)
    weight = model.conv_transpose.weight

    def packed() -> torch.Tensor:
        result = model.packed_weight(16, 16)
        assert torch.equal(result, module.pack(model.conv_transpose.weight, 16, 16))
        return result

    first = packed()
    assert first.shape == (9, 16, 16)
    assert torch.equal(first[5, :5, :3], weight[:, :, 1, 2].T)
    assert packed() is first
    assert model.packed_weight(32, 16).shape == (9, 32, 16)
    for change in (
        lambda: weight.mul_(2),
        lambda: model.load_state_dict(other.state_dict()),
        lambda: setattr(weight, "data", torch.randn_like(weight)),
        lambda: setattr(model.conv_transpose, "weight", torch.nn.Parameter(torch.randn_like(weight))),
        lambda: model.to(torch.bfloat16),
    ):
        before = packed()
        with torch.no_grad():
            change()
        assert packed() is not before
    assert list(model.state_dict()) == ["bias", "conv_transpose.weight", "conv_transpose.bias"]
    with torch.inference_mode():
        packed()
    model = copy.deepcopy(model)
    packed()
    with torch.inference_mode():
        model = module.ModelNew(3, 5, 3, 2, 1, 1, (5, 1, 1), 2.0)
        assert packed() is not packed()


def test_leaves_to_the_convolution_what_the_march_does_not_take(module, monkeypatch):
    def takes(*arguments, shape=(2, 16, 5, 7), x=torch.float32, weight=torch.float32, bias=16) -> bool:
        model = module.ModelNew(*(arguments or (16, 16, 3, 2, 1, 1)), (bias, 1, 1), 2.0).to(weight)
        return module.march_takes(torch.empty(shape, dtype=x), model.conv_transpose, model.bias)

    assert not takes()  # a CPU has no shared memory
    with mock.patch.object(module, "shared_memory_limit", return_value=99 * 1024):
        assert takes()
        assert takes(x=torch.bfloat16, weight=torch.bfloat16)
        assert not takes(x=torch.float64, weight=torch.float64)
        assert not takes(x=torch.bfloat16)
        assert not takes(bias=1)
        assert not takes(shape=(16, 5, 7))
        assert not takes(shape=(16,))
        assert not takes(shape=(2, 15, 5, 7))
        assert not takes(shape=(0, 16, 5, 7))
        assert not takes(16, 16, 2, 2, 2, 0, shape=(2, 16, 2, 2))  # no output
        assert not takes(16, 16, 3, 1, 1, 1)  # as much output_padding as stride
        assert not takes(4, 4, 3, 2, 1, 1, shape=(2, 4, 5, 7), bias=4)
        assert not takes(16, 16, (1, 3), (1, 2), (0, 1), (0, 1))
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes()
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert not takes()
        assert takes(x=torch.float16, weight=torch.float16)


def test_marches_with_gradients_on_as_well_and_has_none(module):
    model, x = module.ModelNew(16, 16, 3, 2, 1, 1, (16, 1, 1), 2.0), torch.randn(1, 16, 3, 3, requires_grad=True)
    marched = []
    with (
        mock.patch.object(module, "shared_memory_limit", return_value=99 * 1024),
        mock.patch.object(module, "row_march", lambda *args: marched.append(args) or torch.zeros(1)),
    ):
        result = model(x)
    assert len(marched) == 1 and not result.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        result.sum().backward()


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


@pytest.mark.parametrize("chip", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_march_compiles_without_spills_for_the_document_s_shape(module, chip, dtype, memory_format):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.kernels.compiling import CHIPS, Launch, compile_launch

    limit = CHIPS[chip].shared_limit
    model = module.ModelNew(64, 64, 3, 2, 1, 1, (64, 1, 1), 2.0).to(dtype)
    kernel = module.row_march_kernel
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        mock.patch.object(module, "shared_memory_limit", return_value=limit),
        mock.patch.object(module, "row_march_kernel", mock.MagicMock()) as recorder,
    ):
        x = torch.empty((128, 64, 128, 128), dtype=dtype, device="cuda", memory_format=memory_format)
        last = memory_format == torch.channels_last
        blocks = module.choose_blocks(x, model.conv_transpose, last)
        packed = torch.empty(9 * 64 * 64, dtype=dtype, device="cuda")
        module.row_march(x, model.conv_transpose, packed, model.bias, 0.0, 0.5, last, *blocks)
        ((launched,), (grid,)) = recorder.__getitem__.return_value.call_args_list, recorder.__getitem__.call_args.args
    options = {"num_warps": launched.kwargs.pop("num_warps")}
    arguments = dict(zip(kernel.arg_names, launched.args, strict=False)) | launched.kwargs
    compiled = compile_launch(Launch(kernel, grid, arguments, options), CHIPS[chip])

    assert compiled.spills == 0
    assert compiled.shared <= limit
    assert set(compiled.stores) == {128}
    assert ("HGMMA" if chip == "sm_90" else "HMMA") in compiled.assembly


# Kernel, stride, padding, output padding, input channels: the last has too many for shared memory.
SHAPES = [(3, 2, 1, 1, 64), (2, 2, 0, 0, 64), (4, 2, 1, 0, 32), (3, 1, 1, 0, 20), (3, 2, 1, 1, 512)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [31, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_agrees_with_the_reference_on_a_gpu(dtype, memory_format, size, shape):
    from fusion_backend.kernels.tf32 import round_to_tf32

    *sizes, C_in = shape
    arguments = (C_in, 64, *sizes, (64, 1, 1), 2.0)
    reference = runpy.run_path(str(EXAMPLES / "kernelbench.py"))["Model"](*arguments)
    ours = runpy.run_path(str(EXAMPLES / "model_new.py"))["ModelNew"](*arguments)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(8, C_in, size, size, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
    x[1, 2, 3, 4] = float("nan")

    eager, result = reference.to("cuda", dtype)(x), ours.to("cuda", dtype)(x)
    expected = reference.double()(x.double())
    rounded = eager
    if dtype == torch.float32:  # cuDNN has no TF32 for some shapes
        reference.conv_transpose.weight.copy_(round_to_tf32(ours.conv_transpose.weight))
        rounded = reference(round_to_tf32(x).double())

    def rmse(y: torch.Tensor) -> float:
        return (y - expected).nan_to_num().square().mean().sqrt().item()

    tolerance = 1e-4 if dtype is torch.float32 else 1e-2
    assert rmse(result) <= 2 * max(rmse(eager), rmse(rounded)) + tolerance / 10
    if torch.cuda.get_device_capability()[0] in (8, 9, 12):
        marched = ours.packed is not None
        assert marched == (C_in < 512)
        if marched:
            assert torch.equal(result.isnan(), expected.isnan())
            assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize(
    ("dtype", "last"), list(itertools.product([torch.float32, torch.bfloat16], [False, True])), ids=str
)
@torch.no_grad()
def test_marches_as_it_convolves_past_2_to_the_31_elements(dtype, last):
    module = runpy.run_path(str(EXAMPLES / "model_new.py"))
    model = module["ModelNew"](16, 16, 3, 2, 1, 1, (16, 1, 1), 2.0).to("cuda", dtype)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("too little memory")
    x = torch.randn((132, 16, 512, 512), device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y = model(x)
    assert y.numel() >= 2**31
    for image in (0, 131):
        # A batch of one is marched with offsets of 32 bits.
        torch.testing.assert_close(y[image], model(x[image : image + 1])[0])

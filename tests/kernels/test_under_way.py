"""The reader of PTX that looks for registers written too early, on PTX of a few lines."""

from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels import test_compile_conv_transpose, test_compile_row_march
from tests.kernels.compiling import CHIPS, compile_launch
from tests.kernels.convolutions import PUBLIC
from tests.kernels.under_way import overwritten

PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, %rd1, 1, 1, 1;"
COMMIT = "wgmma.commit_group.sync.aligned;"
LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r9];"


def waited(pending: int) -> str:
    return f"wgmma.wait_group.sync.aligned {pending};"


def kernel(*lines: str) -> str:
    """A loop of these lines."""
    body = ["$L__BB0_2:", *lines, "@%p1 bra \t$L__BB0_2;", "// %bb.3:", waited(0), "mov.b32 %r1, 0;", "ret;"]
    return "\n".join([".visible .entry kernel(", "\t.param .u64 kernel_param_0", ")", "{", *body, "}"])


def test_what_is_waited_for_may_be_written() -> None:
    assert not overwritten(kernel(LOAD, PRODUCT, COMMIT, waited(0)))
    assert not overwritten(kernel(waited(0), LOAD, PRODUCT, COMMIT))


def test_what_the_next_step_writes_before_it_waits() -> None:
    assert overwritten(kernel(LOAD, PRODUCT, COMMIT)) == [LOAD.rstrip(";")]
    assert overwritten(kernel(LOAD, waited(0), PRODUCT, COMMIT)) == [LOAD.rstrip(";")]
    assert overwritten(kernel(LOAD, PRODUCT, COMMIT, waited(1))) == [LOAD.rstrip(";")]


def test_a_group_behind_another_may_stay() -> None:
    other = PRODUCT.replace("%r1,%r2,%r3,%r4", "%r5,%r6,%r7,%r8")
    assert not overwritten(kernel(LOAD, PRODUCT, COMMIT, other, COMMIT, waited(1)))
    assert overwritten(kernel(LOAD, other, COMMIT, PRODUCT, COMMIT, waited(1))) == [LOAD.rstrip(";")]


def test_what_is_not_committed_is_under_way_too() -> None:
    assert LOAD.rstrip(";") in overwritten(kernel(LOAD, PRODUCT, waited(0)))


@pytest.mark.parametrize("write", ["mov.b32 %r3, %r7;", "@%p2 add.s32 %r3, %r3, 1;", "mov.b64 {%r2, %r3}, %rd7;"])
def test_every_way_to_write(write: str) -> None:
    found = overwritten(kernel(LOAD, PRODUCT, COMMIT, write, waited(0)))
    assert found == [write.removeprefix("@%p2 ").rstrip(";")]


@pytest.mark.parametrize("read", ["st.shared.b32 [%r3], %r3;", "mov.b32 %r7, %r3;", "st.global.v2.b32 [%rd3], {%r1};"])
def test_reading_does_no_harm(read: str) -> None:
    assert not overwritten(kernel(LOAD, PRODUCT, COMMIT, read, waited(0)))


def test_only_what_a_path_reaches() -> None:
    around = ("@%p2 bra $L__BB0_9;", PRODUCT, COMMIT, "bra.uni $L__BB0_8;", "$L__BB0_9:")
    assert not overwritten(kernel(*around, LOAD, "$L__BB0_8:", waited(0)))
    assert overwritten(kernel(*around, "$L__BB0_8:", LOAD, waited(0))) == [LOAD.rstrip(";")]


def test_an_operand_in_shared_memory_is_in_no_registers() -> None:
    assert not overwritten(kernel(LOAD, PRODUCT.replace("{%r1,%r2,%r3,%r4}", "%rd2"), COMMIT))


def test_a_table_of_branches_block_by_block() -> None:
    """As LLVM writes it, a label a line."""
    table = ("$L_brx_0: .branchtargets", "\t$L__BB0_8,", "\t$L__BB0_9;", "brx.idx \t%r5, $L_brx_0;")
    blocks = ("$L__BB0_8:", LOAD, "bra.uni $L__BB0_7;", "$L__BB0_9:", "mov.b32 %r7, 0;", "$L__BB0_7:")
    assert not overwritten(kernel(*table, *blocks, PRODUCT, COMMIT, waited(0)))
    assert overwritten(kernel(PRODUCT, COMMIT, *table, *blocks, waited(0))) == [LOAD.rstrip(";")]


def test_what_stands_beside_a_brace() -> None:
    assert overwritten(kernel(LOAD, PRODUCT, COMMIT, "{ mov.b32 %r1, 0; }", waited(0))) == ["mov.b32 %r1, 0"]


def test_a_label_that_several_blocks_have() -> None:
    waiting = ("{", "waitLoop:", "@!%p3 bra waitLoop;", "}")
    assert not overwritten(kernel(*waiting, LOAD, *waiting, PRODUCT, COMMIT, *waiting, waited(0)))


def test_a_product_that_no_path_reaches_is_no_good_sign() -> None:
    with pytest.raises(AssertionError, match="on no path"):
        overwritten(kernel("ret;", PRODUCT))


@pytest.mark.parametrize("module", [test_compile_conv_transpose, test_compile_row_march], ids=["general", "march"])
def test_kernels_that_do_not_wait_are_found(module: ModuleType) -> None:
    """That is what the pipeliner of the triton that is installed makes of them: if it no longer does, nor need they."""
    launch, _ = module.launch_of(PUBLIC["seed"], torch.float32, True, True, "sm_90")
    assert launch.arguments["WAITS"]
    compile_launch(launch, CHIPS["sm_90"])
    launch.arguments["WAITS"] = False
    with pytest.raises(AssertionError, match="products still read"):
        compile_launch(launch, CHIPS["sm_90"])

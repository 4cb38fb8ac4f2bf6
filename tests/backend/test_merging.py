"""The measurements of one convolution in several files: what becomes of them in the one that ``auto`` chooses by."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence as benchmark
from benchmarks.evidence import compact, merged
from fusion_backend import evidence

MARCH, GENERAL, PRODUCT = "march 64x64, 4 warps, 3 stages", "128x64x128, 4 warps, 3 stages", "product 256x128"


def row(times: dict[str, float], case: str = "a case", **changes: Any) -> dict[str, Any]:
    """Of a result, with times in milliseconds."""
    described = {
        "case": case,
        "x": [64, 256, 16, 16],
        "y": [64, 128, 32, 32],
        "kernel_stride_padding": [4, 2, 1, 0],
        "dtype": "bfloat16",
        "memory_format": "channels_last",
    }
    return described | {"contenders": {name: {"ms": ms} for name, ms in times.items()}} | changes


def merging(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    compacted = [compact(each) for each in rows]
    return merged([each for each in compacted if each is not None])


def test_one_row_is_what_it_was() -> None:
    (only,) = merging(row({GENERAL: 2.0, MARCH: 1.0, "eager": 5.0, "inductor": 4.0}))
    assert list(only["plans"].items()) == [(MARCH, 1.0), (GENERAL, 2.0)] and only["peer"] == 4.0
    assert (only["case"], only["C_out"]) == ("a case", 128) and "peers" not in only


def test_plans_of_a_later_run_keep_their_ratio_to_its_peer() -> None:
    """There everything took twice as long."""
    first = row({GENERAL: 2.0, MARCH: 1.0, "eager": 5.0, "inductor": 4.0})
    later = row({PRODUCT: 1.5, GENERAL: 4.4, "eager": 10.0, "inductor": 8.0})
    (only,) = merging(first, later)
    assert list(only["plans"].items()) == [(PRODUCT, 0.75), (MARCH, 1.0), (GENERAL, 2.2)]
    assert only["peer"] == 4.0


def test_a_third_run_is_merged_as_the_second() -> None:
    first, second = row({MARCH: 1.0, "inductor": 4.0}), row({GENERAL: 4.0, "inductor": 8.0})
    (only,) = merging(first, second, row({PRODUCT: 0.2, GENERAL: 0.3, "inductor": 1.0}))
    assert only["plans"] == {PRODUCT: 0.8, MARCH: 1.0, GENERAL: 1.2}


def test_the_unit_is_a_peer_of_both_runs() -> None:
    """Max-autotune was measured in one of them alone, and would make ours too fast, or too slow."""
    with_autotune = row({MARCH: 1.0, "inductor": 4.0, "inductor max-autotune": 2.0})
    without = row({PRODUCT: 3.0, "inductor": 8.0})
    (only,) = merging(with_autotune, without)
    assert (only["plans"], only["peer"]) == ({MARCH: 1.0, PRODUCT: 1.5}, 2.0)
    (only,) = merging(without, with_autotune)
    assert (only["plans"], only["peer"]) == ({MARCH: 2.0, PRODUCT: 3.0}, 4.0)


def test_the_unit_is_the_fastest_of_the_first_run() -> None:
    first = row({MARCH: 1.0, "eager": 5.0, "inductor": 4.0})
    (only,) = merging(first, row({PRODUCT: 1.0, "eager": 3.0, "inductor": 8.0}))
    assert (only["plans"], only["peer"]) == ({PRODUCT: 0.5, MARCH: 1.0}, 4.0)


def test_what_a_call_takes_beside_its_plan_is_that_of_its_own_run() -> None:
    """Before it is scaled: 0.5 ms of 1 and 2."""
    first = row({MARCH: 1.0, "inductor": 4.0})
    later = row({PRODUCT: 1.0, GENERAL: 2.0, "fused_post": 2.5, "inductor": 8.0})
    later["contenders"]["fused_post"]["plan"] = GENERAL
    (only,) = merging(first, later)
    assert only["plans"] == {PRODUCT: 0.75, MARCH: 1.0, GENERAL: 1.25}


@pytest.mark.parametrize(
    "changes",
    [
        {"x": [32, 256, 16, 16]},
        {"y": [64, 64, 32, 32]},
        {"kernel_stride_padding": [4, 2, 1, 1]},
        {"dtype": "float32"},
        {"memory_format": "contiguous"},
    ],
    ids=str,
)
def test_other_convolutions_stay_apart(changes: dict[str, Any]) -> None:
    one, other = {MARCH: 1.0, "inductor": 4.0}, {PRODUCT: 1.0, "inductor": 8.0}
    assert [each["peer"] for each in merging(row(one), row(other, **changes))] == [4.0, 8.0]


def test_the_same_convolution_by_another_name_is_one() -> None:
    found = merging(row({MARCH: 1.0, "inductor": 4.0}), row({PRODUCT: 1.0, "inductor": 4.0}, "another"))
    assert [each["case"] for each in found] == ["a case"]


def test_a_run_without_inductor_adds_nothing() -> None:
    (only,) = merging(row({MARCH: 1.0, "inductor": 4.0}), row({PRODUCT: 1.0, "eager": 4.0}))
    assert only["plans"] == {MARCH: 1.0}


def test_files_are_merged_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"gpu": "a GPU", "versions": {}, "date": "", "commit": "", "copy_gb_per_s": 1000}
    files = (
        [row({GENERAL: 2.0, "inductor": 4.0}), row({GENERAL: 2.0, "inductor": 4.0}, dtype="float32")],
        [row({PRODUCT: 1.0, "inductor": 5.0})],
    )
    for i, rows in enumerate(files):
        (tmp_path / f"{i}.json").write_text(json.dumps(run | {"command": f"run {i}", "rows": rows}))
    monkeypatch.setattr(evidence, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr("sys.argv", ["evidence", str(tmp_path / "0.json"), str(tmp_path / "1.json")])
    assert benchmark.main() == 0
    assert "2 cases, each predicted from the others" in capsys.readouterr().out
    written = json.loads(evidence.file_of("a GPU").read_text())
    assert [each["command"] for each in written["runs"]] == ["run 0", "run 1"]
    assert [each["plans"] for each in written["cases"]] == [{PRODUCT: 0.8, GENERAL: 2.0}, {GENERAL: 2.0}]

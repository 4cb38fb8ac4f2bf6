"""The benchmark of whole models: what it measures, what it refuses to, and the way from its command to its data."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile

from benchmarks import models, rows, tables
from benchmarks.whole import Entry, RoundedToTF32, Row, end_compilers, in_order, main, parts, relative

ROOT = Path(__file__).parents[2]


class Spoiled(nn.Module):
    """A contender of the wrong value, or of the right one too late."""

    def __init__(self, model: nn.Module, error: float = 0.0, seconds: float = 0.0) -> None:
        super().__init__()
        self.model, self.error, self.seconds = model, error, seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.model(x) + self.error


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Row:
    torch._dynamo.reset()
    row = Row(Entry("benchmarks.kernelbench", "2"), torch.float32, "cpu")
    spoiled = {"eager": row.model, "wrong": Spoiled(row.model, error=0.01), "late": Spoiled(row.model, seconds=10.0)}
    monkeypatch.setattr(row, "contender", spoiled.__getitem__)
    return row


@torch.no_grad()
def test_a_wrong_and_a_late_contender_are_not_timed(row: Row) -> None:
    row.prepare(("wrong", "eager"), until=math.inf)
    row.prepare(("late",), until=0.0)
    columns = row.measure(seconds=0.01)["contenders"]
    assert "ms" in columns["eager"] and columns["eager"]["speed"] == 1.0
    assert columns["wrong"]["error"] > 1e-3 and not columns["wrong"]["in_rule"] and "ms" not in columns["wrong"]
    assert columns["late"] == {"raised": "TimeoutError: the row's time for preparing is spent"}


@config.patch(compile_threads=2)
def test_compilers_end_before_what_is_queued() -> None:
    end_compilers()
    for _ in range(8):
        AsyncCompile.process_pool().submit(functools.partial(time.sleep, 10.0))
    time.sleep(5.0)  # until the first have begun
    begun = time.monotonic()
    end_compilers()
    assert time.monotonic() - begun < 3.0


@torch.no_grad()
def test_an_element_in_the_middle_of_the_batch_is_checked_too(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return row.model(x) + torch.arange(len(x)).eq(len(x) // 2).view(-1, 1, 1, 1)

    row.inputs = (torch.randn(24, *row.inputs[0].shape[1:]),)
    monkeypatch.setattr(row, "contender", lambda name: Middle())
    row.prepare(("middle",), until=math.inf)
    assert row.columns["middle"]["error"] < 1e-6 and not row.correct


@torch.no_grad()
def test_tf32_is_the_measure_of_what_may_take_it(row: Row) -> None:
    exact = row.in_float64()
    with RoundedToTF32():
        rounded = row.in_float64()
    assert 2e-5 < relative(zip(rounded, exact, strict=True)) < 1e-3


def test_parts_are_as_few_as_processes_and_memory_allow() -> None:
    todo = [(Entry("", str(i)), torch.float32) for i in range(5)]
    assert [len(part) for part in parts(todo, 5, {}, 1.0)] == [5]
    assert [len(part) for part in parts(todo, 2, {}, 1.0)] == [2, 2, 1]
    sizes = {str(i): 10 * i for i in range(5)}
    divided = parts(todo, 5, sizes, 200.0)
    assert [[key[0].name for key in part] for part in divided] == [["4", "2", "0"], ["3", "1"]]


def test_what_takes_longest_comes_last() -> None:
    given = ("inductor max-autotune", "fused_post", "eager")
    assert in_order(given) == ("eager", "fused_post", "inductor max-autotune")


def test_what_is_left_out_and_what_raised_is_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {"monai_unet": ModuleNotFoundError("No module named 'monai'"), "dac_decoder": MemoryError("too large")}
    out = tmp_path / "models.json"
    monkeypatch.setattr(rows, "measured", lambda todo, *_: ((key, outcomes[key[0].name]) for (key,) in todo))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["models", "--cpu", "--rows", ",".join(outcomes), "--out", str(out)])
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    main("benchmarks.models", "", models.BUILDS)
    data = json.loads(out.read_text())
    assert data["left_out"] == {"monai_unet": "No module named 'monai'"}
    (row,) = data["rows"]
    assert row["case"] == "dac_decoder" and row["contenders"] == {"row": {"raised": "MemoryError: too large"}}


def test_the_command_measures_and_writes_a_row(tmp_path: Path) -> None:
    out = tmp_path / "kernelbench.json"
    command = f"-m benchmarks.kernelbench --cpu --rows 16 --contenders eager,fused_post --seconds 0.01 --out {out}"
    subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"] == "16" and len(row["sites"]) == 1
    assert {name for name, column in row["contenders"].items() if "ms" in column} == {"eager", "fused_post"}


def test_a_table_of_whole_models_has_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = {
        "eager": {"error": 1e-7, "ms": 3.0, "wall_ms": 4.0},
        "inductor": {"error": 1e-7, "ms": 2.0, "wall_ms": 3.0},
        "fused_post": {"error": 1e-7, "ms": 1.0, "wall_ms": 2.0},
        "inductor max-autotune": {"raised": "TimeoutError: too late"},
    }
    row = {"case": "20", "dtype": "float32", "sites": [{"kernel": "fused"}, {"kernel": None}], "contenders": contenders}
    wrong = row | {"case": "3", "contenders": contenders | {"fused_post": {"error": 1.0}}}
    lost = row | {"case": "5", "sites": [], "contenders": {"row": {"raised": "MemoryError: too large"}}}
    monkeypatch.setattr(tables, "load", lambda name: [row, lost, wrong])
    before, *table, after = tables.written("<!-- kernelbench -->\n<!-- kernelbench -->").splitlines()
    assert before == after and table[2:] == [
        "| 3 | fp32 | 1 of 2 | 3.000 | 2.000 | - | - | - | - |",
        "| 5 | fp32 | 0 of 0 | - | - | - | - | - | - |",
        "| 20 | fp32 | 1 of 2 | 3.000 | 2.000 | - | 1.000 | 2.00x | 1.50x |",
        "| geometric mean |  |  |  |  |  |  | 2.00x | 1.50x |",
    ]

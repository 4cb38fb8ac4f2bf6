"""The rule that picks a configuration, without triton and without a GPU."""

import itertools
from dataclasses import replace

import pytest
import torch

from fusion_backend.kernels.phases import Axis
from fusion_backend.kernels.problem import SMALLEST_EDGE, Problem
from fusion_backend.kernels.tiling import (
    CHANNEL_CONFIGS,
    DOT_CONFIGS,
    ENOUGH_PROGRAMS,
    EXACT_CONFIGS,
    Config,
    choose_tiling,
    tiling_for,
    tilings,
)

KIB = 1024
POINT, K3S2, K2S2 = Axis(), Axis(3, 2, 1, 1), Axis(2, 2)


def problem(**changes: object) -> Problem:
    seed = Problem(
        axes=(POINT, K3S2, K3S2),
        C_in=64,
        C_out=64,
        groups=1,
        positions=128 * 128 * 128,
        dtype=torch.bfloat16,
        x_last=True,
        out_last=True,
        tf32=False,
        exact=False,
        shared_limit=227 * KIB,
    )
    return replace(seed, **changes)


# Enough of everything: edges of one and below 16, sizes that no power of two divides, sizes above any tile.
EVERYTHING = [
    problem(
        axes=axes,
        C_in=C_in,
        C_out=C_out,
        groups=groups,
        positions=positions,
        dtype=dtype,
        x_last=x_last,
        out_last=out_last,
        exact=exact and dtype == torch.float32,
        shared_limit=limit,
    )
    for axes, (C_in, C_out, groups), (dtype, exact), x_last, out_last, (positions, limit) in itertools.product(
        [
            (POINT, POINT, Axis(16, 8, 4)),
            (POINT, POINT, Axis(16, 16)),
            (POINT, K3S2, K3S2),
            (POINT, K2S2, K2S2),
            (K3S2, K3S2, K3S2),
            (K2S2, K2S2, K2S2),
            (Axis(3, 3), Axis(3, 3), Axis(3, 3)),
            (POINT, Axis(4, 2, 1), Axis(7, 5, 2)),
            (POINT, Axis(1, 64), Axis(1, 64)),
        ],
        [
            (1, 1, 1),
            (1, 1, 512),
            (3, 5, 1),
            (1, 3, 7),
            (5, 17, 2),
            (40, 40, 1),
            (96, 80, 1),
            (300, 33, 1),
            (512, 1024, 1),
        ],
        [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
        [False, True],
        [False, True],
        [(1, 64 * KIB), (10**5, 99 * KIB), (2**33, 227 * KIB)],
    )
]


def test_every_problem_has_a_tiling_that_fits() -> None:
    for each in EVERYTHING:
        assert choose_tiling(each) in tilings(each), each
        before = replace(each, prologue=True)
        assert choose_tiling(before) in tilings(before), before


def test_columns_are_phases_times_channels_and_none_is_without_use() -> None:
    for each in EVERYTHING:
        for tiling in tilings(each):
            phases = tiling.joined * tiling.shared[0] * tiling.shared[1] * tiling.shared[2]
            assert tiling.config.columns == phases * tiling.block_c
            if each.dot:
                assert tiling.config.columns // tiling.joined >= SMALLEST_EDGE
                assert tiling.block_k >= SMALLEST_EDGE
            if each.out_last:
                assert tiling.joined == 1
            sharing = [axis.sharing for axis in each.axes]
            assert all(together <= most for together, most in zip(tiling.shared, sharing, strict=True))


def test_operands_fit_into_the_shared_memory() -> None:
    for each in EVERYTHING:
        for tiling in tilings(each):
            edges = tiling.config.rows + tiling.config.columns // tiling.joined
            bytes_a_step = edges * tiling.block_k * each.dtype.itemsize if each.dot else 0
            assert bytes_a_step * tiling.config.num_stages <= each.shared_limit


def test_configurations_go_from_much_work_to_little() -> None:
    for table in (DOT_CONFIGS, EXACT_CONFIGS, CHANNEL_CONFIGS):
        columns = [config.columns for config in table]
        assert columns == sorted(columns, reverse=True)
        assert len(set(table)) == len(table)


@pytest.mark.parametrize(
    ("changes", "config", "joined", "shared", "block_c"),
    [
        # The seed, channels_last: a phase a program.
        ({}, Config(128, 64, 128, 4, 3), 1, (1, 1, 1), 64),
        # Contiguous: both column phases, an accumulator each.
        ({"x_last": False, "out_last": False}, Config(64, 128, 128, 4, 3), 2, (1, 1, 1), 64),
        # kernel == stride: all phases in one product.
        ({"axes": (POINT, K2S2, K2S2)}, Config(128, 256, 128, 8, 4), 1, (1, 2, 2), 64),
        ({"axes": (POINT, K2S2, K2S2), "shared_limit": 99 * KIB}, Config(128, 128, 128, 8, 3), 1, (1, 1, 2), 64),
        # Half of the eight phases share their inputs; the store takes all eight.
        ({"axes": (POINT, POINT, Axis(16, 8, 4)), "out_last": False}, Config(64, 128, 128, 4, 3), 2, (1, 1, 4), 16),
        # Depthwise.
        ({"C_in": 1, "C_out": 1, "groups": 64}, Config(32, 64, 0, 4, 1), 1, (1, 1, 1), 64),
    ],
)
def test_what_the_rule_picks(
    changes: dict[str, object], config: Config, joined: int, shared: tuple[int, int, int], block_c: int
) -> None:
    tiling = choose_tiling(problem(**changes))
    assert (tiling.config, tiling.joined, tiling.shared, tiling.block_c) == (config, joined, shared, block_c)


def test_small_problems_get_small_tiles() -> None:
    programs = [choose_tiling(problem(C_out=512, positions=2**e)) for e in range(0, 21, 4)]
    sizes = [tiling.config.rows * tiling.config.columns for tiling in programs]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert programs[-1].programs >= ENOUGH_PROGRAMS


def test_fp32_keeps_registers_free_for_x() -> None:
    wide = DOT_CONFIGS[0]
    assert tiling_for(problem(axes=(POINT, K2S2, K2S2)), wide) is not None
    assert tiling_for(problem(axes=(POINT, K2S2, K2S2), dtype=torch.float32), wide) is None

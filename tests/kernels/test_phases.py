"""Phases against the definition: every input and tap says which output it adds to."""

import itertools

import pytest

from fusion_backend.kernels.phases import Axis, Phase

AXES = [
    Axis(kernel, stride, padding, output_padding, dilation)
    for kernel, stride, padding, dilation in itertools.product(range(1, 6), range(1, 7), range(4), range(1, 7))
    for output_padding in (0, max(stride, dilation) - 1)
]


def scattered(axis: Axis, size: int) -> dict[int, set[tuple[int, int]]]:
    """For each output the (tap, input) that add to it, by the definition of a transposed convolution."""
    outputs: dict[int, set[tuple[int, int]]] = {o: set() for o in range(axis.output_size(size))}
    for i, k in itertools.product(range(size), range(axis.kernel)):
        o = axis.stride * i - axis.padding + axis.dilation * k
        if o in outputs:
            outputs[o].add((k, i))
    return outputs


def gathered(axis: Axis, size: int) -> dict[int, set[tuple[int, int]]]:
    outputs = {}
    for phase in axis.phases:
        for q in range(axis.positions(phase.remainder, axis.output_size(size))):
            used = {(tap, q + offset) for tap, offset in phase.taps if 0 <= q + offset < size}
            outputs[axis.stride * q + phase.remainder] = used
    return outputs


def test_phases_cover_every_output_with_its_taps_and_inputs() -> None:
    for axis, size in itertools.product(AXES, (1, 2, 7)):
        assert gathered(axis, size) == scattered(axis, size), (axis, size)


def test_taps_are_arithmetic_progressions() -> None:
    for axis in AXES:
        for phase in axis.phases:
            for (tap, offset), (next_tap, next_offset) in itertools.pairwise(phase.taps):
                assert next_tap - tap == axis.step
                assert offset - next_offset == axis.input_step


def test_each_tap_belongs_to_one_phase() -> None:
    for axis in AXES:
        taps = sorted(tap for phase in axis.phases for tap, _ in phase.taps)
        assert taps == list(range(axis.kernel))


@pytest.mark.parametrize(
    ("axis", "phases"),
    [
        (Axis(1, 1), [((0, 0),)]),
        (Axis(3, 2, 1, 1), [((1, 0),), ((0, 1), (2, 0))]),
        (Axis(4, 2, 1), [((1, 0), (3, -1)), ((0, 1), (2, 0))]),
        (Axis(2, 2), [((0, 0),), ((1, 0),)]),
        (Axis(1, 3), [((0, 0),), (), ()]),
        (Axis(3, 2, 0, 0, 2), [((0, 0), (1, -1), (2, -2)), ()]),
        (Axis(3, 2, 1, 0, 3), [((1, -1),), ((0, 1), (2, -2))]),
    ],
    ids=str,
)
def test_phases_worked_out_by_hand(axis: Axis, phases: list[tuple[tuple[int, int], ...]]) -> None:
    assert axis.phases == tuple(Phase(remainder, taps) for remainder, taps in enumerate(phases))


def test_a_phase_beyond_the_output_has_no_positions() -> None:
    axis = Axis(kernel=1, stride=5)
    assert axis.output_size(1) == 1
    assert [axis.positions(remainder, 1) for remainder in range(5)] == [1, 0, 0, 0, 0]
    assert [axis.positions(remainder, 12) for remainder in range(5)] == [3, 3, 2, 2, 2]


def test_only_overlap_padding_and_size_move_the_input() -> None:
    for axis in AXES:
        needed = {i - o // axis.stride for o, used in scattered(axis, 5).items() for _, i in used}
        if needed - {0} or axis.output_size(5) > 5 * axis.stride:
            assert axis.moves, axis
        if not axis.moves:
            assert needed <= {0}, axis


@pytest.mark.parametrize(
    ("axis", "sharing"),
    [
        (Axis(2, 2), 2),
        (Axis(3, 3), 4),
        (Axis(4, 4, 2), 2),
        (Axis(16, 8, 4), 4),
        (Axis(8, 4, 2), 2),
        (Axis(3, 2, 1, 1), 1),
        (Axis(4, 2, 1), 1),
        (Axis(2, 2, 0, 0, 2), 1),
        (Axis(1, 1), 1),
    ],
    ids=str,
)
def test_phases_that_share_their_inputs(axis: Axis, sharing: int) -> None:
    assert axis.sharing == sharing


def test_shared_phases_use_neighbouring_taps() -> None:
    """What the kernel relies on: phase r + e uses the taps of phase r, plus e."""
    for axis in AXES:
        for phase in axis.phases:
            first = axis.phases[phase.remainder // axis.sharing * axis.sharing]
            distance = phase.remainder - first.remainder
            assert phase.taps == tuple((tap + distance, offset) for tap, offset in first.taps)

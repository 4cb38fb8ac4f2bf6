"""The text of a backward: what is in it, and what is left out."""

import pytest

pytest.importorskip("triton")

from fusion_backend.kernels.program_backward import backward_of, behind_form, of_result, with_columns_from_zero

# The program, what of it the gradient is asked for, and the program that gives it.
BACKWARDS = [
    ("tanh v0", "v0", "tanh_backward t0 v0"),
    ("gelu v0; affine v1 2.0 - - -", "v0", "affine t0 2.0 - - -; gelu_backward v1 v0"),
    ("silu v0; affine v1 2.0 c0 - -; tanh v2", "c0", "silu v0; affine v1 2.0 c0 - -; tanh_backward t0 v2"),
    ("silu v0; affine v1 c0 1.0 - -", "c0", "silu v0; mul t0 v1"),
    ("silu v0; affine v1 c0 c1 - -", "c1", ""),
    ("leaky_relu v0 c0", "c0", "affine v0 - - - 0.0; hardtanh_backward t0 v0 - 0.0; mul v2 v1"),
    ("add v0 t0", "v0", ""),
    ("add v0 t0", "t0", ""),
    ("sub v0 t0", "t0", "affine t0 -1.0 - - -"),
    ("mul v0 t0", "v0", "mul t0 t1"),
    ("mul v0 t0", "t0", "mul t0 v0"),
    ("div v0 t0", "t0", "div v0 t1; div t0 t1; mul v2 v1; affine v3 -1.0 - - -"),
    ("add v0 v0", "v0", "add t0 t0"),
    ("square v0; add v0 v1", "v0", "square_backward t0 v0; add t0 v1"),
    ("minimum v0 t0", "t0", "minimum_backward t0 t1 v0"),
    ("clamp v0 -1.0 -; hardtanh v1 0.0 6.0", "v0",
     "clamp v0 -1.0 -; hardtanh_backward t0 v1 0.0 6.0; clamp_backward v2 v0 -1.0 -"),
    ("detach v0; mul v0 v1", "v0", "detach v0; mul t0 v1"),
    ("detach v0; tanh v1", "v0", None),
    ("tanh v0; tanh v0", "v0", "tanh_backward t0 v0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value", "expected"), BACKWARDS)
def test_the_way_back(text: str, value: str, expected: str | None) -> None:
    assert backward_of(text, value) == expected


def test_what_its_result_tells() -> None:
    assert of_result("tanh v0") == "tanh_backward_of_result t0 v0"
    assert of_result("leaky_relu v0 0.2") == "leaky_relu_backward_of_result t0 v0 0.2"
    for text in ("", "gelu v0", "leaky_relu v0 0.0", "leaky_relu v0 c0", "tanh v0; affine v1 2.0 - - -", "add v0 v0"):
        assert of_result(text) is None


def test_behind_a_form_everything_moves_on() -> None:
    text = "silu v0; affine v1 c0 - - -; mul v2 t0"
    expected = "affine v0 c0 0.5 - -; silu v1; affine v2 c1 - - -; mul v3 t0"
    assert behind_form(text, "c0", 0.5, 1) == expected
    assert with_columns_from_zero("affine v0 c3 c1 - -; leaky_relu v1 c3") == (
        (1, 3), "affine v0 c1 c0 - -; leaky_relu v1 c1",
    )  # fmt: skip

"""Sizes rounded up."""


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``, which may be symbolic."""
    return (size + block - 1) // block


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()

"""Activations to test with: parameters for those that have any, and how a program names them."""

# What the tests give for parameters, once or more often.
PARAMETERS: dict[str, list[tuple[float, ...]]] = {
    "elu": [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0), (1.6732632423543772, 1.0507009873554805, 1.0)],
    "leaky_relu": [(0.2,), (0.0,), (-1.5,)],
    "softplus": [(1.0, 20.0), (2.0, 5.0), (-0.5, 3.0)],
}


def parameters_of(name: str) -> list[tuple[float, ...]]:
    return PARAMETERS.get(name, [()])


def line(name: str, parameters: tuple[float, ...]) -> str:
    """The instruction that applies it to v0."""
    return " ".join([name, "v0", *map(str, parameters)])

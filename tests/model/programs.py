"""What a traced program holds."""

from collections.abc import Iterator

from jax.extend.core import JaxprEqn, jaxprs_in_params


def equations(jaxpr, in_loop: bool = False) -> Iterator[tuple[JaxprEqn, bool]]:
    """(equation, whether it is in a loop) of a program and of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation, in_loop
        inside = in_loop or equation.primitive.name in ("scan", "while")
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, inside)

"""Programs as JAX traces them: FLOPs, to compare with those that are counted by hand, and its operations."""

import math

import jax


def traced_flops(function, *arguments):
    """FLOPs of all matrix products of a function as JAX traces it, loops times their length."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(_count(inner) for inner in _inner(equation.params))
    return total


def operations(jaxpr):
    """Every operation, those inside of others too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation.params):
            yield from operations(inner)


def _inner(params):
    """The jaxprs inside an equation."""
    values = [value for value in params.values() for value in (value if isinstance(value, tuple) else (value,))]
    closed = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in closed if hasattr(value, "eqns")]

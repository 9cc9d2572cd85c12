"""What rematerialisation makes from values that it keeps, instead of running again what gave it first."""

from collections.abc import Callable

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.interpreters import partial_eval as pe
from jaxtyping import Array


def remake(value: Array, make: Callable[..., Array], *sources: Array) -> Array:
    """Returns the value.

    A kernel that gives a value and its sources at once would run again where `jax.checkpoint` keeps the sources alone,
    as by their names: there it is make(*sources), which must be cheap, and may differ by how the sources are rounded.
    """
    return _remake.bind(value, *sources, make=make)


_remake, _made = Primitive("remake"), Primitive("made")
_remake.def_impl(lambda value, *_, make: value)
_remake.def_abstract_eval(lambda value, *_, make: value)
mlir.register_lowering(_remake, lambda ctx, value, *_, make: [value])
_made.def_impl(lambda *sources, make: make(*sources))
_made.def_abstract_eval(lambda *sources, make: jax.typeof(jax.eval_shape(make, *sources)))
mlir.register_lowering(_made, mlir.lower_fun(lambda *sources, make: make(*sources), multiple_results=False))


def _batch(primitive, args, axes, *, make):
    """Members by the first axis."""
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    lead = lambda x, axis: batching.bdim_at_front(x, axis, size)
    return primitive.bind(*map(lead, args, axes), make=jax.vmap(make)), 0


for _primitive in (_remake, _made):
    batching.primitive_batchers[_primitive] = lambda *args, p=_primitive, **params: _batch(p, *args, **params)


def _split(policy, unknown, again, equation):
    """What runs in the forward pass, and what again: `again` says what is there, or made there anyway."""
    inputs = [(x, there) for x, there in zip(equation.invars, again, strict=True)]
    if again[0] and not all(again[1:]):
        inputs = inputs[1:]
        repeated = equation.replace(primitive=_made, invars=[x for x, _ in inputs])
    else:
        repeated = equation
    kept = [x for x, there in inputs if not there]
    return (None if any(unknown) else equation), repeated, [any(unknown)], [True], kept


pe.partial_eval_jaxpr_custom_rules[_remake] = _split

"""Products of activations with weights: in which dtype they run, and how their gradients come back."""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def project(spec: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Contracts activations with a weight, in the dtype of the activations.

    The gradient of the weight is summed in float32 and returned in the weight's dtype, where automatic differentiation
    would round it to the dtype of the activations first; and it is formed in the weight's own layout, without a
    transposed copy. Rematerialisation knows the result as "products".

    Args:
      spec: einsum of two operands, activations first; every letter stands in two of the three terms.
      x: activations, any float dtype.
      weight: float32, or bfloat16.
    """
    return checkpoint_name(_project(spec, x, weight), "products")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(spec, x, weight):
    return jnp.einsum(spec, x, weight.astype(x.dtype))


def _project_fwd(spec, x, weight):
    return _project(spec, x, weight), (x, weight)


def _project_bwd(spec, saved, dy):
    x, weight = saved
    terms, out = spec.split("->")
    inputs, axes = terms.split(",")
    dx = jnp.einsum(f"{out},{axes}->{inputs}", dy, weight.astype(x.dtype))
    dw = weight_gradient(inputs, out, axes, x, dy)
    return dx, dw.astype(weight.dtype)


_project.defvjp(_project_fwd, _project_bwd)


def weight_gradient(inputs: str, out: str, axes: str, x, dy):
    """Sums over tokens. For several models at once (`jax.vmap`) tokens are one axis: of products that sum over two axes
    and have one of models XLA transposes an operand, in memory."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    form = jax.custom_batching.custom_vmap(functools.partial(product, f"{inputs},{out}->{axes}"))

    @form.def_vmap
    def of_models(size, is_mapped, *operands):
        summed = sum(letter not in axes for letter in inputs)
        pairs = zip(operands, is_mapped, strict=True)
        each = (y if mapped else jnp.broadcast_to(y, (size, *y.shape)) for y, mapped in pairs)
        rows = (y.reshape(size, -1, *y.shape[1 + summed :]) for y in each)
        return product(f"mn{inputs[summed:]},mn{out[summed:]}->m{axes}", *rows), True

    return form(x, dy)


def is_longer(x: Float[Array, "*B D"], weights: Sequence[Float[Array, "D R"]]) -> bool:
    """Whether x has more rows than the matrices have columns: then it pays to join these, so that x is read once."""
    return math.prod(x.shape[:-1]) > sum(w.shape[1] for w in weights)


def project_narrow(x: Float[Array, "B T D"], weights: Sequence[Float[Array, "D R"]]) -> list[Float[Array, "B T R"]]:
    """Contracts activations with several matrices of few columns: as one for many tokens.

    Args:
      weights: of one dtype.
    """
    if not is_longer(x, weights):
        return [project("BTD,DR->BTR", x, w) for w in weights]
    ends = list(itertools.accumulate(w.shape[1] for w in weights))
    return jnp.split(project("BTD,DR->BTR", apart(x), jnp.concatenate(weights, axis=1)), ends[:-1], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(x: Float[Array, "..."], uses: int) -> tuple[Float[Array, "..."], ...]:
    """Gives each of the projections that read x its own name for it.

    Their gradients are summed one onto the other, the new one on the left: so XLA adds every one inside the product
    that makes it, where of the sums of automatic differentiation every other one is a pass of its own.
    """
    return (x,) * uses


def _fan_out_fwd(x, uses):
    return fan_out(x, uses), None


def _fan_out_bwd(uses, saved, gradients):
    del uses, saved
    return (functools.reduce(lambda total, gradient: gradient + total, gradients),)


fan_out.defvjp(_fan_out_fwd, _fan_out_bwd)


@jax.custom_vjp
def apart(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, which XLA takes for another array: it makes small products part of large ones of the same, and copies both."""
    return jax.lax.optimization_barrier(x)


apart.defvjp(lambda x: (apart(x), None), lambda _, dx: (dx,))


@jax.custom_vjp
def each_apart(*weights: Float[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Weights that one product joins: their gradients become arrays of their own.

    Of parts of one array XLA makes one update of all these parameters, which spills registers, and copies what it then
    may not write onto.
    """
    return weights


each_apart.defvjp(lambda *weights: (weights, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))

"""Weights that lie in parts on several devices: how they are gathered, and when their gradients travel."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kimi_jax.types import PyTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_rounded(w: Float[Array, "..."], over: tuple[str, ...], dim: int, dtype: jnp.dtype) -> Float[Array, "..."]:
    """Collects the parts of a weight, inside `shard_map`.

    Args:
      w: this device's part, float32 or of `dtype`.
      over: mesh axes that cut it.
      dim: which of its dimensions they cut.
      dtype: what travels; the result has the dtype of w, whose gradients are summed without rounding.
    """
    return lax.all_gather(w.astype(dtype), over, axis=dim, tiled=True).astype(w.dtype)


gather_rounded.defvjp(
    lambda w, over, dim, dtype: (gather_rounded(w, over, dim, dtype), None),
    lambda over, dim, dtype, saved, dw: (lax.psum_scatter(dw, over, scatter_dimension=dim, tiled=True),),
)


def in_turn[T: PyTree](x: Float[Array, "..."], weights: T) -> tuple[Float[Array, "..."], T]:
    """Returns both; in the backward pass the gradient of x waits until those of the weights are where they belong.

    With the input of a block and the weights of the block behind it: while the gradients of this block are computed,
    those of the next one travel. XLA's scheduler, which does not know what kernels take, would send nearly all of them
    behind the last kernel. On one device nothing happens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return (x, weights) if mesh.empty or mesh.size == 1 else _in_turn(x, weights)


@jax.custom_vjp
def _in_turn(x, weights):
    return x, weights


_in_turn.defvjp(lambda x, weights: ((x, weights), None), lambda _, gradients: lax.optimization_barrier(gradients))

"""Token embedding and the untied output head; the embedding sets the compute dtype of all that follows."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from kimi_jax.layers.linear import apart
from kimi_jax.layers.param import normal, param
from pallas_kernels.partition import TOKEN_AXES, free_axes_of


class Embedding(nnx.Module):
    """One row per token, unscaled."""

    def __init__(self, vocab_size: int, dim: int, *, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(dtype)
        self.weight = param(normal(rngs, (vocab_size, dim), std), axes=("vocab", "embed"))

    @jax.named_scope("embed")
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(self.weight[...], tokens_BT, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(weight_AD: Float[Array, "A D"], tokens_BT: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T D"]:
    """Rows of a table; their gradients are summed in float32, whatever the table's dtype.

    As one matrix, where tokens are not cut, that XLA takes for an array of its own: to a product that adds onto it, a
    gather's result in another shape would be free to be written on, and be copied for that.
    """
    if free_axes_of(TOKEN_AXES, tokens_BT.shape[1]):
        return weight_AD[tokens_BT].astype(dtype)
    return apart(weight_AD[tokens_BT.reshape(-1)].astype(dtype)).reshape(*tokens_BT.shape, -1)


def _look_up_fwd(weight_AD, tokens_BT, dtype):
    return look_up(weight_AD, tokens_BT, dtype), (weight_AD, tokens_BT)


def _look_up_bwd(dtype, saved, d_rows):
    weight_AD, tokens_BT = saved
    total = jnp.zeros(weight_AD.shape, jnp.float32).at[tokens_BT].add(d_rows.astype(jnp.float32))
    return total.astype(weight_AD.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Head(nnx.Module):
    """Logits over the vocabulary."""

    def __init__(self, vocab_size: int, dim: int, *, std: float, rngs: nnx.Rngs):
        self.weight = param(normal(rngs, (dim, vocab_size), std), axes=("embed", "vocab"))

    @jax.named_scope("head")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T A"]:
        """Returns float32 logits; the product runs in the dtype of x."""
        weight = self.weight[...].astype(x_BTD.dtype)
        return jnp.einsum("BTD,DA->BTA", x_BTD, weight, preferred_element_type=jnp.float32)

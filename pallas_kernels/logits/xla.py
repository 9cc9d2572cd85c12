"""Logits in plain JAX, in float32, and their log-sum-exp in another pass over them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOWEST = -1e30  # finite: the difference of two of them is 0, not NaN


def logits(
    x: Float[Array, "M D"], weight: Float[Array, "D A"], targets: Int[Array, "M"]
) -> tuple[Float[Array, "M A"], Float[Array, "M"], Float[Array, "M"]]:
    """See `api.logits`."""
    values = jnp.einsum("MD,DA->MA", x, weight, preferred_element_type=jnp.float32)
    return values, log_sum_exp(values), jnp.sum(jnp.where(is_target(targets, values), values, 0.0), axis=-1)


def is_target(targets: Int[Array, "..."], values: Float[Array, "... A"]) -> Bool[Array, "... A"]:
    """Compares instead of gathering: it fuses into reductions and needs no exchange where A is cut over devices."""
    return targets[..., None] == lax.broadcasted_iota(targets.dtype, values.shape, values.ndim - 1)


def log_sum_exp(values: Float[Array, "... A"]) -> Float[Array, "..."]:
    """log(sum(exp(x))) over the last axis; on a GPU in one pass."""
    two_passes = functools.partial(jax.nn.logsumexp, axis=-1)  # XLA vectorises it on a CPU, the other one not
    return lax.platform_dependent(values, cpu=two_passes, default=log_sum_exp_in_one_pass)


def log_sum_exp_in_one_pass(values: Float[Array, "... A"]) -> Float[Array, "..."]:
    """Reads the logits once: (largest so far, sum relative to it) is merged pairwise, in any order."""

    def merge(a, b):
        peak = jnp.maximum(a[0], b[0])
        return peak, a[1] * jnp.exp(a[0] - peak) + b[1] * jnp.exp(b[0] - peak)

    empty = (jnp.float32(LOWEST), jnp.float32(0))
    peak, total = lax.reduce((values, jnp.ones_like(values)), empty, merge, (values.ndim - 1,))
    return peak + jnp.log(total)

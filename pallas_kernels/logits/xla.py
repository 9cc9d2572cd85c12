"""Logits in plain JAX, in float32; their log-sum-exp, and the gradient of their cross-entropy, in other passes."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.logits.vocabulary import log_sum_exp_of_parts, numbers_here

LOWEST = -1e30  # finite: the difference of two of them is 0, not NaN


def logits(
    x: Float[Array, "M D"], weight: Float[Array, "D A"], targets: Int[Array, "M"]
) -> tuple[Float[Array, "M A"], Float[Array, "M"], Float[Array, "M"]]:
    """See `api.logits`."""
    values = jnp.einsum("MD,DA->MA", x, weight, preferred_element_type=jnp.float32)
    return values, log_sum_exp(values), jnp.sum(jnp.where(is_target(targets, values), values, 0.0), axis=-1)


def cross_entropy_gradients(
    x: Float[Array, "M D"],
    weight: Float[Array, "D A"],
    targets: Int[Array, "M"],
    scale: Float[Array, "M"],
    *,
    z_weight: float,
    cut_over: tuple[str, ...],
) -> tuple[Float[Array, "M"], Float[Array, "M"], Float[Array, "M D"], Float[Array, "D A"]]:
    """See `api.cross_entropy_gradients`; the vocabulary is cut over axes of the mesh."""
    here = numbers_here(targets, weight.shape[1], cut_over)
    values, part, target = logits(x, weight, here)
    lse = log_sum_exp_of_parts(part, cut_over)
    slope = scale * (1 + 2 * z_weight * lse)
    d_logits = slope[:, None] * jnp.exp(values - lse[:, None])
    d_logits -= jnp.where(is_target(here, values), scale[:, None], 0.0)
    d_logits = jnp.where(scale[:, None] == 0, 0, d_logits).astype(x.dtype)  # both products run in the dtype of x
    d_x = lax.psum(jnp.einsum("MA,DA->MD", d_logits, weight, preferred_element_type=jnp.float32), cut_over)
    d_weight = jnp.einsum("MD,MA->DA", x, d_logits, preferred_element_type=jnp.float32)
    return lse, lax.psum(target, cut_over), d_x.astype(x.dtype), d_weight


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

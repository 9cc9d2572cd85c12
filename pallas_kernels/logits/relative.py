"""Gradients of the cross-entropy from exponentials of logits relative to the target's, which are never normalised.

With P = exp(logits - target) and Z its sum over a row, the gradient of the logits is scale slope / Z times P less
Z / slope at the target: one factor per row times a matrix that differs from P in one place per row. The factor moves to
the narrow sides of both products, so that no pass over the logits follows the one that made them.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.logits.vocabulary import numbers_here

HIGHEST = 80  # binary exponents end here: a logit further above its target than 55 counts as one that is 55 above
LEAST_SLOPE = 1e-6  # so that Z / slope is finite; the slope is 1 + 2 z_weight lse

type Exponentials = Callable[
    [Float[Array, "M D"], Float[Array, "D A"], Float[Array, "M"]], tuple[Float[Array, "M A"], Float[Array, "M"]]
]
"""(x, weight, reference) -> (2^min(log2(e) (x weight - reference), HIGHEST) in the dtype of x, their float32 sums)."""


def cross_entropy_gradients(
    exponentials: Exponentials,
    x: Float[Array, "M D"],
    weight: Float[Array, "D A"],
    targets: Int[Array, "M"],
    scale: Float[Array, "M"],
    z_weight: float,
    axes: tuple[str, ...],
) -> tuple[Float[Array, "M"], Float[Array, "M"], Float[Array, "M D"], Float[Array, "D A"]]:
    """See `pallas_kernels.logits.api.cross_entropy_gradients`; the vocabulary is cut over `axes`."""
    here = numbers_here(targets, weight.shape[1], axes)
    target = lax.psum(target_logits(x, weight, here), axes)
    powers, total = exponentials(x, weight, target)
    total = lax.psum(total, axes)
    lse = target + jnp.log(total)
    slope = 1 + 2 * z_weight * lse
    slope = jnp.where(jnp.abs(slope) < LEAST_SLOPE, LEAST_SLOPE, slope)
    at_target = (1 - total / slope).astype(powers.dtype)
    powers = powers.at[jnp.arange(here.size), here].set(at_target, mode="drop", unique_indices=True)
    factor = (scale * slope / total)[:, None]
    d_x = lax.psum(factor * jnp.einsum("MA,DA->MD", powers, weight, preferred_element_type=jnp.float32), axes)
    scaled = (factor * x.astype(jnp.float32)).astype(x.dtype)
    d_weight = jnp.einsum("MD,MA->DA", scaled, powers, preferred_element_type=jnp.float32)
    return lse, target, d_x.astype(x.dtype), d_weight


def target_logits(x: Float[Array, "M D"], weight: Float[Array, "D A"], targets: Int[Array, "M"]) -> Float[Array, "M"]:
    """The logit of each row's target, summed in float32; 0 for targets that are not here."""
    columns = jnp.take(_as_rows(weight), targets, axis=0, mode="fill", fill_value=0)
    return jnp.sum(x.astype(jnp.float32) * columns.view(weight.dtype).astype(jnp.float32), axis=1)


def _as_rows(weight: Float[Array, "D A"]) -> Array:
    """Columns as rows of words: 16-bit numbers XLA would gather where they are, each from a line of its own."""
    rows = weight.T
    return rows if weight.dtype.itemsize > 2 or rows.shape[1] % 2 else rows.view(jnp.uint32)
